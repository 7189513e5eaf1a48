"""How parameters and masks are stored: flat leaves, tiles of 1024 parameters, mask bits in bytes.

Everything is computed in float32; what is kept is in the leaves' own dtype, the storage dtype.

A flat leaf of n parameters is made of tiles of 1024 and a tail of fewer. A tile is 8 rows of 128
neighbouring parameters, a tail of r parameters 8 rows of w = ceil(r / 8), filled up with zeros. A
mask has one byte for each column of them: bit k is that of row k. So packing and unpacking are
elementwise over rows, on every device: no bit ever changes its place among its neighbours.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Shaped, UInt8

LANES = 128
"""Columns of a tile: neighbouring mask bytes."""

TILE = 8 * LANES
"""Parameters of a tile."""


def flat_leaf(leaf: Shaped[Array, "rows ..."]) -> Shaped[Array, "rows n"]:
    """Flattens the parameters of a leaf: `[rows, ...]` to `[rows, n]`."""
    return leaf.reshape(leaf.shape[0], -1)


def clip_to(x: Float[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """Casts float32 to a storage dtype, with overflow to the largest finite number."""
    limit = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -limit, limit).astype(dtype)


def sign_of(x: Float[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """-1, 0 or 1; `jnp.sign` asks for a TPU to be there when it is lowered in a kernel."""
    return (x > 0).astype(jnp.float32) - (x < 0).astype(jnp.float32)


def in_tiles(size: int) -> int:
    """How many of a leaf's parameters are in whole tiles; the others are its tail."""
    return size // TILE * TILE


def whole_tiles(leaves: list[Shaped[Array, "rows _"]]) -> list[Shaped[Array, "rows _"]]:
    """Flat leaves without their tails."""
    return [leaf[:, : in_tiles(leaf.shape[1])] for leaf in leaves]


def mask_bytes(size: int) -> int:
    """Bytes of the packed mask of so many parameters."""
    return -(-size // 8)


def pack_rows(mask: Bool[Any, "*tiles 8 columns"]) -> UInt8[Any, "*tiles columns"]:
    """Packs bools of 8 rows into a byte for each column; bit k is that of row k."""
    packed = mask[..., 0, :].astype(np.uint8)
    for k in range(1, 8):
        packed = packed | (mask[..., k, :].astype(np.uint8) << np.uint8(k))
    return packed


def unpack_rows(packed: UInt8[Any, "*tiles columns"]) -> Bool[Any, "*tiles 8 columns"]:
    """The inverse of `pack_rows`."""
    bits = (1 << np.arange(8)).astype(np.uint8).reshape([1] * (packed.ndim - 1) + [8, 1])
    return (packed[..., None, :] & bits) != 0


def rows_of(x: Shaped[Any, "*rows n"], columns: int = LANES) -> Shaped[Any, "*rows tiles 8 _"]:
    """`[..., n]` as tiles of 8 rows of so many columns, of which n is a multiple."""
    return x.reshape(*x.shape[:-1], -1, 8, columns)


def tail_rows(tail: Shaped[Any, "*rows n"]) -> Shaped[Any, "*rows 8 columns"]:
    """A tail `[..., r]` as 8 rows `[..., 8, ceil(r / 8)]`, filled up with zeros."""
    behind = [(0, 0)] * (tail.ndim - 1) + [(0, -tail.shape[-1] % 8)]
    return _like(tail).pad(tail, behind).reshape(*tail.shape[:-1], 8, -1)


def pack(mask: Bool[Any, "*rows n"]) -> UInt8[Any, "*rows bytes"]:
    """Packs bools `[..., n]` into bytes `[..., ceil(n / 8)]`; unused bits are 0.

    Takes and gives NumPy's arrays or JAX's.
    """
    whole = in_tiles(mask.shape[-1])
    packed = pack_rows(rows_of(mask[..., :whole]))
    packed = packed.reshape(*mask.shape[:-1], whole // 8)
    if whole == mask.shape[-1]:
        return packed
    tail = pack_rows(tail_rows(mask[..., whole:]))
    return _like(mask).concatenate([packed, tail], axis=-1)


def unpack(packed: UInt8[Any, "*rows bytes"], size: int) -> Bool[Any, "*rows {size}"]:
    """Unpacks bytes `[..., ceil(size / 8)]` into bools `[..., size]`; NumPy's or JAX's arrays."""
    rows, whole = packed.shape[:-1], in_tiles(size)
    tiles = packed[..., : whole // 8].reshape(*rows, -1, LANES)
    mask = unpack_rows(tiles).reshape(*rows, whole)
    if whole == size:
        return mask
    tail = unpack_rows(packed[..., whole // 8 :]).reshape(*rows, -1)[..., : size - whole]
    return _like(packed).concatenate([mask, tail], axis=-1)


def _like(array: Any) -> Any:
    """The module whose functions make arrays like this one."""
    return np if isinstance(array, np.ndarray) else jnp


def as_bits(x: Float[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """16-bit floats as whole numbers of the same bits; others as they are.

    What a loop takes pieces of, or puts them into, is kept so: XLA on CPU would turn a whole array
    of 16-bit floats into float32, and back.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def from_bits(bits: Shaped[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """The inverse of `as_bits`."""
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)
