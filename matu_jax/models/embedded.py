"""The backbone of the embedded benchmark: its checkpoint, its shape and its label vectors."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from flax import nnx
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from matu_jax.data import ImageTask
from matu_jax.json_files import check_readable, checked, parse_json
from matu_jax.models.architectures import without_text_tower
from matu_jax.models.backbone import (
    Backbone,
    adapters,
    build_backbone,
    computing,
    parameter_shapes,
)
from matu_jax.models.choices import ModelConfig
from matu_jax.models.vit import VisionTransformer, ViTShape
from matu_jax.trees import PyTree, leaf_items

CHECKPOINT = Path(__file__).parent / "embedded.safetensors"
_HINT = (
    "With config.model.architecture = 'embedded', give 'embedded', 'random', or a file that "
    "experiments/pretrain_backbone.py wrote; for a Hugging Face checkpoint set "
    "config.model.architecture too, for instance to 'clip' or 'vit'."
)
# Sizes beyond every checkpoint's are refused before anything is made of them.
_Size = Annotated[int, Field(ge=1, le=100_000)]


class _Shape(BaseModel):
    """A `ViTShape` as a checkpoint notes it."""

    image_size: Annotated[int, Field(ge=1, le=10_000)] = 32
    patch_size: _Size = 8
    channels: _Size = 3
    width: _Size = 96
    depth: Annotated[int, Field(ge=1, le=1000)] = 4
    heads: _Size = 4
    mlp_width: _Size = 384
    stem_widths: Annotated[list[_Size], Field(max_length=10)] = []


def load(
    config: ModelConfig, frozen_tasks: Sequence[ImageTask], *, seed: int
) -> tuple[Backbone, list[np.ndarray]]:
    """Makes the small vision transformer and the frozen heads of tasks.

    Args:
      config: checkpoint ("embedded", "random" or a file) and adapters.
      frozen_tasks: tasks whose heads are frozen; they share the label vectors.
      seed: what adapters, and a "random" backbone with its label vectors, are drawn from.

    Returns:
      The backbone, and float32 `[classes, features]` for each of `frozen_tasks`.

    Raises:
      ValueError: for a checkpoint that cannot be read or lacks a tensor, or a frozen task with
        prompts, which the label vectors know nothing of, or more classes than label vectors.
    """
    if config.checkpoint == "random":
        shape, tensors = ViTShape(), None
        square = np.random.default_rng(seed).normal(size=(shape.width, shape.width))
        label_vectors = np.linalg.qr(square)[0].astype(np.float32)
    else:
        shape, tensors = _read(config.checkpoint)
        label_vectors = tensors.pop("label_vectors")
    if prompted := [task.name for task in frozen_tasks if task.templates]:
        raise without_text_tower(config, prompted)
    for task in frozen_tasks:
        if task.num_classes > len(label_vectors):
            raise ValueError(
                f"config.model.head: task {task.name!r} has {task.num_classes} classes and the "
                f"checkpoint only {len(label_vectors)} label vectors. Use config.model.head = "
                f"'trained', or config.model.task_heads = (({task.name!r}, 'trained'),)."
            )

    lora, how = adapters(config), computing(config)

    def module(rngs: nnx.Rngs) -> VisionTransformer:
        return VisionTransformer(shape, lora, computing=how, rngs=rngs)

    values = None
    if tensors is not None:
        values = _fill(parameter_shapes(module), tensors, config.checkpoint)
    backbone = build_backbone(
        module,
        shape.width,
        (shape.image_size, shape.image_size, shape.channels),
        lora=lora is not None,
        dtype=how.dtype,
        seed=seed,
        values=values,
    )
    return backbone, [label_vectors[: task.num_classes] for task in frozen_tasks]


def write(
    path: Path,
    shape: ViTShape,
    model: VisionTransformer,
    label_vectors: np.ndarray,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a checkpoint that `load` reads: safetensors, a tensor for each parameter's path.

    Args:
      path: the file; written over if there is one.
      shape: what the model was built with.
      model: without adapters.
      label_vectors: float32 `[classes, features]`, what frozen heads take their rows from.
      metadata: more to note in the file, by name.
    """
    parameters = leaf_items(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    tensors = {name: np.asarray(leaf) for name, leaf in parameters}
    tensors["label_vectors"] = np.asarray(label_vectors, np.float32)
    save_file(tensors, path, (metadata or {}) | {"shape": json.dumps(vars(shape))})


def image_size(checkpoint: str) -> int:
    """Height and width in pixels of the images that a checkpoint takes.

    Args:
      checkpoint: "embedded", "random" or a file.

    Raises:
      ValueError: if the file cannot be read.
    """
    return ViTShape().image_size if checkpoint == "random" else _open(checkpoint)[0].image_size


def file_of(checkpoint: str) -> Path:
    """The file of a checkpoint, "embedded" or a path."""
    return CHECKPOINT if checkpoint == "embedded" else Path(checkpoint).expanduser()


def _read(checkpoint: str) -> tuple[ViTShape, dict[str, np.ndarray]]:
    """Shape and tensors of a checkpoint, label vectors among them."""
    shape, tensors = _open(checkpoint, tensors=True)
    where = f"config.model.checkpoint {checkpoint}"
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32 or not np.isfinite(tensor).all():
            raise ValueError(
                f"{where}: tensor {name} is {tensor.dtype}, or not all of it is finite; expected "
                f"finite float32. {_HINT}"
            )
    vectors = tensors.get("label_vectors")
    if vectors is None or vectors.ndim != 2 or vectors.shape[1] != shape.width:
        found = "none" if vectors is None else list(vectors.shape)
        raise ValueError(
            f"{where}: label vectors: found {found}, expected [classes, {shape.width}]. {_HINT}"
        )
    return shape, tensors


def _open(checkpoint: str, *, tensors: bool = False) -> tuple[ViTShape, dict[str, np.ndarray]]:
    path = file_of(checkpoint)
    try:
        check_readable(path)
        with safe_open(path, framework="numpy") as file:
            metadata, names = file.metadata() or {}, file.keys() if tensors else ()
            found = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, TypeError, ValueError) as error:  # the last two: dtypes
        raise ValueError(
            f"config.model.checkpoint: {path} cannot be read as safetensors ({error}). {_HINT}"
        ) from None
    where = f"config.model.checkpoint: {path}: the model's shape"
    if "shape" not in metadata:
        raise ValueError(f"{where} is not noted in it. {_HINT}")
    try:
        noted = checked(_Shape, parse_json(metadata["shape"]), "fields")
    except ValueError as error:
        raise ValueError(f"{where} cannot be read: {error}. {_HINT}") from None
    sizes = noted.model_dump(exclude={"stem_widths"})
    return ViTShape(**sizes, stem_widths=tuple(noted.stem_widths)), found


def _fill(shapes: PyTree, tensors: dict[str, np.ndarray], source: str) -> PyTree:
    """Puts the tensor of its path in the place of every shape."""
    wrong, tensors = [], dict(tensors)
    items = [(path, leaf, tensors.pop(path, None)) for path, leaf in leaf_items(shapes)]
    for path, leaf, tensor in items:
        if tensor is None or tensor.shape != leaf.shape:
            found = "none" if tensor is None else str(tensor.shape)
            wrong.append(f"  {path}: found {found}, expected {leaf.shape}")
    if wrong:
        raise ValueError(
            f"config.model.checkpoint {source}: tensors missing or of another shape\n"
            + "\n".join(wrong)
        )
    if tensors:
        raise ValueError(
            f"config.model.checkpoint {source}: unknown tensors {', '.join(sorted(tensors))}. It "
            "was written for another model."
        )
    return jax.tree.unflatten(jax.tree.structure(shapes), [tensor for _, _, tensor in items])
