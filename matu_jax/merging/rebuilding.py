"""From a unified file back to one model's checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from matu_jax.aggregation import Unified, modulate
from matu_jax.config import did_you_mean
from matu_jax.merging.blocks import BUDGET, Block, block_size, fill, plan
from matu_jax.merging.methods import FORMAT, VERSION, write_finite
from matu_jax.tensors import READABLE, Checkpoint, CheckpointError, Tensor, Writer, fingerprint
from matu_jax.trees import apply_vectors


def unified_tasks(unified: Checkpoint) -> dict[str, float]:
    """The models in a unified file, and their scales.

    Raises:
      CheckpointError: if the file is none that `unify_checkpoints` of this version wrote.
    """
    meta = unified.metadata
    if meta.get("format") != FORMAT or meta.get("format_version") != VERSION:
        raise CheckpointError(
            f"{unified.path}: found format {meta.get('format')!r}, version "
            f"{meta.get('format_version')!r}; expected {FORMAT!r}, version {VERSION!r}, as "
            "python -m matu_jax.merge --method unify writes it."
        )
    models = json.loads(meta["models"])
    expected = {"scales": Tensor("F32", (len(models),), 4 * len(models))}
    for name, tensor in unified.tensors.items():
        if name.startswith("vector."):
            expected[name] = tensor
            packed = -(-tensor.size // 8)
            masks = Tensor("U8", (len(models), packed), len(models) * packed)
            expected["mask." + name.removeprefix("vector.")] = masks
    if expected != unified.tensors:
        names = expected.keys() | unified.tensors.keys()
        wrong = {name for name in names if expected.get(name) != unified.tensors.get(name)}
        raise CheckpointError(
            f"{unified.path}: damaged: wrong tensors: {', '.join(sorted(wrong))}."
        )
    return dict(zip(models, unified.read("scales", 0, len(models)).tolist(), strict=True))


def rebuild_checkpoint(
    unified: Checkpoint,
    base: Checkpoint,
    task: str,
    path: Path,
    *,
    budget: int = BUDGET,
    progress: Callable[[int], None] = lambda parameters: None,
) -> float:
    """Writes base + lambda * mask * vector (eq. 4) of one model, with the base's names and dtypes.

    Args:
      unified: a file of `unify_checkpoints`.
      base: the very checkpoint that it was made with.
      task: the name of a model in it.
      path: the file to write; tensors that were not merged are the base's.
      budget: how many entries may stand in memory.
      progress: is told the number of parameters of each block done.

    Returns:
      The model's scale.

    Raises:
      CheckpointError: for a file that is not a unified, a task that is not in it, another base, or
        a file that cannot be written.
    """
    scales = unified_tasks(unified)
    if task not in scales:
        raise CheckpointError(
            f"{unified.path}: no task {task!r} in it.{did_you_mean(task, list(scales))}"
        )
    names = [name.removeprefix("vector.") for name in unified.tensors if name.startswith("vector.")]
    wrong = [
        f"{name} (found {base.tensors.get(name, 'nothing')}, expected "
        f"{unified.tensors['vector.' + name]})"
        for name in names
        if base.tensors.get(name) != unified.tensors["vector." + name]
    ]
    found, wanted = fingerprint(base), unified.metadata.get("base_fingerprint")
    if wrong or found != wanted:
        raise CheckpointError(
            f"{base.path} is not the base that {unified.path} was made with"
            f" ({unified.metadata.get('base', 'unknown')}): fingerprint found {found}, expected "
            f"{wanted}.{' Tensors differ: ' + ', '.join(wrong[:5]) if wrong else ''}"
        )
    row, scale = list(scales).index(task), np.float32(scales[task])
    size = block_size(1, budget)
    with Writer(path, base.tensors, base.metadata) as writer:
        for segments in plan(base, names, size):
            dtype = READABLE[base.tensors[segments[0].name].dtype]
            block = Block(segments, np.zeros(size, dtype), np.zeros((1, size), dtype))
            fill(block.base, base, segments)
            fill(block.tuned[0], unified, segments, "vector.")
            mask = np.zeros(size // 8, np.uint8)
            for segment in segments:
                packed = unified.tensors[f"mask.{segment.name}"].shape[1]
                start, count = row * packed + segment.start // 8, -(-segment.size // 8)
                first = segment.place // 8
                mask[first : first + count] = unified.read(f"mask.{segment.name}", start, count)
            merged = _rebuild_block(block.base, block.tuned[0], mask, scale)
            write_finite(writer, block, np.asarray(merged))
            progress(block.size)
        for name in base.tensors.keys() - set(names):
            for start, data in base.pieces(name):
                writer.write(name, data, start)
    return float(scale)


@jax.jit
def _rebuild_block(base: jax.Array, vector: jax.Array, mask: jax.Array, scale: jax.Array):
    unified = Unified({"block": vector}, {"block": mask[None]}, scale[None])
    return apply_vectors({"block": base}, modulate(unified))["block"][0]
