"""The small vision transformer of the embedded benchmark, in Flax NNX.

Pre-norm blocks (Dosovitskiy et al. 2021, arXiv 2010.11929) behind a convolutional stem.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Key, Real

from matu_jax.models.architectures import TowerShape
from matu_jax.models.transformer import (
    EXACT,
    Block,
    Computing,
    Linear,
    LoRASpec,
    Norm,
    apply_block,
    check_images,
)


@dataclasses.dataclass(frozen=True)
class ViTShape:
    """The shape of a vision transformer; sizes in pixels and features.

    Attributes:
      image_size: height and width of an image.
      patch_size: of a patch, which becomes one token.
      channels: of an image.
      width: features of a token.
      depth: number of blocks.
      heads: of attention.
      mlp_width: features inside a block's perceptron.
      stem_widths: features of the strided 3x3 convolutions in front of the last one, which yields
        the tokens (Xiao et al. 2021, arXiv 2106.14881); each halves the image, so that patch_size
        is 2 ** (len(stem_widths) + 1). Empty: plain patches (Dosovitskiy et al. 2021).
    """

    image_size: int = 32
    patch_size: int = 8
    channels: int = 3
    width: int = 96
    depth: int = 4
    heads: int = 4
    mlp_width: int = 384
    stem_widths: tuple[int, ...] = ()


class StridedConvolution(nnx.Module):
    """A 3x3 convolution of stride 2, `[batch, 2h, 2w, in] -> [batch, h, w, out]`.

    Written as slices and one matrix product: inside a loop, XLA's CPU convolution is ten times
    slower. Zeros are padded below and on the right, as "SAME" does for even sizes.
    """

    def __init__(self, inputs: int, outputs: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.project: Linear = Linear(9 * inputs, outputs, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch {x.shape[1]//2} {x.shape[2]//2} outputs"]:
        """Gathers each output's 3x3 neighbourhood and projects it."""
        batch, height, width, channels = x.shape
        pairs = x.reshape(batch, height // 2, 2, width // 2, 2 * channels)
        right = jnp.pad(pairs[:, :, :, 1:, :channels], ((0, 0), (0, 0), (0, 0), (0, 1), (0, 0)))
        rows = jnp.concatenate([pairs, right], axis=-1)
        upper, middle = rows[:, :, 0], rows[:, :, 1]
        lower = jnp.pad(upper[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
        return self.project(jnp.concatenate([upper, middle, lower], axis=-1))


class ConvolutionalStem(nnx.Module):
    """`[batch, height, width, channels] -> [batch, tokens, width]` by strided convolutions."""

    def __init__(self, shape: ViTShape, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        if 2 ** (len(shape.stem_widths) + 1) != shape.patch_size:
            raise ValueError(
                f"stem_widths {shape.stem_widths} reduce the image by "
                f"{2 ** (len(shape.stem_widths) + 1)}, but patch_size is {shape.patch_size}."
            )
        widths = [shape.channels, *shape.stem_widths, shape.width]
        self.convolutions: nnx.List[StridedConvolution] = nnx.List(
            [
                StridedConvolution(inputs, outputs, dtype=dtype, rngs=rngs)
                for inputs, outputs in itertools.pairwise(widths)
            ]
        )

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch tokens features"]:
        """Convolves, with a GELU between the layers."""
        for i, convolution in enumerate(self.convolutions):
            x = convolution(jax.nn.gelu(x) if i else x)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class Patches(nnx.Module):
    """`[batch, height, width, channels] -> [batch, tokens, width]`, one dense layer per patch."""

    def __init__(self, shape: ViTShape, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.size: int = shape.patch_size
        self.project: Linear = Linear(
            self.size**2 * shape.channels, shape.width, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch tokens features"]:
        """Cuts the images into patches and projects them."""
        batch, height, width, channels = x.shape
        rows, columns = height // self.size, width // self.size
        x = x.reshape(batch, rows, self.size, columns, self.size, channels)
        return self.project(x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1))


class VisionTransformer(nnx.Module):
    """Images to one feature vector: the final norm of the class token.

    `[batch, height, width, channels]` uint8 (or floats in 0 to 255) in, `[batch, features]` out.

    Args:
      shape: sizes.
      lora: adapters.
      computing: dtype of activations, and remat.
      rngs: what parameters are drawn from.
    """

    def __init__(
        self,
        shape: ViTShape,
        lora: LoRASpec | None = None,
        *,
        computing: Computing = EXACT,
        rngs: nnx.Rngs,
    ):
        if shape.image_size % shape.patch_size:
            raise ValueError(
                f"image_size {shape.image_size} is not a multiple of patch_size {shape.patch_size}."
            )
        if shape.width % shape.heads:
            raise ValueError(f"width {shape.width} is not a multiple of heads {shape.heads}.")
        self.shape: ViTShape = shape
        self.computing: Computing = computing
        side, dtype = shape.image_size // shape.patch_size, computing.dtype
        stem = ConvolutionalStem if shape.stem_widths else Patches
        self.stem: ConvolutionalStem | Patches = stem(shape, dtype=dtype, rngs=rngs)
        self.class_token: nnx.Param[jax.Array] = nnx.Param(
            jax.random.normal(rngs.params(), (1, 1, shape.width)) * 0.02
        )
        self.positions: nnx.Param[jax.Array] = nnx.Param(
            jax.random.normal(rngs.params(), (1, side * side + 1, shape.width)) * 0.02
        )
        tower = TowerShape(
            shape.width, shape.depth, shape.heads, shape.mlp_width, "gelu_pytorch_tanh"
        )
        self.blocks: nnx.List[Block] = nnx.List(
            [Block(tower, lora, dtype=dtype, rngs=rngs) for _ in range(shape.depth)]
        )
        self.norm: Norm = Norm(shape.width, tower.epsilon, rngs=rngs)

    def __call__(
        self,
        images: Real[Array | np.ndarray, "batch height width channels"],
        key: Key[Array, ""] | None = None,
    ) -> Float32[Array, "batch features"]:
        """Computes features; pixels are scaled from 0..255 to -1..1.

        Args:
          images: `[batch, height, width, channels]`.
          key: what the adapters' dropout is drawn from; None = no dropout.

        Returns:
          float32 `[batch, features]`.

        Raises:
          ValueError: for images of another size.
        """
        check_images(images, self.shape.image_size, self.shape.channels)
        dtype = self.computing.dtype
        x = self.stem(jnp.asarray(images, jnp.float32) / 127.5 - 1.0)
        token = self.class_token[...].astype(dtype)
        token = jnp.broadcast_to(token, (x.shape[0], 1, self.shape.width))
        x = jnp.concatenate([token, x], axis=1) + self.positions[...].astype(dtype)
        keys = [None] * len(self.blocks) if key is None else jax.random.split(key, len(self.blocks))
        for block, block_key in zip(self.blocks, keys, strict=True):
            x = apply_block(block, x, block_key, remat=self.computing.remat)
        return self.norm(x[:, 0])
