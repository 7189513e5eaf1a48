"""Models as pure functions: what trains, what is frozen, and how features come out.

A model is built once with Flax NNX and split; the rest of the package sees plain trees of arrays
and one pure function.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from matu_jax.config import ModelConfig, did_you_mean
from matu_jax.models.vit import PROJECTIONS, LoRAParam, LoRASpec, VisionTransformer, ViTShape
from matu_jax.trees import PyTree, leaf_items

EMBEDDED_CHECKPOINT = Path(__file__).parent / "embedded.safetensors"


class Model(NamedTuple):
    """A model, split.

    Attributes:
      base: what trains, as it is before fine-tuning, leaves `[...]`. With trained heads it is
        `{"shared": ..., "head": {"kernel": [features, classes], "bias": [classes]}}`.
      frozen: what does not train, leaves `[...]`, "label_vectors" `[classes, features]` among them.
      logits: `(params, frozen, images [batch, height, width, channels]) -> [batch, classes]`.
    """

    base: PyTree
    frozen: PyTree
    logits: Callable[[PyTree, PyTree, jax.Array], jax.Array]


def build(config: ModelConfig, *, num_classes: int, seed: int = 0) -> Model:
    """Builds the model of an experiment.

    Args:
      config: checkpoint, adapters and head.
      num_classes: the largest number of classes of any task.
      seed: what adapters (and a "random" backbone) are drawn from.

    Returns:
      The model; adapters start as the identity, trained heads as zeros.

    Raises:
      ValueError: for an unknown projection, a checkpoint that cannot be read or lacks a tensor, or
        more classes than label vectors.
    """
    for target in config.lora_targets:
        if target not in PROJECTIONS:
            raise ValueError(
                f"config.model.lora_targets: found {target!r}, no such projection."
                + did_you_mean(str(target), PROJECTIONS)
            )
    lora = None
    if config.trainable == "lora":
        if not config.lora_targets:
            raise ValueError("config.model.lora_targets: found none, expected at least one.")
        lora = LoRASpec(tuple(config.lora_targets), config.lora_rank, config.lora_alpha)

    if config.checkpoint == "random":
        shape, tensors = ViTShape(), None
        square = np.random.default_rng(seed).normal(size=(shape.width, shape.width))
        label_vectors = np.linalg.qr(square)[0].astype(np.float32)
    else:
        path = EMBEDDED_CHECKPOINT if config.checkpoint == "embedded" else Path(config.checkpoint)
        shape, tensors = _read(path)
        label_vectors = tensors.pop("label_vectors")
    if config.head == "frozen" and num_classes > len(label_vectors):
        raise ValueError(
            f"config.model.head: a task has {num_classes} classes and the checkpoint only "
            f"{len(label_vectors)} label vectors. Use config.model.head = 'trained'."
        )

    module = VisionTransformer(shape, lora, rngs=nnx.Rngs(seed))
    trains = LoRAParam if lora else nnx.Param
    graph, train_state, rest_state = nnx.split(module, trains, ...)
    base, frozen = nnx.to_pure_dict(train_state), nnx.to_pure_dict(rest_state)
    if tensors is not None:
        tensors = dict(tensors)
        if lora:
            frozen = _fill(frozen, tensors, config.checkpoint)
        else:
            base = _fill(base, tensors, config.checkpoint)
        if tensors:
            raise ValueError(
                f"config.model.checkpoint {config.checkpoint}: unknown tensors "
                f"{', '.join(sorted(tensors))}. It was written for another model."
            )
    frozen = {"backbone": frozen, "label_vectors": jnp.asarray(label_vectors[:num_classes])}

    def features(params, frozen, images):
        first, second = _restored(train_state, params), _restored(rest_state, frozen["backbone"])
        return nnx.merge(graph, first, second)(images)

    if config.head == "trained":
        head = {
            "kernel": jnp.zeros((shape.width, num_classes)),
            "bias": jnp.zeros((num_classes,)),
        }

        def logits(params, frozen, images):
            out = features(params["shared"], frozen, images) @ params["head"]["kernel"]
            return out + params["head"]["bias"][None]

        return Model({"shared": base, "head": head}, frozen, logits)

    def logits(params, frozen, images):
        out = features(params, frozen, images)
        out = out * jax.lax.rsqrt(jnp.sum(jnp.square(out), axis=-1, keepdims=True) + 1e-6)
        return config.logit_scale * out @ frozen["label_vectors"].T

    return Model(base, frozen, logits)


def _restored(state: nnx.State, values: PyTree) -> nnx.State:
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, values)
    return state


def _read(path: Path) -> tuple[ViTShape, dict[str, np.ndarray]]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"config.model.checkpoint: {path} cannot be read as safetensors ({error}). Give "
            "'embedded', 'random', or a file that experiments/pretrain_backbone.py wrote."
        ) from None
    if "shape" not in metadata or "label_vectors" not in tensors:
        raise ValueError(
            f"config.model.checkpoint: {path} has no model shape or no label vectors; expected a "
            "file that experiments/pretrain_backbone.py wrote."
        )
    return ViTShape(**json.loads(metadata["shape"])), tensors


def _fill(tree: PyTree, tensors: dict[str, Any], source: str) -> PyTree:
    """Replaces every leaf by the tensor of its path, taking the tensor out of the dict."""
    wrong, leaves = [], []
    for path, leaf in leaf_items(tree):
        tensor = tensors.pop(path, None)
        if tensor is None or tensor.shape != leaf.shape:
            found = "none" if tensor is None else str(tensor.shape)
            wrong.append(f"  {path}: found {found}, expected {leaf.shape}")
        leaves.append(jnp.asarray(tensor) if tensor is not None else leaf)
    if wrong:
        raise ValueError(
            f"config.model.checkpoint {source}: tensors missing or of another shape\n"
            + "\n".join(wrong)
        )
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
