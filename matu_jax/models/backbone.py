"""A module taken apart: what trains, what is frozen, and a pure function of both.

Flax NNX defines the modules; they are split once, and the hot path sees plain trees of arrays.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from matu_jax.errors import did_you_mean
from matu_jax.models.choices import ModelConfig
from matu_jax.models.modules import restored
from matu_jax.models.transformer import PROJECTIONS, Computing, LoRAParam, LoRASpec
from matu_jax.trees import PyTree, leaf_items


class Backbone(NamedTuple):
    """Images to features, split.

    Attributes:
      trainable: what trains, leaves `[...]` float32.
      frozen: what does not, leaves `[...]`.
      apply: `(trainable, frozen, images [batch, height, width, channels], key) -> float32 [batch,
        features]`; key is None or what dropout is drawn from.
      features: how many there are.
      image_shape: height, width and channels.
    """

    trainable: PyTree
    frozen: PyTree
    apply: Callable[[PyTree, PyTree, jax.Array, jax.Array | None], jax.Array]
    features: int
    image_shape: tuple[int, int, int]


def adapters(config: ModelConfig) -> LoRASpec | None:
    """The adapters that a config asks for; None where every parameter trains.

    Raises:
      ValueError: for an unknown projection, none, or dropout without adapters.
    """
    for target in config.lora_targets:
        if target not in PROJECTIONS:
            raise ValueError(
                f"config.model.lora_targets: found {target!r}, no such projection."
                + did_you_mean(str(target), PROJECTIONS)
            )
    if config.trainable == "full":
        if config.lora_dropout:
            raise ValueError(
                f"config.model.lora_dropout: found {config.lora_dropout}, but with "
                "config.model.trainable = 'full' there are no adapters. Set it to 0."
            )
        return None
    if not config.lora_targets:
        raise ValueError("config.model.lora_targets: found none, expected at least one.")
    return LoRASpec(
        tuple(config.lora_targets), config.lora_rank, config.lora_alpha, config.lora_dropout
    )


def computing(config: ModelConfig) -> Computing:
    """The dtype and remat of a config."""
    return Computing(jnp.dtype(config.compute_dtype), config.remat)


def build_backbone(
    module: Callable[[nnx.Rngs], nnx.Module],
    features: int,
    image_shape: tuple[int, int, int],
    *,
    lora: bool,
    dtype: Any,
    seed: int,
    values: PyTree | None = None,
) -> Backbone:
    """Draws a module's parameters, or only its adapters where a checkpoint brings the rest.

    Args:
      module: makes the module, called as `module(images, key)`, from random streams.
      features: how many the module yields.
      image_shape: what it takes.
      lora: whether the adapters train, or everything.
      dtype: what frozen weights are stored in; norms and the last projection stay float32.
      seed: what parameters are drawn from.
      values: all parameters but the adapters' (as `parameter_shapes` says), leaves `[...]`; None =
        drawn.

    Returns:
      The backbone.
    """
    trains = LoRAParam if lora else nnx.Param

    def draw():
        _, first, second = nnx.split(module(nnx.Rngs(seed)), trains, ...)
        return nnx.to_pure_dict(first), nnx.to_pure_dict(second)

    graph, train_state, rest_state = nnx.split(
        nnx.eval_shape(lambda: module(nnx.Rngs(seed))), trains, ...
    )
    if values is None:
        trainable, frozen = draw()
    elif lora:
        trainable, frozen = jax.jit(lambda: draw()[0])(), values
    else:
        trainable, frozen = jax.tree.map(jnp.asarray, values), nnx.to_pure_dict(rest_state)

    def apply(trainable, frozen, images, key):
        merged = nnx.merge(graph, restored(train_state, trainable), restored(rest_state, frozen))
        return merged(images, key)

    return Backbone(trainable, _stored(frozen, dtype), apply, features, image_shape)


def parameter_shapes(module: Callable[[nnx.Rngs], nnx.Module]) -> PyTree:
    """Shapes of all parameters but the adapters', as a tree of nested dicts."""
    _, _, rest = nnx.split(nnx.eval_shape(lambda: module(nnx.Rngs(0))), LoRAParam, ...)
    return nnx.to_pure_dict(rest)


def _stored(tree: PyTree, dtype: Any) -> PyTree:
    """Casts weights to the compute dtype, but for those of which float32 products are taken."""
    kept = [("norm" in path or path.startswith("projection")) for path, _ in leaf_items(tree)]
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(
        [
            jnp.asarray(leaf, jnp.float32 if keep else dtype)
            for leaf, keep in zip(leaves, kept, strict=True)
        ]
    )
