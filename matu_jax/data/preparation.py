"""Writing the cache that `matu_jax.data.prepared` reads: each image is decoded and resized once.

Images of more than 8 bits a sample are measured before, in all splits, since their white level is
one for the whole dataset (`matu_jax.data.images`). The work is done in `<name>-<key>.partial`, a
chunk at a time. After each chunk everything is flushed to the disk before its number is noted, so
that a preparation that was killed goes on there, and ends with the same bytes. The metadata is
written last, and the whole folder renamed into place.

Splits are made disjoint by the hash of the resized pixels. The official test split stays as it is
(its duplicates are counted), and so does a validation split of the dataset's own; what occurs in
them, or earlier in the training split, is left out of the training split, and counted.
"""

import dataclasses
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from matu_jax.data import Transform, folders, images, prepared, resuming, selection, tfds
from matu_jax.data.datasets import Dataset, Example, Source
from matu_jax.data.finishing import finish, sync
from matu_jax.data.prepared import FORMAT
from matu_jax.data.splits import Places, places_of
from matu_jax.json_files import remove_unfinished

__all__ = ["open_source", "prepare"]


CHUNK = 256
"""Images between two flushes to the disk."""


_REPORTED = 20
"""Unreadable images that are collected before a preparation gives up."""


def open_source(
    dataset: Dataset,
    *,
    image_folders: str | os.PathLike[str] = "",
    cache_dir: str | os.PathLike[str] | None = None,
) -> Source:
    """Opens the examples of a dataset: its image folder if there is one, else TFDS.

    Raises:
        ValueError: If they are neither there nor can be downloaded; the message says what to do.
    """
    folder = selection.image_folder(dataset.name, image_folders, cache_dir)
    if folder is None:
        return tfds.source(dataset)
    if not folder.is_dir():
        layout = "train/<class>/<image> and test/<class>/<image>" if dataset.test else "<class>/*"
        get = f"get it from {dataset.url} and lay it" if dataset.url else "lay the images"
        raise ValueError(
            f"dataset {dataset.name!r}: found no {folder}; {get} out there as {layout}"
        )
    return folders.source(dataset, folder)


