"""Image folders: which images and classes there are.

A folder is laid out in one of two ways:

    root/<split>/<class>/<image>      with the splits train, and test and val where there are any
    root/<class>/<image>              without an official test split

Without `test`, a seeded fifth of each class of `train` is tested on. `val` (or `valid`, or
`validation`) is what is validated on; without it, a part of the training images is divided off. It
is trained on only if the table of datasets says so of this dataset, which is reported.

Upper and lower case make no difference to a split's name. Classes are numbered in the alphabetical
order of their folders (by value, if all are numbers); names that differ only in their Unicode
normalisation (NFC or NFD) are one class in different splits.
Hidden files are passed over. Files that are no images by their name are passed over and reported;
the content of an image decides its format, not its name.
"""

import hashlib
import os
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from matu_jax.data.class_names import readable
from matu_jax.data.datasets import Dataset, Example, Source
from matu_jax.data.images import EXTENSIONS, decode
from matu_jax.data.selection import SPLITS, check_utf8, is_directory, is_hidden

__all__ = ["Listing", "decode", "list_folder", "notes_of_files", "source"]


class Listing(NamedTuple):
    """What an image folder holds.

    Attributes:
        root: The folder.
        splits: Of "train", "validation" and "test" those that are there ("train" alone if there
            are no splits): the images in order, each as its path below the root and its label.
        folders: The classes' folder names, by label.
        ignored: Paths of files that are no images by their name.
        linked: Paths of links that lead out of the folder; they are followed.
        digest: SHA-256 of all images' paths, sizes and times of change.
    """

    root: Path
    splits: dict[str, tuple[tuple[str, int], ...]]
    folders: tuple[str, ...]
    ignored: tuple[str, ...]
    linked: tuple[str, ...]
    digest: str


def list_folder(root: Path) -> Listing:
    """Lists an image folder; opens no image.

    Raises:
        ValueError: If it is not laid out as this module's first lines say.
    """
    ignored: list[str] = []
    linked: list[str] = []
    tops = _directories(root, ignored)
    if not tops:
        raise ValueError(f"{root}: found no folder in it, expected one per class, or per split")
    splits = {"train": root}
    if all(top.lower() in SPLITS for top in tops):
        splits = {}
        for top in tops:
            split = SPLITS[top.lower()]
            if split in splits:
                raise ValueError(f"{root}: found {splits[split].name} and {top}, expected one")
            splits[split] = root / top
        if "train" not in splits:
            raise ValueError(f"{root}: found the splits {', '.join(tops)}, but no train")
    found = {}
    for split, folder in splits.items():
        classes = _directories(folder, ignored)
        if not classes:
            raise ValueError(f"{folder}: found no folder in it, expected one per class")
        found[split] = {}
        for name in classes:
            label = _label(name, folder, classes)
            found[split][label] = _images(folder / name, root, ignored, linked)
    names = list(found["train"])
    names.sort(key=lambda name: (int(name), name) if name.isdecimal() else (0, name))
    if not all(name.isdecimal() for name in names):
        names.sort()
    for split, classes in found.items():
        if strange := [name for name in classes if name not in found["train"]]:
            near = [name for name in names if name.casefold() == strange[0].casefold()]
            has = f", where it is {near[0]!r}: rename one" if near else ""
            raise ValueError(
                f"{splits[split]}: found the class {strange[0]!r}, which {splits['train']} "
                f"lacks{has}"
            )
    digest, listed = hashlib.sha256(), {}
    for split, classes in sorted(found.items()):
        files = [
            (*file, label) for label, name in enumerate(names) for file in classes.get(name, ())
        ]
        for path, state, label in files:
            digest.update(f"{split}\0{label}\0{path}\0{state}\n".encode(errors="surrogateescape"))
        listed[split] = tuple((path, label) for path, _, label in files)
    noted = [tuple(sorted(map(shown, paths))) for paths in (ignored, linked)]
    return Listing(root, listed, tuple(names), noted[0], noted[1], digest.hexdigest())


def shown(path: str | Path) -> str:
    """A path as it can be printed, even if it is not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def notes_of_files(ignored: Sequence[str], linked: Sequence[str]) -> tuple[str, ...]:
    """What people should know of a folder's files: those of `Listing`."""
    said = {"files that are no images": ignored, "links out of the folder": linked}
    return tuple(
        f"{what}: {len(paths)}, such as {paths[0]}" for what, paths in said.items() if paths
    )


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not is_hidden(entry.name))
    except OSError as error:
        raise ValueError(f"{folder} cannot be listed: {error.strerror}") from None


def _directories(folder: Path, ignored: list[str]) -> list[str]:
    directories = []
    for entry in _entries(folder):
        if is_directory(entry):
            directories.append(entry.name)
        else:
            ignored.append(entry.path)
    return sorted(directories)


