"""Eqs. 1 to 4 on flat leaves: task vectors folded into unified vectors, masks and scales."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from matu_jax.aggregation.blocks import add_row, in_lanes, loop_zeros, over_blocks
from matu_jax.aggregation.choices import Magnitude
from matu_jax.aggregation.fold_block import FAR, FoldMemory, Grouped, fold_block, grouped
from matu_jax.aggregation.platforms import where_lowered
from matu_jax.aggregation.sharding import Axes, total_over
from matu_jax.aggregation.storage import TILE, as_bits, from_bits, mask_bytes, pack_rows


def fold(
    source: list[Float[Array, "rows _"]],
    rows: Int[Array, "slots"] | None,
    groups: Int[Array, "slots"] | None,
    present: Bool[Array | np.ndarray, "slots"],
    num_groups: int,
    magnitude: Magnitude,
    axes: Axes = (),
) -> tuple[
    list[Float[Array, "{num_groups} _"]],
    list[UInt8[Array, "slots _"]],
    Float32[Array, "slots"],
]:
    """Eqs. 1 to 4 for slots whose task vectors are rows of `source`.

    Args:
      source: flat leaves `[rows, n]`, of which whole tiles are folded.
      rows: int32 `[slots]`, where each slot's task vector stands in `source`; None: in order.
      groups: int32 `[slots]`, the group that each slot folds into; None: all into one.
      present: bool `[slots]`.
      num_groups: number of groups.
      magnitude: "max" or "mean".
      axes: mesh axes over which parameters are sharded.

    Returns:
      Flat vectors `[groups, n]`, packed masks `[slots, bytes]`, scales `[slots]`.
    """
    where = np.arange(present.shape[0], dtype=np.int32) if rows is None else rows
    slots = grouped(groups, present.shape[0], num_groups)
    folded = [_fold_leaf(leaf, where, slots, present, magnitude) for leaf in source]
    sums = total_over(jnp.stack([sums for *_, sums in folded]).sum(axis=0), axes)
    vectors, masks = [vector for vector, *_ in folded], [masks for _, masks, _ in folded]
    return vectors, masks, scales_of(sums, groups, present)


def _fold_leaf(
    source: Float[Array, "rows n"],
    rows: Int[Array | np.ndarray, "slots"],
    slots: Grouped,
    present: Bool[Array | np.ndarray, "slots"],
    magnitude: Magnitude,
) -> tuple[Float[Array, "groups n"], UInt8[Array, "slots bytes"], Float32[Array, "slots 4"]]:
    """`fold_block` driven over the whole tiles of a flat leaf, as the program's platform does best.

    Returns:
      Vectors, packed masks, and sums over parameters of |tau_s| and |m_s * u|, then of these times
      `FAR`. What stands behind the tiles is not defined.
    """
    vector, masks, sums = _fold_flat(source, rows, *slots, present, magnitude=magnitude)
    return vector, masks, sums


def scanned(
    source: Float[Array, "rows n"],
    rows: Int[Array | np.ndarray, "slots"],
    slots: Grouped,
    present: Bool[Array | np.ndarray, "slots"],
    magnitude: Magnitude,
) -> tuple[Float[Array, "groups n"], UInt8[Array, "slots bytes"], Float32[Array, "slots 4"]]:
    """`fold_block` driven over a flat leaf by a scan: memory for one block, wherever it runs.

    Args:
      source: `[rows, n]`.
      rows: int32 `[slots]`, where each slot's task vector stands in `source`.
      slots: which slots each group has.
      present: bool `[slots]`.
      magnitude: "max" or "mean".

    Returns:
      As `_fold_leaf`.
    """
    size, count, dtype = source.shape[1], present.shape[0], source.dtype
    rows, present, slots = jax.tree.map(jnp.asarray, (rows, present, slots))
    bits, inputs = as_bits(source), (source, rows, *slots, present)

    def visit(block, carry):
        def task_vector(slot):
            x = from_bits(block.take(bits, rows[slot]), dtype).astype(jnp.float32)
            return jnp.where(present[slot], x, 0.0)

        def put_vector(carry, group, u):
            vector, masks, sums = carry
            return block.put(vector, group, as_bits(u)), masks, sums

        def put_slot(carry, slot, mask, magnitudes):
            vector, masks, sums = carry
            parts = (*magnitudes, *(FAR * x for x in magnitudes))
            added = jnp.concatenate([in_lanes(x) for x in parts])
            masks = block.put_bytes(masks, slot, pack_rows(mask))
            return vector, masks, add_row(sums, slot, added)

        memory = FoldMemory(task_vector, put_vector, put_slot, block.zeros(*inputs), dtype)
        return fold_block(memory, slots, magnitude, carry)

    carry = (
        as_bits(loop_zeros((slots.starts.shape[0] - 1, size), dtype, *inputs)),
        loop_zeros((count, mask_bytes(size)), jnp.uint8, *inputs),
        loop_zeros((count, 4 * TILE), jnp.float32, *inputs),
    )
    vector, masks, sums = over_blocks(size, visit, carry)
    return from_bits(vector, dtype), masks, sums.reshape(count, 4, TILE).sum(axis=2)


def scales_of(
    sums: Float32[Array, "slots 4"],
    groups: Int[Array, "slots"] | None,
    present: Bool[Array | np.ndarray, "slots"],
) -> Float32[Array, "slots"]:
    """Eq. 4, lambda_s = sum |tau_s| / sum |m_s * u|, and 0 where the denominator is 0.

    Args:
      sums: numerators and denominators, and both times `FAR`.
      groups: int32 `[slots]`, the group of each slot; None: all are in one.
      present: bool `[slots]`.

    Returns:
      float32 `[slots]`, finite.
    """
    near, far = sums[:, :2], sums[:, 2:]
    own, kept = jnp.where(jnp.isfinite(near).all(axis=1, keepdims=True), near, far).T
    limit = jnp.float32(jnp.finfo(jnp.float32).max)
    scales = jnp.minimum(own / jnp.where(kept > 0, kept, 1.0), limit)
    # Alone in its group, a slot is the group's vector: 1, without the two sums' rounding.
    held = present if groups is None else present[None, :] & (groups[:, None] == groups[None, :])
    alone = jnp.where(held.sum(axis=-1) == 1, 1.0, scales)
    return jnp.where(kept > 0, alone, 0.0)


def _shapes(
    source: jax.Array,
    rows: jax.Array,
    order: jax.Array,
    starts: jax.Array,
    present: jax.Array,
    *,
    magnitude: Magnitude,
) -> list[jax.ShapeDtypeStruct]:
    """Of the results of `_fold_leaf`."""
    size, count, groups = source.shape[1], present.shape[0], starts.shape[0] - 1
    return [
        jax.ShapeDtypeStruct((groups, size), source.dtype),
        jax.ShapeDtypeStruct((count, mask_bytes(size)), jnp.uint8),
        jax.ShapeDtypeStruct((count, 4), jnp.float32),
    ]


def _by_scan(source, rows, order, starts, present, *, magnitude):
    return scanned(source, rows, Grouped(order, starts), present, magnitude)


def _by_kernel(platform):
    def form(source, rows, order, starts, present, *, magnitude):
        from matu_jax.aggregation import kernels  # Pallas is heavy, and no one else's

        slots = Grouped(order, starts)
        if not kernels.fold_fits(source, present.shape[0], starts.shape[0] - 1, platform):
            return scanned(source, rows, slots, present, magnitude)
        kernel = {"cuda": kernels.fold_on_gpu, "tpu": kernels.fold_on_tpu}[platform]
        return kernel(source, rows, slots, present, magnitude=magnitude)

    return form


_fold_flat = where_lowered(
    "matu_fold", _shapes, _by_scan, cuda=_by_kernel("cuda"), tpu=_by_kernel("tpu")
)
