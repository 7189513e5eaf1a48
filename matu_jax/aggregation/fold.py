"""Eqs. 1 to 4 on flat leaves: task vectors folded into unified vectors, masks and scales.

The notation is that of `matu_jax.aggregation`: slot s has the task vector tau_s; a group of slots
(a client's, or all of them) has the elected signs sigma, the magnitudes mu and the unified vector
u = sigma * mu; a slot has the mask m_s and the scale lambda_s.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped, UInt8

from matu_jax.aggregation.blocks import (
    Block,
    add_total,
    lanes_of,
    loop_zeros,
    over_blocks,
    over_groups,
    put_row,
    take_row,
    total,
)
from matu_jax.aggregation.choices import Magnitude
from matu_jax.aggregation.sharding import Axes, largest_over, total_over
from matu_jax.aggregation.storage import as_bits, clip_to, from_bits, packed_bit, unpack


def fold(
    source: list[Float[Array, "rows _"]],
    rows: Int[Array, "slots"] | None,
    groups: Int[Array, "slots"],
    present: Bool[Array, "slots"],
    num_groups: int,
    magnitude: Magnitude,
    axes: Axes = (),
) -> tuple[
    list[Float[Array, "{num_groups} _"]],
    list[UInt8[Array, "slots _"]],
    Float32[Array, "slots"],
]:
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
    stacks = [_Stack(as_bits(x), x.dtype, rows, groups, present, num_groups) for x in source]
    folded = [_fold_leaf(stack, magnitude) for stack in stacks]
    vectors, masks = [vector for vector, *_ in folded], [masks for _, masks, _ in folded]
    sums = total_over(jnp.stack([sums for *_, sums in folded]).sum(axis=0), axes)
    exact = jnp.isfinite(sums).all(axis=0)
    own, kept = jax.lax.cond(
        exact.all(),
        lambda: sums,
        lambda: jnp.where(exact, sums, _relative_sums(stacks, vectors, masks, axes)),
    )
    return vectors, masks, _scales(own, kept, groups, present, num_groups)


class _Stack(NamedTuple):
    """The task vectors of all slots in one flat leaf, and the groups that they fold into.

    Attributes:
      source: `[rows, n]` in the storage dtype, its 16-bit floats `as_bits`.
      dtype: the storage dtype.
      rows: int32 `[slots]`, where each slot's task vector stands in `source`; None: in order.
      groups: int32 `[slots]`.
      present: bool `[slots]`.
      num_groups: number of groups.
    """

    source: Shaped[Array, "rows n"]
    dtype: Any
    rows: Int[Array, "slots"] | None
    groups: Int[Array, "slots"]
    present: Bool[Array, "slots"]
    num_groups: int

    @property
    def slots(self) -> int:
        """Number of slots."""
        return self.groups.shape[0]

    @property
    def together(self) -> int:
        """How many slots are visited at a time: those whose mask bits share a byte."""
        return min(8, self.slots)

    def zeros(self, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        """`loop_zeros` that vary as the task vectors do."""
        inputs = [self.source, self.groups, self.present]
        return loop_zeros(shape, dtype, *inputs, *([] if self.rows is None else [self.rows]))

    def numbers(
        self, array: Shaped[Array, "rows n"], row: Any, block: Block
    ) -> Float32[Array, "1 {block.length}"]:
        """A block of one row of `[rows, n]`, of the source or what is made of it, in float32."""
        return from_bits(block.take(array, row), self.dtype).astype(jnp.float32)

    def task_vector(self, slot: Any, block: Block) -> Float32[Array, "1 {block.length}"]:
        """tau_s, zeros where the slot is absent: float32 `[1, length]`."""
        x = self.numbers(self.source, slot if self.rows is None else self.rows[slot], block)
        return jnp.where(self.present[slot], x, 0.0)


def _fold_leaf(
    stack: _Stack, magnitude: Magnitude
) -> tuple[Float[Array, "groups n"], UInt8[Array, "slots bytes"], Float32[Array, "2 slots"]]:
    """Eqs. 1 to 3 for one leaf, and the sums of eq. 4.

    Returns:
      Vectors `[groups, n]` in the storage dtype, packed masks `[slots, bytes]`, and float32 sums
      `[2, slots]`: of |tau_s|, and of |m_s * u|, infinite where they overflow.
    """
    height, size = stack.source.shape

    def visit(block, carry):
        vector, masks, own, kept = carry
        if magnitude == "max" and stack.num_groups == 1:
            vector = _largest_in_one_group(stack, block, vector)
        elif magnitude == "max":
            vector = _largest_agreeing(stack, block, _elected(stack, block), vector)
        else:
            vector = _mean_agreeing(stack, block, _elected(stack, block), vector)
        masks = _mark(stack, block, vector, masks)
        own = _add_own_magnitudes(stack, block, own)
        kept = _add_kept_magnitudes(stack, block, vector, kept)
        return vector, masks, own, kept

    lanes = lanes_of(size)
    carry = (
        as_bits(stack.zeros((stack.num_groups, size), stack.dtype)),
        stack.zeros((stack.slots, -(-size // 8)), jnp.uint8),
        stack.zeros((height, lanes)),
        stack.zeros((stack.slots, lanes)),
    )
    vector, masks, own, kept = over_blocks(size, visit, carry)
    own = total(own) if stack.rows is None else total(own)[stack.rows]
    sums = jnp.stack([jnp.where(stack.present, own, 0.0), total(kept)])
    return from_bits(vector, stack.dtype), masks, sums


def _elected(stack: _Stack, block: Block) -> Float32[Array, "groups {block.length}"]:
    """Eq. 1's sums of tau_s, whose signs sigma are elected: float32 `[groups, length]`."""

    def add(slot, sums):
        group = stack.groups[slot]
        return put_row(sums, group, take_row(sums, group) + stack.task_vector(slot, block))

    return jax.lax.fori_loop(0, stack.slots, add, stack.zeros((stack.num_groups, block.length)))


