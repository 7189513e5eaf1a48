"""Prepares the datasets of an experiment, one after the other, and tells how it went in a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from matu_jax.config import Config
from matu_jax.data import SOURCES, Transform, preparation, prepared, selection
from matu_jax.data.splits import counts
from matu_jax.errors import UserError
from matu_jax.models.architectures import check_heads
from matu_jax.models.images import transform_of
from matu_jax.runs.tables import human_bytes

_TO_DO = "to be prepared"
_LATER = (
    "Decided while preparing: which images are left out of train, which value becomes white in "
    "images of more than 8 bits, and which classes are left without an image."
)


@dataclass
class _Row:
    """A line of the table at the end."""

    name: str
    source: str = "?"
    train: int | None = None
    test: int | None = None
    size: int | None = None
    left_out: str = ""
    state: str = ""
    failed: bool = False


def prepare(config: Config, console: Console, *, dry_run: bool = False) -> bool:
    """Prepares the datasets of an experiment, one after the other, and prints a table.

    Args:
      config: the experiment; its `data` and the transform of its architecture count.
      console: what to print to, from `commandline.plain_console`.
      dry_run: whether only to tell what would be done.

    Returns:
      Whether all datasets are prepared, or seem preparable if `dry_run`.

    Raises:
      UserError: for an unknown dataset or architecture, or a directory that is not there.
    """
    data = config.data
    if data.source in SOURCES:
        console.print(f"config.data.source is {data.source!r}, your own: nothing to prepare.")
        return True
    if data.sites or data.manifest:
        console.print(
            f"{data.sites or data.manifest}: images are read and resized when a run begins, once; "
            "nothing to prepare."
        )
        return True
    try:
        names = selection.resolve(data.tasks, data.folders)
        if selection.is_generated(data.tasks, data.folders):
            console.print(
                "The embedded benchmark is generated as it is needed; nothing to prepare."
            )
            return True
        transform = transform_of(config.model)
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.data.source == "synthetic":
        console.print(
            "config.data.source is 'synthetic': stand-ins are generated as they are needed; "
            "nothing to prepare."
        )
        return True
    try:
        check_heads(config.model, names)
        if data.folders:
            selection.check_directory(data.folders)
    except ValueError as error:
        raise UserError(str(error)) from None
    console.print(
        f"Images of {transform.size} pixels ({transform.resize}, {transform.resample}), into "
        f"{selection.cache() / 'prepared'}."
    )
    rows = []
    for name in names:
        row = _Row(name)
        rows.append(row)
        try:
            _one(row, transform, config.data.folders, console, dry_run)
        except (ValueError, OSError) as error:
            row.state, row.failed = "not prepared", True
            where = "" if repr(name) in str(error) else f"dataset {name!r}: "
            console.print(f"{where}{error}", style="red")
    console.print(_table(rows))
    if any(row.state.startswith(_TO_DO) for row in rows):
        console.print(_LATER)
    failed = [row.name for row in rows if row.failed]
    if failed:
        console.print(
            f"{len(failed)} of {len(rows)} datasets cannot be prepared: {', '.join(failed)}; the "
            "reasons stand above. Mend them, and the same command goes on."
        )
    return not failed


def _one(row: _Row, transform: Transform, folders: str, console: Console, dry_run: bool) -> None:
    """Prepares one dataset where that is needed, and fills its row."""
    dataset = selection.find(row.name, folders)
    images = selection.image_folder(row.name, folders)
    row.source = "folder" if images else f"TFDS {dataset.tfds}"
    target = prepared.location(row.name, transform=transform, folders=folders)
    anew = ""
    if target.is_dir():
        try:
            if not prepared.outdated(dataset, target, images):
                _fill(row, prepared.check(row.name, target), "prepared")
                return
            anew = "anew, since the image folder, or how it is divided, has changed"
        except ValueError as error:
            anew = "anew, since it is damaged"
            console.print(str(error))
    if dry_run:
        row.state = f"{_TO_DO} {anew}".strip()
        if images is None:
            row.state += ", downloaded if need be"
            if not dataset.test:
                row.state += f"; test: {prepared.SEEDED.format('all images')}"
            return
        source = preparation.open_source(dataset, image_folders=folders)
        row.train, row.test = counts(source)
        row.size = (row.train + row.test) * transform.size**2 * 3
        notes = prepared.notes_of_splits(prepared.test_split(source), source.validation)
        row.state = "; ".join((row.state, *notes, *source.notes))
        return
    _fill(row, _run(row.name, transform, folders, console), f"prepared {anew or 'now'}")
    console.print(f"{row.name}: images for train: {row.train:,}, for test: {row.test:,}")


def _run(name: str, transform: Transform, folders: str, console: Console) -> dict:
    """Prepares a dataset behind a progress bar."""
    image_bytes = transform.size**2 * 3
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        # Until the number of images is known, a download may be going on.
        job = bar.add_task(name, total=None, rate="opening")

        def progress(done: int, total: int) -> None:
            speed = bar.tasks[0].speed
            rate = f"{speed:.0f} images/s, " if speed else ""
            rate += f"{human_bytes(done * image_bytes)} of {human_bytes(total * image_bytes)}"
            bar.update(job, completed=done, total=total, rate=rate)

        return preparation.prepare(
            name, transform=transform, image_folders=folders, progress=progress
        )


def _fill(row: _Row, metadata: dict, state: str) -> None:
    splits, left_out = metadata["splits"], metadata["left_out"]
    row.train, row.test = splits["train"]["examples"], splits["test"]["examples"]
    row.size = sum(size for split in splits.values() for size in split["bytes"].values())
    row.left_out = f"{left_out['train_in_test']} + {left_out['train_twice']}"
    row.state = "; ".join((state, *prepared.notes(metadata)))


def _table(rows: Sequence[_Row]) -> Table:
    table = Table(
        caption="left out of train: images that are in test + images that are twice in train, "
        "or in validation",
        caption_justify="left",
    )
    for column in ("dataset", "source"):
        table.add_column(column, overflow="fold")
    for column in ("train", "test", "size", "left out"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("state")
    for row in rows:
        train, test = ("?" if n is None else f"{n:,}" for n in (row.train, row.test))
        size = "?" if row.size is None else human_bytes(row.size)
        cells = (row.name, row.source, train, test, size, row.left_out, row.state)
        table.add_row(*(Text(cell) for cell in cells), style="red" if row.failed else "")
    sizes = [row.size for row in rows if row.size is not None]
    if len(rows) > 1 and sizes:
        table.add_section()
        table.add_row("all", "", "", "", human_bytes(sum(sizes)), "", "", style="bold")
    return table
