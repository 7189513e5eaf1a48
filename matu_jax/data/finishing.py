"""The last stage of `matu_jax.data.preparation`: splits made disjoint, and described."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from matu_jax.data import Transform, prepared
from matu_jax.data.datasets import Dataset, Source
from matu_jax.data.prepared import FORMAT, PARTS
from matu_jax.data.splits import Places, distinct
from matu_jax.json_files import replace_file


def finish(
    dataset: Dataset,
    source: Source,
    places: Places,
    transform: Transform,
    levels: dict[int, int],
    partial: Path,
) -> dict[str, Any]:
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
    keep, in_test = distinct(places, *keys)
    kept, given = int(keep.sum()), places.validation
    least = 1 if given else 2  # to train on, and to validate on
    if kept - given < least:
        raise ValueError(
            f"dataset {dataset.name!r}: {kept - given} of {len(keep) - given} training images are "
            "left without those that also occur in the test or validation split, or twice; "
            f"expected {least} at least"
        )
    _keep(dataset, partial / "train_images.npy", keep, (labels[0], hashes[0]))
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
    replace_file(partial / "metadata.json", json.dumps(metadata, indent=1).encode())
    sync(partial)
    return metadata


def _keep(dataset: Dataset, file: Path, keep: np.ndarray, others: Sequence[np.ndarray]) -> None:
    """Moves rows that are kept to those that are not, and cuts the file of images behind them.

    Args:
        dataset: For messages.
        file: The training images, by rows; shortened already if an earlier call came so far.
        keep: bool `[examples]`.
        others: Arrays whose rows are moved likewise; they are not shortened.
    """
    kept = int(keep.sum())
    gaps, movers = np.flatnonzero(~keep[:kept]), kept + np.flatnonzero(keep[kept:])
    images = npy.open_memmap(file, "r+")
    if len(images) == len(keep):
        for gap, mover in zip(gaps, movers, strict=True):
            images[gap] = images[mover]
        images.flush()
    elif len(images) != kept:
        raise ValueError(
            f"dataset {dataset.name!r}: {file}: found {len(images)} images, expected {kept}; "
            f"remove {file.parent} and prepare it again"
        )
    del images
    for array in others:
        array[gaps] = array[movers]
    _shorten(file, kept)


def _described(partial: Path, part: str, labels: np.ndarray, hashes: np.ndarray) -> dict[str, Any]:
    """Writes a split's labels, and returns what metadata.json says of the split."""
    np.save(partial / f"{part}_labels.npy", labels)
    content = np.concatenate([hashes, labels.astype("<i4")[:, None].view(np.uint8)], 1)
    sizes = {}
    for what in ("images", "labels"):
        file = partial / f"{part}_{what}.npy"
        sizes[what] = file.stat().st_size
        sync(file)
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


def sync(path: Path) -> None:
    """Has a file, or a folder's list of files, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
