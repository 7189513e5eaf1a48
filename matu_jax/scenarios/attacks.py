"""Clients that lie, to measure what they can do.

A lie replaces what a slot has changed in a round (task vector less download), x, before its client
folds it; with `strength` s, 1 by default:

    sign_flip   -s x
    scaling     s x
    noise       Gaussian, s times as long as x
    constant    the same number everywhere, s times as long as x
    garbage     infinity where x is positive, not a number elsewhere

or something else that the client controls:

    label_flip  the client trains on wrong labels: class c of C becomes C - 1 - c
    masks       every bit of the upload's masks is inverted
    scales      the upload's scales are s times as large
    hidden      the upload's vector is 1e-25 times as long, its scales 1e25 s times as large: the
                same as "scales" for whoever multiplies the two, but not for whoever squares one

The last three need an algorithm whose uploads have masks and scales. A liar lies about all of its
tasks, in every round. What liars hold is evaluated like what all others hold.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from matu_jax.aggregation import Slots, Unified
from matu_jax.algorithms.means import per_row, row_lengths, weighted_mean
from matu_jax.fields import field
from matu_jax.scenarios.privacy import gaussian, slot_keys
from matu_jax.trees import PyTree


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    """Clients that lie, to find out what they can do; the module says what each kind does.

    Attributes:
      kind: "none", "sign_flip", "scaling", "noise", "constant", "label_flip", "masks", "scales",
        "hidden" or "garbage".
      share: of every task's holders at most this part lies, and as many as that allows.
      strength: how many times longer than an honest one a lie is.
      colludes: whether the liars of a task agree on one lie, made from the mean of what they
        trained.
    """

    kind: Literal[
        "none",
        "sign_flip",
        "scaling",
        "noise",
        "constant",
        "label_flip",
        "masks",
        "scales",
        "hidden",
        "garbage",
    ] = "none"
    share: float = field(0.2, at_least=0, at_most=1)
    strength: float = field(1.0, above=0)
    colludes: bool = False

    def conflicts(self, where: str) -> Iterator[str]:
        """Yields the fields that the kind of attack has no use for."""
        if self.colludes and self.kind in ("none", "label_flip", "masks", "scales", "hidden"):
            yield (
                f"{where}.colludes: found True, but of kind {self.kind!r} liars say the same "
                "anyway, or nothing; leave it False."
            )
        if self.strength != 1.0 and self.kind in ("none", "label_flip", "masks", "garbage"):
            yield (
                f"{where}.strength: found {self.strength:g}, but kind {self.kind!r} has no "
                "strength; leave it 1."
            )


OF_UPLOADS = ("masks", "scales", "hidden")


_HIDDEN = 1e-25


_SALT = 0x11A5


def liars(config: AttackConfig, slots: Slots, seed: int) -> Bool[np.ndarray, "clients"]:
    """Draws who lies: bool `[clients]`; as many as leave every task's share where it is allowed."""
    client, task = np.asarray(slots.client), np.asarray(slots.task)
    most = np.zeros(slots.num_clients, bool)
    if config.kind == "none":
        return most
    held = np.zeros((slots.num_clients, slots.num_tasks))
    np.add.at(held, (client, task), 1)
    allowed = np.floor(config.share * held.sum(axis=0) + 1e-9)
    rng = np.random.default_rng((seed, _SALT))
    for _ in range(64):  # one after the other may block who is missing; then in another order
        lies, left = np.zeros(slots.num_clients, bool), allowed.copy()
        for one in rng.permutation(slots.num_clients):
            if held[one].any() and (held[one] <= left).all():
                lies[one] = True
                left -= held[one]
        if lies[client].sum() > most[client].sum():
            most = lies
        if not left.any():
            break
    return most


def lied(
    config: AttackConfig,
    changes: PyTree[Float[Array, "slots ..."]],
    lies: Bool[Array, "slots"],
    slots: Slots,
    round_index: Int[Array | np.integer, ""] | int,
    seed: int,
) -> PyTree[Float[Array, "slots ..."]]:
    """What slots say that they have changed; leaves `[slots, ...]`.

    Args:
      config: the kind of lie.
      changes: leaves `[slots, ...]`.
      lies: bool `[slots]`.
      slots: the slots.
      round_index: int32 scalar.
      seed: of the run.
    """
    said = changes
    if config.colludes:
        weight = jnp.where(lies, slots.weight, 0.0)
        means, _ = weighted_mean(changes, weight, slots.task, slots.num_tasks)
        said = jax.tree.map(lambda x: x[slots.task], means)
    length = config.strength * row_lengths(said)
    if config.kind == "sign_flip":
        said = jax.tree.map(lambda x: -config.strength * x, said)
    elif config.kind == "scaling":
        said = jax.tree.map(lambda x: config.strength * x, said)
    elif config.kind == "garbage":
        said = jax.tree.map(lambda x: jnp.where(x > 0, jnp.inf, jnp.nan).astype(x.dtype), said)
    elif config.kind in ("noise", "constant"):
        if config.kind == "noise":
            by = "task" if config.colludes else "slot"
            said = gaussian(slot_keys(seed, _SALT, slots, round_index, by), said)
        else:
            said = jax.tree.map(jnp.ones_like, said)
        factor = length / row_lengths(said)
        said = jax.tree.map(lambda x: per_row(factor, x).astype(x.dtype) * x, said)

    def choose(lie, truth):
        return jnp.where(per_row(lies, truth), lie, truth)

    return jax.tree.map(choose, said, changes)


def lied_upload(
    config: AttackConfig, uploads: Any, lies: Bool[Array, "slots"], slots: Slots
) -> Any:
    """Uploads with lying vectors, masks or scales; every `Unified` in them is changed.

    Args:
      config: the kind of lie.
      uploads: of an algorithm.
      lies: bool `[slots]`.
      slots: the slots.
    """
    liar = jnp.zeros(slots.num_clients, jnp.bool_).at[slots.client].max(lies)

    def change(x):
        if not isinstance(x, Unified):
            return x
        if config.kind == "masks":
            inverted = jax.tree.map(lambda bits: jnp.where(lies[:, None], ~bits, bits), x.masks)
            return x._replace(masks=inverted)
        factor = config.strength if config.kind == "scales" else config.strength / _HIDDEN
        x = x._replace(scales=jnp.where(lies, factor, 1.0) * x.scales)
        if config.kind == "scales":
            return x
        factors = jnp.where(liar, _HIDDEN, 1.0)
        return x._replace(
            vector=jax.tree.map(lambda v: per_row(factors, v).astype(v.dtype) * v, x.vector)
        )

    return jax.tree.map(change, uploads, is_leaf=lambda x: isinstance(x, Unified))


def has_modulators(uploads: Any) -> bool:
    """Whether there is a `Unified` in uploads, whose masks and scales can lie."""
    leaves = jax.tree.leaves(uploads, is_leaf=lambda x: isinstance(x, Unified))
    return any(isinstance(x, Unified) for x in leaves)
