"""The client side, eqs. 1 to 4: folding task vectors into a unified, and rebuilding them."""

from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp

from matu_jax.aggregation.types import Magnitude, Slots, Unified, check_slots, check_unified
from matu_jax.trees import PyTree, as_floating, check_stacked

_LANES = 1024  # partial sums kept apart, so that float32 sums stay exact enough at 1e8 parameters


def flat_leaf(leaf: jax.Array, axes: int = 1) -> jax.Array:
    """Flattens the parameters of a leaf: `[rows, ...]` to `[rows, n]`, or `[...]` to `[n]`."""
    return leaf.reshape(*leaf.shape[:axes], -1)


def total(x: jax.Array) -> jax.Array:
    """Sums a float32 vector in parallel lanes; one running sum would stall at 2**24 terms."""
    whole = x.shape[0] // _LANES * _LANES
    lanes = x[:whole].reshape(-1, _LANES).sum(axis=0).sum()
    return lanes + x[whole:].sum()


def clip_to(x: jax.Array, dtype: Any) -> jax.Array:
    """Casts float32 to a storage dtype, with overflow to the largest finite number."""
    limit = jnp.asarray(float(jnp.finfo(dtype).max), x.dtype)
    return jnp.clip(x, -limit, limit).astype(dtype)


def loop_zeros(shape: tuple[int, ...], dtype: Any, *inputs: jax.Array) -> jax.Array:
    """Zeros that vary over the mesh axes of the inputs, as `shard_map` asks of loop carries."""
    nothing = sum(x.reshape(-1)[:0].astype(jnp.float32).sum() for x in inputs)
    return jnp.zeros(shape, dtype) + jnp.asarray(nothing, dtype)


def pack(mask: jax.Array) -> jax.Array:
    """Packs bools `[..., n]` into bytes `[..., ceil(n / 8)]`, least significant bit first."""
    return jnp.packbits(mask, axis=-1, bitorder="little")


def unpack(packed: jax.Array, size: int) -> jax.Array:
    """Unpacks bytes `[..., ceil(size / 8)]` into bools `[..., size]`."""
    return jnp.unpackbits(packed, axis=-1, count=size, bitorder="little").astype(jnp.bool_)


def modulated(vector: jax.Array, mask: jax.Array, scale: jax.Array) -> jax.Array:
    """Eq. 4 for flat parameters `[..., n]` and packed masks; float32, kept finite."""
    product = scale[..., None] * vector.astype(jnp.float32)
    product = jnp.where(unpack(mask, vector.shape[-1]), product, 0.0)
    return clip_to(product, vector.dtype).astype(jnp.float32)


def fold(
    source: list[jax.Array],
    rows: jax.Array,
    groups: jax.Array,
    present: jax.Array,
    num_groups: int,
    magnitude: Magnitude,
) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """Eqs. 1 to 4 for slots whose task vectors are rows of `source`.

    Args:
      source: flat leaves `[rows, n]`.
      rows: int32 `[slots]`, where each slot's task vector stands in `source`.
      groups: int32 `[slots]`, the group that each slot folds into.
      present: bool `[slots]`.
      num_groups: number of groups.
      magnitude: "max" or "mean".

    Returns:
      Flat vectors `[groups, n]`, packed masks `[slots, bytes]`, scales `[slots]`.
    """

    def row(leaf, index, here):
        return jnp.where(here, leaf[index].astype(jnp.float32), 0.0)

    def elect(sums, slot):
        index, group, here = slot
        values = [row(leaf, index, here) for leaf in source]
        largest = jnp.stack([jnp.max(jnp.abs(x), initial=0.0) for x in values]).max()
        return [a.at[group].add(x) for a, x in zip(sums, values, strict=True)], largest

    slots = (rows, groups, present)
    zeros = [loop_zeros((num_groups, x.shape[1]), jnp.float32, x, *slots) for x in source]
    sums, largest = jax.lax.scan(elect, zeros, slots)

    def agreeing(leaf, total, slot):
        """|tau_s| where its sign is the elected one, else 0."""
        index, group, here = slot
        elected = total[group]
        x = row(leaf, index, here)
        return jnp.maximum(jnp.where(elected > 0, x, jnp.where(elected < 0, -x, 0.0)), 0.0)

    if magnitude == "max":

        def grow(tops, slot):
            return [
                top.at[slot[1]].max(agreeing(leaf, total, slot))
                for top, leaf, total in zip(tops, source, sums, strict=True)
            ], None

        sizes, _ = jax.lax.scan(grow, zeros, slots)
        broken = [jnp.isinf(size) for size in sizes]
    else:

        def gather(carry, slot):
            totals, counts = carry
            values = [agreeing(leaf, t, slot) for leaf, t in zip(source, sums, strict=True)]
            # Halving keeps a sum of finite numbers near the largest float32 finite.
            totals = [t.at[slot[1]].add(x / len_slots) for t, x in zip(totals, values, strict=True)]
            counts = [
                c.at[slot[1]].add((x > 0).astype(c.dtype))
                for c, x in zip(counts, values, strict=True)
            ]
            return (totals, counts), None

        len_slots = float(2 ** (rows.shape[0] - 1).bit_length())
        none = [zero.astype(jnp.int32) for zero in zeros]
        (totals, counts), _ = jax.lax.scan(gather, (zeros, none), slots)
        sizes = [
            t / jnp.maximum(c, 1).astype(jnp.float32) * len_slots
            for t, c in zip(totals, counts, strict=True)
        ]
        broken = [jnp.isinf(t) for t in totals]
    # A mean that overflows is clipped; an infinity that came in stays, for the server to refuse.
    vectors = [
        jnp.where(
            bad, (jnp.sign(t) * jnp.inf).astype(x.dtype), clip_to(jnp.sign(t) * size, x.dtype)
        )
        for t, size, bad, x in zip(sums, sizes, broken, source, strict=True)
    ]

    held = jnp.zeros(num_groups, jnp.int32).at[groups].add(present.astype(jnp.int32))

    def mask_and_rescale(_, slot):
        index, group, here, top = slot
        # Both sums are taken relative to the slot's largest entry, so that neither overflows.
        unit = jnp.where(top > 0, top, 1.0)
        packed, own, kept = [], jnp.float32(0), jnp.float32(0)
        for leaf, vector in zip(source, vectors, strict=True):
            x, u = row(leaf, index, here), vector[group].astype(jnp.float32)
            mask = ((x > 0) & (u > 0)) | ((x < 0) & (u < 0))
            packed.append(pack(mask))
            own += total(jnp.abs(x) / unit)
            kept += total(jnp.where(mask, jnp.abs(u) / unit, 0.0))
        limit = jnp.float32(jnp.finfo(jnp.float32).max)
        scale = jnp.minimum(own / jnp.where(kept > 0, kept, 1.0), limit)
        # Alone in its group, a slot is the group's vector: 1, without the two sums' rounding.
        scale = jnp.where(kept > 0, jnp.where(held[group] == 1, 1.0, scale), 0.0)
        return None, (packed, scale)

    _, (masks, scales) = jax.lax.scan(mask_and_rescale, None, (*slots, largest))
    return vectors, masks, scales