def _label(name: str, folder: Path, classes: Sequence[str]) -> str:
    """The name of a class's folder, normalised (NFC)."""
    check_utf8(name, folder)
    label = unicodedata.normalize("NFC", name)
    same = [other for other in classes if unicodedata.normalize("NFC", other) == label]
    if len(same) > 1:
        spelled = " and ".join(ascii(other) for other in same)
        raise ValueError(
            f"{folder}: the classes {spelled} are called the same, spelled with different Unicode "
            "characters; rename one, or put their images together"
        )
    return label


def _leads_out(path: Path | str, root: Path) -> bool:
    """Whether a link leads out of a folder."""
    real, inside = os.path.realpath(path), os.path.realpath(root)
    return os.path.commonpath((real, inside)) != inside


def _images(
    folder: Path, root: Path, ignored: list[str], linked: list[str]
) -> list[tuple[str, tuple[int, ...]]]:
    """Path below the root, and size, times and place on disk, of a class's images."""
    files = []
    if any(part.is_symlink() for part in (folder, folder.parent)) and _leads_out(folder, root):
        linked.append(str(folder))
    for entry in _entries(folder):
        if is_directory(entry):
            raise ValueError(
                f"{shown(entry.path)}: found a folder where images were expected; the layout is "
                f"{root}/<split>/<class>/<image>, or {root}/<class>/<image>, with splits called "
                f"{', '.join(SPLITS)}; where {root} is the folder of a site, give the one that it "
                "is in as config.data.sites"
            )
        if os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
            try:
                found = entry.stat()
            except OSError as error:
                reason = error.strerror
                raise ValueError(f"{shown(entry.path)} cannot be read: {reason}") from None
            if not stat.S_ISREG(found.st_mode):
                raise ValueError(f"{shown(entry.path)} is no regular file; remove it")
            if entry.is_symlink() and _leads_out(entry.path, root):
                linked.append(entry.path)
            # What was replaced has another time of change, even if its size and the time of its
            # last modification were kept; what was moved here is another file.
            times = (found.st_mtime_ns, found.st_ctime_ns)
            state = (found.st_size, *times, found.st_dev, found.st_ino)
            files.append((f"{os.path.relpath(folder, root)}/{entry.name}", state))
        else:
            ignored.append(entry.path)
    if not files:
        raise ValueError(
            f"{folder}: found no image in it, expected files of {', '.join(sorted(EXTENSIONS))}"
        )
    return sorted(files)


class _Images(Sequence):
    """Random access to the image files of a listing."""

    def __init__(self, root: Path, files: Sequence[tuple[str, int]]):
        self.root, self.files = root, files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index):
        path, label = self.files[index]
        return Example(self.root / path, label, shown(self.root / path))


def source(dataset: Dataset, root: Path) -> Source:
    """Reads a dataset from its folder; opens no image.

    Folders that are called by numbers, from 0 or from 1 on, take the table's class names in order;
    other folders' names are the class names.

    Raises:
        ValueError: If the layout, the number of classes or the splits are not those of the table,
            or two classes are called the same.
    """
    listing = list_folder(root)
    if len(listing.folders) != dataset.num_classes:
        some = ", ".join(listing.folders[:5]) + ", ..." * (len(listing.folders) > 5)
        where = f"dataset {dataset.name!r}: {root}: found classes: {len(listing.folders)} ({some})"
        if dataset.num_classes:
            raise ValueError(
                f"{where}, expected {dataset.num_classes}, as the dataset of this name has; a "
                "folder of your own takes another name"
            )
        if len(listing.folders) < 2:
            raise ValueError(f"{where}, expected 2 or more")
    if dataset.test and "test" not in listing.splits:
        raise ValueError(
            f"dataset {dataset.name!r}: found no {root}/test, expected the official test split "
            f"there, as {root}/test/<class>/<image>, beside {root}/train"
        )
    names = tuple(map(readable, listing.folders))
    if dataset.class_names and all(name.isdecimal() for name in listing.folders):
        numbers = [int(name) for name in listing.folders]
        if numbers not in ([*range(len(numbers))], [*range(1, len(numbers) + 1)]):
            raise ValueError(
                f"dataset {dataset.name!r}: found class folders {numbers[0]} to {numbers[-1]} in "
                f"{root}, expected 0 to {len(numbers) - 1}, or 1 to {len(numbers)}"
            )
        names = dataset.class_names
    for name in names:
        if names.count(name) > 1:
            same = [f for f, other in zip(listing.folders, names, strict=True) if other == name]
            raise ValueError(
                f"dataset {dataset.name!r}: the class folders {', '.join(map(repr, same))} in "
                f"{root} all read as {name!r}; rename all but one"
            )
    given = listing.splits.get("validation", ())
    train = listing.splits["train"] + given
    notes = ()
    if given and "validation" in dataset.train.split("+"):
        # As from TFDS, where the split of this name is among those to train on.
        notes = (f"images of the validation split that are trained on: {len(given):,}",)
        given = ()
    notes += notes_of_files(listing.ignored, listing.linked)
    test = listing.splits.get("test")
    return Source(
        _Images(root, train),
        None if test is None else _Images(root, test),
        names,
        listing.digest,
        f"folder {root}",
        notes,
        validation=len(given),
        labels=tuple(label for _, label in train),
    )
