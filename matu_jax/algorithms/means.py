"""Means over rows of task vectors, weighted and defended."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Int, Shaped

from matu_jax.aggregation import Slots
from matu_jax.aggregation.choices import NO_DEFENCE, DefenceConfig
from matu_jax.aggregation.robust import (
    agreement_weights,
    clip_factors,
    counted,
    vector_lengths,
    within_trim,
)
from matu_jax.aggregation.storage import clip_to
from matu_jax.algorithms.contract import Sums
from matu_jax.trees import PyTree


def weighted_mean(
    vectors: PyTree[Float[Array, "rows ..."]],
    weight: Float[Array | np.ndarray, "rows"],
    group: Int[Array | np.ndarray, "rows"],
    num_groups: int,
) -> tuple[PyTree[Float[Array, "{num_groups} ..."]], Float32[Array, "{num_groups}"]]:
    """Weighted mean of rows per group, in float32.

    Args:
      vectors: leaves `[rows, ...]`.
      weight: float32 `[rows]`; rows of weight 0 do not count, whatever they hold.
      group: int32 `[rows]`.
      num_groups: number of groups.

    Returns:
      Means, leaves `[groups, ...]` in the storage dtype (0 for a group without weight), and the
      total weight `[groups]`.
    """
    total = jax.ops.segment_sum(weight, group, num_groups)

    def zero(leaf):
        return jnp.zeros((num_groups, *leaf.shape[1:]), jnp.float32)

    shares = _with_rows(jax.tree.map(zero, vectors), vectors, weight, group, total)
    return jax.tree.map(lambda x, leaf: clip_to(x, leaf.dtype), shares, vectors), total


def _with_rows(
    shares: PyTree, vectors: PyTree, weight: ArrayLike, group: ArrayLike, total: jax.Array
) -> PyTree:
    """Adds to sums `[groups, ...]` each row's part of its group's total weight, row after row."""
    weight, group = jnp.asarray(weight), jnp.asarray(group)
    share = weight / jnp.where(total > 0, total, 1.0)[group]

    def of_leaf(before, leaf):
        def add(carry, row):
            x, part, where = row
            return carry.at[where].add(jnp.where(part > 0, part * x.astype(jnp.float32), 0.0)), None

        return jax.lax.scan(add, before, (leaf, share, group))[0]

    return jax.tree.map(of_leaf, shares, vectors)


class RunningMean(NamedTuple):
    """A weighted mean of rows per group, of rows that come one after the other.

    Attributes:
      shares: sum of the rows, each times its part of the total weight: float32 `[groups, ...]`.
      total: the weight that is expected, float32 `[groups]`.
    """

    shares: PyTree[Float32[Array, "groups ..."]]
    total: Float32[Array, "groups"]

    @staticmethod
    def started(
        before: PyTree[Float[Array, "groups ..."]],
        weight: Float[Array | np.ndarray, "rows"],
        group: Int[Array | np.ndarray, "rows"],
    ) -> "RunningMean":
        """Without rows yet, of groups that have `before`; weights of all rows that are expected."""
        shares = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), before)
        return RunningMean(shares, _totals(before, weight, group))

    def added(
        self,
        vectors: PyTree[Float[Array, "rows ..."]],
        weight: Float[Array | np.ndarray, "rows"],
        group: Int[Array | np.ndarray, "rows"],
    ) -> "RunningMean":
        """With some rows more, leaves `[rows, ...]`; those of weight 0 do not count."""
        return self._replace(shares=_with_rows(self.shares, vectors, weight, group, self.total))

    def ended(
        self,
        before: PyTree[Float[Array, "groups ..."]],
        weight: Float[Array | np.ndarray, "rows"],
        group: Int[Array | np.ndarray, "rows"],
    ) -> PyTree[Float[Array, "groups ..."]]:
        """What `defended_mean` makes of all rows that have come, without defences.

        The same, bit for bit, where everything has come that was expected; else it is scaled up at
        last, and so rounded once more.
        """
        came = _totals(before, weight, group)
        factor = jnp.where(came > 0, self.total / jnp.where(came > 0, came, 1.0), 1.0)

        def mean(x, b):
            return clip_to(per_row(factor, x) * x, b.dtype)

        return keep_where_absent(jax.tree.map(mean, self.shares, before), before, came > 0)


def _totals(before: PyTree, weight: Any, group: Any) -> jax.Array:
    num_groups = jax.tree.leaves(before)[0].shape[0]
    return jax.ops.segment_sum(jnp.asarray(weight), jnp.asarray(group), num_groups)


def sums_over_clients() -> Sums:
    """The sums of `mean_over_clients` without defences, of uploads `[clients, ...]`."""

    def rows(slots):
        weight = jax.ops.segment_sum(slots.weight, slots.client, slots.num_clients)
        return weight, jnp.zeros(slots.num_clients, jnp.int32)

    def one(state):
        return jax.tree.map(lambda leaf: leaf[None], state)

    def end(state, sums, slots):
        mean = sums.ended(one(state), *rows(slots))
        return jax.tree.map(lambda leaf: leaf[0], mean), {}

    return Sums(
        start=lambda state, slots: RunningMean.started(one(state), *rows(slots)),
        add=lambda sums, uploads, group: sums.added(uploads, *rows(group)),
        end=end,
    )


def sums_by_task() -> Sums:
    """The sums of means over the holders of each task, of uploads `[slots, ...]`; undefended."""
    return Sums(
        start=lambda state, slots: RunningMean.started(state, slots.weight, slots.task),
        add=lambda sums, uploads, group: sums.added(uploads, group.weight, group.task),
        end=lambda state, sums, slots: (sums.ended(state, slots.weight, slots.task), {}),
    )


def defended_mean(
    vectors: PyTree[Float[Array, "rows ..."]],
    before: PyTree[Float[Array, "groups ..."]],
    weight: Float[Array | np.ndarray, "rows"],
    group: Int[Array | np.ndarray, "rows"],
    num_groups: int,
    defence: DefenceConfig,
    slots: Slots | None = None,
) -> tuple[PyTree[Float[Array, "groups ..."]], Float32[Array, "groups"]]:
    """`before` plus the mean of changes per group, by the rules of a defence; in float32.

    Args:
      vectors: leaves `[rows, ...]`; what a row has changed is its difference from its group's
        `before`.
      before: leaves `[groups, ...]`.
      weight: float32 `[rows]`; rows of weight 0 do not count, whatever they hold.
      group: int32 `[rows]`.
      num_groups: number of groups.
      defence: see `DefenceConfig`, with rows for slots and groups for tasks.
      slots: where rows are slots, whose client each is; None = each row is a client's only one.

    Returns:
      Leaves `[groups, ...]` in the storage dtype, `before` for a group without weight; and the
      total weight `[groups]`. Without defences, that is the weighted mean itself.
    """
    weight, group = jnp.asarray(weight), jnp.asarray(group)
    total = jax.ops.segment_sum(weight, group, num_groups)
    if defence == NO_DEFENCE:
        mean, _ = weighted_mean(vectors, weight, group, num_groups)
        return keep_where_absent(mean, before, total > 0), total

    present = weight > 0

    def change(x, b):
        rows = clip_to(x.astype(jnp.float32) - b.astype(jnp.float32)[group], jnp.float32)
        return jnp.where(present[:, None], rows.reshape(rows.shape[0], -1), 0.0)

    changes = jax.tree.map(change, vectors, before)
    if defence.clip:
        rows = weight.shape[0]
        client, clients = jnp.arange(rows), rows
        if slots is not None:
            client, clients = slots.client, slots.num_clients
        factors = clip_factors(row_lengths(changes), present, defence.clip, client, clients)
        changes = jax.tree.map(lambda x: factors[:, None] * x, changes)
    if defence.weighting == "agreement":
        weight = _weights_by_agreement(changes, weight, group, num_groups)
    if defence.trim:
        moved = _trimmed_mean(changes, present, group, num_groups, defence.trim)
    else:
        moved, _ = weighted_mean(changes, weight, group, num_groups)

    def add(b, x):
        return clip_to(b.astype(jnp.float32) + x.reshape(b.shape), b.dtype)

    return keep_where_absent(jax.tree.map(add, before, moved), before, total > 0), total


def _weights_by_agreement(
    changes: PyTree, weight: jax.Array, group: jax.Array, num_groups: int
) -> jax.Array:
    """Less weight for rows whose signs agree little with those of their group: float32 `[rows]`."""

    def signs(x):
        own = jnp.sign(x)
        return (own * jax.ops.segment_sum(own, group, num_groups)[group]).sum(axis=1)

    leaves = jax.tree.leaves(changes)
    common = jnp.stack([signs(x) for x in leaves]).sum(axis=0)
    nonzero = jnp.stack([(x != 0).sum(axis=1) for x in leaves]).sum(axis=0)
    return agreement_weights(common, nonzero.astype(jnp.float32), weight, group, num_groups)


def _trimmed_mean(
    changes: PyTree, present: jax.Array, group: jax.Array, num_groups: int, trim: int
) -> PyTree:
    """Mean of each number over a group's rows, less its `trim` largest and smallest: `[groups, n]`.

    Args:
      changes: leaves `[rows, n]`, float32.
      present: bool `[rows]`; others do not count.
      group: int32 `[rows]`.
      num_groups: number of groups.
      trim: how many are left out at each end, of groups that have enough rows.
    """
    members = jnp.zeros(num_groups, jnp.int32).at[group].add(present.astype(jnp.int32))
    share = 1 / counted(trim, members)

    def trimmed(x):
        def add(carry, row):
            extremes, mean = carry
            values, where, there = row
            high, low = (tuple(side) for side in extremes[where])
            grown, passed = within_trim((high, low), values, members[where])
            grown = jnp.stack([jnp.stack(side) for side in grown])
            extremes = extremes.at[where].set(jnp.where(there, grown, extremes[where]))
            mean = mean.at[where].add(jnp.where(there, share[where] * passed, 0.0))
            return (extremes, mean), None

        extremes = jnp.full((num_groups, 2, trim, x.shape[1]), -jnp.inf)
        mean = jnp.zeros((num_groups, x.shape[1]), jnp.float32)
        return jax.lax.scan(add, (extremes, mean), (x, group, present))[0][1]

    return jax.tree.map(trimmed, changes)


def row_lengths(vectors: PyTree[Float[Array, "rows ..."]]) -> Float32[Array, "rows"]:
    """Euclidean lengths of the rows of a stacked tree, over all its leaves: float32 `[rows]`."""
    found = vector_lengths([x.reshape(x.shape[0], -1) for x in jax.tree.leaves(vectors)])
    return found.unit * found.length


def headroom(rows: int) -> float:
    """A power of 2, which rounds nothing, by which the sum of so many float32 rows stays finite."""
    return 2.0 ** -math.ceil(math.log2(max(rows, 2)))


def per_row(
    values: Shaped[Array | np.ndarray, "rows"], like: Shaped[Array, "rows ..."]
) -> Shaped[Array | np.ndarray, "rows ..."]:
    """Gives values `[rows]` as many axes as an array `[rows, ...]` has, to broadcast against it."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def keep_where_absent(
    new: PyTree[Shaped[Array, "rows ..."]],
    old: PyTree[Shaped[Array, "rows ..."]],
    present: Bool[Array | np.ndarray, "rows"],
) -> PyTree[Shaped[Array, "rows ..."]]:
    """Takes rows of `new` where present and of `old` elsewhere; leaves `[rows, ...]`."""

    def choose(n, o):
        return jnp.where(per_row(present, n), n, o)

    return jax.tree.map(choose, new, old)


