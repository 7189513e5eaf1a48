"""Eq. 4's modulation on flat leaves: task vectors rebuilt from unified vectors."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped, UInt8

from matu_jax.aggregation.blocks import Block
from matu_jax.aggregation.storage import (
    LANES,
    clip_to,
    from_bits,
    in_tiles,
    rows_of,
    tail_rows,
    unpack_rows,
)


def modulated_block(
    vector: Float[Array, "*tiles 8 columns"],
    mask: UInt8[Array, "*tiles columns"],
    scale: Float32[Array, "..."],
) -> Float32[Array, "*tiles 8 columns"]:
    """Eq. 4's lambda * m * u for a block of parameters; float32, kept finite in u's dtype."""
    product = jnp.where(unpack_rows(mask), scale * vector.astype(jnp.float32), 0.0)
    return clip_to(product, vector.dtype).astype(jnp.float32)


def modulated(
    vector: Float[Array, "*rows n"],
    mask: UInt8[Array, "*rows bytes"],
    scale: Float32[Array, "*rows"],
) -> Float32[Array, "*rows n"]:
    """Eq. 4's lambda * m * u for flat parameters and packed masks; float32, kept finite.

    Args:
      vector: u, `[..., n]`.
      mask: m, `[..., bytes]`.
      scale: lambda, `[...]`.
    """
    rows, size = vector.shape[:-1], vector.shape[-1]
    whole = in_tiles(size)
    tiles = modulated_block(
        rows_of(vector[..., :whole]),
        mask[..., : whole // 8].reshape(*rows, -1, LANES),
        scale[..., None, None, None],
    ).reshape(*rows, whole)
    if whole == size:
        return tiles
    tail = modulated_block(
        tail_rows(vector[..., whole:]), mask[..., whole // 8 :], scale[..., None, None]
    )
    tail = tail.reshape(*rows, -1)[..., : size - whole]
    return jnp.concatenate([tiles, tail], axis=-1)


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

    def unified(self, client: Any, block: Block) -> Float[Array, "{block.tiles} 8 128"]:
        """U of a client, in the storage dtype."""
        return from_bits(block.take(self.vector, client), self.dtype)

    def task_vector(self, slot: Any, block: Block) -> Float32[Array, "{block.tiles} 8 128"]:
        """tau_s = lambda_s * m_s * u, zeros where the slot takes no part."""
        mask = block.take_bytes(self.masks, slot)
        vector = self.unified(self.client[slot], block)
        accepted = self.accepted[slot]
        scale = jnp.where(accepted, self.scales[slot], 0.0)
        return jnp.where(accepted, modulated_block(vector, mask, scale), 0.0)
