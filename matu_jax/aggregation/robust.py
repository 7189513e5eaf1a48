"""Defences of the server: bounded lengths, weights by agreement, trimmed means."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from matu_jax.aggregation.platforms import where_lowered
from matu_jax.aggregation.sharding import Axes, largest_over, total_over
from matu_jax.aggregation.storage import TILE


def clip_factors(
    lengths: Float32[Array, "rows"],
    present: Bool[Array, "rows"],
    limit: float,
    client: Int[Array | np.ndarray, "rows"],
    num_clients: int,
    unseen: Float32[Array, "rows"] | float = 0.0,
) -> Float32[Array, "rows"]:
    """Factors that bring lengths down to `limit` times their median, and raise none.

    The median over rows is the mean of the middle two where their number is even, and a client may
    have many rows. So that neither half of the clients nor one of them sets it, it counts for no
    more than twice the lower median over clients of their longest row.

    Args:
      lengths: float32 `[rows]`, not negative; infinite where one is beyond float32.
      present: bool `[rows]`; the medians are over those present whose length is not 0.
      limit: how many medians long a row may stay.
      client: int32 `[rows]`, whose a row is.
      num_clients: number of clients.
      unseen: float32 `[rows]`, what a row may be longer than its length says, see
        `smallest_length`. It does not count for the medians.

    Returns:
      float32 `[rows]`, in [0, 1].
    """
    counts = present & (lengths > 0)
    median = jnp.nanmedian(jnp.where(counts, lengths, jnp.nan))
    longest_of = jnp.zeros(num_clients, jnp.float32).at[client].max(jnp.where(counts, lengths, 0.0))
    group = (longest_of == 0).astype(jnp.int32)
    of_clients = _lower_median(longest_of, group, 1)[0]
    # Where nobody has a length there is no median, and nothing that could be let through.
    median = jnp.where(counts.any(), jnp.minimum(median, 2 * of_clients), 0.0)
    longest, lengths = limit * median, lengths + unseen
    return jnp.where(lengths > longest, longest / lengths, 1.0)


class Lengths(NamedTuple):
    """Euclidean lengths of vectors, each in two factors.

    Attributes:
      finite: whether all numbers are.
      unit: the largest power of 2 that is at most the largest magnitude, from 2^-126 to 2^120.
      length: in units. The length is the product of both, which may overflow: it is to be
        multiplied by a scale, unit first.
    """

    finite: Bool[Array, "rows"]
    unit: Float32[Array, "rows"]
    length: Float32[Array, "rows"]


_UNITS = (2.0**-80, 1.0, 2.0**80)


def vector_lengths(vector: list[Float[Array, "rows _"]], axes: Axes = ()) -> Lengths:
    """Lengths of the rows of flat leaves `[rows, n]`, over all leaves, in one pass over them.

    Squares as they are would vanish in float32 below 1e-19, and overflow above 1e19, so that a
    scale could hide how long a vector is. So they are added up in three units, in the manner of
    Blue 1978 (A portable Fortran program to find the Euclidean norm of a vector), and those count
    in whose unit the row's largest number is neither small nor large. By powers of 2 nothing is
    rounded.

    Args:
      vector: flat leaves `[rows, n]`, n sharded over `axes`.
      axes: see `ParameterSharding`.
    """
    found = [_row_sums(leaf) for leaf in vector]
    largest = largest_over(jnp.stack([top for top, _ in found]).max(axis=0), axes)
    squares = total_over(jnp.stack([squares for _, squares in found]).sum(axis=0), axes)
    which = (largest >= 2.0**-40).astype(jnp.int32) + (largest > 2.0**40).astype(jnp.int32)
    length = jnp.sqrt(jnp.take_along_axis(squares, which[None], axis=0)[0])
    unit = _power_of_two(largest)
    # Of finite numbers the squares in the largest unit are finite; a maximum may pass over a NaN.
    return Lengths(
        jnp.isfinite(squares[-1]), unit, length * (jnp.asarray(_UNITS, jnp.float32)[which] / unit)
    )


def _plain_row_sums(leaf: Float[Array, "rows n"]) -> list[jax.Array]:
    """The largest magnitude of rows `[rows]`, and their squares in three units `[3, rows]`."""
    rows = jnp.abs(leaf.astype(jnp.float32))
    squares = [jnp.square(rows * (1 / unit)).sum(axis=1) for unit in _UNITS]
    return [rows.max(axis=1, initial=0.0), jnp.stack(squares)]


def _row_sums_in_lanes(leaf: Float[Array, "rows n"]) -> list[jax.Array]:
    """The same for XLA on CPU, whose one running sum would stall at 2**24 terms."""
    rows = jnp.pad(leaf, ((0, 0), (0, -leaf.shape[1] % TILE)))
    rows = jnp.abs(rows.reshape(leaf.shape[0], -1, TILE).astype(jnp.float32))
    lanes = [jnp.square(rows * (1 / unit)).sum(axis=1) for unit in _UNITS]
    lanes = jax.lax.optimization_barrier(jnp.stack(lanes))  # else XLA makes one sum of both
    return [rows.max(axis=(1, 2), initial=0.0), lanes.sum(axis=2)]


def _row_sum_shapes(leaf: jax.Array) -> list[jax.ShapeDtypeStruct]:
    rows = leaf.shape[0]
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows,), (len(_UNITS), rows))]


_row_sums = where_lowered("matu_row_sums", _row_sum_shapes, _plain_row_sums, cpu=_row_sums_in_lanes)


def _power_of_two(x: Float32[Array, "rows"]) -> Float32[Array, "rows"]:
    """The largest power of 2 that is at most x, from 2^-126 to 2^120; float32 `[rows]`."""
    exponent = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    return jnp.clip(jax.lax.bitcast_convert_type(exponent, jnp.float32), 2.0**-126, 2.0**120)


def smallest_length(size: int) -> float:
    """How long a vector of `size` numbers can be of which none is a normal float32.

    Devices differ in whether they take such numbers for 0, and then a length does not see them.
    """
    return float(np.finfo(np.float32).tiny) * math.sqrt(size)


FEWEST = 5  # rows; of fewer, one liar is more than a fifth, and who differs may well be honest


def agreement_weights(
    common: Float32[Array, "rows"],
    nonzero: Float32[Array, "rows"],
    weight: Float32[Array, "rows"],
    group: Int[Array, "rows"],
    num_groups: int,
) -> Float32[Array, "rows"]:
    """Weights by how far a row's signs agree with those of the other rows of its group.

    A row's agreement is the mean, over the others, of the correlation of signs where the row is not
    0. Rows that agree at least half as much as the group's median row keep their weight, others
    less of it, down to none where they do not agree at all. Where that leaves a group nothing, or
    where it has fewer than `FEWEST` rows, its weights stay.

    Args:
      common: float32 `[rows]`, the row's signs times the sum of its group's signs, its own too.
      nonzero: float32 `[rows]`, how many of a row's numbers are not 0.
      weight: float32 `[rows]`; 0 = absent.
      group: int32 `[rows]`.
      num_groups: number of groups.

    Returns:
      float32 `[rows]`.
    """
    members = jnp.zeros(num_groups, jnp.float32).at[group].add((weight > 0).astype(jnp.float32))
    pairs = nonzero * (members[group] - 1)
    agreement = jnp.where(pairs > 0, (common - nonzero) / jnp.where(pairs > 0, pairs, 1.0), 0.0)
    middle = _lower_median(agreement, jnp.where(weight > 0, group, num_groups), num_groups)[group]
    enough = jnp.maximum(middle / 2, jnp.finfo(jnp.float32).tiny)
    trusted = weight * jnp.clip(agreement / enough, 0.0, 1.0)
    left = jnp.zeros(num_groups, jnp.float32).at[group].add(trusted)
    judged = (members >= FEWEST) & (left > 0)
    return jnp.where(judged[group], trusted, weight)


def _lower_median(
    values: Float32[Array, "rows"], group: Int[Array, "rows"], num_groups: int
) -> Float32[Array, "{num_groups}"]:
    """The median of every group's values, the lower one of two; anything for an empty group.

    Args:
      values: float32 `[rows]`.
      group: int32 `[rows]`; rows of group `num_groups` are left out.
      num_groups: number of groups.

    Returns:
      float32 `[groups]`.
    """
    order = jnp.lexsort((values, group))
    bounds = jnp.arange(num_groups + 1, dtype=group.dtype)
    edges = (group[None, :] < bounds[:, None]).sum(axis=1)
    place = edges[:-1] + jnp.maximum(edges[1:] - edges[:-1] - 1, 0) // 2
    return values[order][jnp.minimum(place, values.shape[0] - 1)]


Extremes = tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]
"""See `within_trim`: each side's `trim` blocks of numbers."""


