"""The three ways to merge, each one program that runs on every block."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from matu_jax.aggregation import unify
from matu_jax.aggregation.choices import Magnitude
from matu_jax.aggregation.storage import mask_bytes, unpack
from matu_jax.merging.alignment import Alignment
from matu_jax.merging.blocks import BUDGET, Block, block_size, check_finite, read_blocks
from matu_jax.merging.sums import Summary, Totals, lanes, measure, relative
from matu_jax.models.tensors import Tensor, TensorFileError, TensorFiles, Writer, floating_tensor
from matu_jax.trees import apply_vectors, task_vectors

Method = Literal["unify", "ties", "arithmetic"]
PASSES: dict[Method, int] = {"unify": 1, "ties": 3, "arithmetic": 1}  # over all parameters
FORMAT, VERSION = "matu_jax.unified", "2"


def unify_models(
    base: TensorFiles,
    models: Mapping[str, TensorFiles],
    alignment: Alignment,
    path: Path,
    *,
    magnitude: Magnitude = "max",
    budget: int = BUDGET,
    progress: Callable[[int], None] = lambda parameters: None,
) -> Summary:
    """Writes the unified of the models' task vectors (eqs. 1 to 4): equal to `matu_jax.unify`.

    The file holds, for every merged tensor NAME: `vector.NAME` in the base's shape and dtype, and
    `mask.NAME`, uint8 `[models, ceil(size / 8)]`, packed as `matu_jax.Unified` says; and `scales`,
    float32 `[models]`, lambda of eq. 4 with both sums over all parameters. Its metadata name the
    format and its version, models, magnitude, dtypes, and the base with its fingerprint; and, as
    JSON, "cosines" of the models' task vectors with those rebuilt, "from_base", tensors that are
    the base's and not the models' own, and "left_out" by model, tensors that only that model has.

    Args:
      base: the model that the others were fine-tuned from.
      models: fine-tuned models by name.
      alignment: from `align`.
      path: the file to write.
      magnitude: "max" or "mean" of the agreeing magnitudes (eq. 2).
      budget: how many entries may stand in memory.
      progress: is told the number of parameters of each block done.

    Returns:
      The summary, with `scale` and `cosine` per model.

    Raises:
      TensorFileError: for numbers that are not finite, naming model and tensor; or a file that
        cannot be written.
      ValueError: for an unknown magnitude.
    """
    count, totals = len(models), Totals(base, models, alignment.parameters)
    tensors = {"scales": floating_tensor("F32", (count,))}
    for name in alignment.merged:
        tensor = base.tensors[name]
        tensors[f"vector.{name}"] = tensor
        packed = mask_bytes(tensor.size)
        tensors[f"mask.{name}"] = Tensor("U8", (count, packed), count * packed)
    metadata = {
        "format": FORMAT,
        "format_version": VERSION,
        "models": json.dumps(list(models)),
        "magnitude": magnitude,
        "dtypes": ",".join(sorted({base.tensors[name].dtype for name in alignment.merged})),
        "base": given_name(base.path),
        "base_fingerprint": totals.fingerprint,
        "from_base": json.dumps(alignment.from_base),
        "left_out": json.dumps(alignment.left_out),
        "cosines": _cosines(np.zeros(count)),  # as long as what will be known at the end
    }
    with Writer(path, tensors, metadata) as writer:
        for block in read_blocks(base, models, alignment.merged, block_size(count, budget)):
            vector, masks, sums = _unify_block(block.base, block.tuned, magnitude)
            check_finite(block, sums["finite"], base, models)
            totals.add(sums)
            vector, masks = np.asarray(vector), np.asarray(masks)
            for segment in block.segments:
                name, tensor = segment.name, base.tensors[segment.name]
                start = segment.start * vector.itemsize
                writer.write(f"vector.{name}", vector[segment.part], start)
                packed = mask_bytes(tensor.size)
                for s in range(count):
                    bits = segment.of_block(masks[s, segment.mask_part])
                    writer.write(f"mask.{name}", bits, s * packed + segment.start // 8)
            progress(block.size)
        scales, cosines = totals.scales(), totals.cosines()
        writer.write("scales", scales)
        writer.replace_metadata("cosines", _cosines(cosines))
    return totals.summary(lambda s: {"scale": float(scales[s]), "cosine": float(cosines[s])})


def merge_models(
    base: TensorFiles,
    models: Mapping[str, TensorFiles],
    alignment: Alignment,
    path: Path,
    *,
    method: Method,
    scale: float,
    density: float | None = None,
    budget: int = BUDGET,
    progress: Callable[[int], None] = lambda parameters: None,
) -> Summary:
    """Writes one model: the base plus `scale` times the models' merged task vector.

    With "arithmetic" that is the sum of the task vectors. With "ties" each is first trimmed to its
    `max(1, round(density * parameters))` entries of largest magnitude over all its parameters;
    entries as large as the smallest of those stay as well, whatever their order (as in the
    authors' program; with bfloat16 and float16 there may be many). Then a parameter's sign is that
    of the sum (0 where the sum is 0), and its value the mean of the entries of that sign. Task
    vectors are float32 here, whatever the storage dtype.

    Args:
      base: the model that the others were fine-tuned from.
      models: fine-tuned models by name.
      alignment: from `align`.
      path: the file to write: the base's tensors, those that are not merged as they are.
      method: "ties" or "arithmetic".
      scale: factor of the merged task vector.
      density: for "ties", the fraction of entries to keep, in (0, 1].
      budget: how many entries may stand in memory.
      progress: is told the number of parameters of each block done, `PASSES[method]` times.

    Returns:
      The summary, with `threshold` and `kept` per model for "ties".

    Raises:
      TensorFileError: for numbers that are not finite, naming model and tensor; a result beyond
        the storage dtype; or a file that cannot be written.
      ValueError: for a setting outside what is said above.
    """
    if method not in get_args(Method) or method == "unify":
        raise ValueError(
            f"merge_models: method: found {method!r}, expected 'ties' or 'arithmetic'."
        )
    if (method == "ties") != (density is not None) or not (density is None or 0 < density <= 1):
        raise ValueError(
            f"merge_models: density: found {density!r} for {method!r}, expected a number "
            "above 0 and at most 1 for 'ties', None for 'arithmetic'."
        )
    count, totals = len(models), Totals(base, models, alignment.parameters)

    def blocks() -> Iterator[Block]:
        for block in read_blocks(base, models, alignment.merged, block_size(count, budget)):
            yield block
            progress(block.size)

    thresholds, kept = None, np.zeros(count, np.int64)
    if density is not None:
        keep = max(1, round(density * alignment.parameters))
        thresholds = _thresholds(blocks, keep, count)
    with Writer(path, base.tensors, base.metadata) as writer:
        for block in blocks():
            merged, some, sums = _merge_block(
                block.base, block.tuned, np.float32(scale), thresholds
            )
            check_finite(block, sums["finite"], base, models)
            totals.add(sums)
            kept += np.asarray(some)
            write_finite(writer, block, np.asarray(merged))
        for name in (*alignment.equal, *alignment.from_base):
            for start, data in base.pieces(name):
                writer.write(name, data, start)
    if thresholds is None:
        return totals.summary(lambda s: {})
    return totals.summary(lambda s: {"threshold": float(thresholds[s]), "kept": int(kept[s])})


def given_name(path: Path) -> str:
    """The name that a file or folder was given by; of a link, not of what it points to."""
    path = path.absolute()
    return path.resolve().name if path.name in ("", "..") else path.name


def _cosines(values: Float[np.ndarray, "models"]) -> str:
    """Numbers in [-1, 1] as JSON of a length that does not depend on them."""
    return "[" + ",".join(f"{value:9.6f}" for value in values) + "]"


def write_finite(
    writer: Writer,
    block: Block,
    merged: Float[np.ndarray, "size"],
    advice: str = "Use a smaller --scale, or",
) -> None:
    """Writes a block `[block]` of a model.

    Args:
      writer: of the model's file.
      block: says what stands where.
      merged: `[block]`.
      advice: the beginning of what to do about numbers beyond the dtype.

    Raises:
      TensorFileError: names the tensor whose result is beyond its dtype.
    """
    for segment in block.segments:
        part = merged[segment.part]
        if not np.isfinite(part).all():
            raise TensorFileError(
                f"{writer.path}: tensor {segment.name}: the result is beyond the largest "
                f"{merged.dtype}, or no number. {advice} checkpoints of a wider dtype."
            )
        writer.write(segment.name, part, segment.start * merged.itemsize)


@partial(jax.jit, static_argnames=("magnitude",))
def _unify_block(base: jax.Array, tuned: jax.Array, magnitude: Magnitude) -> Any:
    vectors = task_vectors({"block": tuned}, {"block": base})
    unified = unify(vectors, magnitude=magnitude)
    vector, masks = unified.vector["block"], unified.masks["block"]
    folded = jnp.where(unpack(masks, vector.size), vector.astype(jnp.float32)[None], 0.0)
    sums, own = measure(vectors["block"])
    folded_unit, folded = relative(folded)
    sums |= {
        "folded_unit": folded_unit,
        "folded_absolute": lanes(jnp.abs(folded)),
        "folded_square": lanes(jnp.square(folded)),
        "product": lanes(own * folded),
    }
    return vector, masks, sums


@jax.jit
def _merge_block(
    base: jax.Array, tuned: jax.Array, scale: jax.Array, thresholds: jax.Array | None
) -> Any:
    vectors = _float32_vectors(base, tuned)
    sums, _ = measure(vectors)
    if thresholds is None:
        kept = jnp.zeros(tuned.shape[0], jnp.int32)
        merged = vectors.sum(axis=0)
    else:
        large = (jnp.abs(vectors) >= thresholds[:, None]) & (vectors != 0)
        kept = large.sum(axis=1, dtype=jnp.int32)
        merged = unify({"block": jnp.where(large, vectors, 0.0)}, magnitude="mean").vector["block"]
    result = apply_vectors({"block": base}, {"block": (scale * merged)[None]})
    return result["block"][0], kept, sums


@jax.jit
def _magnitude_bits(base: jax.Array, tuned: jax.Array) -> jax.Array:
    """The bits of float32 magnitudes, uint32 `[models, block]`: in the order of the magnitudes."""
    return jax.lax.bitcast_convert_type(jnp.abs(_float32_vectors(base, tuned)), jnp.uint32)


def _float32_vectors(base: jax.Array, tuned: jax.Array) -> jax.Array:
    wide = [{"block": x.astype(jnp.float32)} for x in (tuned, base)]
    return task_vectors(*wide)["block"]


def _thresholds(blocks: Callable[[], Iterator[Block]], keep: int, models: int) -> np.ndarray:
    """The `keep`-th largest magnitude of each task vector, exactly: float32 `[models]`.

    Counts the upper 16 of 31 bits of all magnitudes, then the lower 15 of those that share the
    upper ones of the one sought. NaN counts as large: the pass that merges refuses it.
    """
    upper = np.zeros((models, 1 << 16), np.int64)
    for block in blocks():
        for row, bits in zip(
            upper, np.asarray(_magnitude_bits(block.base, block.tuned)), strict=True
        ):
            row += np.bincount(bits >> 15, minlength=row.size)
    at_least = upper[:, ::-1].cumsum(axis=1)[:, ::-1]  # padding only adds zeros, the smallest
    chosen = (at_least >= keep).sum(axis=1) - 1
    left = keep - (at_least - upper)[np.arange(models), chosen]

    lower = np.zeros((models, 1 << 15), np.int64)
    for block in blocks():
        found = np.asarray(_magnitude_bits(block.base, block.tuned))
        for row, bits, sought in zip(lower, found, chosen, strict=True):
            row += np.bincount(bits[bits >> 15 == sought] & 0x7FFF, minlength=row.size)
    at_least = lower[:, ::-1].cumsum(axis=1)[:, ::-1]
    last = (at_least >= left[:, None]).sum(axis=1) - 1
    return ((chosen << 15) | last).astype(np.uint32).view(np.float32)
