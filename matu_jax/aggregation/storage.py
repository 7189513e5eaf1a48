"""How parameters and masks are stored: flat leaves, 16-bit floats, and eight mask bits in a byte.

Everything is computed in float32; what is kept is in the leaves' own dtype, the storage dtype.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8


def flat_leaf(leaf: Shaped[Array, "rows ..."]) -> Shaped[Array, "rows n"]:
    """Flattens the parameters of a leaf: `[rows, ...]` to `[rows, n]`."""
    return leaf.reshape(leaf.shape[0], -1)


def clip_to(x: Float[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """Casts float32 to a storage dtype, with overflow to the largest finite number."""
    limit = jnp.asarray(float(jnp.finfo(dtype).max), x.dtype)
    return jnp.clip(x, -limit, limit).astype(dtype)


def as_bits(x: Float[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """16-bit floats as whole numbers of the same bits; others as they are.

    What a loop takes pieces of, or puts them into, is kept so: XLA on CPU would turn a whole array
    of 16-bit floats into float32, and back.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def from_bits(bits: Shaped[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """The inverse of `as_bits`."""
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)


def pack(mask: Bool[Array, "*rows n"]) -> UInt8[Array, "*rows bytes"]:
    """Packs bools `[..., n]` into bytes `[..., ceil(n / 8)]`, least significant bit first."""
    return jnp.packbits(mask, axis=-1, bitorder="little")


def unpack(packed: UInt8[Array, "*rows bytes"], size: int) -> Bool[Array, "*rows {size}"]:
    """Unpacks bytes `[..., ceil(size / 8)]` into bools `[..., size]`."""
    return joined_eighths(eighths(packed), size)


def eighths(packed: UInt8[Array, "*rows bytes"]) -> Bool[Array, "*rows bytes 8"]:
    """Bytes `[..., bytes]` to the bools of their bits, `[..., bytes, 8]`."""
    bits = jnp.left_shift(jnp.uint8(1), jnp.arange(8, dtype=jnp.uint8))
    return (packed[..., None] & bits.reshape([1] * packed.ndim + [8])) != 0


def joined_eighths(x: Shaped[Array, "*rows bytes 8"], size: int) -> Shaped[Array, "*rows {size}"]:
    """`[..., bytes, 8]` to `[..., size]`."""
    return x.reshape(*x.shape[:-2], -1)[..., :size]


def packed_bit(
    planes: UInt8[Array, "1 parameters"], bit: Int[Array, ""]
) -> UInt8[Array, "1 parameters//8"]:
    """One slot's packed mask, from bytes that hold a bit of each of eight slots.

    Args:
      planes: uint8 `[1, 8 * bytes]`, a byte per parameter; its bit i belongs to the i-th slot.
      bit: int32 scalar, which slot: 0 to 7.

    Returns:
      uint8 `[1, bytes]`, a bit per parameter, as `pack` makes them.
    """
    parameters = planes.reshape(-1, 8)
    bits = [((parameters[:, k] >> bit.astype(jnp.uint8)) & 1) << k for k in range(8)]
    return functools.reduce(jnp.bitwise_or, bits)[None]
