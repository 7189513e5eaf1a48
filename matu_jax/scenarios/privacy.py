"""Differential privacy of clients towards the server: clipping, discrete noise, and what it costs.

In every round a client clips what it has changed, over all its tasks together, to `clip_norm` C,
rounds it to whole multiples of a power of 2, g, and adds to every number g times a whole number
from the discrete Gaussian distribution of variance (z C / g)^2 (Canonne, Kamath and Steinke 2020,
arXiv 2004.00010). Only then does it fold, and so vectors, masks, scales, the server's similarity
and all that follows are made of noisy numbers alone. The server, and whoever sees what it sends,
learns about a client's examples no more than (epsilon, delta) says: how far its messages can differ
from those of a client that has changed nothing (client-level, zero-out adjacency; of an event that
the noise hides, the sensitivity is C). Rounds add up; nothing is gained by drawing clients at
random, since the server knows whom it drew.

Why whole numbers: noise that is drawn as a floating-point number has low bits that no other noise
has, and they tell whether a client took part, whatever its size (Mironov 2012). Of whole numbers
with a discrete Gaussian the guarantee holds as it stands: each round is 1 / (2 z^2)-zCDP
(arXiv 2004.00010, theorem 4, for sensitivity C / g). Clipping leaves room for the rounding: to
C - g sqrt(n) / 2, and for that of float32's sums; with the g chosen here the two are less than 1 %
of C, unless the numbers n are more than a billion.

Noise is drawn by OpenDP, exactly, from the operating system's entropy, so that nobody can draw it
again: a run with privacy cannot be repeated bit for bit, and a round that is run again after a
crash has other noise. (What was sent in such a round before the crash is a release of its own, that
a real server has seen, and that no record counts.) `config.privacy.seed` draws it from a seed
instead, for tests: whoever knows the seed can take the noise away, and so there is no privacy and
no epsilon.

Not covered: numbers of examples, who holds which task, and who takes part when. Accuracies that a
run reports are of the simulation and no part of the protocol.
"""

import dataclasses
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Key

from matu_jax.aggregation import Slots
from matu_jax.algorithms.means import per_row
from matu_jax.fields import field
from matu_jax.trees import PyTree


@dataclasses.dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy of clients towards the server, as the module describes it.

    Attributes:
      clip_norm: what a client has changed in a round, over all its tasks, is scaled down to this
        Euclidean length; 0 = no privacy.
      noise_multiplier: standard deviation of the Gaussian noise on every number, in clip_norms.
      delta: of (epsilon, delta).
      seed: -1 = noise from the operating system's entropy, which nobody can draw again; from 0 on,
        noise is drawn from this seed, so that a run can be repeated, and nothing is private.
    """

    clip_norm: float = field(0.0, at_least=0)
    noise_multiplier: float = field(0.0, at_least=0)
    delta: float = field(1e-5, above=0, at_most=0.5)
    seed: int = field(-1, at_least=-1, at_most=2**31 - 1)

    def conflicts(self, where: str) -> Iterator[str]:
        """Yields what is wrong where half of a mechanism is given, or one beyond its numbers."""
        if bool(self.clip_norm) != bool(self.noise_multiplier):
            yield (
                f"{where}: found clip_norm = {self.clip_norm} and noise_multiplier = "
                f"{self.noise_multiplier}; privacy needs both, or neither."
            )
        if self.clip_norm and not 1e-30 <= self.clip_norm <= 1e30:
            yield f"{where}.clip_norm: found {self.clip_norm:g}, expected 1e-30 to 1e30."


PACKAGES = ("dp_accounting", "opendp")
"""What the extra `privacy` installs: the accountant, and the noise."""


_SALT = 0xD1FF


_FINENESS = 64


_LARGEST = 2.0**27
"""Of the noise's standard deviation in grid steps: 14 of them fit into an int32."""


_PIECE = 1 << 15


def slot_keys(
    seed: int, salt: int, slots: Slots, round_index: Int[Array | np.integer, ""] | int, by: str
) -> Key[Array, "slots"]:
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


