"""The client side, eqs. 1 to 4: folding task vectors into a unified, and rebuilding them."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from matu_jax.aggregation.choices import Magnitude
from matu_jax.aggregation.joining import joining
from matu_jax.aggregation.sharding import (
    Axes,
    ParameterSharding,
    check_mesh,
    largest_over,
    total_over,
)
from matu_jax.aggregation.types import Slots, Unified, check_slots, check_unified
from matu_jax.trees import PyTree, as_floating, check_stacked

_LANES = 1024  # partial sums kept apart, so that float32 sums stay exact enough at 1e8 parameters
_BLOCK = 1 << 15  # parameters that are visited at a time on CPU; a multiple of 8, for the masks


def flat_leaf(leaf: jax.Array, axes: int = 1) -> jax.Array:
    """Flattens the parameters of a leaf: `[rows, ...]` to `[rows, n]`, or `[...]` to `[n]`."""
    return leaf.reshape(*leaf.shape[:axes], -1)


def total(x: jax.Array) -> jax.Array:
    """Sums a float32 array over its last axis in parallel lanes.

    One running sum would stall at 2**24 terms. Four quarters are added first, in one sweep.
    """
    quarter = x.shape[-1] // (4 * _LANES) * _LANES

    def part(start: int, stop: int) -> jax.Array:
        return jax.lax.slice_in_dim(x, start, stop, axis=-1)

    first, second, third, fourth = (part(i * quarter, (i + 1) * quarter) for i in range(4))
    lanes = (first + second + third + fourth).reshape(*x.shape[:-1], -1, _LANES)
    return lanes.sum(axis=-2).sum(axis=-1) + part(4 * quarter, x.shape[-1]).sum(axis=-1)


def clip_to(x: jax.Array, dtype: Any) -> jax.Array:
    """Casts float32 to a storage dtype, with overflow to the largest finite number."""
    limit = jnp.asarray(float(jnp.finfo(dtype).max), x.dtype)
    return jnp.clip(x, -limit, limit).astype(dtype)


def loop_zeros(shape: tuple[int, ...], dtype: Any, *inputs: jax.Array) -> jax.Array:
    """Zeros that vary over the mesh axes of the inputs, as `shard_map` asks of loop carries."""
    nothing = sum(x.reshape(-1)[:0].astype(jnp.float32).sum() for x in inputs)
    return jnp.zeros(shape, dtype) + jnp.asarray(nothing, dtype)


def as_bits(x: jax.Array) -> jax.Array:
    """16-bit floats as whole numbers of the same bits; others as they are.

    What a loop takes pieces of, or puts them into, is kept so: XLA on CPU would turn a whole array
    of 16-bit floats into float32, and back.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def from_bits(bits: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `as_bits`."""
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)


def pack(mask: jax.Array) -> jax.Array:
    """Packs bools `[..., n]` into bytes `[..., ceil(n / 8)]`, least significant bit first."""
    return jnp.packbits(mask, axis=-1, bitorder="little")


def unpack(packed: jax.Array, size: int) -> jax.Array:
    """Unpacks bytes `[..., ceil(size / 8)]` into bools `[..., size]`."""
    return joined_eighths(_eighths(packed), size)


def _eighths(packed: jax.Array) -> jax.Array:
    """Bytes `[..., bytes]` to the bools of their bits, `[..., bytes, 8]`."""
    bits = jnp.left_shift(jnp.uint8(1), jnp.arange(8, dtype=jnp.uint8))
    return (packed[..., None] & bits.reshape([1] * packed.ndim + [8])) != 0


def joined_eighths(x: jax.Array, size: int) -> jax.Array:
    """`[..., bytes, 8]` to `[..., size]`."""
    return x.reshape(*x.shape[:-2], -1)[..., :size]


def _block_size(size: int) -> int:
    """Parameters to visit at a time: on CPU, what stays in cache; if possible, without a rest.

    A rest is a second program, as long to compile as the first.
    """
    if size <= _BLOCK or jax.default_backend() != "cpu":
        return max(size, 1)
    fewest = -(-size // _BLOCK)
    even = [n for n in range(fewest, 3 * fewest) if size % (8 * n) == 0]
    return size // even[0] if even else _BLOCK


def _lanes(length: int) -> int:
    """How many sums are kept apart: on CPU, what one vectorised sweep makes of a block."""
    return length // 4 if jax.default_backend() == "cpu" and length % 4 == 0 else 1


def over_blocks(size: int, visit: Callable[..., Any], carry: Any) -> Any:
    """Carries `(start, length, carry) -> carry` over a leaf's blocks of parameters.

    Starts are multiples of 8; the length is static.
    """
    length = _block_size(size)
    whole, rest = divmod(size, length)
    if whole:
        carry = jax.lax.fori_loop(
            0, whole, lambda i, carry: visit(i * length, length, carry), carry
        )
    return visit(whole * length, rest, carry) if rest else carry


def over_groups(groups: jax.Array, step: Callable[..., Any], carry: Any) -> Any:
    """Carries `(carry, slot, group, first) -> carry` over slots, one group after the other.

    First says whether a slot is the first of its group, so that one running total serves all.
    """
    order = jnp.argsort(groups, stable=True)
    ordered = groups[order]
    first = jnp.concatenate([jnp.ones(1, jnp.bool_), ordered[1:] != ordered[:-1]])
    return jax.lax.fori_loop(
        0, groups.shape[0], lambda i, carry: step(carry, order[i], ordered[i], first[i]), carry
    )


def modulated(vector: jax.Array, mask: jax.Array, scale: jax.Array) -> jax.Array:
    """Eq. 4 for flat parameters and packed masks; float32, kept finite.

    Args:
      vector: `[..., n]`.
      mask: `[..., bytes]`.
      scale: `[...]`.

    Returns:
      `[..., bytes, 8]`, with zeros behind the n-th: in this shape XLA on CPU uses SIMD.
    """
    product = scale[..., None] * vector.astype(jnp.float32)
    behind = 8 * mask.shape[-1] - product.shape[-1]
    product = jnp.pad(product, [(0, 0)] * (product.ndim - 1) + [(0, behind)])
    product = jnp.where(_eighths(mask), product.reshape(*mask.shape, 8), 0.0)
    return clip_to(product, vector.dtype).astype(jnp.float32)


def fold(
    source: list[jax.Array],
    rows: jax.Array | None,
    groups: jax.Array,
    present: jax.Array,
    num_groups: int,
    magnitude: Magnitude,
    axes: Axes = (),
) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """Eqs. 1 to 4 for slots whose task vectors are rows of `source`.

    On CPU the parameters are visited in blocks, so that task vectors are read from memory about
    once and nothing of their size is made besides the results; elsewhere a leaf's float32 sums
    `[groups, n]` are. Where sums of magnitudes overflow (and always under `vmap`, which takes both
    branches), the vectors are gone through once more.

    Args:
      source: flat leaves `[rows, n]`.
      rows: int32 `[slots]`, where each slot's task vector stands in `source`; None: in order.
      groups: int32 `[slots]`, the group that each slot folds into.
      present: bool `[slots]`.
      num_groups: number of groups.
      magnitude: "max" or "mean".
      axes: mesh axes over which parameters are sharded.

    Returns:
      Flat vectors `[groups, n]`, packed masks `[slots, bytes]`, scales `[slots]`.
    """
    folded = [_fold_leaf(x, rows, groups, present, num_groups, magnitude) for x in source]
    vectors, masks = [vector for vector, *_ in folded], [masks for _, masks, _ in folded]
    sums = total_over(jnp.stack([sums for *_, sums in folded]).sum(axis=0), axes)
    exact = jnp.isfinite(sums).all(axis=0)
    own, kept = jax.lax.cond(
        exact.all(),
        lambda: sums,
        lambda: jnp.where(
            exact, sums, _relative_sums(source, rows, groups, present, vectors, masks, axes)
        ),
    )
    limit = jnp.float32(jnp.finfo(jnp.float32).max)
    scales = jnp.minimum(own / jnp.where(kept > 0, kept, 1.0), limit)
    # Alone in its group, a slot is the group's vector: 1, without the two sums' rounding.
    held = jnp.zeros(num_groups, jnp.int32).at[groups].add(present.astype(jnp.int32))
    scales = jnp.where(kept > 0, jnp.where(held[groups] == 1, 1.0, scales), 0.0)
    return vectors, masks, scales


def _relative_sums(
    source: list[jax.Array],
    rows: jax.Array | None,
    groups: jax.Array,
    present: jax.Array,
    vectors: list[jax.Array],
    masks: list[jax.Array],
    axes: Axes,
) -> jax.Array:
    """What scales are made of, relative to each slot's largest entry: float32 `[2, slots]`.

    For task vectors whose sums of magnitudes are beyond float32.
    """

    def row_of(leaf, row):
        return from_bits(as_bits(leaf)[row], leaf.dtype).astype(jnp.float32)

    def of_slot(slot):
        where = slot if rows is None else rows[slot]
        own = [jnp.where(present[slot], jnp.abs(row_of(x, where)), 0.0) for x in source]
        kept = [
            jnp.where(unpack(mask[slot], u.shape[1]), jnp.abs(row_of(u, groups[slot])), 0.0)
            for u, mask in zip(vectors, masks, strict=True)
        ]
        top = largest_over(jnp.stack([x.max(initial=0.0) for x in own]).max(), axes)
        unit = jnp.where(top > 0, top, 1.0)
        sums = jnp.stack([sum(total(x / unit) for x in of) for of in (own, kept)])
        return total_over(sums, axes)

    return jax.lax.map(of_slot, jnp.arange(groups.shape[0])).T


def _fold_leaf(
    leaf: jax.Array,
    rows: jax.Array | None,
    groups: jax.Array,
    present: jax.Array,
    num_groups: int,
    magnitude: Magnitude,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`fold` for one leaf, with what scales are made of: float32 sums `[2, slots]`.

    They are the sums of magnitudes of a slot's task vector, and of the vector where its mask is
    set; infinite where they overflow.
    """
    count, (height, size), dtype = groups.shape[0], leaf.shape, leaf.dtype
    inputs = (leaf, groups, present) if rows is None else (leaf, rows, groups, present)
    together = min(8, count)  # slots that share a byte
    source = as_bits(leaf)

    def block(start, length, carry):
        vector, masks, own, kept = carry
        zero = loop_zeros((1, length), jnp.float32, *inputs)

        def piece(whole, row, part=0, parts=1):
            where = row, start + part * (length // parts)
            x = jax.lax.dynamic_slice(whole, where, (1, length // parts))
            return from_bits(x, dtype).astype(jnp.float32)

        def row(slot, part=0, parts=1):
            x = piece(source, slot if rows is None else rows[slot], part, parts)
            return jnp.where(present[slot], x, 0.0)

        def compared(slot, part=0, parts=1):
            x, u = row(slot, part, parts), piece(vector, groups[slot], part, parts)
            return u, ((x > 0) & (u > 0)) | ((x < 0) & (u < 0))

        def put(whole, row, value):
            return jax.lax.dynamic_update_slice(whole, as_bits(value), (row, start))

        def largest(sum_, high, low):
            # Of the elected sign and the largest magnitude: the largest number, or the smallest.
            # An infinity that came in stays, and so does a NaN, for the server to refuse.
            return jnp.where(sum_ > 0, high, jnp.where(sum_ < 0, low, 0.0 * sum_)).astype(dtype)

        def grow_all(chunk, carry):
            sum_, high, low = carry
            for i in range(together):
                slot = chunk * together + i
                x = jnp.where(slot < count, row(jnp.minimum(slot, count - 1)), 0.0)
                sum_, high, low = sum_ + x, jnp.maximum(high, x), jnp.minimum(low, x)
            return sum_, high, low

        def elect(slot, elected):
            before = jax.lax.dynamic_slice(elected, (groups[slot], 0), (1, length))
            return jax.lax.dynamic_update_slice(elected, before + row(slot), (groups[slot], 0))

        def grow(slot, vector):
            sum_ = jax.lax.dynamic_slice(elected, (groups[slot], 0), (1, length))
            x, u = row(slot), piece(vector, groups[slot])
            return put(vector, groups[slot], largest(sum_, jnp.maximum(u, x), jnp.minimum(u, x)))

        def average(carry, slot, group, first):
            vector, sum_, many = carry
            x, sign = row(slot), jax.lax.dynamic_slice(elected, (group, 0), (1, length))
            agreeing = jnp.maximum(jnp.where(sign > 0, x, jnp.where(sign < 0, -x, 0.0)), 0.0)
            # Halving keeps a sum of finite numbers near the largest float32 finite.
            sum_ = jnp.where(first, 0.0, sum_) + agreeing / halved
            many = jnp.where(first, 0.0, many) + (agreeing > 0).astype(jnp.float32)
            mean = jnp.sign(sign) * (sum_ / jnp.maximum(many, 1.0) * halved)
            # A mean that overflows is clipped; an infinity that came in stays.
            broken = (jnp.sign(sign) * jnp.inf).astype(dtype)
            value = jnp.where(jnp.isinf(sum_), broken, clip_to(mean, dtype))
            return put(vector, group, value), sum_, many

        if magnitude == "max" and num_groups == 1:
            chunks = -(-count // together)
            extremes = jax.lax.fori_loop(0, chunks, grow_all, (zero, zero, zero))
            vector = put(vector, 0, largest(*extremes))
        else:
            elected = loop_zeros((num_groups, length), jnp.float32, *inputs)
            elected = jax.lax.fori_loop(0, count, elect, elected)
            if magnitude == "max":
                vector = jax.lax.fori_loop(0, count, grow, vector)
            else:
                halved = float(2 ** (count - 1).bit_length())
                vector, *_ = over_groups(groups, average, (vector, zero, zero))

        def mark(chunk, masks):
            """Masks of eight slots: a byte per parameter with a bit of each, then turned around."""

            def slot_of(i):
                return jnp.minimum(chunk * together + i, count - 1)

            def collect(i, bytes_):
                bit = compared(slot_of(i))[1].astype(jnp.uint8) << i.astype(jnp.uint8)
                return jax.lax.dynamic_update_slice(bytes_, bytes_[:, :length] | bit, (0, 0))

            def turn(i, masks):
                eighths = bytes_.reshape(-1, 8)
                bits = [((eighths[:, k] >> i.astype(jnp.uint8)) & 1) << k for k in range(8)]
                byte = functools.reduce(jnp.bitwise_or, bits)[None]
                return jax.lax.dynamic_update_slice(masks, byte, (slot_of(i), start // 8))

            bytes_ = loop_zeros((1, -(-length // 8) * 8), jnp.uint8, *inputs)
            bytes_ = jax.lax.fori_loop(0, together, collect, bytes_)
            return jax.lax.fori_loop(0, together, turn, masks)

        def add(sums, row, sizes):
            lanes = _lanes(length)
            if lanes == 1:
                part = total(sizes(0, 1))[:, None]
            else:
                parts = length // lanes
                part = functools.reduce(jnp.add, [sizes(i, parts) for i in range(parts)])
            before = jax.lax.dynamic_slice(sums, (row, 0), part.shape)
            return jax.lax.dynamic_update_slice(sums, before + part, (row, 0))

        def measure(row, own):
            return add(own, row, lambda *part: jnp.abs(piece(source, row, *part)))

        def compare(slot, kept):
            def sizes(*part):
                u, agree = compared(slot, *part)
                return jnp.where(agree, jnp.abs(u), 0.0)

            return add(kept, slot, sizes)

        masks = jax.lax.fori_loop(0, -(-count // together), mark, masks)
        own = jax.lax.fori_loop(0, height, measure, own)
        kept = jax.lax.fori_loop(0, count, compare, kept)
        return vector, masks, own, kept

    lanes = _lanes(_block_size(size))
    carry = (
        as_bits(loop_zeros((num_groups, size), dtype, *inputs)),
        loop_zeros((count, -(-size // 8)), jnp.uint8, *inputs),
        loop_zeros((height, lanes), jnp.float32, *inputs),
        loop_zeros((count, lanes), jnp.float32, *inputs),
    )
    vector, masks, own, kept = over_blocks(size, block, carry)
    own = total(own) if rows is None else total(own)[rows]
    sums = jnp.stack([jnp.where(present, own, 0.0), total(kept)])
    return from_bits(vector, dtype), masks, sums


@partial(jax.jit, static_argnames=("magnitude", "mesh"))
def _unify(
    vectors: PyTree, slots: Slots | None, magnitude: Magnitude, mesh: Mesh | None
) -> Unified:
    leaves, treedef = jax.tree.flatten(vectors)
    count = leaves[0].shape[0]
    if slots is None:
        groups, present, num_groups = jnp.zeros(count, jnp.int32), jnp.ones(count, jnp.bool_), 1
    else:
        groups, present, num_groups = slots.client, slots.weight > 0, slots.num_clients
    flat = [flat_leaf(leaf) for leaf in leaves]
    join = joining(flat)
    flat = join.vectors(flat)
    sharding = ParameterSharding(mesh, [x.shape[1] for x in flat])

    def work(flat, rest):
        groups, present = rest
        return fold(flat, None, groups, present, num_groups, magnitude, sharding.axes)

    columns, out = sharding.pad_vectors(flat), (True, True, False)
    vector, masks, scales = sharding.run(work, columns, (groups, present), out)
    vector, masks = sharding.unpad_vectors(vector), sharding.unpad_masks(masks)
    shaped = [
        vector.reshape(leaf.shape[1:] if slots is None else (num_groups, *leaf.shape[1:]))
        for vector, leaf in zip(join.leaves(vector), leaves, strict=True)
    ]
    return Unified(treedef.unflatten(shaped), treedef.unflatten(join.leaf_masks(masks)), scales)


def unify(
    vectors: PyTree,
    slots: Slots | None = None,
    *,
    magnitude: Magnitude = "mean",
    mesh: Mesh | None = None,
) -> Unified:
    """Folds task vectors into one vector per client, a mask and a scale per slot (eqs. 1 to 4).

    Args:
      vectors: task vectors, leaves `[slots, ...]` of float32, bfloat16 or float16.
      slots: which client each row belongs to; None folds all rows into one group.
      magnitude: eq. 2 takes the "max" of the agreeing magnitudes (EMR-Merging) or their "mean".
      mesh: devices over which the parameters are sharded, of axes of type Auto; None = all on one.
        Of a leaf of more than 65,536 parameters nothing crosses between them but sums, if it is
        sharded over them already, along its first axis of parameters, and has a multiple of 8
        parameters per device; smaller leaves are put together first.

    Returns:
      `Unified`: vector leaves `[clients, ...]` (`[...]` without slots) in the storage dtype, masks
      `[slots, bytes]`, scales `[slots]`. Masks and scales are those of the vector as stored.

    Raises:
      ValueError: for an unknown magnitude, a mesh whose axes are not Auto, or trees and slots that
        do not fit, naming the leaves.

    Example:
      >>> import jax.numpy as jnp, matu_jax as matu
      >>> unified = matu.unify({"w": jnp.array([[1.0, -2.0], [3.0, 1.0]])})
      >>> unified.vector["w"].tolist(), unified.scales.tolist()
      ([2.0, -2.0], [0.75, 2.0])
    """
    if magnitude not in get_args(Magnitude):
        raise ValueError(f"unify: magnitude: found {magnitude!r}, expected 'max' or 'mean'.")
    vectors = as_floating(vectors, "unify: vectors")
    rows = None
    if slots is not None:
        slots = check_slots(slots, "unify")
        rows = slots.client.shape[0]
    check_stacked(vectors, "unify: vectors", rows=rows)
    return _unify(vectors, slots, magnitude, check_mesh(mesh, "unify"))


@jax.jit
def modulate_jit(unified: Unified, slots: Slots | None) -> PyTree:
    """`modulate` without its checks."""

    def leaf(vector, mask):
        count = mask.shape[0]
        if slots is None:
            shape, flat = vector.shape, jnp.broadcast_to(vector.reshape(-1), (count, vector.size))
        else:
            shape, flat = vector.shape[1:], flat_leaf(vector)[slots.client]
        rows = joined_eighths(modulated(flat, mask, unified.scales), flat.shape[1])
        return rows.astype(vector.dtype).reshape(count, *shape)

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
