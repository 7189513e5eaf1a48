"""Image folders of several sites, each of which owns its images.

    root/<site>/<task>/<split>/<class>/<image>

A site may hold some of the tasks, and some of a task's classes. Names of sites, tasks and classes
that differ only in their Unicode normalisation (NFC or NFD) are one. Each `<site>/<task>` is laid
out as `matu_jax.data.folders` says: without `test`, a fifth of the site's images is tested on.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from matu_jax.data import SPLITS, selection
from matu_jax.data.folders import Listing, list_folder, notes_of_files
from matu_jax.data.table import Row, Table


def read(root: str | os.PathLike[str]) -> Table:
    """Lists the images of all sites; opens none.

    Raises:
        ValueError: If the folders are laid out otherwise, with the folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(
            f"config.data.sites: {root}: there is no such directory; give one that holds a folder "
            "per site"
        )
    rows = []
    ignored, linked = defaultdict(list), defaultdict(list)
    one_site = f" If {root} is the folder of one site, give the one above, {root.resolve().parent}"
    for site, at in _named(root, "site").items():
        for task, folder in _named(at, "task", one_site).items():
            try:
                listing = list_folder(folder)
            except ValueError as error:
                hint = "" if any(folder.glob("*/")) else one_site
                raise ValueError(
                    f"{error}. The layout is {root}/<site>/<task>/<split>/<class>/<image>.{hint}"
                ) from None
            rows += _rows(site, task, listing)
            ignored[task] += listing.ignored
            linked[task] += listing.linked
    notes = {task: notes_of_files(ignored[task], linked[task]) for task in ignored}
    return Table(str(root), rows, notes)


def _rows(site: str, task: str, listing: Listing) -> Iterator[Row]:
    for split, files in listing.splits.items():
        for path, label in files:
            yield Row(
                f"{site}/{task}/{path}",
                task,
                site,
                listing.folders[label],
                _allowed(split, listing.splits),
                (f"image {site}/{task}/{path}",),
                listing.root / path,
                (),
            )


def _allowed(split: str, there) -> tuple[str, ...]:
    """The splits that an image of a folder may be in, by the folders beside it."""
    if split != "train":
        return (split,)
    return tuple(part for part in SPLITS if part == split or part not in there)


def _named(folder: Path, what: str, hint: str = "") -> dict[str, Path]:
    """The folders in a folder, by their composed names.

    Args:
        folder: Of folders.
        what: Each of them should be.
        hint: What to do where one of them is a split.

    Raises:
        ValueError: If there is none, one is called as a split is, or two are called the same.
    """
    names = sorted(
        entry.name
        for entry in os.scandir(folder)
        if not selection.is_hidden(entry.name) and selection.is_directory(entry)
    )
    layout = f"expected one per {what}; the layout is <site>/<task>/<split>/<class>/<image>"
    if not names:
        raise ValueError(f"{folder}: found no folder in it, {layout}")
    for name in names:
        selection.check_utf8(name, folder)
        if name.lower() in selection.SPLITS:
            raise ValueError(
                f"{folder}: found {name!r} in it, which is the name of a split, {layout}.{hint}"
            )
        same = [other for other in names if selection.composed(other) == selection.composed(name)]
        if len(same) > 1:
            raise selection.twins(folder, same)
    return {selection.composed(name): folder / name for name in names}