def gaussian(
    keys: Key[Array, "slots"], like: PyTree[Float[Array, "slots ..."]]
) -> PyTree[Float[Array, "slots ..."]]:
    """Standard normal numbers like a stacked tree, each row from its key: `[slots, ...]`."""
    leaves, treedef = jax.tree.flatten(like)
    drawn = []
    for number, leaf in enumerate(leaves):

        def row(key, number=number, leaf=leaf):
            return jax.random.normal(jax.random.fold_in(key, number), leaf.shape[1:], leaf.dtype)

        drawn.append(jax.lax.map(row, keys))
    return treedef.unflatten(drawn)


def grid_step(config: PrivacyConfig, like: PyTree) -> float:
    """The g to whose multiples changes are rounded: a power of 2, at most C / (64 sqrt(n)).

    Args:
      config: clip_norm and noise_multiplier.
      like: arrays or shapes of the changes, `[slots, ...]`; n is the number of their numbers, and
        so at least that of any one client's.

    Raises:
      ValueError: for noise that does not fit into 32 bits at that fineness.
    """
    numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(like))
    step = 2.0 ** math.floor(math.log2(config.clip_norm / (_FINENESS * math.sqrt(numbers))))
    if config.noise_multiplier * config.clip_norm / step > _LARGEST:
        raise ValueError(
            f"config.privacy.noise_multiplier: found {config.noise_multiplier:g}, which does not "
            f"fit into 32 bits with {numbers:,} numbers; expected at most "
            f"{_LARGEST * step / config.clip_norm:.3g}."
        )
    return step


def discrete_gaussian(deviation: float, into: list[Int32[np.ndarray, "_"]]) -> None:
    """Fills int32 arrays with discrete Gaussian numbers, exactly, by OpenDP, in threads.

    From the operating system's entropy. About 10 to 20 microseconds a number and core.

    Args:
      deviation: sqrt of the variance parameter; more than 0.
      into: int32 arrays `[n]`, filled in place.
    """
    from opendp import domains, measurements, metrics, mod

    mod.enable_features("contrib")  # every mechanism of OpenDP is one
    mechanism: Any = measurements.make_gaussian(
        domains.vector_domain(domains.atom_domain(T="i32")), metrics.l2_distance(T=float), deviation
    )

    def fill(piece: np.ndarray) -> None:
        piece[:] = mechanism([0] * piece.size)

    pieces = [x[start : start + _PIECE] for x in into for start in range(0, x.size, _PIECE)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        list(threads.map(fill, pieces))


def drawn(
    config: PrivacyConfig, like: PyTree, slots: Slots
) -> PyTree[Int32[np.ndarray, "slots ..."]]:
    """Draws a round's noise, on the host; see `discrete_gaussian`.

    Args:
      config: clip_norm and noise_multiplier.
      like: arrays or shapes of the changes, `[slots, ...]`.
      slots: those of weight 0 send nothing and need none.

    Returns:
      numpy int32, leaves `[slots, ...]`, in steps of `grid_step`.
    """
    noise = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.int32), like)
    present = np.flatnonzero(np.asarray(slots.weight) > 0)
    rows = [leaf[row].reshape(-1) for leaf in jax.tree.leaves(noise) for row in present]
    deviation = config.noise_multiplier * config.clip_norm / grid_step(config, like)
    discrete_gaussian(deviation, rows)
    return noise


