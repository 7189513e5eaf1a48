"""How a flat leaf is visited: in blocks of tiles of parameters, and slot by slot within a block.

A block stays in a CPU's cache while all equations are applied to it, so that task vectors are read
from memory about once. Slots are visited by loops, so that no second array of slots x parameters is
ever made, and programs do not grow with their number.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Shaped, UInt8

from matu_jax.aggregation.storage import LANES, TILE

_TILES = 32  # that are visited at a time


class Block(NamedTuple):
    """Neighbouring parameters of a flat leaf, visited at a time.

    Attributes:
      start: the first of its tiles; int, or int32 scalar within a loop.
      tiles: how many (static).
    """

    start: Any
    tiles: int

    @property
    def length(self) -> int:
        """How many parameters it has."""
        return self.tiles * TILE

    def zeros(self, *inputs: jax.Array | np.ndarray) -> Float32[Array, "{self.tiles} 8 128"]:
        """`loop_zeros` in its shape."""
        return loop_zeros((self.tiles, 8, LANES), jnp.float32, *inputs)

    def take(self, array: Shaped[Array, "rows n"], row: Any) -> Shaped[Array, "{self.tiles} 8 128"]:
        """The block of one row of `[rows, n]`."""
        taken = jax.lax.dynamic_slice(array, (row, self.start * TILE), (1, self.length))
        return taken.reshape(self.tiles, 8, LANES)

    def put(
        self, array: Shaped[Array, "rows n"], row: Any, value: Shaped[Array, "{self.tiles} 8 128"]
    ) -> Shaped[Array, "rows n"]:
        """`[rows, n]` with `value` as the block of one row."""
        return jax.lax.dynamic_update_slice(
            array, value.reshape(1, self.length), (row, self.start * TILE)
        )

    def take_bytes(
        self, masks: UInt8[Array, "rows bytes"], row: Any
    ) -> UInt8[Array, "{self.tiles} 128"]:
        """The block's packed mask in one row of `[rows, ceil(n / 8)]`."""
        shape = (1, self.tiles * LANES)
        taken = jax.lax.dynamic_slice(masks, (row, self.start * LANES), shape)
        return taken.reshape(self.tiles, LANES)

    def put_bytes(
        self,
        masks: UInt8[Array, "rows bytes"],
        row: Any,
        value: UInt8[Array, "{self.tiles} 128"],
    ) -> UInt8[Array, "rows bytes"]:
        """`[rows, ceil(n / 8)]` with `value` as the block's packed mask in one row."""
        return jax.lax.dynamic_update_slice(masks, value.reshape(1, -1), (row, self.start * LANES))


def over_blocks(size: int, visit: Callable[[Block, Any], Any], carry: Any) -> Any:
    """Carries `(block, carry) -> carry` over the whole tiles of a leaf of `size` parameters."""
    tiles = size // TILE
    length = _block_tiles(tiles)
    whole, rest = divmod(tiles, length)
    if whole:
        carry = jax.lax.fori_loop(
            0, whole, lambda i, carry: visit(Block(i * length, length), carry), carry
        )
    return visit(Block(whole * length, rest), carry) if rest else carry


def _block_tiles(tiles: int) -> int:
    """Tiles to visit at a time: what stays in cache; if possible, without a rest.

    A rest is a second program, as long to compile as the first.
    """
    if tiles <= _TILES:
        return max(tiles, 1)
    fewest = -(-tiles // _TILES)
    even = [n for n in range(fewest, 3 * fewest) if tiles % n == 0]
    return tiles // even[0] if even else _TILES


def loop_zeros(shape: tuple[int, ...], dtype: Any, *inputs: jax.Array | np.ndarray) -> jax.Array:
    """Zeros that vary over the mesh axes of the inputs, as `shard_map` asks of loop carries."""
    nothing = sum(jnp.reshape(x, -1)[:0].astype(jnp.float32).sum() for x in inputs)
    return jnp.zeros(shape, dtype) + jnp.asarray(nothing, dtype)


def in_lanes(x: Float32[Array, "tiles 8 128"]) -> Float32[Array, "1024"]:
    """The sum of a block's tiles; a running sum of all numbers would round 2**15 times or more."""
    return x.sum(axis=0).reshape(-1)


def add_row(sums: Float32[Array, "rows n"], row: Any, added: Float32[Array, "n"]) -> jax.Array:
    """`[rows, n]` with numbers added to one row."""
    place = (row, 0)
    before = jax.lax.dynamic_slice(sums, place, (1, sums.shape[1]))
    return jax.lax.dynamic_update_slice(sums, before + added[None], place)


def add_at(x: Float32[Array, "n"], place: Any, added: jax.Array) -> jax.Array:
    """Numbers `[n]` with one more in one place."""
    return add_row(x[:, None], place, added[None])[:, 0]
