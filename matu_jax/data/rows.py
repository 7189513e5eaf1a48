"""A table's rows as tasks, whose sites own their data."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from matu_jax.data import SPLITS, ImageTask, Split, Task, Transform, row_images, selection
from matu_jax.data.datasets import GENERAL_TEMPLATES
from matu_jax.data.labels import (
    alike,
    are_numbers,
    classes_of,
    notes_of_classes,
    notes_of_numbers,
    readable_names,
    untrained_classes,
)
from matu_jax.data.table import Row, Table, divided, in_float32, shares
from matu_jax.errors import did_you_mean, look_alike


def tasks_of(
    table: Table,
    *,
    wanted: str = "",
    transform: Transform,
    validation_fraction: float,
    seed: int,
) -> tuple[Task, ...]:
    """Divides rows among splits and makes tasks of them, whose sites own their examples.

    Of examples whose split is not given, a fifth is tested on and `validation_fraction` of the rest
    validated on, task by task and site by site as nearly as whole groups allow. Images are read and
    resized once, and kept in the cache. Images with the same pixels, and rows with the same
    features, are in one split alone, of whichever task and site they are: training and validation
    lack what a later split has too. `notes` tell how many, and what was drawn.

    Args:
        table: All examples.
        wanted: Names of tasks with commas between, in the order to take; "" = all, sorted.
        transform: Of images.
        validation_fraction: See `DataConfig`.
        seed: What splits are drawn from.

    Returns:
        `ImageTask`s of images, whose class names are those of the task at all sites, sorted. Else
        tasks of `{"x": float32 [examples, features], "y": ...}`: y are the labels, float32
        `[examples]` where all labels of all these tasks are numbers; else int32, the positions in
        the sorted names of the task's classes, which `notes` list.

    Raises:
        ValueError: If a task is not there, a split of a task is empty, a site has examples to
            validate or to test on but none to train on, images cannot be read, classes of
            images read alike, or labels are no classes (`labels.are_numbers`, `labels.classes_of`).
    """
    names = _names(table, wanted)
    of_names = [row for row in table.rows if row.task in names]
    images = row_images.pixels(table, transform) if table.rows[0].path else None
    numbers = images is None and are_numbers(of_names, table.name)
    splits = divided(table.rows, validation_fraction, seed)
    splits = _without_repeats(splits, _contents(table.rows, images))
    if table.rows[0].site:
        _check_sites(table.rows, splits, table.name)
    return tuple(
        _task(task, table, splits, images, numbers, shares(validation_fraction)) for task in names
    )


def _names(table: Table, wanted: str) -> list[str]:
    """The names of the tasks to make."""
    there = sorted({row.task for row in table.rows})
    wanted = selection.composed(wanted)
    names = [word.strip() for word in wanted.split(",") if word.strip()] or there
    for task in names:
        if task not in there:
            raise ValueError(
                f"config.data.tasks: found {task!r}, no task of {table.name}."
                + did_you_mean(task, there)
            )
    if len(set(names)) < len(names):
        raise ValueError(f"config.data.tasks: found {wanted!r}, expected each task once.")
    return names


def _task(
    task: str,
    table: Table,
    splits: Sequence[str],
    images: np.ndarray | None,
    numbers: bool,
    asked: Mapping[str, float],
) -> Task:
    """Makes one task.

    Args:
        task: Its name.
        table: All examples.
        splits: Of each row; "" = left out.
        images: Of each row; None for features.
        numbers: Whether labels are numbers to predict.
        asked: The share of each split among examples whose split is not given.
    """
    rows = table.rows
    mine = [i for i, row in enumerate(rows) if row.task == task]
    parts = {part: [i for i in mine if splits[i] == part] for part in SPLITS}
    left_out = _left_out(sum(not splits[i] for i in mine), images is not None)
    for part, members in parts.items():
        if not members:
            raise ValueError(
                f"{table.name}: task {task!r}: has {len(mine)} examples, none of them in the split "
                f"{part!r}. {''.join(f'{note}. ' for note in left_out)}Give it some, or more "
                f"groups to divide{' (rows of equal features are one)' * (images is None)}."
            )
    kept = [rows[i] for members in parts.values() for i in members]
    classes = [] if numbers else classes_of(kept, table.name)
    of_labels = notes_of_classes(kept, classes) if classes else notes_of_numbers(kept)
    of_sites = alike(sorted({row.site for row in rows}), "sites")
    if classes:
        measured = [rows[i] for part in SPLITS[1:] for i in parts[part]]
        trained = [rows[i] for i in parts["train"]]
        of_labels = (*of_labels, *untrained_classes(trained, measured, table.name))
    sites = {part: [rows[i].site for i in members] for part, members in parts.items()}
    about = {
        "label_space": task,
        "domain": task,
        "sites": sites if rows[0].site else {},
        "fingerprint": _fingerprint(rows, parts, images),
        "notes": (
            *table.notes.get(task, ()),
            *_drawn(rows, parts),
            *_far(rows, parts, asked),
            *left_out,
            *_repeated(kept),
            *of_sites,
            *of_labels,
        ),
    }
    if images is None:
        return _of_features(task, rows, parts, classes, about)
    about["class_names"] = readable_names(kept, classes, table.name)
    return _of_images(task, rows, parts, images, classes, about)


def _contents(rows: Sequence[Row], images: np.ndarray | None) -> list[bytes]:
    """What tells one example from another: its pixels, or its features as a model sees them."""
    if images is None:
        return [in_float32(row.features).tobytes() for row in rows]
    return [hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest() for image in images]


def _without_repeats(splits: Sequence[str], contents: Sequence[bytes]) -> list[str]:
    """Leaves out what is trained or validated on and stands in a later split too.

    Args:
        splits: Of each row.
        contents: Of each row, what its pixels or features are.

    Returns:
        The splits, "" for what is left out.
    """
    kept, later = list(splits), set()
    for part in reversed(SPLITS):
        mine = [i for i, split in enumerate(splits) if split == part]
        for i in mine:
            if contents[i] in later:
                kept[i] = ""
        later |= {contents[i] for i in mine}
    return kept


def _drawn(rows: Sequence[Row], parts: dict[str, list[int]]) -> Iterator[str]:
    placed = [(part, rows[i].splits) for part, members in parts.items() for i in members]
    for part in SPLITS[1:]:
        open_ones = [(at, among) for at, among in placed if part in among and len(among) > 1]
        drawn = sum(at == part for at, _ in open_ones)
        if drawn:
            of = "examples" if any("test" in among for _, among in open_ones) else "of train"
            yield f"{part}: {drawn:,} of {len(open_ones):,} {of}, drawn by config.data.seed"


def _far(
    rows: Sequence[Row], parts: dict[str, list[int]], asked: Mapping[str, float]
) -> Iterator[str]:
    """Warnings of splits that are far from the shares asked for, where all of them is drawn."""
    ways = {rows[i].splits for members in parts.values() for i in members}
    drawn = [way for way in ways if len(way) > 1]
    if len(drawn) != 1 or any(way[0] in drawn[0] for way in ways - {*drawn}):
        return
    total = sum(len(parts[part]) for part in drawn[0])
    for part in drawn[0][1:]:
        share = asked[part] / sum(asked[part] for part in drawn[0])
        found = len(parts[part]) / total
        if abs(found - share) > 0.05 and not 0.5 < found / share < 2:
            yield (
                f"warning: {part}: drawn {100 * found:.0f} % of the examples, where "
                f"{100 * share:.0f} % were asked for: whole groups are drawn, site by site, and "
                "these are large or few; take smaller groups, or give the splits"
            )


def _left_out(count: int, of_images: bool) -> tuple[str, ...]:
    what, same = ("images", "pixels") if of_images else ("examples", "features")
    note = f"{what} left out, since a later split has the same {same}: {count:,}"
    return (note,) if count else ()


def _repeated(rows: Sequence[Row]) -> tuple[str, ...]:
    """A note of rows of a table that are there twice; images never are."""
    different = {(row.features, row.label, row.site) for row in rows}
    if rows[0].path is not None or len(different) == len(rows):
        return ()
    return (f"rows equal to another, in features, label and site: {len(rows) - len(different):,}",)


def _check_sites(rows: Sequence[Row], splits: Sequence[str], name: str) -> None:
    """Checks that sites train on what they are measured on."""
    placed = [(row, split) for row, split in zip(rows, splits, strict=True) if split]
    trained = {_of(row) for row, split in placed if split == "train"}
    for row, split in placed:
        if _of(row) not in trained:
            known = sorted({site for task, site in trained if task == row.task})
            near = [site for site in known if look_alike((site, row.site))]
            hint = f" Is {near[0]!r} meant?" if near else ""
            cell = [split for one, split in zip(rows, splits, strict=True) if _of(one) == _of(row)]
            out = " ".join(_left_out(cell.count(""), row.path is not None))
            raise ValueError(
                f"{name}, {row.where}: site {row.site!r} has an example of task {row.task!r} in "
                f"{split}, and none in train{out and f' ({out})'}; sites that have: "
                f"{', '.join(known) or 'none'}.{hint} Give the site some, or leave this one out."
            )


def _of(row: Row) -> tuple[str, str]:
    return row.task, row.site


def _fingerprint(
    rows: Sequence[Row], parts: dict[str, list[int]], images: np.ndarray | None
) -> str:
    digest = hashlib.sha256()
    for part, members in parts.items():
        for i in members:
            row = rows[i]
            digest.update(repr((part, row.site, row.label, row.features)).encode())
            if images is not None:
                digest.update(np.ascontiguousarray(images[i]).tobytes())
    return digest.hexdigest()


def _of_images(
    task: str,
    rows: Sequence[Row],
    parts: dict[str, list[int]],
    images: np.ndarray,
    classes: Sequence[str],
    about: dict,
) -> ImageTask:
    position = {name: label for label, name in enumerate(classes)}
    splits = (
        Split(images[members], np.array([position[rows[i].label] for i in members], np.int32))
        for members in parts.values()
    )
    return ImageTask(task, *splits, templates=GENERAL_TEMPLATES, **about)


def _of_features(
    task: str,
    rows: Sequence[Row],
    parts: dict[str, list[int]],
    classes: Sequence[str],
    about: dict,
) -> Task:
    """Without classes, labels are numbers."""
    position = {name: label for label, name in enumerate(classes)}

    def labels(members: Sequence[int]) -> np.ndarray:
        if not classes:
            return np.array([float(rows[i].label) for i in members], np.float32)
        return np.array([position[rows[i].label] for i in members], np.int32)

    splits = (
        {"x": np.array([rows[i].features for i in members], np.float32), "y": labels(members)}
        for members in parts.values()
    )
    return Task(task, *splits, **about)
