"""Prepares an experiment's or a comparison's datasets: `python -m matu_jax.prepare --config FILE`.

    --config FILE             an experiment or a comparison: a Python file with get_config()
    --config.FIELD=VALUE      changes a field, such as --config.data.tasks=dtd,svhn or
                              --config.data.folders=/data/images
    --dry-run                 only tells what would be done, and how large it would be

Every image goes once through the model's transform into the cache ($MATU_JAX_CACHE, or
~/.cache/matu_jax). A dataset is taken from the image folder <folders>/<name> if there is one
(config.data.folders, or $MATU_JAX_FOLDERS, or `folders` in the cache), and else from TensorFlow
Datasets. Folders are laid out as <name>/train/<class>/<image> and <name>/test/<class>/<image>, or,
where there is no test split, as <name>/<class>/<image>; images in <name>/val/<class> are validated
on, and not trained on. Folders of your own need nothing else; all
in config.data.folders are prepared where config.data.tasks names none. What is prepared already is
left alone, unless its image folder has changed; what was interrupted is gone on with.

Exit codes: 0 all datasets are prepared (with --dry-run: are, or can be as far as can be told
without a download); 2 some are not, or there is a mistake in the command or the config; 130
interrupted with Ctrl-C.
"""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from matu_jax.comparison import plan
from matu_jax.config import Config
from matu_jax.data import Transform, preparation, prepared, selection
from matu_jax.data.splits import counts
from matu_jax.errors import UserError
from matu_jax.models.architectures import check_heads, transform_of
from matu_jax.runs.commandline import read_config, read_words, run_file, run_program
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


def parse(argv: Sequence[str]) -> tuple[list[Config], bool]:
    """Reads the command line: an experiment, or a comparison's settings; and whether to try only.

    Raises:
      UserError: with what is wrong, and where.
    """
    doc, flags = __doc__ or "", ["dry-run"]
    (file, fields, _), options = read_words(argv, doc, flags=flags)
    comparison = run_file(file)
    if not isinstance(comparison, plan.Comparison):
        return [read_config(argv, doc, flags=flags)[0]], "dry-run" in options
    try:
        comparison = plan.overridden(comparison, fields)
        plan.check(comparison)
        configs = [plan.run_config(comparison, run) for run in plan.runs(comparison)]
        # Runs that ask for the same data ask for it once.
        asked = {
            (c.data.tasks, c.data.folders, c.data.source, transform_of(c.model)): c for c in configs
        }
    except ValueError as error:
        raise UserError(f"--config {file}: {error}") from None
    return list(asked.values()), "dry-run" in options


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns the exit code."""
    # An image too large to be decoded safely is an error, and no warning before it.
    warnings.simplefilter("error", Image.DecompressionBombWarning)

    def work(console: Console) -> int:
        configs, dry_run = parse(argv)
        ready = [prepare(config, console, dry_run=dry_run) for config in configs]
        return 0 if all(ready) else 2

    return run_program(work, interrupted="Interrupted. The same command goes on.")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
