"""The parts of every transformer here: dense layers with LoRA, pre-norm blocks, stacks of blocks.

LoRA (Hu et al. 2022, arXiv 2106.09685) on chosen projections: y = x W + b + (alpha / rank) (x A) B,
with A random and B zero, so that an adapted model starts as the base model.

Parameters may be of any floating dtype; they are cast where they are used. Activations and matrix
products are of the compute dtype; layer norms and the softmax of attention are float32.

For the backward pass a block keeps its input and what its projections yield, once and in the
compute dtype, and computes the rest again, which is elementwise: norms, activation, and attention's
inside. So the frozen kernels leave nothing behind, and norms nothing in float32.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key, Shaped

from matu_jax.models.architectures import TowerShape
from matu_jax.models.attention import attention

PROJECTIONS = ("query", "key", "value", "out", "mlp_in", "mlp_out")

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class LoRASpec:
    """Adapters: where they are and what they are like.

    Attributes:
      targets: the projections that carry one, out of `PROJECTIONS`.
      rank: of the product A B.
      alpha: the product is scaled by alpha / rank.
      dropout: probability with which each input of an adapter is zeroed while training; the others
        are divided by 1 - dropout. The frozen product beside it sees its inputs whole.
    """

    targets: tuple[str, ...] = ("query", "value")
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Computing:
    """How a model computes, which changes its speed and rounding alone.

    Attributes:
      dtype: of activations and matrix products; float32 or bfloat16.
      remat: whether all of a block but its input is computed again in the backward pass.
    """

    dtype: Any = jnp.float32
    remat: bool = False


EXACT = Computing()


class LoRAParam(nnx.Param[jax.Array]):
    """A parameter of a LoRA adapter; the filter that selects what trains."""


class Linear(nnx.Module):
    """A dense layer, with an optional LoRA adapter beside it: `[..., in] -> [..., out]`.

    Parameters: kernel `[in, out]`, bias `[out]` (unless left out), lora_a `[in, rank]`, lora_b
    `[rank, out]`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        lora: LoRASpec | None = None,
        *,
        bias: bool = True,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        scale = math.sqrt(1.0 / inputs)
        self.kernel: nnx.Param[jax.Array] = nnx.Param(
            jax.random.normal(rngs.params(), (inputs, outputs)) * scale
        )
        self.has_bias: bool = bias
        self.dtype: Any = dtype
        if bias:
            self.bias: nnx.Param[jax.Array] = nnx.Param(jnp.zeros(outputs))
        self.lora_scale: float = 0.0
        self.dropout: float = 0.0
        if lora is not None:
            bound = math.sqrt(3.0 / inputs)
            self.lora_scale, self.dropout = lora.alpha / lora.rank, lora.dropout
            self.lora_a: LoRAParam = LoRAParam(
                jax.random.uniform(rngs.params(), (inputs, lora.rank), minval=-bound, maxval=bound)
            )
            self.lora_b: LoRAParam = LoRAParam(jnp.zeros((lora.rank, outputs)))

    def __call__(
        self, x: Float[Array, "*batch inputs"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "*batch outputs"]:
        """Applies the layer; the adapter's product is kept apart from the frozen one.

        Args:
          x: `[..., in]`.
          key: what the adapter's dropout is drawn from; None = no dropout.

        Returns:
          `[..., out]` in the compute dtype.
        """
        batch, x = x.shape[:-1], _rows(x.astype(self.dtype))
        y = x @ self.kernel[...].astype(self.dtype)
        if self.lora_scale:
            if self.dropout and key is not None:
                kept = jax.random.bernoulli(key, 1.0 - self.dropout, x.shape)
                x = jnp.where(kept, x / (1.0 - self.dropout), jnp.zeros_like(x))
            # The narrow factor is scaled: the sum then needs no product of its own.
            low = _kept(self.lora_scale * (x @ self.lora_a[...].astype(self.dtype)))
            y = y + low @ self.lora_b[...].astype(self.dtype)
        if self.has_bias:
            y = y + self.bias[...].astype(self.dtype)[None]
        return y.reshape(*batch, y.shape[-1])


def _rows(x: jax.Array) -> jax.Array:
    """`[..., features] -> [rows, features]`."""
    return x.reshape(-1, x.shape[-1])


def _kept(x: jax.Array) -> jax.Array:
    """Marks what is kept for the backward pass, see `_keeping`."""
    return checkpoint_name(x, "kept")


def _keeping(function: Callable[..., Any], *, looped: bool = False) -> Callable[..., Any]:
    """The function, which keeps its arguments and what is marked `_kept`, and nothing else.

    Looped: it is the body of a loop, which itself keeps XLA from merging the second computation
    with the first.
    """
    policy = jax.checkpoint_policies.save_only_these_names("kept")
    return jax.checkpoint(function, policy=policy, prevent_cse=not looped)


class Norm(nnx.LayerNorm):
    """Layer normalisation in float32, whatever the dtype of its input: `[..., width]` float32."""

    def __init__(self, width: int, epsilon: float, *, rngs: nnx.Rngs):
        super().__init__(width, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)


class Block(nnx.Module):
    """Pre-norm self-attention and MLP: `[batch, tokens, width] -> [batch, tokens, width]`.

    Args:
      shape: widths, heads, activation and epsilon; its depth does not matter here.
      lora: adapters.
      causal: whether a token attends to itself and those before it only.
      dtype: the compute dtype.
      rngs: what parameters are drawn from.
    """

    def __init__(
        self,
        shape: TowerShape,
        lora: LoRASpec | None = None,
        *,
        causal: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def linear(name: str, inputs: int, outputs: int) -> Linear:
            adapter = lora if lora and name in lora.targets else None
            return Linear(inputs, outputs, adapter, dtype=dtype, rngs=rngs)

        width = shape.width
        self.heads: int = shape.heads
        self.causal: bool = causal
        self.dtype: Any = dtype
        self.activation: str = shape.activation
        self.norm_attention: Norm = Norm(width, shape.epsilon, rngs=rngs)
        self.query: Linear = linear("query", width, width)
        self.key: Linear = linear("key", width, width)
        self.value: Linear = linear("value", width, width)
        self.out: Linear = linear("out", width, width)
        self.norm_mlp: Norm = Norm(width, shape.epsilon, rngs=rngs)
        self.mlp_in: Linear = linear("mlp_in", width, shape.mlp_width)
        self.mlp_out: Linear = linear("mlp_out", shape.mlp_width, width)

    def __call__(
        self, x: Float[Array, "batch tokens width"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch tokens width"]:
        """Applies attention, then the MLP, each with its residual.

        Args:
          x: `[batch, tokens, width]` in the compute dtype.
          key: what the adapters' dropout is drawn from, a mask per projection; None = no dropout.

        Returns:
          `[batch, tokens, width]` in the compute dtype.
        """
        return self.of_rows(_rows(x), x.shape[1], key).reshape(x.shape)

    def of_rows(
        self, x: Float[Array, "rows width"], tokens: int, key: Key[Array, ""] | None = None
    ) -> Float[Array, "rows width"]:
        """The same of tokens in a row, example after example.

        So everything but attention's heads is a matrix: where arrays lie in tiles, as on TPU, a
        number of tokens that does not fill them would have every product's operands copied.
        """
        keys = [None] * len(PROJECTIONS) if key is None else jax.random.split(key, len(PROJECTIONS))
        width = x.shape[-1]
        normed = self.norm_attention(x).astype(self.dtype)
        heads = (-1, tokens, self.heads, width // self.heads)
        query, key, value = (
            _kept(projection(normed, part)).reshape(heads)
            for projection, part in zip((self.query, self.key, self.value), keys, strict=False)
        )
        attended = attention(query, key, value, causal=self.causal)
        attended = _kept(attended.reshape(x.shape))
        x = _kept(x + self.out(attended, keys[3]))
        hidden = _kept(self.mlp_in(self.norm_mlp(x), keys[4]))
        return x + self.mlp_out(ACTIVATIONS[self.activation](hidden), keys[5])


def apply_block(
    block: Block,
    x: Float[Array, "batch tokens width"],
    key: Key[Array, ""] | None,
    *,
    remat: bool,
) -> Float[Array, "batch tokens width"]:
    """Applies one block; for the backward pass it keeps its matrix products or, with remat, not."""
    graph, state = nnx.split(block)

    def function(state, rows, key):
        return nnx.merge(graph, state).of_rows(rows, x.shape[1], key)

    checkpointed = (jax.checkpoint if remat else _keeping)(function)
    return checkpointed(state, _rows(x), key).reshape(x.shape)


def stacked_blocks(
    shape: TowerShape,
    lora: LoRASpec | None = None,
    *,
    causal: bool = False,
    dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Block:
    """All blocks of a tower as one, with every parameter stacked over depth: `[depth, ...]`.

    Such a block is to be applied by `apply_blocks`; see `Block` for the arguments.
    """

    @nnx.vmap(in_axes=0, out_axes=0)
    def draw(keys: jax.Array) -> Block:
        return Block(shape, lora, causal=causal, dtype=dtype, rngs=nnx.Rngs(keys))

    return draw(jax.random.split(rngs.params(), shape.depth))


def apply_blocks(
    blocks: Block,
    x: Float[Array, "batch tokens width"],
    key: Key[Array, ""] | None = None,
    *,
    remat: bool = False,
) -> Float[Array, "batch tokens width"]:
    """Applies stacked blocks, one after the other.

    In a loop, whose body is compiled once: for a TPU twelve blocks one by one take minutes instead
    of seconds, and move no fewer bytes. But without remat one by one on NVIDIA GPUs, where XLA is
    quick and what a block keeps for the backward pass stays where its products have put it: a loop
    would copy all of it into a stack and out again, half as many bytes again.

    Args:
      blocks: from `stacked_blocks`.
      x: `[batch, tokens, width]`.
      key: what the adapters' dropout is drawn from; None = no dropout.
      remat: whether all of a block but its input is computed again in the backward pass.

    Returns:
      `[batch, tokens, width]`.
    """
    graph, state = nnx.split(blocks)
    depth = jax.tree.leaves(state)[0].shape[0]
    keys = None if key is None else jax.random.split(key, depth)

    def step(rows, layer):
        state, key = layer
        return nnx.merge(graph, state).of_rows(rows, x.shape[1], key), None

    def in_a_loop(rows, state, keys):
        body = jax.checkpoint(step, prevent_cse=False) if remat else _keeping(step, looped=True)
        return jax.lax.scan(body, rows, (state, keys))[0]

    def one_by_one(rows, state, keys):
        leaves, structure = jax.tree.flatten(state)
        # Their gradients are put together again, not added up.
        pieces = [jnp.split(leaf, depth) for leaf in leaves]
        for layer in range(depth):
            own = structure.unflatten([piece[layer].squeeze(0) for piece in pieces])
            rows = _keeping(step)(rows, (own, None if keys is None else keys[layer]))[0]
        return rows

    given = (_rows(x), state, keys)
    if remat:
        return in_a_loop(*given).reshape(x.shape)
    rows = jax.lax.platform_dependent(*given, cuda=one_by_one, default=in_a_loop)
    return rows.reshape(x.shape)


def check_images(
    images: Shaped[Array | np.ndarray, "batch height width channels"], size: int, channels: int
) -> None:
    """Refuses images that a model was not made for; while tracing, so at no cost.

    Raises:
      ValueError: with the shapes.
    """
    if images.ndim != 4 or images.shape[1:] != (size, size, channels):
        raise ValueError(
            f"images: found {list(images.shape)}, expected [batch, {size}, {size}, {channels}]. "
            "Prepare the tasks for the model in use (config.model.architecture)."
        )
