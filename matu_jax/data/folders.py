"""Image folders, and how an image file becomes the square image that a model takes.

A folder is laid out in one of two ways; `val`, `valid` and `validation` mean the same, and their
images may be trained on, since validation is divided off anew:

    root/<split>/<class>/<image>      with the splits train, test and val
    root/<class>/<image>              without an official test split

Upper and lower case make no difference to a split's name. Classes are numbered in the alphabetical
order of their folders (by value, if all are numbers); names that differ only in their Unicode
normalisation (NFC or NFD) are one class in different splits.
Hidden files are passed over. Files that are no images by their name are passed over and reported;
the content of an image decides its format, not its name.
"""

import hashlib
import io
import os
import struct
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from matu_jax.data import Transform
from matu_jax.data.class_names import readable
from matu_jax.data.datasets import Dataset, Example, Source
from matu_jax.data.selection import SPLITS, check_utf8, is_hidden

__all__ = ["EXTENSIONS", "Listing", "apply", "decode", "list_folder", "source"]

# fmt: off
EXTENSIONS = frozenset((
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif",
    ".tiff", ".webp",
))
# fmt: on
"""Of files that are taken for images, in lower case."""
_MAX_PIXELS = 2**27
"""Of an image after its shortest side was resized; 400 MB of RGB."""
_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


# --- Images ---------------------------------------------------------------------------------------


def decode(content: Path | bytes, name: str) -> Image.Image:
    """Decodes an image file to RGB, upright.

    The EXIF orientation is applied. Grey, palette and CMYK images are converted; 16-bit grey keeps
    its high byte; what is transparent is laid over white; of an animation the first image counts.

    Args:
        content: The file, or its bytes.
        name: What messages call it.

    Returns:
        An image in mode RGB.

    Raises:
        ValueError: If there is no whole image in it, or one with more than Pillow's
            `MAX_IMAGE_PIXELS` (89 million), which may be made to fill the memory.
    """
    try:
        data = content if isinstance(content, bytes) else content.read_bytes()
        if not data:
            raise ValueError("the file is empty")
        with Image.open(io.BytesIO(data)) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height > limit:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {limit}")
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError:
        reason = "it is no image, or of a format that Pillow does not know"
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        KeyError,
        IndexError,
        TypeError,
        OverflowError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:  # Pillow's readers let through whatever a damaged file makes them stumble over.
        reason = str(error) or type(error).__name__
    raise ValueError(f"{name} cannot be read: {reason}; replace or remove it")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels go from {values.min()} to {values.max()}, beyond 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, expected 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def apply(image: Image.Image, transform: Transform) -> np.ndarray:
    """Resizes and crops an image, to the very pixels of Hugging Face's image processors.

    `"shortest_side"` is the geometry of `CLIPImageProcessor`: the longer side is rounded down, and
    so is the crop's offset. `"squash"` is that of `ViTImageProcessor`.

    Args:
        image: Mode RGB.
        transform: Size, geometry and filter.

    Returns:
        uint8 `[size, size, 3]`.

    Raises:
        ValueError: If the transform is unknown, or the image so thin that its longer side would
            not fit into memory.
    """
    size = transform.size
    if size < 1 or transform.resample not in _RESAMPLE:
        raise ValueError(
            f"{transform}: expected size >= 1 and resample of {', '.join(sorted(_RESAMPLE))}"
        )
    resample = _RESAMPLE[transform.resample]
    if transform.resize == "squash":
        return np.asarray(image.resize((size, size), resample))
    if transform.resize != "shortest_side":
        raise ValueError(f"{transform}: expected resize 'shortest_side' or 'squash'")
    width, height = image.size
    long = int(size * max(width, height) / min(width, height))
    if long * size > _MAX_PIXELS:
        raise ValueError(
            f"an image of {width} x {height} pixels is too thin to bring its shortest side to "
            f"{size}; crop or remove it"
        )
    width, height = (size, long) if width <= height else (long, size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), resample)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


# --- Folders --------------------------------------------------------------------------------------


class Listing(NamedTuple):
    """What an image folder holds.

    Attributes:
        root: The folder.
        splits: Of "train", "validation" and "test" those that are there ("train" alone if there
            are no splits): the images in order, each as its path below the root and its label.
        folders: The classes' folder names, by label.
        ignored: Paths of files that are no images by their name.
        digest: SHA-256 of all images' paths and sizes.
    """

    root: Path
    splits: dict[str, tuple[tuple[str, int], ...]]
    folders: tuple[str, ...]
    ignored: tuple[str, ...]
    digest: str


def list_folder(root: Path) -> Listing:
    """Lists an image folder; opens no image.

    Raises:
        ValueError: If it is not laid out as this module's first lines say.
    """
    ignored: list[str] = []
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
            found[split][label] = _images(folder / name, root, ignored)
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
        for path, size, label in files:
            digest.update(f"{split}\0{label}\0{path}\0{size}\n".encode(errors="surrogateescape"))
        listed[split] = tuple((path, label) for path, _, label in files)
    return Listing(root, listed, tuple(names), tuple(sorted(ignored)), digest.hexdigest())


def _entries(folder: Path) -> Iterator[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not is_hidden(entry.name))
    except OSError as error:
        raise ValueError(f"{folder} cannot be listed: {error.strerror}") from None


def _directories(folder: Path, ignored: list[str]) -> list[str]:
    directories = []
    for entry in _entries(folder):
        if entry.is_dir():
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


def _images(folder: Path, root: Path, ignored: list[str]) -> list[tuple[str, int]]:
    files = []
    for entry in _entries(folder):
        if entry.is_dir():
            raise ValueError(
                f"{entry.path}: found a folder where images were expected; the layout is "
                f"{root}/<split>/<class>/<image>, or {root}/<class>/<image>"
            )
        if os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
            try:
                size = entry.stat().st_size
            except OSError as error:
                raise ValueError(f"{entry.path} cannot be read: {error.strerror}") from None
            files.append((f"{os.path.relpath(folder, root)}/{entry.name}", size))
        else:
            ignored.append(entry.path)
    if not files:
        raise ValueError(
            f"{folder}: found no image in it, expected files of {', '.join(sorted(EXTENSIONS))}"
        )
    return sorted(files)


class _Images(Sequence):
    """Random access to the images of a listing, decoded when asked for."""

    def __init__(self, root: Path, files: Sequence[tuple[str, int]]):
        self.root, self.files = root, files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index):
        path, label = self.files[index]
        name = str(self.root / path)
        return Example(decode(self.root / path, name), label, name)


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
        where = f"dataset {dataset.name!r}: found {len(listing.folders)} classes in {root} ({some})"
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
    train = listing.splits["train"] + listing.splits.get("validation", ())
    notes = ()
    if listing.ignored:
        notes = (f"{len(listing.ignored)} files are no images, such as {listing.ignored[0]}",)
    test = listing.splits.get("test")
    return Source(
        _Images(root, train),
        None if test is None else _Images(root, test),
        names,
        listing.digest,
        f"folder {root}",
        notes,
    )