def privatised(
    config: PrivacyConfig,
    changes: PyTree[Float[Array, "slots ..."]],
    slots: Slots,
    round_index: Int[Array | np.integer, ""] | int,
    seed: int | None = None,
    *,
    noise: PyTree[Int32[Array | np.ndarray, "slots ..."]] | None = None,
) -> PyTree[Float[Array, "slots ..."]]:
    """Clips each client's changes, rounds them to the grid and adds noise; leaves `[slots, ...]`.

    Args:
      config: clip_norm and noise_multiplier.
      changes: leaves `[slots, ...]`; absent slots (weight 0) do not count. What is not finite
        becomes 0, and so does a client's change whose square is beyond float32.
      slots: the slots.
      round_index: int32 scalar; used with a seed alone.
      seed: draws noise from (seed, round, client, task), rounded from normal numbers. Nothing is
        private then.
      noise: int32, from `drawn`; of seed and noise exactly one is given.

    Returns:
      Whole multiples of `grid_step`, in the changes' dtype: one that does not hold them all rounds
      what has its noise already.

    Raises:
      ValueError: for a seed beside noise, or neither.
    """
    if (seed is None) == (noise is None):
        raise ValueError("privatised: expected a seed or noise, and not both.")
    step = grid_step(config, changes)
    if noise is None:
        assert seed is not None
        deviation = jnp.float32(config.noise_multiplier * config.clip_norm / step)
        normal = gaussian(slot_keys(seed, _SALT, slots, round_index, "slot"), changes)
        noise = jax.tree.map(
            lambda n: jnp.round(deviation * n.astype(jnp.float32)).astype(jnp.int32), normal
        )
    present = slots.weight > 0

    def in_steps(x):
        y = x.astype(jnp.float32) / jnp.float32(step)
        return jnp.where(jnp.isfinite(y), y, 0.0)

    steps = jax.tree.map(in_steps, changes)
    squares, error = _squares(steps)
    squares = jax.ops.segment_sum(jnp.where(present, squares, 0.0), slots.client, slots.num_clients)
    numbers = sum(x.size for x in jax.tree.leaves(steps))
    # What rounding to whole steps, and float32's sums, may add to a length still fits.
    longest = (config.clip_norm / step - math.sqrt(numbers) / 2) * (1 - error)
    factor = jnp.where(squares > longest**2, longest / jnp.sqrt(squares), 1.0)[slots.client]
    most = config.clip_norm / step

    def hide(x, y, n):
        whole = jnp.round(jnp.clip(per_row(factor, y) * y, -most, most)).astype(jnp.int32) + n
        return (jnp.float32(step) * whole.astype(jnp.float32)).astype(x.dtype)

    return jax.tree.map(hide, changes, steps, noise)


def _squares(vectors: PyTree) -> tuple[jax.Array, float]:
    """Sums of the squares of rows `[rows, ...]`, and by how much a length from them may be wrong.

    Returns:
      float32 `[rows]`; and a bound on the relative error of the sum over all rows, whatever order
      a device adds in: sums of sqrt(n) numbers are carried from one to the next.
    """
    flat = [x.reshape(x.shape[0], -1) for x in jax.tree.leaves(vectors)]
    rows, numbers = flat[0].shape[0], sum(x.shape[1] for x in flat)
    side = math.isqrt(max(numbers - 1, 0)) + 1
    whole = jnp.concatenate(flat, axis=1)
    whole = jnp.pad(whole, ((0, 0), (0, side**2 - numbers))).reshape(rows, side, side)

    def add(total, block):
        return total + jnp.square(block).sum(axis=1), None

    zero = jnp.zeros(rows, jnp.float32)
    squares, _ = jax.lax.scan(add, zero, jnp.swapaxes(whole, 0, 1))
    return squares, (2 * side + rows + 16) * 2.0**-24


def epsilon(config: PrivacyConfig, releases: int) -> float:
    """Epsilon of a client after so many rounds, from dp-accounting's Renyi accountant.

    For noise from the operating system's entropy; with a seed there is no epsilon.

    Args:
      config: noise_multiplier and delta.
      releases: in how many rounds the client has sent something; each is 1 / (2 z^2)-zCDP.

    Raises:
      ImportError: if dp-accounting is not installed.
    """
    from dp_accounting import dp_event, rdp

    if releases == 0:
        return 0.0
    accountant = rdp.RdpAccountant()
    event = dp_event.ZCDpEvent(rho=1 / (2 * config.noise_multiplier**2), xi=0.0)
    accountant.compose(dp_event.SelfComposedDpEvent(event, releases))
    return float(accountant.get_epsilon(config.delta))
