"""How far an interrupted preparation had come: the file `progress.json` and the arrays beside it.

`matu_jax.data.preparation` writes the file after each chunk of images. It is believed only if it is
as it was written, of the same plan, and if the arrays are those that it speaks of. Else the
preparation starts anew, since what it did not write would be black images.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.lib import format as npy
from pydantic import BaseModel, Field

from matu_jax.data.prepared import PARTS, WhiteLevels, checksum
from matu_jax.json_files import checked, read_json, regular_file, replace_file

__all__ = ["Progress", "begun", "note", "open_arrays"]


class Progress(NamedTuple):
    """How far a preparation is.

    Attributes:
        done: Images that are written, in the source's order.
        white_levels: See `matu_jax.data.images.white_levels`; decided once, before the first image.
    """

    done: int
    white_levels: dict[int, int]


class _State(BaseModel):
    """What progress.json holds."""

    plan: dict[str, Any]
    done: Annotated[int, Field(ge=0)]
    white_levels: WhiteLevels
    checksum: str


def note(partial: Path, plan: dict[str, Any], progress: Progress) -> None:
    """Writes progress.json.

    Args:
        partial: The folder of the unfinished preparation.
        plan: All that decides the bytes of a prepared dataset, as JSON holds it; with "examples",
            the images of train and of test, and the "size" of "transform".
        progress: How far the preparation is.
    """
    levels = {str(declared): level for declared, level in progress.white_levels.items()}
    found: dict[str, Any] = {"plan": plan, "done": progress.done, "white_levels": levels}
    found["checksum"] = checksum(found)
    replace_file(partial / "progress.json", json.dumps(found, indent=1).encode())


def open_arrays(
    partial: Path, mode: Literal["r+", "w+"], examples: Sequence[int], size: int
) -> list[tuple[np.memmap, ...]]:
    """Opens the arrays that are filled: images, labels, hashes of pixels and of files, by rows.

    Args:
        partial: The folder of the unfinished preparation.
        mode: "w+" to make them anew.
        examples: Images of train and of test.
        size: Their height and width.

    Returns:
        The four arrays of train, and those of test.

    Raises:
        OSError: If the disk is too small.
    """
    return [
        tuple(
            _opened(partial / name, mode, dtype, shape)
            for name, dtype, shape in _layout(part, count, size)
        )
        for part, count in zip(PARTS, examples, strict=True)
    ]


def _opened(file: Path, mode: Literal["r+", "w+"], dtype: type, shape: tuple) -> np.memmap:
    array = npy.open_memmap(file, mode, dtype, shape)
    if hasattr(os, "posix_fallocate"):
        # Writing through a map to a disk that has become full would kill the process.
        with file.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
    return array


def _layout(part: str, examples: int, size: int) -> Iterator[tuple[str, type, tuple[int, ...]]]:
    """Names of the files of a split's arrays, dtypes and shapes."""
    for what, dtype, shape in (
        ("images", np.uint8, (size, size, 3)),
        ("all_labels", np.int32, ()),
        ("all_hashes", np.uint8, (32,)),
        ("all_contents", np.uint8, (32,)),
    ):
        yield f"{part}_{what}.npy", dtype, (examples, *shape)


def begun(partial: Path, plan: dict[str, Any]) -> Progress | None:
    """How far an interrupted preparation of the same plan had come; None if it must start anew.

    Args:
        partial: The folder of the unfinished preparation, if there is one.
        plan: See `note`.
    """
    file, total = partial / "progress.json", sum(plan["examples"])
    try:
        found = read_json(file)
        noted = checked(_State, found, f"{file}: damaged")
        levels = {int(declared): level for declared, level in noted.white_levels.items()}
    except (OSError, ValueError):
        return None
    if noted.checksum != checksum(found) or noted.plan != plan or noted.done > total:
        return None
    if noted.done and not _there(partial, plan, complete=noted.done == total):
        return None
    return Progress(noted.done, levels)


def _there(partial: Path, plan: dict[str, Any], *, complete: bool) -> bool:
    """Whether all arrays have their dtypes, shapes and lengths; their values are not looked at."""
    for part, examples in zip(PARTS, plan["examples"], strict=True):
        for name, dtype, shape in _layout(part, examples, plan["transform"]["size"]):
            try:
                file = regular_file(partial / name)
                array = np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError):
                return False
            # The last stage shortens the training images.
            shortened = complete and name == "train_images.npy" and len(array) < examples
            wanted = (len(array), *shape[1:]) if shortened else shape
            if array.dtype != dtype or array.shape != wanted:
                return False
    return True
