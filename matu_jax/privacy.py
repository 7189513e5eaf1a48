"""Differential privacy of clients towards the server: clipping, Gaussian noise, and what it costs.

In every round a client clips what it has changed, over all its tasks together, to `clip_norm` C,
and adds Gaussian noise of standard deviation z C to every number; only then does it fold, and so
vectors, masks, scales, the server's similarity and all that follows are made of noisy numbers
alone. The server, and whoever sees what it sends, learns about a client's examples no more than
(epsilon, delta) says: how far its messages can differ from those of a client that has changed
nothing (client-level, zero-out adjacency; of an event that the noise hides, the sensitivity is C).
Rounds add up; nothing is gained by drawing clients at random, since the server knows whom it drew.

Not covered: numbers of examples, who holds which task, and who takes part when. Accuracies that a
run reports are of the simulation and no part of the protocol.
"""

import jax
import jax.numpy as jnp

from matu_jax.aggregation import Slots
from matu_jax.algorithms.base import per_row, row_lengths
from matu_jax.config import PrivacyConfig
from matu_jax.trees import PyTree

_SALT = 0xD1FF


def slot_keys(seed: int, salt: int, slots: Slots, round_index: jax.Array, by: str) -> jax.Array:
    """One random key per slot, from (seed, round, client, task), or without the client.

    Args:
      seed: of the run.
      salt: what the keys are for.
      slots: the slots.
      round_index: int32 scalar.
      by: "slot" or "task".
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), salt), round_index)

    def one(client, task):
        own = jax.random.fold_in(key, task)
        return jax.random.fold_in(own, client) if by == "slot" else own

    return jax.vmap(one)(slots.client, slots.task)


def gaussian(keys: jax.Array, like: PyTree) -> PyTree:
    """Standard normal numbers like a stacked tree, each row from its key: `[slots, ...]`."""
    leaves, treedef = jax.tree.flatten(like)
    drawn = []
    for number, leaf in enumerate(leaves):

        def row(key, number=number, leaf=leaf):
            return jax.random.normal(jax.random.fold_in(key, number), leaf.shape[1:], leaf.dtype)

        drawn.append(jax.lax.map(row, keys))
    return treedef.unflatten(drawn)


def privatised(
    config: PrivacyConfig, changes: PyTree, slots: Slots, round_index: jax.Array, seed: int
) -> PyTree:
    """Clips each client's changes and adds noise; leaves `[slots, ...]`.

    Args:
      config: clip_norm and noise_multiplier.
      changes: leaves `[slots, ...]`; absent slots (weight 0) do not count.
      slots: the slots.
      round_index: int32 scalar.
      seed: noise is drawn from (seed, round, client, task).
    """
    present = slots.weight > 0
    squares = jnp.where(present, jnp.square(row_lengths(changes)), 0.0)
    length = jnp.sqrt(jax.ops.segment_sum(squares, slots.client, slots.num_clients))
    factor = jnp.where(length > config.clip_norm, config.clip_norm / length, 1.0)[slots.client]
    noise = gaussian(slot_keys(seed, _SALT, slots, round_index, "slot"), changes)
    deviation = jnp.float32(config.noise_multiplier * config.clip_norm)

    def hide(x, n):
        clipped = per_row(factor, x) * x.astype(jnp.float32)
        return (clipped + deviation * n.astype(jnp.float32)).astype(x.dtype)

    return jax.tree.map(hide, changes, noise)


def epsilon(config: PrivacyConfig, releases: int) -> float:
    """Epsilon of a client after so many rounds, from dp-accounting's privacy loss distributions.

    Args:
      config: noise_multiplier and delta.
      releases: in how many rounds the client has sent something.

    Raises:
      ImportError: if dp-accounting is not installed.
    """
    from dp_accounting import dp_event, pld

    if releases == 0:
        return 0.0
    accountant = pld.PLDAccountant()
    event = dp_event.GaussianDpEvent(config.noise_multiplier)
    accountant.compose(dp_event.SelfComposedDpEvent(event, releases))
    return float(accountant.get_epsilon(config.delta))
