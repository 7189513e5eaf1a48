"""A model of one's own out of a run, as safetensors files with a card."""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from matu_jax.data import num_examples
from matu_jax.errors import UserError
from matu_jax.models import exporting
from matu_jax.models.choices import ModelConfig
from matu_jax.runs.card import rows_of_clients, rows_of_data
from matu_jax.runs.provenance import versions
from matu_jax.runs.saved import SavedSlot, sums_of
from matu_jax.simulation.measures import measure_named
from matu_jax.trees import PyTree, leaf_items

_ROUNDING = 1e-3
"""How far a metric may be from what the run recorded, as a part of it: another number of slots at
once is another order of the same sums."""
_FEWEST = 20
"""Examples from which on rounding may put one on the other side, in a metric that counts them."""


def write(
    slot: SavedSlot, kind: str, out: Path, say: Callable[[str], None] = lambda line: None
) -> None:
    """Writes a slot's task vector, and the parameters that it makes of the base, into a new folder.

    Before that it is measured: each metric has to be what the run recorded, up to rounding, or one
    example where it counts examples. Files are read back and compared bit for bit.

    Args:
      slot: from `read_slot`.
      kind: "safetensors".
      out: the folder.
      say: is told what is done.

    Raises:
      UserError: for another format, if the folder is there already, the slot is not what the run
        measured, or a file reads back otherwise. Nothing is written then.
    """
    if kind != "safetensors":
        raise UserError(
            f"--format {kind}: the run is of a model of your own, "
            f"{slot.config.model.architecture!r}, which nothing else loads. Use --format "
            "safetensors; of LoRA on Llama's or Qwen2's layers, "
            "matu_jax.models.language.write_adapter makes a PEFT adapter out of that."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is there already. Give a new folder.")
    say("Measuring first, as the run did.")
    params = jax.tree.map(lambda a, b: np.asarray(a + b), slot.model.base, slot.vector)
    rows = dict(_measured(slot, params))
    if not rows:
        rows = {"measured": "nothing: the run recorded no finite number of this round"}
        say("The run recorded no finite number of this slot and round: nothing is checked.")
    about = {"task": _task(slot), "client": str(slot.client), "round": str(slot.round)}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as unfinished:
        folder = Path(unfinished) / "model"
        folder.mkdir()
        try:
            for name, tree in (("task_vector", slot.vector), ("parameters", params)):
                file = folder / f"{name}.safetensors"
                exporting.save_checked(dict(leaf_items(tree)), file, about)
        except ValueError as error:
            raise UserError(str(error)) from None
        (folder / "README.md").write_text(_card(slot, rows), encoding="utf-8")
        if out.exists():
            out.rmdir()
        folder.rename(out)


def _measured(slot: SavedSlot, params: object) -> Iterator[tuple[str, str]]:
    """Measures the slot and yields what the card says of each metric and split.

    Raises:
      UserError: if one of them is not what the run recorded.
    """
    model = slot.model
    for split in ("validation", "test"):
        asked = {name for name, recorded in slot.recorded.items() if split in recorded}
        metrics = {name: metric for name, metric in model.metrics.items() if name in asked}
        if not metrics:
            continue
        splits, own = slot.measured_on(split)
        sums = sums_of(slot.config, model, metrics, splits, own, slot.task, params)
        examples = num_examples(splits[own])
        examples = min(examples, slot.config.evaluation.max_examples or examples)
        for name, metric in metrics.items():
            found, recorded = float(metric.value(sums[name])), slot.recorded[name][split]
            near = abs(found - recorded) <= _ROUNDING * max(abs(recorded), abs(found), 1e-3)
            if not near and not (metric.percent and _one_flipped(found, recorded, examples)):
                raise UserError(
                    f"task {_task(slot)}: the model of client {slot.client} after round "
                    f"{slot.round}: {split} {name} is {found:.6g}, but the run recorded "
                    f"{recorded:.6g}. It is not the model that was measured, so nothing is "
                    "written. Has the model's code, or an installed version, changed since? "
                    "Versions then are in summary.json."
                )
            yield f"{split} {name}", measure_named(name, metric).text(found)


def _one_flipped(found: float, recorded: float, examples: int) -> bool:
    """Whether two values, as parts of so many examples, are whole numbers that differ by one."""
    counts = found * examples, recorded * examples
    if examples < _FEWEST or not all(math.isfinite(count) for count in counts):
        return False
    whole = [round(count) for count in counts]
    are_whole = all(abs(count - near) <= 1e-3 for count, near in zip(counts, whole, strict=True))
    return are_whole and abs(whole[0] - whole[1]) == 1


def _task(slot: SavedSlot) -> str:
    return slot.federation.tasks[slot.task].name


def _card(slot: SavedSlot, measured: dict[str, str]) -> str:
    config = slot.config
    trained = sum(np.size(leaf) for leaf in jax.tree.leaves(slot.vector))
    task = slot.federation.tasks[slot.task]
    rows = {
        "task": task.name,
        "model": f"{config.model.architecture}, of the experiment's own",
        "trained": f"{trained:,} parameters",
        "algorithm": config.algorithm,
        "rounds": f"{slot.round} of {config.rounds}: {slot.why}",
        **rows_of_clients(slot),
        **measured,
        **rows_of_data(slot),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    return exporting.model_card(
        f"{task.name}, fine-tuned with matu_jax",
        {"library_name": "matu_jax"},
        rows,
        code={"Load it": _loading(slot)},
        settings=dataclasses.asdict(config) | {"model": _settings(config.model)},
    )


def _loading(slot: SavedSlot) -> str:
    """Python code that makes a model's `params` of the file."""
    needed, tree = _BY_PATHS if _is_told_by_paths(slot.vector) else _BY_BASE
    return (
        f"{needed}\n\n"
        "# What trained, by its path in the model's base; task_vector.safetensors, in the same\n"
        "# form, is that minus base.\n"
        'parameters = safetensors.numpy.load_file("FOLDER/parameters.safetensors")\n'
        f"{tree}\n"
        "# The model's `outputs` and `loss` take `params`; a module of Flax NNX does so:\n"
        "#   state = nnx.state(module, nnx.Param)  # or what else of it trains\n"
        "#   nnx.replace_by_pure_dict(state, params)\n"
        "#   nnx.update(module, state)"
    )


_BY_PATHS = (
    "import safetensors.numpy\nfrom flax.traverse_util import unflatten_dict",
    'params = unflatten_dict(parameters, sep="/")',
)
_BY_BASE = (
    "import jax\nimport safetensors.numpy\n\nfrom matu_jax.trees import leaf_items",
    "# `base` is that of the Model which the experiment's file makes.\n"
    "leaves = [parameters[path] for path, _ in leaf_items(base)]\n"
    "params = jax.tree.unflatten(jax.tree.structure(base), leaves)",
)


def _is_told_by_paths(tree: PyTree) -> bool:
    """Whether its leaves' paths alone say what a tree is: dicts, by names without a slash."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    names = [getattr(key, "key", None) for path in paths for key in path]
    if not all(paths) or not all(isinstance(name, str) and "/" not in name for name in names):
        return False
    nested = unflatten_dict(dict(leaf_items(tree)), sep="/")
    return jax.tree.structure(nested) == jax.tree.structure(tree)


def _settings(config: ModelConfig) -> dict[str, Any]:
    """What of the config's model a model of one's own may have been built by."""
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != field.default or field.name == "architecture"
    }