@partial(jax.jit, static_argnames=("magnitude",))
def _unify(vectors: PyTree, slots: Slots | None, magnitude: Magnitude) -> Unified:
    leaves, treedef = jax.tree.flatten(vectors)
    count = leaves[0].shape[0]
    if slots is None:
        groups, present, num_groups = jnp.zeros(count, jnp.int32), jnp.ones(count, jnp.bool_), 1
    else:
        groups, present, num_groups = slots.client, slots.weight > 0, slots.num_clients
    flat, masks, scales = fold(
        [flat_leaf(leaf) for leaf in leaves],
        jnp.arange(count),
        groups,
        present,
        num_groups,
        magnitude,
    )
    shaped = [
        vector.reshape(leaf.shape[1:] if slots is None else (num_groups, *leaf.shape[1:]))
        for vector, leaf in zip(flat, leaves, strict=True)
    ]
    return Unified(treedef.unflatten(shaped), treedef.unflatten(masks), scales)


def unify(vectors: PyTree, slots: Slots | None = None, *, magnitude: Magnitude = "max") -> Unified:
    """Folds task vectors into one vector per client, a mask and a scale per slot (eqs. 1 to 4).

    Args:
      vectors: task vectors, leaves `[slots, ...]` of float32, bfloat16 or float16.
      slots: which client each row belongs to; None folds all rows into one group.
      magnitude: eq. 2 takes the "max" of the agreeing magnitudes (EMR-Merging) or their "mean".

    Returns:
      `Unified`: vector leaves `[clients, ...]` (`[...]` without slots) in the storage dtype, masks
      `[slots, bytes]`, scales `[slots]`. Masks and scales are those of the vector as stored.

    Raises:
      ValueError: for an unknown magnitude, or trees and slots that do not fit, naming the leaves.

    Example:
      >>> import jax.numpy as jnp, matu_jax as matu
      >>> unified = matu.unify({"w": jnp.array([[1.0, -2.0], [3.0, 1.0]])})
      >>> unified.vector["w"].tolist(), unified.scales.tolist()
      ([3.0, -2.0], [0.6000000238418579, 1.3333333730697632])
    """
    if magnitude not in get_args(Magnitude):
        raise ValueError(f"unify: magnitude: found {magnitude!r}, expected 'max' or 'mean'.")
    vectors = as_floating(vectors, "unify: vectors")
    rows = None
    if slots is not None:
        slots = check_slots(slots, "unify")
        rows = slots.client.shape[0]
    check_stacked(vectors, "unify: vectors", rows=rows)
    return _unify(vectors, slots, magnitude)


@jax.jit
def modulate_jit(unified: Unified, slots: Slots | None) -> PyTree:
    """`modulate` without its checks."""

    def leaf(vector, mask):
        count = mask.shape[0]
        if slots is None:
            shape, flat = vector.shape, jnp.broadcast_to(vector.reshape(-1), (count, vector.size))
        else:
            shape, flat = vector.shape[1:], flat_leaf(vector)[slots.client]
        return modulated(flat, mask, unified.scales).astype(vector.dtype).reshape(count, *shape)

    return jax.tree.map(leaf, unified.vector, unified.masks)


def modulate(unified: Unified, slots: Slots | None = None) -> PyTree:
    """Rebuilds each slot's task vector from a unified: scale * mask * vector (eq. 4).

    Args:
      unified: from `unify`, or a download.
      slots: the slots it was folded with; None for a single group.

    Returns:
      Task vectors, leaves `[slots, ...]` in the storage dtype. For a group of one slot it equals
      what went into `unify`.

    Raises:
      ValueError: if masks, scales or vector do not fit each other or the slots.
    """
    rows = jnp.shape(unified.scales)[0] if jnp.ndim(unified.scales) == 1 else -1
    groups = None
    if slots is not None:
        slots = check_slots(slots, "modulate")
        rows, groups = slots.client.shape[0], slots.num_clients
    return modulate_jit(
        check_unified(unified, "modulate: unified", rows=rows, groups=groups), slots
    )
