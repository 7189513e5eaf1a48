"""Defences of the server: bounded lengths, weights by agreement, trimmed means."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from matu_jax.aggregation.blocks import loop_zeros, over_blocks, put_row, take_row
from matu_jax.aggregation.modulation import UploadedLeaf
from matu_jax.aggregation.sharding import Axes, largest_over, total_over
from matu_jax.aggregation.storage import joined_eighths
from matu_jax.aggregation.types import Slots


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


def vector_lengths(
    vector: list[Float[Array, "rows _"]], axes: Axes = ()
) -> tuple[Float32[Array, "rows"], Float32[Array, "rows"]]:
    """Euclidean lengths of the rows of flat leaves `[rows, n]`, over all leaves, in two factors.

    Numbers are squared relative to the row's largest: squares as they are would vanish in float32
    below 1e-19, and overflow above 1e19, so that a scale could hide how long a vector is. The unit
    is a power of 2, by which nothing is rounded.

    Args:
      vector: flat leaves `[rows, n]`, n sharded over `axes`.
      axes: see `ParameterSharding`.

    Returns:
      Unit and length in units, float32 `[rows]` each; the length is their product, which may
      overflow. To be multiplied by a scale, unit first.
    """

    def over(leaf, of_block, combine):
        def add(block, carry):
            x = jax.lax.dynamic_slice_in_dim(leaf, block.start, block.length, axis=1)
            return combine(carry, of_block(x.astype(jnp.float32)))

        return over_blocks(leaf.shape[1], add, loop_zeros(leaf.shape[:1], jnp.float32, leaf))

    largest = [over(leaf, lambda x: jnp.abs(x).max(axis=1), jnp.maximum) for leaf in vector]
    unit = _power_of_two(largest_over(jnp.stack(largest).max(axis=0), axes))

    def squares(x):
        return jnp.square(x * (1 / unit)[:, None]).sum(axis=1)

    total = jnp.stack([over(leaf, squares, jnp.add) for leaf in vector]).sum(axis=0)
    return unit, jnp.sqrt(total_over(total, axes))


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
    edges = jnp.searchsorted(group[order], jnp.arange(num_groups + 1))
    place = edges[:-1] + jnp.maximum(edges[1:] - edges[:-1] - 1, 0) // 2
    return values[order][jnp.minimum(place, values.shape[0] - 1)]


def sign_sums(
    vector: list[Float[Array, "clients _"]],
    masks: list[UInt8[Array, "slots _"]],
    scales: Float32[Array, "slots"],
    accepted: Bool[Array, "slots"],
    slots: Slots,
    axes: Axes,
) -> tuple[Float32[Array, "slots"], Float32[Array, "slots"]]:
    """What `agreement_weights` takes, for slots grouped by task: `[slots]` and `[slots]`."""
    count, tasks = slots.client.shape[0], slots.num_tasks
    inputs = (*vector, *masks, scales, accepted, slots.client, slots.task)
    sums = loop_zeros((2, count), jnp.float32, *inputs)
    for leaf, mask in zip(vector, masks, strict=True):
        uploads = UploadedLeaf(leaf, leaf.dtype, mask, scales, accepted, slots.client)

        def visit(block, sums, uploads=uploads):
            def signs(slot):
                return jnp.sign(joined_eighths(uploads.task_vector(slot, block), block.length))

            def add(slot, total):
                task = slots.task[slot]
                return put_row(total, task, take_row(total, task) + signs(slot))

            total = loop_zeros((tasks, block.length), jnp.float32, *inputs)
            total = jax.lax.fori_loop(0, count, add, total)

            def compare(slot, sums):
                x, met = signs(slot), take_row(total, slots.task[slot])
                return sums.at[:, slot].add(jnp.stack([(x * met).sum(), jnp.abs(x).sum()]))

            return jax.lax.fori_loop(0, count, compare, sums)

        sums = over_blocks(leaf.shape[1], visit, sums)
    common, nonzero = total_over(sums, axes)
    return common, nonzero


def within_trim(
    extremes: Float32[Array, "2 trim n"], x: Float32[Array, "n"], members: Int[Array, ""]
) -> tuple[Float32[Array, "2 trim n"], Float32[Array, "n"]]:
    """Takes one more number into a trimmed mean, parameter by parameter.

    What is left out never enters a sum, so that no number, however large, leaves its rounding.

    Args:
      extremes: float32 `[2, trim, n]`, the largest numbers so far, falling, and of the others the
        negated smallest; `-inf` at first.
      x: float32 `[n]`, finite.
      members: int32 scalar, how many numbers there are in all.

    Returns:
      The extremes with x among them, or what x has driven out of them, and that: float32 `[n]`, a
      number that counts, or 0 where none is known to count yet. When all have been taken,
      `counted(trim, members)` of them have come out.
    """
    trim = extremes.shape[1]
    cut = _cut(trim, members)
    high, low = extremes

    def through(held, entering):
        """Keeps the largest numbers, and lets the smallest of all pass."""
        rows = []
        for i in range(trim):
            used = i < cut
            rows.append(jnp.where(used, jnp.maximum(held[i], entering), held[i]))
            entering = jnp.where(used, jnp.minimum(held[i], entering), entering)
        return jnp.stack(rows), entering

    high, passed = through(high, x)
    there = passed != -jnp.inf
    kept, left = through(low, -passed)
    extremes = jnp.stack([high, jnp.where(there, kept, low)])
    return extremes, jnp.where(there & (left != -jnp.inf), -left, 0.0)


def counted(trim: int, members: Int[Array, "*groups"]) -> Float32[Array, "*groups"]:
    """How many of so many numbers a trimmed mean is made of, as float32; 1 at least."""
    return jnp.maximum(members - 2 * _cut(trim, members), 1).astype(jnp.float32)


def _cut(trim: int, members: Int[Array, "*groups"]) -> Int[Array, "*groups"]:
    """How many numbers are left out on either side: `trim`, or as many as leave one."""
    return jnp.minimum(trim, jnp.maximum(members - 1, 0) // 2)
