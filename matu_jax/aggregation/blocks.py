"""How a flat leaf is visited: in blocks of parameters, and slot by slot within a block.

On CPU a block stays in cache while all equations are applied to it, so that task vectors are read
from memory about once; elsewhere a block is the whole leaf. Slots are visited by loops, so that no
second array of slots x parameters is ever made, and programs do not grow with their number.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Shaped, UInt8

_LANES = 1024  # partial sums kept apart, so that float32 sums stay exact enough at 1e8 parameters
_BLOCK = 1 << 15  # parameters that are visited at a time on CPU; a multiple of 8, for the masks


class Block(NamedTuple):
    """Neighbouring parameters of a flat leaf, visited at a time.

    Attributes:
      start: the first of them, a multiple of 8; int, or int32 scalar within a loop.
      length: how many (static).
    """

    start: Any
    length: int

    def part(self, index: int, parts: int) -> "Block":
        """The index-th of so many equal parts."""
        length = self.length // parts
        return Block(self.start + index * length, length)

    def take(self, array: Shaped[Array, "rows n"], row: Any) -> Shaped[Array, "1 {self.length}"]:
        """The block of one row of `[rows, n]`: `[1, length]`."""
        return jax.lax.dynamic_slice(array, (row, self.start), (1, self.length))

    def put(
        self, array: Shaped[Array, "rows n"], row: Any, value: Shaped[Array, "1 {self.length}"]
    ) -> Shaped[Array, "rows n"]:
        """`[rows, n]` with `value` `[1, length]` as the block of one row."""
        return jax.lax.dynamic_update_slice(array, value, (row, self.start))

    @property
    def mask_bytes(self) -> int:
        """How many bytes its packed masks have."""
        return -(-self.length // 8)

    def take_bytes(
        self, masks: UInt8[Array, "rows bytes"], row: Any
    ) -> UInt8[Array, "1 {self.mask_bytes}"]:
        """The block's packed mask in one row of `[rows, ceil(n / 8)]`: `[1, bytes]`."""
        return jax.lax.dynamic_slice(masks, (row, self.start // 8), (1, self.mask_bytes))

    def put_bytes(
        self,
        masks: UInt8[Array, "rows bytes"],
        row: Any,
        value: UInt8[Array, "1 {self.mask_bytes}"],
    ) -> UInt8[Array, "rows bytes"]:
        """`[rows, ceil(n / 8)]` with `value` `[1, bytes]` as the block's packed mask in one row."""
        return jax.lax.dynamic_update_slice(masks, value, (row, self.start // 8))


def take_row(array: Shaped[Array, "rows n"], row: Any) -> Shaped[Array, "1 n"]:
    """One row of `[rows, n]`, as `[1, n]`."""
    return jax.lax.dynamic_slice(array, (row, 0), (1, array.shape[1]))


def put_row(
    array: Shaped[Array, "rows n"], row: Any, value: Shaped[Array, "1 _"]
) -> Shaped[Array, "rows n"]:
    """`[rows, n]` with `value` `[1, n]` as one row, or as its beginning where it is shorter."""
    return jax.lax.dynamic_update_slice(array, value, (row, 0))


def over_blocks(size: int, visit: Callable[[Block, Any], Any], carry: Any) -> Any:
    """Carries `(block, carry) -> carry` over the blocks of a leaf of `size` parameters."""
    length = _block_size(size)
    whole, rest = divmod(size, length)
    if whole:
        carry = jax.lax.fori_loop(
            0, whole, lambda i, carry: visit(Block(i * length, length), carry), carry
        )
    return visit(Block(whole * length, rest), carry) if rest else carry


def _block_size(size: int) -> int:
    """Parameters to visit at a time: on CPU, what stays in cache; if possible, without a rest.

    A rest is a second program, as long to compile as the first.
    """
    if size <= _BLOCK or jax.default_backend() != "cpu":
        return max(size, 1)
    fewest = -(-size // _BLOCK)
    even = [n for n in range(fewest, 3 * fewest) if size % (8 * n) == 0]
    return size // even[0] if even else _BLOCK


def over_groups(groups: Int[Array, "slots"], step: Callable[..., Any], carry: Any) -> Any:
    """Carries `(carry, slot, group, first) -> carry` over slots, one group after the other.

    First says whether a slot is the first of its group, so that one running total serves all.
    """
    order = jnp.argsort(groups, stable=True)
    ordered = groups[order]
    first = jnp.concatenate([jnp.ones(1, jnp.bool_), ordered[1:] != ordered[:-1]])
    return jax.lax.fori_loop(
        0, groups.shape[0], lambda i, carry: step(carry, order[i], ordered[i], first[i]), carry
    )


def loop_zeros(shape: tuple[int, ...], dtype: Any, *inputs: jax.Array) -> jax.Array:
    """Zeros that vary over the mesh axes of the inputs, as `shard_map` asks of loop carries."""
    nothing = sum(x.reshape(-1)[:0].astype(jnp.float32).sum() for x in inputs)
    return jnp.zeros(shape, dtype) + jnp.asarray(nothing, dtype)


def total(x: Float32[Array, "*rows n"]) -> Float32[Array, "*rows"]:
    """Sums a float32 array over its last axis in parallel lanes.

    One running sum would stall at 2**24 terms. Four quarters are added first, in one sweep.
    """
    quarter = x.shape[-1] // (4 * _LANES) * _LANES

    def part(start: int, stop: int) -> jax.Array:
        return jax.lax.slice_in_dim(x, start, stop, axis=-1)

    first, second, third, fourth = (part(i * quarter, (i + 1) * quarter) for i in range(4))
    lanes = (first + second + third + fourth).reshape(*x.shape[:-1], -1, _LANES)
    return lanes.sum(axis=-2).sum(axis=-1) + part(4 * quarter, x.shape[-1]).sum(axis=-1)


def lanes_of(size: int) -> int:
    """How many partial sums `add_total` keeps apart, in the blocks of a leaf of `size`."""
    return _lanes(_block_size(size))


def _lanes(length: int) -> int:
    """How many sums are kept apart: on CPU, what one vectorised sweep makes of a block."""
    return length // 4 if jax.default_backend() == "cpu" and length % 4 == 0 else 1


def add_total(
    sums: Float32[Array, "rows lanes"],
    row: Int[Array, ""],
    numbers: Callable[[Block], jax.Array],
    block: Block,
) -> Float32[Array, "rows lanes"]:
    """Adds a block's numbers to one row of partial sums.

    Args:
      sums: float32 `[rows, lanes]`, of as many lanes as `lanes_of` says; `total` of them is the
        sum.
      row: int32 scalar.
      numbers: gives those of the block, or of a part of it: float32 `[1, length]`. A sweep over
        parts is one pass that XLA on CPU vectorises.
      block: what is added up.
    """
    lanes = _lanes(block.length)
    if lanes == 1:
        added = total(numbers(block))[:, None]
    else:
        parts = block.length // lanes
        added = functools.reduce(jnp.add, [numbers(block.part(i, parts)) for i in range(parts)])
    before = jax.lax.dynamic_slice(sums, (row, 0), added.shape)
    return put_row(sums, row, before + added)
