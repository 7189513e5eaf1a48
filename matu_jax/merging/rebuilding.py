"""From a unified file back to one model."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from pydantic import AfterValidator, BaseModel, Field

from matu_jax.aggregation import Unified, modulate
from matu_jax.aggregation.storage import mask_bytes
from matu_jax.errors import did_you_mean
from matu_jax.json_files import checked, parse_json
from matu_jax.merging.blocks import BUDGET, Block, block_size, fill, plan
from matu_jax.merging.methods import FORMAT, VERSION, write_finite
from matu_jax.models.tensors import (
    FLOATING,
    READABLE,
    Tensor,
    TensorFileError,
    TensorFiles,
    Writer,
    fingerprint,
    some_of,
)
from matu_jax.trees import apply_vectors


def _different(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("expected names that differ")
    return names


_Names = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(min_length=1), AfterValidator(_different)
]


class _Metadata(BaseModel):
    """What a unified file's header says, the JSON in it read."""

    models: _Names
    base_fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    base: str = "unknown"
    cosines: list[Annotated[float, Field(ge=-1, le=1)]] | None = None  # older files have none
    from_base: list[str] | None = None
    left_out: dict[str, list[str]] = {}


class UnifiedTasks(NamedTuple):
    """What a unified file holds.

    Attributes:
      scales: of the models, by name, in the order of the masks' rows.
      base: the name of the base.
      base_fingerprint: of the base.
      cosines: by model, between its task vector and the one rebuilt; empty if not known.
      from_base: tensors that are the base's and not the models' own; None if not known.
      left_out: by model, tensors that only that model has.
    """

    scales: dict[str, float]
    base: str
    base_fingerprint: str
    cosines: dict[str, float]
    from_base: tuple[str, ...] | None
    left_out: dict[str, list[str]]


def unified_tasks(unified: TensorFiles) -> UnifiedTasks:
    """What a unified file holds, all of it checked.

    Raises:
      TensorFileError: if the file is none that `unify_models` of this version wrote, or is
        damaged.
    """
    meta = unified.metadata
    if meta.get("format") != FORMAT or meta.get("format_version") != VERSION:
        raise TensorFileError(
            f"{unified.path}: found format {meta.get('format')!r}, version "
            f"{meta.get('format_version')!r}; expected {FORMAT!r}, version {VERSION!r}, as "
            "python -m matu_jax.merge --method unify writes it."
        )
    parsed: dict[str, Any] = dict(meta)
    try:
        for key in ("models", "cosines", "from_base", "left_out"):
            if key in meta:
                parsed[key] = parse_json(meta[key])
        found = checked(_Metadata, parsed, "metadata")
    except ValueError as error:
        raise TensorFileError(f"{unified.path}: damaged: {error}") from None
    models = found.models
    if found.cosines is not None and len(found.cosines) != len(models):
        raise TensorFileError(f"{unified.path}: damaged: one cosine per model is expected.")
    expected = {"scales": Tensor("F32", (len(models),), 4 * len(models))}
    for name, tensor in unified.tensors.items():
        if name.startswith("vector.") and tensor.dtype in FLOATING:
            expected[name] = tensor
            packed = mask_bytes(tensor.size)
            masks = Tensor("U8", (len(models), packed), len(models) * packed)
            expected["mask." + name.removeprefix("vector.")] = masks
    if expected != unified.tensors:
        names = expected.keys() | unified.tensors.keys()
        wrong = {name for name in names if expected.get(name) != unified.tensors.get(name)}
        raise TensorFileError(f"{unified.path}: damaged: wrong tensors: {some_of(wrong)}.")
    scales = dict(zip(models, unified.read("scales", 0, len(models)).tolist(), strict=True))
    bad = [f"{name}: {scale}" for name, scale in scales.items() if not 0 <= scale < np.inf]
    if bad:
        raise TensorFileError(
            f"{unified.path}: damaged: scales of {some_of(bad)}; expected finite numbers "
            "that are not negative."
        )
    return UnifiedTasks(
        scales,
        found.base,
        found.base_fingerprint,
        dict(zip(models, found.cosines or (), strict=False)),
        None if found.from_base is None else tuple(found.from_base),
        found.left_out,
    )


def rebuild_model(
    unified: TensorFiles,
    base: TensorFiles,
    task: str,
    path: Path,
    *,
    budget: int = BUDGET,
    progress: Callable[[int], None] = lambda parameters: None,
) -> float:
    """Writes base + lambda * mask * vector (eq. 4) of one model, with the base's names and dtypes.

    Args:
      unified: a file of `unify_models`.
      base: the very base that it was made with.
      task: the name of a model in it.
      path: the file to write; tensors that were not merged are the base's.
      budget: how many entries may stand in memory.
      progress: is told the number of parameters of each block done.

    Returns:
      The model's scale.

    Raises:
      TensorFileError: for a file that is not a unified, a task that is not in it, another base, or
        a file that cannot be written.
    """
    tasks = unified_tasks(unified)
    scales = tasks.scales
    if task not in scales:
        raise TensorFileError(
            f"{unified.path}: no task {task!r} in it.{did_you_mean(task, list(scales))}"
        )
    names = [name.removeprefix("vector.") for name in unified.tensors if name.startswith("vector.")]
    wrong = [
        f"{name} (found {base.tensors.get(name, 'nothing')}, expected "
        f"{unified.tensors['vector.' + name]})"
        for name in names
        if base.tensors.get(name) != unified.tensors["vector." + name]
    ]
    found, wanted = fingerprint(base), tasks.base_fingerprint
    if wrong or found != wanted:
        raise TensorFileError(
            f"{base.path} is not the base that {unified.path} was made with"
            f" ({tasks.base}): fingerprint found {found}, expected "
            f"{wanted}.{f' Tensors differ: {some_of(wrong)}' if wrong else ''}"
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
                start, count = row * packed + segment.start // 8, mask_bytes(segment.size)
                bits = unified.read(f"mask.{segment.name}", start, count)
                mask[segment.mask_part] = segment.for_block(bits)
            merged = _rebuild_block(block.base, block.tuned[0], mask, scale)
            advice = "The unified file is damaged, or made from"
            write_finite(writer, block, np.asarray(merged), advice)
            progress(block.size)
        for name in base.tensors.keys() - set(names):
            for start, data in base.pieces(name):
                writer.write(name, data, start)
    return float(scale)


@jax.jit
def _rebuild_block(base: jax.Array, vector: jax.Array, mask: jax.Array, scale: jax.Array):
    unified = Unified({"block": vector}, {"block": mask[None]}, scale[None])
    return apply_vectors({"block": base}, modulate(unified))["block"][0]
