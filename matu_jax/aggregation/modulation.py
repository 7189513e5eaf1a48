"""Eq. 4's modulation on flat leaves: task vectors rebuilt from unified vectors."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped, UInt8

from matu_jax.aggregation.blocks import Block
from matu_jax.aggregation.storage import clip_to, eighths, from_bits


def modulated(
    vector: Float[Array, "*rows n"],
    mask: UInt8[Array, "*rows bytes"],
    scale: Float32[Array, "*rows"],
) -> Float32[Array, "*rows bytes 8"]:
    """Eq. 4's lambda * m * u for flat parameters and packed masks; float32, kept finite.

    Args:
      vector: u, `[..., n]`.
      mask: m, `[..., bytes]`.
      scale: lambda, `[...]`.

    Returns:
      `[..., bytes, 8]`, with zeros behind the n-th: in this shape XLA on CPU uses SIMD.
    """
    product = scale[..., None] * vector.astype(jnp.float32)
    behind = 8 * mask.shape[-1] - product.shape[-1]
    product = jnp.pad(product, [(0, 0)] * (product.ndim - 1) + [(0, behind)])
    product = jnp.where(eighths(mask), product.reshape(*mask.shape, 8), 0.0)
    return clip_to(product, vector.dtype).astype(jnp.float32)


class UploadedLeaf(NamedTuple):
    """One flat leaf of the clients' uploads.

    Attributes:
      vector: u of every client, `[clients, n]` in the storage dtype, or `as_bits`.
      dtype: the storage dtype.
      masks: m_s, packed, `[slots, bytes]`.
      scales: lambda_s, float32 `[slots]`.
      accepted: bool `[slots]`, which slots take part.
      client: int32 `[slots]`.
    """

    vector: Shaped[Array, "clients n"]
    dtype: Any
    masks: UInt8[Array, "slots bytes"]
    scales: Float32[Array, "slots"]
    accepted: Bool[Array, "slots"]
    client: Int[Array, "slots"]

    def task_vector(self, slot: Any, block: Block) -> Float32[Array, "1 {block.mask_bytes} 8"]:
        """tau_s = lambda_s * m_s * u, zeros where the slot takes no part: as `modulated`."""
        mask = block.take_bytes(self.masks, slot)
        vector = from_bits(block.take(self.vector, self.client[slot]), self.dtype)
        accepted = self.accepted[slot]
        scale = jnp.where(accepted, self.scales[slot], 0.0)[None]
        return jnp.where(accepted, modulated(vector, mask, scale), 0.0)
