"""The towers of real checkpoints: CLIP's and ViT's for images, CLIP's for texts.

CLIP: Radford et al. 2021, arXiv 2103.00020; ViT: Dosovitskiy et al. 2021, arXiv 2010.11929. The
arithmetic is that of Hugging Face's CLIPVisionModelWithProjection, CLIPTextModelWithProjection and
ViTModel, so that their checkpoints yield the same features.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int32, Key, Real

from matu_jax.models.architectures import Architecture
from matu_jax.models.transformer import (
    EXACT,
    Block,
    Computing,
    Linear,
    LoRASpec,
    Norm,
    apply_blocks,
    check_images,
    stacked_blocks,
)


def _drawn(rngs: nnx.Rngs, scale: float, *shape: int) -> nnx.Param[jax.Array]:
    return nnx.Param(jax.random.normal(rngs.params(), shape) * scale)


class VisionTower(nnx.Module):
    """Images to features: `[batch, height, width, 3]` uint8 to `[batch, features]` float32.

    Pixels are normalised on the device, patches projected, a class token put in front and positions
    added; CLIP then has a layer norm that ViT lacks. The blocks follow, and a layer norm of the
    class token, which CLIP projects.

    Args:
      architecture: sizes, mean and standard deviation of the pixels, and family.
      lora: adapters.
      computing: dtype of activations and matrix products, and remat. The last norm and projection
        are float32.
      rngs: what parameters are drawn from.
    """

    def __init__(
        self,
        architecture: Architecture,
        lora: LoRASpec | None = None,
        *,
        computing: Computing = EXACT,
        rngs: nnx.Rngs,
    ):
        self.architecture: Architecture = architecture
        self.computing: Computing = computing
        shape, clip = architecture.vision, architecture.family == "clip"
        patch, dtype = architecture.patch_size, computing.dtype
        tokens = (architecture.image_size // patch) ** 2 + 1
        self.patches: Linear = Linear(
            patch * patch * 3, shape.width, bias=not clip, dtype=dtype, rngs=rngs
        )
        self.class_token: nnx.Param[jax.Array] = _drawn(rngs, shape.width**-0.5, shape.width)
        self.positions: nnx.Param[jax.Array] = _drawn(rngs, 0.02, tokens, shape.width)
        self.has_norm_pre: bool = clip
        if clip:
            self.norm_pre: Norm = Norm(shape.width, shape.epsilon, rngs=rngs)
        self.blocks: Block = stacked_blocks(shape, lora, dtype=dtype, rngs=rngs)
        self.norm: Norm = Norm(shape.width, shape.epsilon, rngs=rngs)
        if architecture.projection:
            self.projection: Linear = Linear(
                shape.width, architecture.projection, bias=False, rngs=rngs
            )

    def __call__(
        self,
        images: Real[Array | np.ndarray, "batch height width 3"],
        key: Key[Array, ""] | None = None,
    ) -> Float32[Array, "batch features"]:
        """Computes features.

        Args:
          images: `[batch, height, width, 3]`, uint8, or floating from 0 to 255.
          key: what the adapters' dropout is drawn from; None = no dropout.

        Returns:
          float32 `[batch, features]`, not normalised.

        Raises:
          ValueError: for images of another size.
        """
        how, dtype = self.architecture, self.computing.dtype
        check_images(images, how.image_size, 3)
        batch, size, side = images.shape[0], how.patch_size, how.image_size // how.patch_size
        # What does not fill a patch is left out, as a convolution with that stride does. Columns
        # and channels stay one axis: on TPU, one of three would take as much as one of 128.
        pixels = jnp.asarray(images)[:, : side * size, : side * size]
        pixels = pixels.reshape(batch, side, size, side, size * 3).transpose(0, 1, 3, 2, 4)
        mean, std = (jnp.tile(jnp.asarray(x), size) for x in (how.image_mean, how.image_std))
        pixels = pixels.astype(jnp.float32) / 255.0
        pixels = (pixels - mean[None, None, None, None]) / std[None, None, None, None]
        x = self.patches(pixels.reshape(batch, side * side, size * size * 3))
        token = self.class_token[...].astype(dtype)[None, None]
        x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, token.shape[-1])), x], axis=1)
        x = x + self.positions[...].astype(dtype)[None]
        if self.has_norm_pre:
            x = self.norm_pre(x).astype(dtype)
        x = self.norm(apply_blocks(self.blocks, x, key, remat=self.computing.remat)[:, 0])
        return self.projection(x) if how.projection else x


class TextTower(nnx.Module):
    """Token ids to features: int32 `[batch, tokens]` to float32 `[batch, features]`.

    Args:
      architecture: sizes and end token; it must have a text tower and a projection.
      dtype: of activations and matrix products.
      rngs: what parameters are drawn from.
    """

    def __init__(self, architecture: Architecture, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        shape = architecture.text
        if shape is None or architecture.projection is None:
            raise ValueError(f"architecture {architecture.name} has no text tower.")
        self.architecture: Architecture = architecture
        self.dtype: Any = dtype
        self.tokens: nnx.Param[jax.Array] = _drawn(rngs, 0.02, architecture.vocabulary, shape.width)
        self.positions: nnx.Param[jax.Array] = _drawn(rngs, 0.01, architecture.context, shape.width)
        self.blocks: Block = stacked_blocks(shape, causal=True, dtype=dtype, rngs=rngs)
        self.norm: Norm = Norm(shape.width, shape.epsilon, rngs=rngs)
        self.projection: Linear = Linear(
            shape.width, architecture.projection, bias=False, rngs=rngs
        )

    def __call__(
        self, tokens: Int32[Array | np.ndarray, "batch tokens"]
    ) -> Float32[Array, "batch features"]:
        """Computes the feature of each text at its end token.

        Args:
          tokens: int32 `[batch, tokens]`, padded behind the end token; since attention is causal,
            what follows the end token changes nothing.

        Returns:
          float32 `[batch, features]`, not normalised.

        Raises:
          ValueError: for more tokens per text than the tower has positions.
        """
        context = self.architecture.context
        if tokens.ndim != 2 or tokens.shape[1] > context:
            raise ValueError(
                f"tokens: found {list(tokens.shape)}, expected [batch, at most {context}]."
            )
        positions = self.positions[...][: tokens.shape[1]].astype(self.dtype)
        x = self.tokens[...].astype(self.dtype)[tokens] + positions[None]
        x = apply_blocks(self.blocks, x, remat=True)  # compiled sooner; there is no backward pass
        end = self.architecture.end_token
        # Checkpoints that say 2 mean the highest token, which OpenAI's vocabulary ends with.
        at = (tokens if end == 2 else (tokens == end).astype(jnp.int32)).argmax(axis=1)
        last = jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]
        return self.projection(self.norm(last))
