"""Defences of the server: bounded lengths, weights by agreement, and what both are made of."""

import jax
import jax.numpy as jnp

from matu_jax.aggregation.fold import (
    joined_eighths,
    loop_zeros,
    modulated,
    over_blocks,
)
from matu_jax.aggregation.sharing import Axes, total_over
from matu_jax.aggregation.types import Slots


def clip_factors(lengths: jax.Array, present: jax.Array, limit: float) -> jax.Array:
    """Factors that bring lengths down to `limit` times their median, and raise none.

    Args:
      lengths: float32 `[rows]`, not negative; infinite where a sum has overflowed.
      present: bool `[rows]`; the median is over those present whose length is not 0.
      limit: how many medians long a row may stay.

    Returns:
      float32 `[rows]`, in [0, 1].
    """
    counted = jnp.where(present & (lengths > 0), lengths, jnp.nan)
    longest = limit * jnp.nanmedian(counted)
    # False where nobody is there, and the median is not a number.
    return jnp.where(lengths > longest, longest / lengths, 1.0)


def vector_lengths(vector: list[jax.Array], axes: Axes) -> jax.Array:
    """Euclidean lengths of the rows of flat leaves `[rows, n]`, over all leaves: `[rows]`."""

    def squares(leaf):
        def add(start, length, carry):
            x = jax.lax.dynamic_slice_in_dim(leaf, start, length, axis=1)
            return carry + jnp.square(x.astype(jnp.float32)).sum(axis=1)

        return over_blocks(leaf.shape[1], add, loop_zeros(leaf.shape[:1], jnp.float32, leaf))

    return jnp.sqrt(total_over(jnp.stack([squares(leaf) for leaf in vector]).sum(axis=0), axes))


FEWEST = 5  # rows; of fewer, one liar is more than a fifth, and who differs may well be honest


def agreement_weights(
    common: jax.Array,
    nonzero: jax.Array,
    weight: jax.Array,
    group: jax.Array,
    num_groups: int,
) -> jax.Array:
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


def _lower_median(values: jax.Array, group: jax.Array, num_groups: int) -> jax.Array:
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
    vector: list[jax.Array],
    masks: list[jax.Array],
    scales: jax.Array,
    accepted: jax.Array,
    slots: Slots,
    axes: Axes,
) -> tuple[jax.Array, jax.Array]:
    """What `agreement_weights` takes, for slots grouped by task: `[slots]` and `[slots]`."""
    count, tasks = slots.client.shape[0], slots.num_tasks
    inputs = (*vector, *masks, scales, accepted, slots.client, slots.task)
    sums = loop_zeros((2, count), jnp.float32, *inputs)
    for leaf, mask in zip(vector, masks, strict=True):

        def visit(start, length, sums, leaf=leaf, mask=mask):
            def signs(slot):
                packed = jax.lax.dynamic_slice(mask, (slot, start // 8), (1, -(-length // 8)))
                x = jax.lax.dynamic_slice(leaf, (slots.client[slot], start), (1, length))
                scale = jnp.where(accepted[slot], scales[slot], 0.0)[None]
                x = jnp.where(accepted[slot], modulated(x, packed, scale), 0.0)
                return jnp.sign(joined_eighths(x, length))

            def add(slot, total):
                place = slots.task[slot], 0
                before = jax.lax.dynamic_slice(total, place, (1, length))
                return jax.lax.dynamic_update_slice(total, before + signs(slot), place)

            total = loop_zeros((tasks, length), jnp.float32, *inputs)
            total = jax.lax.fori_loop(0, count, add, total)

            def compare(slot, sums):
                x = signs(slot)
                met = jax.lax.dynamic_slice(total, (slots.task[slot], 0), (1, length))
                return sums.at[:, slot].add(jnp.stack([(x * met).sum(), jnp.abs(x).sum()]))

            return jax.lax.fori_loop(0, count, compare, sums)

        sums = over_blocks(leaf.shape[1], visit, sums)
    common, nonzero = total_over(sums, axes)
    return common, nonzero


def with_extremes(extremes: jax.Array, x: jax.Array, first: jax.Array) -> jax.Array:
    """Sorts numbers into the largest and smallest so far, for a trimmed mean.

    Args:
      extremes: float32 `[2, trim, n]`: the largest numbers, falling, and the negated smallest.
      x: float32 `[n]`.
      first: bool scalar, whether these are the first numbers.
    """
    held = jnp.where(first, -jnp.inf, extremes)
    rows, entering = [], jnp.stack([x, -x])
    for i in range(extremes.shape[1]):
        rows.append(jnp.maximum(held[:, i], entering))
        entering = jnp.minimum(held[:, i], entering)
    return jnp.stack(rows, axis=1)


def trimmed_mean(mean: jax.Array, extremes: jax.Array, members: jax.Array) -> jax.Array:
    """The mean without the `trim` largest and smallest numbers, or without as many as leave one.

    Args:
      mean: float32 `[n]`, of all members, equally weighted.
      extremes: from `with_extremes`, of all members, `[2, trim, n]`.
      members: int32 scalar, how many there are.
    """
    trim = extremes.shape[1]
    cut = jnp.minimum(trim, jnp.maximum(members - 1, 0) // 2)
    counted = (jnp.arange(trim) < cut)[None, :, None]
    high, low = jnp.where(counted, extremes, 0.0).sum(axis=1)
    count = members.astype(jnp.float32)
    return (mean * count - (high - low)) / jnp.maximum(count - 2 * cut.astype(jnp.float32), 1.0)
