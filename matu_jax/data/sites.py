"""Image folders of several sites, each of which owns its images.

    root/<site>/<task>/<split>/<class>/<image>

A site may hold some of the tasks, and some of a task's classes. Each `<site>/<task>` is laid out as
`matu_jax.data.folders` says: without `test`, a fifth of the site's images is tested on.
"""

import os
from pathlib import Path

from matu_jax.data import SPLITS, selection
from matu_jax.data.folders import list_folder
from matu_jax.data.rows import Row, Table


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
    for site in _named(root, "site"):
        for task in _named(root / site, "task"):
            try:
                listing = list_folder(root / site / task)
            except ValueError as error:
                raise ValueError(
                    f"{error}. The layout is {root}/<site>/<task>/<split>/<class>/<image>."
                ) from None
            for split, files in listing.splits.items():
                for path, label in files:
                    rows.append(
                        Row(
                            f"{site}/{task}/{path}",
                            task,
                            site,
                            listing.folders[label],
                            _allowed(split, listing.splits),
                            (f"image {root / site / task / path}",),
                            root / site / task / path,
                            (),
                        )
                    )
    return Table(str(root), rows)


def _allowed(split: str, there) -> tuple[str, ...]:
    """The splits that an image of a folder may be in, by the folders beside it."""
    if split != "train":
        return (split,)
    return tuple(part for part in SPLITS if part == split or part not in there)


def _named(folder: Path, what: str) -> list[str]:
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
                f"{folder}: found {name!r} in it, which is the name of a split, {layout}"
            )
    return names
