"""Real architectures: their towers out of Hugging Face checkpoints, or drawn at random."""

import functools
import logging
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from matu_jax.data import ImageTask
from matu_jax.models import huggingface
from matu_jax.models.architectures import Architecture, without_text_tower
from matu_jax.models.backbone import (
    Backbone,
    adapters,
    build_backbone,
    computing,
    parameter_shapes,
)
from matu_jax.models.checkpoint_config import architecture_of
from matu_jax.models.choices import ModelConfig
from matu_jax.models.heads import zero_shot_heads
from matu_jax.models.tensor_names import from_huggingface, tensor_names
from matu_jax.models.towers import TextTower, VisionTower
from matu_jax.trees import PyTree

CLIP_LOGIT_SCALE = 100.0  # where CLIP's training clips it, and OpenAI's checkpoints ended
_LEFT_OUT = {
    "clip": re.compile(r"(vision|text)_model\.embeddings\.position_ids"),
    "vit": re.compile(r"(classifier|decoder|vit\.pooler)\..*|vit\.embeddings\.mask_token"),
}


def load(
    config: ModelConfig, frozen_tasks: Sequence[ImageTask], *, seed: int
) -> tuple[Backbone, list[np.ndarray], float]:
    """Makes the image tower of a real architecture, and the zero-shot heads of tasks.

    Args:
      config: architecture, checkpoint and adapters.
      frozen_tasks: tasks whose heads are frozen.
      seed: what adapters are drawn from; with checkpoint "random" also the tower and, since there
        is no text tower to ask, the heads: unit vectors drawn from seed and task name.

    Returns:
      The backbone, float32 `[classes, features]` for each of `frozen_tasks`, and the checkpoint's
      logit scale (100 for "random", 1 where no head is frozen).

    Raises:
      ValueError: for a checkpoint that cannot be found or read or does not fit, or frozen heads
        without a text tower.
    """
    lora, how = adapters(config), computing(config)
    architecture, folder = architecture_of(config), huggingface.folder_of(config)
    if frozen_tasks and architecture.text is None:
        raise without_text_tower(config, [task.name for task in frozen_tasks])

    def module(rngs: nnx.Rngs) -> VisionTower:
        return VisionTower(architecture, lora, computing=how, rngs=rngs)

    values, heads, logit_scale = None, [], 1.0
    if folder is None:
        heads = [_random_head(task, architecture.features, seed) for task in frozen_tasks]
        logit_scale = CLIP_LOGIT_SCALE
    else:
        values, text, logit_scale = read_towers(
            folder, architecture, parameter_shapes(module), text=bool(frozen_tasks)
        )
        if frozen_tasks:
            tokenizer = huggingface.tokenizer(folder, architecture.vocabulary)
            heads = zero_shot_heads(
                text_embedding(architecture, text),
                tokenizer,
                frozen_tasks,
                context=architecture.context,
                end_token=architecture.end_token,
            )
    size = architecture.image_size
    backbone = build_backbone(
        module,
        architecture.features,
        (size, size, 3),
        lora=lora is not None,
        dtype=how.dtype,
        seed=seed,
        values=values,
    )
    return backbone, heads, logit_scale


def read_towers(
    folder: Path, architecture: Architecture, vision_shapes: PyTree, *, text: bool
) -> tuple[PyTree, PyTree, float]:
    """Reads the towers of a checkpoint.

    Tensors that are known and not needed (position numbers, a classifier, a pooler) are left out
    and logged.

    Args:
      folder: of the checkpoint.
      architecture: the checkpoint's, from `checkpoint_config.architecture_of`.
      vision_shapes: of the image tower's parameters.
      text: whether the text tower is wanted too; architecture must have one.

    Returns:
      The image tower's parameters, the text tower's or None, and the logit scale (1 without text).

    Raises:
      ValueError: lists tensors that are missing, unknown or of another shape.
    """
    files = huggingface.tensor_files(folder)
    vision_kind = "vit" if architecture.family == "vit" else "clip_vision"
    shapes = {vision_kind: vision_shapes}
    if architecture.text is not None:
        shapes["clip_text"] = parameter_shapes(lambda rngs: TextTower(architecture, rngs=rngs))
    known = {name for kind, tree in shapes.items() for name in tensor_names(kind, tree)}
    left_out = [name for name in files if _LEFT_OUT[architecture.family].fullmatch(name)]
    unknown = sorted(set(files) - known - set(left_out) - {"logit_scale"})
    if unknown:
        raise ValueError(
            f"{folder}: unknown tensors {', '.join(unknown)}. Expected those of "
            f"{architecture.name}, with {architecture.vision.depth} layers."
        )
    wanted = [vision_kind] + ["clip_text"] * text
    trees = {}
    for kind in wanted:
        tensors = huggingface.read_tensors(files, tensor_names(kind, shapes[kind]))
        try:
            trees[kind] = from_huggingface(tensors, kind, shapes[kind])
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
    logit_scale = 1.0
    if text:
        scale = huggingface.read_tensors(files, ["logit_scale"]).get("logit_scale")
        if scale is None or scale.size != 1:
            raise ValueError(f"{folder}: tensor logit_scale is missing, expected one number.")
        logit_scale = float(np.exp(scale.item()))
    if left_out:
        logging.getLogger(__name__).warning("%s: not needed: %s", folder, ", ".join(left_out))
    return trees[vision_kind], trees.get("clip_text"), logit_scale


def text_embedding(
    architecture: Architecture, values: PyTree
) -> Callable[[jax.Array | np.ndarray], jax.Array]:
    """The text tower, jitted: int32 `[batch, tokens]` to float32 `[batch, features]`."""
    graph, state = nnx.split(nnx.eval_shape(lambda: TextTower(architecture, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, values))
    # The weights are an argument: as constants they would be compiled into the program.
    return functools.partial(jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens)), state)


def _random_head(task: ImageTask, features: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng((seed, zlib.crc32(task.name.encode())))
    rows = rng.normal(size=(task.num_classes, features))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
