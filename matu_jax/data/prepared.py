"""The cache of real datasets: images that were resized once, read through memory maps.

`matu_jax.data.preparation` writes one folder per dataset and transform:

    <cache>/prepared/<name>-<key>/
        train_images.npy    uint8 [examples, size, size, 3]
        train_labels.npy    int32 [examples]
        test_images.npy, test_labels.npy
        metadata.json       counts, sizes, hashes, class names, where it all came from
        seen_again          the version of an image folder whose sizes or times have changed since,
                            and whose images were found to be the same; often not there

The key is a hash of the dataset's name and of what its row in the table says of splits and classes,
its version in TFDS or the path of its folder, the transform and the version of this format.
Training images lie in a fixed, shuffled order, behind the dataset's own validation split if it has
one, so that training and validation are two slices of one file: `load` copies no image.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field

from matu_jax.data import ImageTask, Split, Transform, selection
from matu_jax.data.datasets import Dataset, Example, Source
from matu_jax.json_files import checked, read_json, regular_file, replace_file

__all__ = ["check", "load", "location", "missing", "notes", "outdated"]

FORMAT = 2
"""Of the cache; part of the key, to be raised by any change to what is written."""
PARTS = ("train", "test")
TEST_FRACTION = 0.2
"""Of a dataset without an official test split, what is tested on."""
SEED = 0
"""What the order of training images, and test splits that are not official, are drawn from."""
SEEDED = f"seeded, no official test split ({TEST_FRACTION:g} of {{}}, seed {SEED})"
"""What is said of a test split that is not official."""
_COMPARED: dict[tuple[Path, Path, str, str], bool] = {}
"""Whether images have changed, by what was compared, so that they are read once by a process."""


def location(
    name: str,
    *,
    transform: Transform,
    cache_dir: str | os.PathLike[str] | None = None,
    folders: str | os.PathLike[str] = "",
) -> Path:
    """Returns where a dataset lies once it is prepared."""
    row = selection.find(name, folders, cache_dir)
    name, place = row.name, selection.place_of(row.name, folders, cache_dir)
    means = (row.train, row.test, row.label, row.class_names, row.transposed)
    parts = [FORMAT, name, place, means, dataclasses.astuple(transform)]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return selection.cache(cache_dir) / "prepared" / f"{selection.short_name(name)}-{key}"


def missing(
    names: Sequence[str],
    *,
    transform: Transform,
    cache_dir: str | os.PathLike[str] | None = None,
    folders: str | os.PathLike[str] = "",
) -> list[str]:
    """Returns the datasets that must be prepared before they can be loaded.

    Takes milliseconds; image folders are listed, to see whether they changed, which takes about a
    second for 100 000 images, and read once where sizes or times of their files have changed. A
    dataset whose folder was removed after its preparation is there.

    Raises:
        ValueError: If a name is unknown or given twice.
    """
    selection.check_once(names)
    absent = []
    for name in names:
        folder = location(name, transform=transform, cache_dir=cache_dir, folders=folders)
        images = selection.image_folder(name, folders, cache_dir)
        dataset = selection.find(name, folders, cache_dir)
        if not folder.is_dir() or outdated(dataset, folder, images):
            absent.append(name)
    return absent


def outdated(dataset: Dataset, folder: Path, images: Path | None) -> bool:
    """Whether an image folder is no longer what a prepared dataset was made from.

    Where sizes and times of all files are as they were, so are the images. Else the files are read
    and their contents compared, once by a process: copies and links of the same images are the
    same.

    Raises:
        ValueError: If what is prepared is damaged, or the folder is not laid out as it must be.
    """
    metadata = check(dataset.name, folder)
    if images is None or not images.is_dir():
        return False
    from matu_jax.data import folders  # here, since it loads Pillow
    from matu_jax.data.images import read

    source, seen = folders.source(dataset, images), folder / "seen_again"
    splits = metadata["test_split"], metadata.get("validation", 0)
    if splits != (test_split(source), source.validation):
        return True
    known = [metadata["version"]]
    with contextlib.suppress(OSError, ValueError):
        known.append(regular_file(seen).read_text())
    if source.version in known:
        return False
    compared = (folder, images, source.version, metadata["checksum"])
    if compared in _COMPARED:
        return _COMPARED[compared]
    published = metadata["published"]
    if [len(source.train), len(source.test or ())] != [published["train"], published["test"]]:
        return True

    def content(example: Example) -> tuple[int, bytes]:
        return example.label, hashlib.sha256(read(example.content, example.name)).digest()

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        try:
            found = list(threads.map(content, (*source.train, *(source.test or ()))))
        except ValueError:
            return True  # What cannot be read was changed; preparing it tells.
    changed = contents_digest(source, found) != metadata["contents"]
    _COMPARED[compared] = changed
    if not changed:
        # Where the cache cannot be written, the next process reads them again.
        with contextlib.suppress(OSError):
            replace_file(seen, source.version.encode())
    return changed


def test_split(source: Source) -> str:
    """What is said of where the images to test on are from."""
    if source.test is not None:
        return "official"
    return SEEDED.format("each class" if source.labels else "all images")


def contents_digest(source: Source, published: Iterable[tuple[int, bytes]]) -> str:
    """SHA-256 of what a dataset's source holds: its classes, labels and image files.

    Args:
        source: Whose it is.
        published: The label, and the SHA-256 of the image file, of all examples of train and then
            of test.
    """
    sizes = len(source.train), None if source.test is None else len(source.test)
    validation = [source.validation] if source.validation else []
    digest = hashlib.sha256(json.dumps([source.class_names, sizes, *validation]).encode())
    for label, content in published:
        digest.update(label.to_bytes(8, "little") + content)
    return digest.hexdigest()


def load(
    names: Sequence[str],
    *,
    transform: Transform,
    cache_dir: str | os.PathLike[str] | None = None,
    folders: str | os.PathLike[str] = "",
    validation_fraction: float = 0.1,
    how: str = "run python -m matu_jax.prepare with --config and an experiment file",
) -> tuple[ImageTask, ...]:
    """Opens prepared datasets.

    An image folder's own validation split is the validation split. Else it is the last
    `validation_fraction` of the training images; their order was shuffled once and for all when the
    dataset was prepared, so that every run with the same fraction validates on the same images.

    Args:
        names: Names that `matu_jax.data.selection.find` knows, each at most once.
        transform: As the model demands.
        cache_dir: By default the environment's `MATU_JAX_CACHE`, else `~/.cache/matu_jax`.
        folders: Where image folders are; "" = `$MATU_JAX_FOLDERS`, or `folders` in the cache.
        validation_fraction: Of the training images, more than 0 and less than 1; one image at
            least. Datasets with a validation split of their own do not look at it.
        how: What a message tells to do about datasets that are not prepared.

    Returns:
        The tasks, in the order of `names`; their images are read-only memory maps. `fingerprint` is
        the hash of all images and labels that was taken when they were prepared.

    Raises:
        ValueError: If a name is unknown or given twice, datasets are not prepared (all of them are
            listed), or a file is missing or damaged.
    """
    if isinstance(names, str):
        raise ValueError(f"names must be several names, such as [{names!r}], got the one string")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}")
    absent = missing(names, transform=transform, cache_dir=cache_dir, folders=folders)
    if absent:
        raise ValueError(
            f"datasets that are not prepared for {transform}, or whose image folder has changed "
            f"since ({len(absent)} of {len(names)}): {', '.join(absent)}; {how}"
        )
    tasks = []
    for name in names:
        folder = location(name, transform=transform, cache_dir=cache_dir, folders=folders)
        metadata = check(name, folder)
        images, labels = _arrays(folder, "train")
        given = metadata.get("validation", 0)
        held_out = max(1, round(validation_fraction * len(labels)))
        trained, validated = slice(0, -held_out), slice(-held_out, None)
        divided: list[str] = []
        if given:
            trained, validated = slice(given, None), slice(given)
        elif held_out == len(labels):
            raise ValueError(
                f"dataset {name!r}: no training image is left of {len(labels)} if "
                f"validation_fraction is {validation_fraction}; lower it"
            )
        else:
            where = "to train on: all are held out to validate on"
            divided = notes_of_classes(metadata["class_names"], labels[trained], where, labels)
        tasks.append(
            ImageTask(
                name=name,
                label_space=name,
                domain=name,
                class_names=tuple(metadata["class_names"]),
                train=Split(images[trained], labels[trained]),
                validation=Split(images[validated], labels[validated]),
                test=Split(*_arrays(folder, "test")),
                templates=selection.find(name, folders, cache_dir).templates,
                fingerprint=metadata["sha256"],
                notes=(*notes(metadata), *divided),
            )
        )
    return tuple(tasks)


def notes(metadata: dict[str, Any]) -> tuple[str, ...]:
    """What people should know of a prepared dataset before they trust its numbers.

    Args:
        metadata: From `check`.

    Returns:
        Sentences: where the test split is from if it is not official, whether the validation split
        is the dataset's own, how images of more than 8 bits were scaled, what was passed over,
        links that were followed, and images that the test split holds more than once.
    """
    validation = metadata.get("validation", 0)
    found = [*notes_of_splits(metadata["test_split"], validation), *metadata["notes"]]
    if metadata["test_twice"]:
        found.append(f"images that are in test more than once: {metadata['test_twice']}")
    return tuple(found)


def notes_of_classes(
    class_names: Sequence[str], labels: np.ndarray, where: str, among: np.ndarray | None = None
) -> list[str]:
    """Of `notes`, which classes have no image.

    Args:
        class_names: By label.
        labels: Those that there are.
        where: Such as "in train".
        among: Labels of which a class is asked; None = all classes.
    """
    asked = range(len(class_names)) if among is None else np.unique(among)
    lacking = [class_names[label] for label in asked if not (labels == label).any()]
    more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
    return [f"classes without an image {where}: {', '.join(lacking[:5])}{more}"] if lacking else []


def notes_of_splits(test: str, validation: int) -> list[str]:
    """Of `notes`, where the images to test and to validate on are from.

    Args:
        test: From `test_split`.
        validation: See `matu_jax.data.datasets.Source`.
    """
    found = [] if test == "official" else [f"test: {test}"]
    if validation:
        found.append(f"validation: the folder's own split, of size {validation:,}")
    return found


def check(name: str, folder: Path) -> dict[str, Any]:
    """Checks a prepared dataset without reading its images, and returns its metadata.

    Checked are the metadata's own hash, every file's size and header, and the labels' hash.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    remedy = f"remove {folder} and prepare it again"
    file = folder / "metadata.json"
    try:
        metadata = read_json(file)
        checked(_Metadata, metadata, f"{file}: damaged")
    except (OSError, ValueError) as error:
        raise ValueError(f"dataset {name!r}: {file} cannot be read ({error}); {remedy}") from None
    if metadata["checksum"] != checksum(metadata):
        raise ValueError(f"dataset {name!r}: {file} was changed; {remedy}")
    if metadata["name"] != name:
        raise ValueError(f"dataset {name!r}: {file} is of {metadata['name']!r}; {remedy}")
    for part in PARTS:
        expected = metadata["splits"][part]
        for what in ("images", "labels"):
            size = expected["bytes"][what]
            file = folder / f"{part}_{what}.npy"
            found = file.stat().st_size if file.is_file() else "no file"
            if found != size:
                raise ValueError(
                    f"dataset {name!r}: {file}: found {found}, expected {size} bytes; {remedy}"
                )
        try:
            images, labels = _arrays(folder, part)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"dataset {name!r}: {folder}/{part}_*.npy cannot be read ({error}); {remedy}"
            ) from None
        size = metadata["transform"]["size"]
        shape = (expected["examples"], size, size, 3)
        if images.dtype != np.uint8 or images.shape != shape:
            raise ValueError(
                f"dataset {name!r}: {folder}/{part}_images.npy: found {images.dtype} "
                f"{list(images.shape)}, expected uint8 {list(shape)}; {remedy}"
            )
        if hashlib.sha256(labels.tobytes()).hexdigest() != expected["labels_sha256"]:
            raise ValueError(
                f"dataset {name!r}: {folder}/{part}_labels.npy: its hash is another than in "
                f"metadata.json; {remedy}"
            )
    trained = metadata["splits"]["train"]["examples"]
    if metadata.get("validation", 0) >= trained:
        raise ValueError(
            f"dataset {name!r}: {folder}/metadata.json: found validation {metadata['validation']}, "
            f"expected less than the {trained} images of train; {remedy}"
        )
    return metadata


