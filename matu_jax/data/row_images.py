"""The images of a table, read and resized once and kept in the cache."""

import contextlib
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from matu_jax.data import Transform, selection
from matu_jax.data.table import Table
from matu_jax.json_files import remove_unfinished


def pixels(table: Table, transform: Transform) -> UInt8[np.ndarray, "rows size size 3"]:
    """The images of all rows, out of the cache where paths and files are as they were.

    The cache keeps one file per table and transform, the last.

    Raises:
        ValueError: With the row, if an image is not there or cannot be used.
    """
    file = _kept(table, transform)
    shape = (len(table.rows), transform.size, transform.size, 3)
    with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or damaged
        kept = np.load(file, mmap_mode="r")
        if kept.shape == shape and kept.dtype == np.uint8:
            return kept
    found = _read(table, transform)
    file.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(file.parent)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as stream:
            np.save(stream, found)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    for other in file.parent.glob(f"{file.name.partition('-')[0]}-*.npy"):
        if other != file:
            other.unlink(missing_ok=True)
    return found


def _kept(table: Table, transform: Transform) -> Path:
    """Where the cache keeps the images: `<table and transform>-<paths and states of files>.npy`."""
    place = hashlib.sha256(repr((os.path.realpath(table.name), transform)).encode())
    state = hashlib.sha256()
    for row in table.rows:
        try:
            found = os.stat(str(row.path))
        except OSError as error:
            raise ValueError(
                f"{table.name}, {row.where}: {row.path}: {error.strerror}. Paths are relative to "
                "the folder of the file that they stand in."
            ) from None
        about = str(row.path), found.st_size, found.st_mtime_ns, found.st_ctime_ns
        state.update(repr(about).encode())
    name = f"{place.hexdigest()[:32]}-{state.hexdigest()[:32]}.npy"
    return selection.cache() / "rows" / name


def _read(table: Table, transform: Transform) -> UInt8[np.ndarray, "rows size size 3"]:
    from matu_jax.data import images  # here, since it loads Pillow

    paths = [Path(str(row.path)) for row in table.rows]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        levels = images.white_levels(threads.map(images.measure, paths))

        def applied(path: Path) -> np.ndarray | str:
            try:
                return images.apply(images.decode(path, str(path), levels), transform)
            except ValueError as error:
                return str(error)

        found = list(threads.map(applied, paths))
    bad = [
        f"  {row.where}: {one}"
        for row, one in zip(table.rows, found, strict=True)
        if isinstance(one, str)
    ]
    if bad:
        more = [f"  and {len(bad) - 20} more"] if len(bad) > 20 else []
        first = f"{table.name}: images that cannot be used: {len(bad)}"
        raise ValueError("\n".join([first, *bad[:20], *more]))
    return np.stack([one for one in found if not isinstance(one, str)])
