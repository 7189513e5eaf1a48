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
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy

from matu_jax.data import Transform, folders, images, prepared, resuming, selection, tfds
from matu_jax.data.datasets import Dataset, Example, Source
from matu_jax.data.prepared import FORMAT, PARTS, SEED, TEST_FRACTION
from matu_jax.json_files import remove_unfinished, replace_file

__all__ = ["counts", "open_source", "prepare"]

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
) -> dict:
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
        places = _places(source)
        levels = _write(dataset, source, places, transform, partial, progress)
        metadata = _finish(dataset, source, places, transform, levels, partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync(final.parent)
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


class _Places(NamedTuple):
    """Where the examples of a source go: `part[i]` (0 train, 1 test) and the row there.

    The first `validation` rows of train are the source's own validation split.
    """

    part: np.ndarray
    row: np.ndarray
    counts: tuple[int, int]
    validation: int


def counts(source: Source) -> tuple[int, int]:
    """Images of train (and validation) and of test, before any is left out."""
    return _places(source).counts


def _places(source: Source) -> _Places:
    """Shuffles the training images, and draws the test split from them if there is none."""
    given = source.validation
    count = len(source.train) - given
    # By hashes, which are the same in every version of every library.
    keys = [hashlib.sha256(f"{SEED}/{index}".encode()).digest() for index in range(count)]
    rank = np.empty(count, np.int64)
    rank[sorted(range(count), key=keys.__getitem__)] = np.arange(count)
    drawn = np.zeros(count, bool)
    if source.test is None:
        drawn = _drawn(rank, np.array(source.labels[:count] or [0] * count))
    official = len(source.test or ())
    part = np.concatenate([drawn, np.zeros(given, bool), np.ones(official, bool)]).astype(int)
    rows = [np.empty(count, np.int64), np.arange(given), np.arange(official)]
    for one, first in ((~drawn, given), (drawn, 0)):
        rows[0][one] = first + np.argsort(np.argsort(rank[one]))
    tested = int(part.sum())
    return _Places(part, np.concatenate(rows), (len(part) - tested, tested), given)


def _drawn(rank: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which images are tested on where there is no test split: the last of each label.

    Args:
        rank: `[examples]`, their places in the shuffled order.
        labels: `[examples]`. Of two images or more, one is tested on and one is trained on.

    Returns:
        bool `[examples]`; one image at least is tested on.
    """
    drawn = np.zeros(len(rank), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(rank[members])]
        tested = min(max(1, round(TEST_FRACTION * len(members))), len(members) - 1)
        drawn[members[len(members) - tested :]] = True
    if not drawn.any():
        drawn[np.argmax(rank)] = True
    return drawn


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
    places: _Places,
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
                state = resuming.state(plan, resuming.Progress(indices.stop, levels))
                replace_file(partial / "progress.json", _json(state))
            progress(indices.stop, total)
    if errors:
        raise ValueError(
            f"dataset {dataset.name!r}: images that cannot be used: {len(errors)}"
            + " or more" * (len(errors) >= _REPORTED)
            + "".join(f"\n  {error}" for error in errors)
        )
    return levels


def _arrays(
    dataset: Dataset, partial: Path, places: _Places, size: int, done: int
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


def _finish(
    dataset: Dataset,
    source: Source,
    places: _Places,
    transform: Transform,
    levels: dict[int, int],
    partial: Path,
) -> dict:
    """Makes the splits disjoint and describes them.

    May be killed anywhere and called again: the labels and hashes that it decides by are never
    changed, and an image is only ever copied from rows that are kept to rows that are not.
    """
    labels, hashes, contents = (
        [np.load(partial / f"{part}_all_{what}.npy") for part in PARTS]
        for what in ("labels", "hashes", "contents")
    )
    # In the source's order, before images that are twice are left out.
    published = [
        (int(labels[part][row]), contents[part][row].tobytes())
        for part, row in zip(places.part, places.row, strict=True)
    ]
    keys = [[row.tobytes() for row in part] for part in hashes]
    keep, in_test = _distinct(places, *keys)
    kept, given = int(keep.sum()), places.validation
    least = 1 if given else 2  # to train on, and to validate on
    if kept - given < least:
        raise ValueError(
            f"dataset {dataset.name!r}: {kept - given} of {len(keep) - given} training images are "
            "left without those that also occur in the test or validation split, or twice; "
            f"expected {least} at least"
        )
    gaps, movers = np.flatnonzero(~keep[:kept]), kept + np.flatnonzero(keep[kept:])
    file = partial / "train_images.npy"
    images = npy.open_memmap(file, "r+")
    if len(images) == len(keep):
        for gap, mover in zip(gaps, movers, strict=True):
            images[gap] = images[mover]
        images.flush()
    elif len(images) != kept:
        raise ValueError(
            f"dataset {dataset.name!r}: {file}: found {len(images)} images, expected {kept}; "
            f"remove {partial} and prepare it again"
        )
    del images
    for array in (labels[0], hashes[0]):
        array[gaps] = array[movers]
    _shorten(file, kept)
    rows = (kept, len(keys[1]))
    shown = {"train": labels[0][given:kept], "test": labels[1]}
    shown |= {"validation": labels[0][:given]} if given else {}
    notes = [*source.notes, *_notes(source.class_names, shown, levels)]
    if shared := len(set(keys[1]).intersection(keys[0][:given])):
        notes.append(f"images that are in validation and in test: {shared}")
    splits = {
        part: _described(partial, part, label[:count], digest[:count])
        for part, count, label, digest in zip(PARTS, rows, labels, hashes, strict=True)
    }
    metadata = {
        "name": dataset.name,
        "format": FORMAT,
        "version": source.version,
        "contents": prepared.contents_digest(source, published),
        "origin": source.origin,
        "test_split": prepared.test_split(source),
        "validation": given,
        "transform": dataclasses.asdict(transform),
        "class_names": list(source.class_names),
        "published": {"train": len(source.train), "test": len(source.test or ())},
        "left_out": {"train_in_test": in_test, "train_twice": len(keep) - kept - in_test},
        "test_twice": len(keys[1]) - len(set(keys[1])),
        "white_levels": {str(declared): level for declared, level in levels.items()},
        "notes": notes,
        "splits": splits,
        "sha256": hashlib.sha256("".join(splits[p]["sha256"] for p in PARTS).encode()).hexdigest(),
    }
    metadata["checksum"] = prepared.checksum(metadata)
    replace_file(partial / "metadata.json", _json(metadata))
    _sync(partial)
    return metadata


def _distinct(
    places: _Places, trained: Sequence[bytes], tested: Sequence[bytes]
) -> tuple[np.ndarray, int]:
    """Which training images occur neither in the test split nor earlier in the source's order.

    Args:
        places: Where the examples are.
        trained: Hashes of the pixels of all training images, by rows.
        tested: The same of the test split.

    Returns:
        bool `[examples]`, whether a row of the training images is kept, as all of the source's own
        validation split are; and how many are not since they are in the test split.
    """
    given = places.validation
    in_test, seen = set(tested), set(trained[:given])
    keep, left_out = np.arange(len(trained)) < given, 0
    rows = places.row[places.part == 0]  # in the source's order
    for row in rows[rows >= given]:
        key = trained[row]
        left_out += key in in_test
        keep[row] = key not in in_test and key not in seen
        seen.add(key)
    return keep, left_out


def _described(partial: Path, part: str, labels: np.ndarray, hashes: np.ndarray) -> dict:
    """Writes a split's labels, and returns what metadata.json says of the split."""
    np.save(partial / f"{part}_labels.npy", labels)
    content = np.concatenate([hashes, labels.astype("<i4")[:, None].view(np.uint8)], 1)
    sizes = {}
    for what in ("images", "labels"):
        file = partial / f"{part}_{what}.npy"
        sizes[what] = file.stat().st_size
        _sync(file)
    return {
        "examples": len(labels),
        "bytes": sizes,
        "labels_sha256": hashlib.sha256(labels.tobytes()).hexdigest(),
        "sha256": hashlib.sha256(content.tobytes()).hexdigest(),
    }


def _notes(
    class_names: Sequence[str], labels: Mapping[str, np.ndarray], levels: dict[int, int]
) -> Iterator[str]:
    """What people should know of a prepared dataset."""
    for declared, level in sorted(levels.items()):
        whose = f"say that {declared} is their largest" if declared else "do not say their largest"
        yield f"images of more than 8 bits that {whose} value: 0 to {level} became 0 to 255"
    for part, found in labels.items():
        yield from prepared.notes_of_classes(class_names, found, f"in {part}")


def _tidy(folder: Path) -> None:
    """Removes what only an unfinished preparation needs; not before, lest it cannot be resumed."""
    for file in (*folder.glob("*_all_*.npy"), folder / "progress.json"):
        file.unlink(missing_ok=True)
    remove_unfinished(folder)


def _shorten(file: Path, rows: int) -> None:
    """Cuts an .npy file to its first rows, in place."""
    with file.open("r+b") as stream:
        npy.read_magic(stream)
        shape, _, dtype = npy.read_array_header_1_0(stream)
        start = stream.tell()
        header = {"descr": dtype.str, "fortran_order": False, "shape": (rows, *shape[1:])}
        stream.seek(0)
        npy.write_array_header_1_0(stream, header)
        if stream.tell() != start:  # NumPy leaves room for any number of rows.
            raise RuntimeError(f"{file}: the header of {rows} rows has another length")
        stream.flush()
        stream.truncate(start + int(np.prod(shape[1:])) * rows * dtype.itemsize)


def _json(content: dict) -> bytes:
    return json.dumps(content, indent=1).encode()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
