"""Examples with a site, a task and a group each, as tasks whose sites own their data.

`matu_jax.data.manifest` reads such rows from a table, `matu_jax.data.sites` from folders.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from matu_jax.data import SPLITS, ImageTask, Split, Task, Transform, selection
from matu_jax.data.datasets import GENERAL_TEMPLATES
from matu_jax.data.labels import (
    are_numbers,
    classes_of,
    notes_of_classes,
    notes_of_numbers,
    readable_names,
)
from matu_jax.errors import did_you_mean

TEST_FRACTION = 0.2
"""Of the examples whose split is not given, what is tested on."""


class Row(NamedTuple):
    """One example.

    Attributes:
        where: What messages call it, such as "line 7".
        task: Its task's name.
        site: Whose it is; "" = nobody's.
        label: A class name, or a number, as it is written.
        splits: Those that it may be in: one, where that is given.
        groups: What it belongs to that may not be divided among splits, such as a patient, and
            itself; rows that share one of them, with each other or by way of others, are in one.
        path: The image's; None for features.
        features: Numbers; () for an image.
    """

    where: str
    task: str
    site: str
    label: str
    splits: tuple[str, ...]
    groups: tuple[Hashable, ...]
    path: Path | None
    features: tuple[float, ...]


class Table(NamedTuple):
    """All examples of a manifest, or of folders of sites.

    Attributes:
        name: What messages call it: where it is.
        rows: In a fixed order.
        notes: By task, what people should know of how it was read.
    """

    name: str
    rows: Sequence[Row]
    notes: Mapping[str, tuple[str, ...]] = MappingProxyType({})


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
    resized once, and kept in the cache; those whose pixels a later split has too, of whichever task
    and site, are left out of training and validation, which `notes` tell.

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
            images read alike, or labels are numbers and words (`labels.are_numbers`).
    """
    name, rows, read = table
    there = sorted({row.task for row in rows})
    wanted = selection.composed(wanted)
    names = [word.strip() for word in wanted.split(",") if word.strip()] or there
    for task in names:
        if task not in there:
            raise ValueError(
                f"config.data.tasks: found {task!r}, no task of {name}.{did_you_mean(task, there)}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"config.data.tasks: found {wanted!r}, expected each task once.")
    numbers = rows[0].path is None and are_numbers([row for row in rows if row.task in names], name)
    splits = _divided(rows, validation_fraction, seed)
    images = _images(rows, transform) if rows[0].path else None
    left_out = [0] * len(rows)
    if images is not None:
        splits, left_out = _without_repeats(splits, images)
    _check_sites(rows, splits, name)
    made = []
    for task in names:
        mine = [i for i, row in enumerate(rows) if row.task == task]
        parts = {part: [i for i in mine if splits[i] == part] for part in SPLITS}
        for part, members in parts.items():
            if not members:
                raise ValueError(
                    f"{name}: task {task!r}: has {len(mine)} examples, none of them in the split "
                    f"{part!r}. Give it some, or more groups to divide."
                )
        sites = {part: [rows[i].site for i in members] for part, members in parts.items()}
        about = {
            "label_space": task,
            "domain": task,
            "sites": sites if rows[0].site else {},
            "fingerprint": _fingerprint(rows, parts, images),
            "notes": (*read.get(task, ()), *_notes(sum(left_out[i] for i in mine))),
        }
        kept = [rows[i] for members in parts.values() for i in members]
        labels = [row.label for row in kept]
        classes = [] if numbers else classes_of(labels)
        about["notes"] += notes_of_classes(kept, classes) if classes else notes_of_numbers(labels)
        if images is None:
            made.append(_of_features(task, rows, parts, classes, about))
        else:
            about["class_names"] = readable_names(kept, classes, name)
            made.append(_of_images(task, rows, parts, images, classes, about))
    return tuple(made)


def _without_repeats(splits: Sequence[str], images: np.ndarray) -> tuple[list[str], list[bool]]:
    """Leaves out what is trained or validated on and, pixel by pixel, stands in a later split too.

    Returns:
        The splits, "" for what is left out, and of each row whether it is.
    """
    pixels = [hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest() for image in images]
    kept, later = list(splits), set()
    for part in reversed(SPLITS):
        mine = [i for i, split in enumerate(splits) if split == part]
        for i in mine:
            if pixels[i] in later:
                kept[i] = ""
        later |= {pixels[i] for i in mine}
    return kept, [not split for split in kept]


def _notes(left_out: int) -> tuple[str, ...]:
    if not left_out:
        return ()
    return (f"images left out, since a later split has the same pixels: {left_out:,}",)


def components(rows: Sequence[Row]) -> list[int]:
    """Which rows have to stay together: of each row, a number that those have in common."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[Hashable, int] = {}
    for i, row in enumerate(rows):
        for group in row.groups:
            parent[root(i)] = root(first.setdefault(group, i))
    return [root(i) for i in range(len(rows))]


def _divided(rows: Sequence[Row], validation_fraction: float, seed: int) -> list[str]:
    """The split of each row; all rows of a group have one."""
    shares = {"validation": (1 - TEST_FRACTION) * validation_fraction, "test": TEST_FRACTION}
    shares = {"train": 1 - sum(shares.values()), **shares}
    groups: dict[int, list[int]] = {}
    for i, group in enumerate(components(rows)):
        groups.setdefault(group, []).append(i)
    cells = [(row.task, row.site) for row in rows]
    sizes, filled, chosen = Counter(cells), Counter(), [""] * len(rows)

    def lacks(members: Iterable[int], split: str) -> float:
        """How far the members' tasks at their sites are from what the split should have there."""
        held = {cells[i] for i in members}
        return sum(1 - filled[cell, split] / (shares[split] * sizes[cell]) for cell in held)

    def put(members: Sequence[int], split: str) -> None:
        for i in members:
            chosen[i] = split
            filled[cells[i], split] += 1

    order = np.random.default_rng(seed).permutation(len(groups))
    by_group = list(groups.values())
    open_ones = []
    for members in (by_group[index] for index in order):
        allowed = set(SPLITS).intersection(*(rows[i].splits for i in members))
        if len(allowed) == 1:
            put(members, *allowed)
        else:
            open_ones.append((members, [split for split in SPLITS if split in allowed]))
    for members, allowed in open_ones:
        put(members, max(allowed, key=lambda split: lacks(members, split)))
    return chosen


def check_groups(rows: Sequence[Row], name: str) -> None:
    """Checks that nothing that has to stay together is given two splits.

    Raises:
        ValueError: Otherwise, with two rows of it.
    """
    given: dict[int, Row] = {}
    for row, group in zip(rows, components(rows), strict=True):
        if row.splits == SPLITS:
            continue
        first = given.setdefault(group, row)
        if first.splits != row.splits:
            shared = [str(group) for group in row.groups if group in first.groups]
            how = f"of the same {shared[0]}" if shared else "of a group by way of other rows"
            raise ValueError(
                f"{name}, {row.where}: is in {row.splits[0]}, and {first.where}, {how}, in "
                f"{first.splits[0]}. Put a group into one split, in all tasks: who was trained on "
                "is not new in a test."
            )


def _check_sites(rows: Sequence[Row], splits: Sequence[str], name: str) -> None:
    """Checks that sites train on what they are measured on."""
    placed = [(row, split) for row, split in zip(rows, splits, strict=True) if split]
    trained = {(row.task, row.site) for row, split in placed if split == "train"}
    for row, split in placed:
        if (row.task, row.site) not in trained:
            known = sorted({site for task, site in trained if task == row.task})
            raise ValueError(
                f"{name}, {row.where}: site {row.site!r} has an example of task {row.task!r} in "
                f"{split}, and none in train; sites that have: {', '.join(known) or 'none'}. Give "
                "the site some, or leave this one out."
            )


def _images(rows: Sequence[Row], transform: Transform) -> np.ndarray:
    """All images, uint8 `[rows, size, size, 3]`, out of the cache where they are as they were."""
    from matu_jax.data import images  # here, since it loads Pillow

    digest = hashlib.sha256(repr(transform).encode())
    for row in rows:
        try:
            state = os.stat(str(row.path))
        except OSError as error:
            raise ValueError(f"{row.where}: {row.path}: {error.strerror}.") from None
        about = str(row.path), state.st_size, state.st_mtime_ns, state.st_ctime_ns
        digest.update(repr(about).encode())
    file = selection.cache() / "rows" / f"{digest.hexdigest()[:32]}.npy"
    shape = (len(rows), transform.size, transform.size, 3)
    if file.exists():
        kept = np.load(file, mmap_mode="r")
        if kept.shape == shape and kept.dtype == np.uint8:
            return kept
    paths = [Path(str(row.path)) for row in rows]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        levels = images.white_levels(threads.map(images.measure, paths))

        def pixels(path: Path) -> np.ndarray | str:
            try:
                return images.apply(images.decode(path, str(path), levels), transform)
            except ValueError as error:
                return str(error)

        found = list(threads.map(pixels, paths))
    bad = [
        f"  {row.where}: {one}"
        for row, one in zip(rows, found, strict=True)
        if isinstance(one, str)
    ]
    if bad:
        more = [f"  and {len(bad) - 20} more"] if len(bad) > 20 else []
        raise ValueError("\n".join([f"images that cannot be used: {len(bad)}", *bad[:20], *more]))
    whole = np.stack([one for one in found if not isinstance(one, str)])
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as stream:
        np.save(stream, whole)
    unfinished.replace(file)
    return whole


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