def mean_of_clients(
    vectors: PyTree[Float[Array, "slots ..."]], slots: Slots
) -> PyTree[Float[Array, "clients ..."]]:
    """Each client's mean over its slots, weighted by examples: leaves `[clients, ...]`."""
    client = slots.client
    if isinstance(client, np.ndarray) and np.array_equal(client, np.arange(slots.num_clients)):
        absent = jax.tree.map(jnp.zeros_like, vectors)  # known while tracing: each has one slot
        return keep_where_absent(vectors, absent, jnp.asarray(slots.weight) > 0)
    return weighted_mean(vectors, slots.weight, slots.client, slots.num_clients)[0]


def mean_over_clients(
    uploads: PyTree[Float[Array, "clients ..."]],
    slots: Slots,
    before: PyTree[Float[Array, "..."]],
    defence: DefenceConfig,
) -> PyTree[Float[Array, "..."]]:
    """Mean over clients, weighted by examples: leaves `[...]`; `before` where nobody is there."""
    weight = jax.ops.segment_sum(slots.weight, slots.client, slots.num_clients)
    one_group = jnp.zeros(slots.num_clients, jnp.int32)
    old = jax.tree.map(lambda leaf: leaf[None], before)
    mean, _ = defended_mean(uploads, old, weight, one_group, 1, defence)
    return jax.tree.map(lambda leaf: leaf[0], mean)


def zeros(
    base: PyTree[Float[ArrayLike | jax.ShapeDtypeStruct, "..."]], *rows: int
) -> PyTree[Float[Array, "..."]]:
    """Zero task vectors, leaves `[*rows, ...]` in the base's dtypes."""
    return jax.tree.map(lambda leaf: jnp.zeros((*rows, *leaf.shape), leaf.dtype), base)