_Count = Annotated[int, Field(ge=0)]
_Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
WhiteLevels = dict[
    Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")], Annotated[int, Field(ge=1)]
]
"""What `matu_jax.data.images.white_levels` decided, as JSON holds it."""


class _Transform(BaseModel):
    size: Annotated[int, Field(ge=1)]
    resize: str
    resample: str


class _Bytes(BaseModel):
    images: _Count
    labels: _Count


class _Split(BaseModel):
    examples: Annotated[int, Field(ge=1)]
    bytes: _Bytes
    labels_sha256: _Hash
    sha256: _Hash


class _Splits(BaseModel):
    train: _Split
    test: _Split


class _Published(BaseModel):
    train: _Count
    test: _Count


class _LeftOut(BaseModel):
    train_in_test: _Count
    train_twice: _Count


class _Metadata(BaseModel):
    """What metadata.json holds."""

    name: str
    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    version: str
    contents: _Hash
    origin: str
    test_split: str
    transform: _Transform
    class_names: Annotated[list[str], Field(min_length=1)]
    published: _Published
    validation: _Count = 0
    left_out: _LeftOut
    test_twice: _Count
    white_levels: WhiteLevels
    notes: list[str]
    splits: _Splits
    sha256: _Hash
    checksum: _Hash


def checksum(metadata: dict[str, Any]) -> str:
    """SHA-256 of all of a dataset's metadata, or of its progress, but the field `checksum`."""
    rest = {key: value for key, value in metadata.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _arrays(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """The images, memory-mapped, and the labels of a split."""
    images = np.load(folder / f"{part}_images.npy", mmap_mode="r", allow_pickle=False)
    return images, np.load(folder / f"{part}_labels.npy", allow_pickle=False)