def no_extremes(trim: int, zeros: jax.Array) -> Extremes:
    """Before the first number; `zeros` is a float32 block."""
    rows = (zeros - jnp.inf,) * trim
    return rows, rows


def within_trim(
    extremes: Extremes, x: jax.Array, members: Int[Array, ""]
) -> tuple[Extremes, jax.Array]:
    """Takes one more number into a trimmed mean, parameter by parameter.

    What is left out never enters a sum, so that no number, however large, leaves its rounding.

    Args:
      extremes: the `trim` largest numbers so far, falling, and of the others the negated smallest;
        `-inf` at first. Float32 blocks.
      x: a float32 block, finite.
      members: int32 scalar, how many numbers there are in all.

    Returns:
      The extremes with x among them; and what x has driven out of them, a number that counts, or 0
      where none is known to count yet. When all have been taken, `counted(trim, members)` of them
      have come out.
    """
    high, low = extremes
    cut = _cut(len(high), members)

    def through(held, entering):
        """Keeps the largest numbers, and lets the smallest of all pass."""
        rows = []
        for i, row in enumerate(held):
            used = i < cut
            rows.append(jnp.where(used, jnp.maximum(row, entering), row))
            entering = jnp.where(used, jnp.minimum(row, entering), entering)
        return tuple(rows), entering

    high, passed = through(high, x)
    there = passed != -jnp.inf
    kept, left = through(low, -passed)
    low = tuple(jnp.where(there, new, old) for new, old in zip(kept, low, strict=True))
    return (high, low), jnp.where(there & (left != -jnp.inf), -left, 0.0)


def counted(trim: int, members: Int[Array, "*groups"]) -> Float32[Array, "*groups"]:
    """How many of so many numbers a trimmed mean is made of, as float32; 1 at least."""
    return jnp.maximum(members - 2 * _cut(trim, members), 1).astype(jnp.float32)


def _cut(trim: int, members: Int[Array, "*groups"]) -> Int[Array, "*groups"]:
    """How many numbers are left out on either side: `trim`, or as many as leave one."""
    # A shift, since `//` asks for a TPU to be there when it is lowered in a kernel.
    return jnp.minimum(trim, jnp.right_shift(jnp.maximum(members - 1, 0), 1))