def _largest(
    sums: Float32[Array, "1 length"],
    high: Float32[Array, "1 length"],
    low: Float32[Array, "1 length"],
    dtype: Any,
) -> Float[Array, "1 length"]:
    """Eq. 2, u = sigma * max |tau_s|, from the largest numbers and the smallest ones, 0 included.

    Of the elected sign and the largest magnitude is the largest number, or the smallest. An
    infinity that came in stays, and so does a NaN, for the server to refuse.

    Args:
      sums: those of eq. 1, float32 `[1, length]`.
      high: the largest of 0 and all tau_s, float32 `[1, length]`.
      low: the smallest of 0 and all tau_s, float32 `[1, length]`.
      dtype: the storage dtype, of the result `[1, length]`.
    """
    return jnp.where(sums > 0, high, jnp.where(sums < 0, low, 0.0 * sums)).astype(dtype)


def _largest_in_one_group(
    stack: _Stack, block: Block, vector: Shaped[Array, "1 n"]
) -> Shaped[Array, "1 n"]:
    """Eqs. 1 and 2 with the maximum, in one sweep over the slots: of all of them in one group.

    Returns:
      `vector`, `[1, n]` as bits, with this block of u.
    """

    def grow(chunk, carry):
        sums, high, low = carry
        for i in range(stack.together):
            slot = chunk * stack.together + i
            last = stack.slots - 1
            x = jnp.where(slot <= last, stack.task_vector(jnp.minimum(slot, last), block), 0.0)
            sums, high, low = sums + x, jnp.maximum(high, x), jnp.minimum(low, x)
        return sums, high, low

    zero = stack.zeros((1, block.length))
    chunks = -(-stack.slots // stack.together)
    sums, high, low = jax.lax.fori_loop(0, chunks, grow, (zero, zero, zero))
    return block.put(vector, 0, as_bits(_largest(sums, high, low, stack.dtype)))


def _largest_agreeing(
    stack: _Stack,
    block: Block,
    elected: Float32[Array, "groups length"],
    vector: Shaped[Array, "groups n"],
) -> Shaped[Array, "groups n"]:
    """Eq. 2 with the maximum: u = sigma * max |tau_s| over slots with sgn(tau_s) = sigma.

    Args:
      stack: the task vectors.
      block: the parameters.
      elected: the sums of eq. 1, float32 `[groups, length]`.
      vector: `[groups, n]` as bits, zeros in this block.

    Returns:
      `vector` with this block of u.
    """

    def grow(slot, vector):
        group = stack.groups[slot]
        x, u = stack.task_vector(slot, block), stack.numbers(vector, group, block)
        grown = _largest(
            take_row(elected, group), jnp.maximum(u, x), jnp.minimum(u, x), stack.dtype
        )
        return block.put(vector, group, as_bits(grown))

    return jax.lax.fori_loop(0, stack.slots, grow, vector)


def _mean_agreeing(
    stack: _Stack,
    block: Block,
    elected: Float32[Array, "groups length"],
    vector: Shaped[Array, "groups n"],
) -> Shaped[Array, "groups n"]:
    """Eq. 2 with the mean: u = sigma * mean |tau_s| over slots with sgn(tau_s) = sigma.

    Args and result as for `_largest_agreeing`.
    """
    # Divided by it, a sum of finite numbers near the largest float32 stays finite.
    divisor = float(2 ** (stack.slots - 1).bit_length())

    def add(carry, slot, group, first):
        vector, sums, many = carry
        x, sign = stack.task_vector(slot, block), take_row(elected, group)
        agreeing = jnp.maximum(jnp.where(sign > 0, x, jnp.where(sign < 0, -x, 0.0)), 0.0)
        sums = jnp.where(first, 0.0, sums) + agreeing / divisor
        many = jnp.where(first, 0.0, many) + (agreeing > 0).astype(jnp.float32)
        mean = jnp.sign(sign) * (sums / jnp.maximum(many, 1.0) * divisor)
        # A mean that overflows is clipped; an infinity that came in stays.
        broken = (jnp.sign(sign) * jnp.inf).astype(stack.dtype)
        value = jnp.where(jnp.isinf(sums), broken, clip_to(mean, stack.dtype))
        return block.put(vector, group, as_bits(value)), sums, many

    zero = stack.zeros((1, block.length))
    vector, *_ = over_groups(stack.groups, add, (vector, zero, zero))
    return vector


def _compared(
    stack: _Stack, slot: Any, block: Block, vector: Shaped[Array, "groups n"]
) -> tuple[Float32[Array, "1 length"], Bool[Array, "1 length"]]:
    """Eq. 3, m_s = [tau_s * u > 0], of signs, since the product may vanish in float32.

    Args:
      stack: the task vectors.
      slot: s, int32 scalar.
      block: the parameters.
      vector: u, `[groups, n]` as bits.

    Returns:
      The slot's u, float32, and m_s, bool: `[1, length]` each.
    """
    x, u = stack.task_vector(slot, block), stack.numbers(vector, stack.groups[slot], block)
    return u, ((x > 0) & (u > 0)) | ((x < 0) & (u < 0))


def _mark(
    stack: _Stack,
    block: Block,
    vector: Shaped[Array, "groups n"],
    masks: UInt8[Array, "slots bytes"],
) -> UInt8[Array, "slots bytes"]:
    """Eq. 3's masks, of eight slots at a time.

    Their bits are collected in a byte per parameter, and then turned around, so that both are done
    in long vectors.

    Args:
      stack: the task vectors.
      block: the parameters.
      vector: u, `[groups, n]` as bits.
      masks: packed, `[slots, bytes]`.

    Returns:
      `masks` with those of this block.
    """

    def mark(chunk, masks):
        def slot_of(i):
            return jnp.minimum(chunk * stack.together + i, stack.slots - 1)

        def collect(i, planes):
            _, mask = _compared(stack, slot_of(i), block, vector)
            bit = mask.astype(jnp.uint8) << i.astype(jnp.uint8)
            return put_row(planes, 0, planes[:, : block.length] | bit)

        def turn(i, masks):
            return block.put_bytes(masks, slot_of(i), packed_bit(planes, i))

        planes = stack.zeros((1, 8 * block.mask_bytes), jnp.uint8)
        planes = jax.lax.fori_loop(0, stack.together, collect, planes)
        return jax.lax.fori_loop(0, stack.together, turn, masks)

    return jax.lax.fori_loop(0, -(-stack.slots // stack.together), mark, masks)


def _add_own_magnitudes(
    stack: _Stack, block: Block, sums: Float32[Array, "rows lanes"]
) -> Float32[Array, "rows lanes"]:
    """Eq. 4's numerators, sum |tau_s|: adds this block's to `[rows, lanes]`, for every row."""

    def add(row, sums):
        return add_total(
            sums, row, lambda part: jnp.abs(stack.numbers(stack.source, row, part)), block
        )

    return jax.lax.fori_loop(0, stack.source.shape[0], add, sums)


def _add_kept_magnitudes(
    stack: _Stack,
    block: Block,
    vector: Shaped[Array, "groups n"],
    sums: Float32[Array, "slots lanes"],
) -> Float32[Array, "slots lanes"]:
    """Eq. 4's denominators, sum |m_s * u|: adds this block's to `[slots, lanes]`.

    `vector` is u, `[groups, n]` as bits.
    """

    def add(slot, sums):
        def kept(part):
            u, mask = _compared(stack, slot, part, vector)
            return jnp.where(mask, jnp.abs(u), 0.0)

        return add_total(sums, slot, kept, block)

    return jax.lax.fori_loop(0, stack.slots, add, sums)


def _relative_sums(
    stacks: list[_Stack],
    vectors: list[Float[Array, "groups _"]],
    masks: list[UInt8[Array, "slots _"]],
    axes: Axes,
) -> Float32[Array, "2 slots"]:
    """The sums of eq. 4 relative to each slot's largest entry: float32 `[2, slots]`.

    For task vectors whose sums of magnitudes are beyond float32.
    """
    rows, groups, present = stacks[0].rows, stacks[0].groups, stacks[0].present

    def row_of(bits, row, dtype):
        return from_bits(bits[row], dtype).astype(jnp.float32)

    def of_slot(slot):
        where = slot if rows is None else rows[slot]
        own = [
            jnp.where(present[slot], jnp.abs(row_of(stack.source, where, stack.dtype)), 0.0)
            for stack in stacks
        ]
        kept = [
            jnp.where(
                unpack(mask[slot], u.shape[1]),
                jnp.abs(row_of(as_bits(u), groups[slot], u.dtype)),
                0.0,
            )
            for u, mask in zip(vectors, masks, strict=True)
        ]
        top = largest_over(jnp.stack([x.max(initial=0.0) for x in own]).max(), axes)
        unit = jnp.where(top > 0, top, 1.0)
        sums = jnp.stack([sum(total(x / unit) for x in of) for of in (own, kept)])
        return total_over(sums, axes)

    return jax.lax.map(of_slot, jnp.arange(groups.shape[0])).T


def _scales(
    own: Float32[Array, "slots"],
    kept: Float32[Array, "slots"],
    groups: Int[Array, "slots"],
    present: Bool[Array, "slots"],
    num_groups: int,
) -> Float32[Array, "slots"]:
    """Eq. 4, lambda_s = sum |tau_s| / sum |m_s * u|, and 0 where the denominator is 0.

    Args:
      own: the numerators, float32 `[slots]`.
      kept: the denominators, float32 `[slots]`.
      groups: int32 `[slots]`.
      present: bool `[slots]`.
      num_groups: number of groups.

    Returns:
      float32 `[slots]`, finite.
    """
    limit = jnp.float32(jnp.finfo(jnp.float32).max)
    scales = jnp.minimum(own / jnp.where(kept > 0, kept, 1.0), limit)
    # Alone in its group, a slot is the group's vector: 1, without the two sums' rounding.
    held = jnp.zeros(num_groups, jnp.int32).at[groups].add(present.astype(jnp.int32))
    return jnp.where(kept > 0, jnp.where(held[groups] == 1, 1.0, scales), 0.0)
