"""A vision transformer with LoRA, in Flax NNX.

Pre-norm blocks (Dosovitskiy et al. 2021, arXiv 2010.11929); LoRA adapters (Hu et al. 2022, arXiv
2106.09685) on chosen projections: y = x W + b + (alpha / rank) (x A) B, with A random and B zero,
so that an adapted model starts as the base model.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx

PROJECTIONS = ("query", "key", "value", "out", "mlp_in", "mlp_out")


@dataclasses.dataclass(frozen=True)
class ViTShape:
    """The shape of a vision transformer; sizes in pixels and features.

    Attributes:
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


@dataclasses.dataclass(frozen=True)
class LoRASpec:
    """Which projections carry an adapter, its rank, and alpha (the scale is alpha / rank)."""

    targets: tuple[str, ...] = ("query", "value")
    rank: int = 8
    alpha: float = 16.0


class LoRAParam(nnx.Param):
    """A parameter of a LoRA adapter; the filter that selects what trains."""


class Linear(nnx.Module):
    """A dense layer, with an optional LoRA adapter beside it: `[..., in] -> [..., out]`."""

    def __init__(self, inputs: int, outputs: int, lora: LoRASpec | None, *, rngs: nnx.Rngs):
        scale = math.sqrt(1.0 / inputs)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (inputs, outputs)) * scale)
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.lora_scale = 0.0
        if lora is not None:
            bound = math.sqrt(3.0 / inputs)
            self.lora_scale = lora.alpha / lora.rank
            self.lora_a = LoRAParam(
                jax.random.uniform(rngs.params(), (inputs, lora.rank), minval=-bound, maxval=bound)
            )
            self.lora_b = LoRAParam(jnp.zeros((lora.rank, outputs)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer; the adapter's product is kept apart from the frozen one."""
        y = x @ self.kernel[...]
        if self.lora_scale:
            y = y + self.lora_scale * ((x @ self.lora_a[...]) @ self.lora_b[...])
        return y + _row(self.bias[...], y.ndim)


def _row(vector: jax.Array, ndim: int) -> jax.Array:
    return vector.reshape((1,) * (ndim - 1) + vector.shape)


class Block(nnx.Module):
    """Pre-norm self-attention and MLP: `[batch, tokens, width] -> [batch, tokens, width]`."""

    def __init__(self, shape: ViTShape, lora: LoRASpec | None, *, rngs: nnx.Rngs):
        def linear(name: str, inputs: int, outputs: int) -> Linear:
            return Linear(
                inputs, outputs, lora if lora and name in lora.targets else None, rngs=rngs
            )

        width = shape.width
        self.heads = shape.heads
        self.norm_attention = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.query = linear("query", width, width)
        self.key = linear("key", width, width)
        self.value = linear("value", width, width)
        self.out = linear("out", width, width)
        self.norm_mlp = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.mlp_in = linear("mlp_in", width, shape.mlp_width)
        self.mlp_out = linear("mlp_out", shape.mlp_width, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies attention, then the MLP, each with its residual."""
        batch, tokens, width = x.shape
        normed = self.norm_attention(x)
        heads = (batch, tokens, self.heads, width // self.heads)
        attended = jax.nn.dot_product_attention(
            self.query(normed).reshape(heads),
            self.key(normed).reshape(heads),
            self.value(normed).reshape(heads),
        )
        x = x + self.out(attended.reshape(batch, tokens, width))
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(self.norm_mlp(x))))


class StridedConvolution(nnx.Module):
    """A 3x3 convolution of stride 2, `[batch, 2h, 2w, in] -> [batch, h, w, out]`.

    Written as slices and one matrix product: inside a loop, XLA's CPU convolution is ten times
    slower. Zeros are padded below and on the right, as "SAME" does for even sizes.
    """

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.project = Linear(9 * inputs, outputs, None, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
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

    def __init__(self, shape: ViTShape, *, rngs: nnx.Rngs):
        if 2 ** (len(shape.stem_widths) + 1) != shape.patch_size:
            raise ValueError(
                f"stem_widths {shape.stem_widths} reduce the image by "
                f"{2 ** (len(shape.stem_widths) + 1)}, but patch_size is {shape.patch_size}."
            )
        widths = [shape.channels, *shape.stem_widths, shape.width]
        self.convolutions = nnx.List(
            [
                StridedConvolution(inputs, outputs, rngs=rngs)
                for inputs, outputs in itertools.pairwise(widths)
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves, with a GELU between the layers."""
        for i, convolution in enumerate(self.convolutions):
            x = convolution(jax.nn.gelu(x) if i else x)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class Patches(nnx.Module):
    """`[batch, height, width, channels] -> [batch, tokens, width]`, one dense layer per patch."""

    def __init__(self, shape: ViTShape, *, rngs: nnx.Rngs):
        self.size = shape.patch_size
        self.project = Linear(self.size**2 * shape.channels, shape.width, None, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Cuts the images into patches and projects them."""
        batch, height, width, channels = x.shape
        rows, columns = height // self.size, width // self.size
        x = x.reshape(batch, rows, self.size, columns, self.size, channels)
        return self.project(x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1))


class VisionTransformer(nnx.Module):
    """Images to one feature vector: the final norm of the class token.

    `[batch, height, width, channels]` uint8 (or floats in 0 to 255) in, `[batch, features]` out.
    """

    def __init__(self, shape: ViTShape, lora: LoRASpec | None = None, *, rngs: nnx.Rngs):
        if shape.image_size % shape.patch_size:
            raise ValueError(
                f"image_size {shape.image_size} is not a multiple of patch_size {shape.patch_size}."
            )
        if shape.width % shape.heads:
            raise ValueError(f"width {shape.width} is not a multiple of heads {shape.heads}.")
        self.shape = shape
        side = shape.image_size // shape.patch_size
        self.stem = (ConvolutionalStem if shape.stem_widths else Patches)(shape, rngs=rngs)
        self.class_token = nnx.Param(jax.random.normal(rngs.params(), (1, 1, shape.width)) * 0.02)
        self.positions = nnx.Param(
            jax.random.normal(rngs.params(), (1, side * side + 1, shape.width)) * 0.02
        )
        self.blocks = nnx.List([Block(shape, lora, rngs=rngs) for _ in range(shape.depth)])
        self.norm = nnx.LayerNorm(shape.width, epsilon=1e-5, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Computes features; pixels are scaled from 0..255 to -1..1."""
        x = self.stem(images.astype(jnp.float32) / 127.5 - 1.0)
        token = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, self.shape.width))
        x = jnp.concatenate([token, x], axis=1) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])
