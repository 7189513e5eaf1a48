"""Fewer bits for a vector that crosses the network: bfloat16, or int8 with a scale per block."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

from matu_jax.trees import PyTree

BLOCK = 256
"""Parameters that share a scale: 32 bits for 256 numbers of 8 bits make 8.125 bits each."""


class Blocks(NamedTuple):
    """A leaf in whole numbers of 8 bits.

    Attributes:
      values: int8 `[rows, parameters]`, in -127 to 127.
      scales: float32 `[rows, ceil(parameters / 256)]`, what a value of 1 stands for in a block.
    """

    values: Int8[Array, "rows parameters"]
    scales: Float32[Array, "rows blocks"]


def rounded(vectors: PyTree[Float[Array, "rows ..."]], precision: str) -> PyTree:
    """Rounds floats for the network.

    Args:
      vectors: leaves `[rows, ...]`, floating.
      precision: "float32" (as they are), "bfloat16", or "int8": to the nearest multiple of a scale
        that is the largest magnitude of the block over 127, so that nothing moves by more than half
        a scale and zeros stay.

    Returns:
      What crosses the network: the same tree, of leaves for "bfloat16", of `Blocks` for "int8".
    """
    if precision == "float32":
        return vectors
    if precision == "bfloat16":
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), vectors)
    return jax.tree.map(_blocks, vectors)


def restored(
    sent: PyTree, like: PyTree[Float[Array, "rows ..."]]
) -> PyTree[Float[Array, "rows ..."]]:
    """What the other side makes of `rounded(like, ...)`: leaves in `like`'s shapes and dtypes.

    A block with a number that is not finite comes back without any finite number.
    """

    def leaf(like, part):
        if not isinstance(part, Blocks):
            return part.astype(like.dtype)
        rows, size = part.values.shape
        values = _padded(part.values.astype(jnp.float32)) * part.scales[..., None]
        return values.reshape(rows, -1)[:, :size].reshape(like.shape).astype(like.dtype)

    return jax.tree.map(leaf, like, sent)


def _padded(flat: Float32[Array, "rows n"]) -> Float32[Array, "rows blocks block"]:
    """Cuts `[rows, n]` into blocks, the last one filled up with zeros: `[rows, blocks, 256]`."""
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % BLOCK)))
    return flat.reshape(flat.shape[0], -1, BLOCK)


def _blocks(x: Float[Array, "rows ..."]) -> Blocks:
    flat = x.reshape(x.shape[0], -1).astype(jnp.float32)
    blocks = _padded(flat)
    scales = jnp.abs(blocks).max(axis=-1, initial=0.0) / 127
    unit = jnp.where(scales > 0, scales, 1.0)[..., None]
    # NaN, of a block with an infinity or a NaN, has no whole number; its scale says so.
    values = jnp.nan_to_num(jnp.round(blocks / unit)).astype(jnp.int8)
    values = values.reshape(flat.shape[0], -1)[:, : flat.shape[1]]
    return Blocks(values, jnp.where(jnp.isfinite(scales), scales, jnp.nan))
