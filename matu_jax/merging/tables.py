"""Tables of a merge, for people."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from matu_jax.models.tensors import some_of
from matu_jax.runs.commandline import plain_console
from matu_jax.runs.tables import human_bytes

_COLUMNS = {  # what merge.json calls it: what the table calls it, and how it is written
    "norm": ("norm of task vector", "{:.4g}"),
    "scale": ("scale", "{:.4f}"),
    "cosine": ("cosine of rebuilt", "{:.4f}"),
    "threshold": ("trimmed below", "{:.3g}"),
    "kept": ("entries kept", "{:,}"),
}


def show(record: Mapping[str, Any], console: Console) -> None:
    """Prints what merge.json says: the models, their similarity, the result and its size.

    Args:
      record: the contents of merge.json.
      console: where to print; lines are as long as the number of models asks for.
    """
    models = record["models"]
    table = Table(box=box.SIMPLE, title=f"{record['method']}: models: {len(models)}")
    table.add_column("")
    table.add_column("model")
    columns = [name for name in _COLUMNS if name in models[0]]
    for name in columns:
        table.add_column(_COLUMNS[name][0], justify="right")
    for number, model in enumerate(models, start=1):
        cells = [_COLUMNS[name][1].format(model[name]) for name in columns]
        table.add_row(str(number), Text(model["name"]), *cells)
    _print(console, table)
    if len(models) > 1:
        similarity = Table(
            box=box.SIMPLE,
            title="direction similarity of the task vectors",
            caption="where either has changed: 1 the same signs, 0.5 unrelated, 0 opposite",
        )
        similarity.add_column("")
        similarity.add_column("model")
        for number in range(1, len(models) + 1):
            similarity.add_column(str(number), justify="right")
        rows = zip(models, record["similarity"]["matrix"], strict=True)
        for number, (model, row) in enumerate(rows, start=1):
            similarity.add_row(str(number), Text(model["name"]), *(f"{x:.3f}" for x in row))
        _print(console, similarity)
    for line in _notes(record):
        console.print(line)


def rebuilt_notes(record: Mapping[str, Any]) -> list[str]:
    """What to say of a rebuilt model, from its merge.json: how near it is, and what is missing."""
    task, cosine, names = record["task"], record["cosine"], record["from_base"]
    if record["scale"] == 0:
        near = "its task vector is zero, so that this is the base"
    elif cosine is None:
        near = "how near it is, the unified file does not say; unify again to know"
    else:
        near = f"the cosine between its task vector and the one rebuilt is {cosine:.4f}"
    lines = [f"Rebuilding is lossy: of {task}, {near}."]
    if names:
        lines.append(
            f"Not {task}'s own but the base's, tensors: {len(names)}: {some_of(names)}"
            + ("" if record["from_base_known"] else " (some may be equal in all)")
        )
    if record["left_out"]:
        lines.append(f"Only {task} has, and lost: {some_of(record['left_out'])}")
    return lines + _left_out(record)


def _notes(record: Mapping[str, Any]) -> list[str]:
    lines = []
    for model in record["models"]:
        if model["zero"]:
            lines.append(f"Model {model['name']} equals the base: its task vector is zero.")
        if model["left_out"]:
            lines.append(f"Left out of model {model['name']}: {some_of(model['left_out'])}")
    tensors, size = record["tensors"], record["bytes"]
    if tensors["equal"]:
        lines.append(f"Copied, equal in all: {some_of(tensors['equal'])}")
    if tensors["from_base"]:
        lines.append(
            f"From the base, outside --only, tensors: {len(tensors['from_base'])}: "
            f"{some_of(tensors['from_base'])}"
        )
    lines.append(f"Merged: tensors: {tensors['merged']}, parameters: {record['parameters']:,}.")
    if record["method"] == "unify":
        lines.append(
            f"Size: {human_bytes(size['result_file'])}, {size['ratio']:.4f} of the "
            f"{human_bytes(size['merged_tensors_of_all_models'])} of the same tensors in "
            f"all models; rebuilding one takes the base as well."
        )
    lines += _left_out(record)
    lines.append(f"Result: {record['result']} ({record['seconds']:.1f} seconds)")
    return lines


def _left_out(record: Mapping[str, Any]) -> list[str]:
    """A line on the base's files that were not copied."""
    links = record.get("links_left_out")
    return [f"Not copied, links out of the base's folder: {some_of(links)}"] if links else []


def _print(console: Console, table: Table) -> None:
    """Prints a table at its full width, also where lines are cut at 80 columns, as in pipes."""
    width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    plain_console(file=console.file, width=max(width, console.width)).print(table)