def prepare(
    name: str,
    *,
    transform: Transform,
    cache_dir: str | os.PathLike[str] | None = None,
    image_folders: str | os.PathLike[str] = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Prepares a dataset, unless it is, going on where an earlier call was stopped.

    Args:
        name: As `matu_jax.data.selection.find` takes it.
        transform: As the model demands.
        cache_dir: See `prepared.load`.
        image_folders: The `folders` of `prepared.load`.
        progress: Called with the number of images done and of all, after each chunk.

    Returns:
        The metadata.

    Raises:
        ValueError: If the dataset cannot be had, images cannot be read (all are listed, up to 20),
            the disk is too small, or another process prepares it at this moment.
    """
    dataset = selection.find(name, image_folders, cache_dir)
    final = prepared.location(name, transform=transform, cache_dir=cache_dir, folders=image_folders)
    with _lock(final, name):
        if final.is_dir() and not _unusable(dataset, final, image_folders, cache_dir):
            _tidy(final)
            return prepared.check(name, final)
        source = open_source(dataset, image_folders=image_folders, cache_dir=cache_dir)
        partial = final.with_name(final.name + ".partial")
        places = places_of(source)
        levels = _write(dataset, source, places, transform, partial, progress)
        metadata = finish(dataset, source, places, transform, levels, partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        sync(final.parent)
        _tidy(final)
    return metadata


@contextmanager
def _lock(final: Path, name: str) -> Iterator[None]:
    """Keeps other processes from preparing the same dataset."""
    file = final.with_name(final.name + ".lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not file.is_file():
            raise ValueError(f"dataset {name!r}: {file} is no regular file; remove it")
        stream = file.open("w")
    except OSError as error:
        raise ValueError(
            f"dataset {name!r}: {file.parent} cannot be written ({error.strerror}); set "
            "MATU_JAX_CACHE to a directory that can"
        ) from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"dataset {name!r}: another process is preparing it; wait for that one"
            ) from None
        yield


def _unusable(dataset: Dataset, final: Path, image_folders, cache_dir) -> bool:
    folder = selection.image_folder(dataset.name, image_folders, cache_dir)
    try:
        return prepared.outdated(dataset, final, folder)
    except ValueError:
        return True  # Damaged; it is written anew.


def _at(source: Source, index: int) -> Example:
    """An example by its place among those of train, and then of test."""
    trained = len(source.train)
    if source.test is None or index < trained:
        return source.train[index]
    return source.test[index - trained]


def _white_levels(source: Source, total: int) -> dict[int, int]:
    """The white levels of a source's images of more than 8 bits, looking at all of them."""
    if not source.deep:
        return {}

    def measured(index: int) -> tuple[int, int] | None:
        try:
            return images.measure(_at(source, index).content)
        except ValueError:
            return None  # It will be told when it is its turn.

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        return images.white_levels(threads.map(measured, range(total)))


def _write(
    dataset: Dataset,
    source: Source,
    places: Places,
    transform: Transform,
    partial: Path,
    progress: Callable[[int, int], None],
) -> dict[int, int]:
    """Fills the partial folder, from where it was left; returns the white levels."""
    total, size, classes = len(places.part), transform.size, len(source.class_names)
    plan = {
        "format": FORMAT,
        "version": source.version,
        "transform": dataclasses.asdict(transform),
        "examples": list(places.counts),
        "class_names": list(source.class_names),
        "test_split": prepared.test_split(source),
        "validation": places.validation,
    }
    begun = resuming.begun(partial, plan)
    if begun is None or not begun.done:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    done, levels = begun or (0, _white_levels(source, total))
    progress(done, total)
    if done == total:
        return levels
    arrays = _arrays(dataset, partial, places, size, done)

    def prepared_at(index: int) -> tuple[np.ndarray, int, bytes, bytes] | ValueError:
        try:
            content, label, name, _ = example = _at(source, index)
            content = images.read(content, name)
            image = images.picture(example._replace(content=content), levels)
        except ValueError as error:
            return error
        try:
            if not 0 <= label < classes:
                raise ValueError(f"its label is {label}, expected 0 to {classes - 1}")
            pixels = images.apply(image, transform)
        except ValueError as error:
            return ValueError(f"{name}: {error}")
        of_pixels = hashlib.sha256(pixels.tobytes()).digest()
        return pixels, label, of_pixels, hashlib.sha256(content).digest()

    errors: list[str] = []
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        for start in range(done, total, CHUNK):
            indices = range(start, min(start + CHUNK, total))
            for index, result in zip(indices, threads.map(prepared_at, indices), strict=True):
                if isinstance(result, ValueError):
                    errors.append(str(result))
                    continue
                pictures, labels, hashes, contents = arrays[places.part[index]]
                row = places.row[index]
                pictures[row], labels[row] = result[:2]
                hashes[row], contents[row] = (np.frombuffer(h, np.uint8) for h in result[2:])
            if len(errors) >= _REPORTED:
                break
            if not errors:
                for array in (*arrays[0], *arrays[1]):
                    array.flush()
                resuming.note(partial, plan, resuming.Progress(indices.stop, levels))
            progress(indices.stop, total)
    if errors:
        raise ValueError(
            f"dataset {dataset.name!r}: images that cannot be used: {len(errors)}"
            + " or more" * (len(errors) >= _REPORTED)
            + "".join(f"\n  {error}" for error in errors)
        )
    return levels


def _arrays(
    dataset: Dataset, partial: Path, places: Places, size: int, done: int
) -> list[tuple[np.memmap, ...]]:
    """The arrays of both splits, if there is room for the images that are not done."""
    needed = (len(places.part) - done) * size * size * 3
    free = shutil.disk_usage(partial).free
    full = ValueError(
        f"dataset {dataset.name!r}: {needed / 1e9:.1f} GB are needed in {partial}, and "
        f"{free / 1e9:.1f} are free; set MATU_JAX_CACHE to a larger disk"
    )
    if needed > free:
        raise full
    try:
        return resuming.open_arrays(partial, "r+" if done else "w+", places.counts, size)
    except OSError as error:
        raise full from error


def _tidy(folder: Path) -> None:
    """Removes what only an unfinished preparation needs; not before, lest it cannot be resumed."""
    for file in (*folder.glob("*_all_*.npy"), folder / "progress.json"):
        file.unlink(missing_ok=True)
    remove_unfinished(folder)
