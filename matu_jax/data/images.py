"""How an image file becomes the square image that a model takes.

Files are decoded by Pillow, and only in the `FORMATS` listed here, whatever a file is called: some
of the others run programs (PostScript). Of images of more than 8 bits a sample the *white level*,
the value that becomes 255, is not always said by the file: 12 bits of a camera or a scanner are
often kept in 16, and would be all but black. `white_levels` decides it for a whole dataset.
"""

import contextlib
import io
import math
import re
import stat
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile

from matu_jax.data import Transform
from matu_jax.data.datasets import Example

__all__ = ["EXTENSIONS", "FORMATS", "apply", "decode", "measure", "picture", "read", "white_levels"]

# fmt: off
EXTENSIONS = frozenset((
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif",
    ".tiff", ".webp",
))
# fmt: on
"""Of files that are taken for images, in lower case."""
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Of Pillow's formats, those of files with such names."""
_MAX_BYTES = 2**30
"""Of an image file."""
_MAX_PIXELS = 2**27
"""Of an image after its shortest side was resized; 400 MB of RGB."""
_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_PNG = b"\x89PNG\r\n\x1a\n"
# Tags of TIFF.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _COLOUR_MAP, _SAMPLE_FORMAT, _LARGEST_SAMPLE = (
    258, 262, 320, 339, 341,
)  # fmt: skip
_SIGNED = 2  # a sample format
_ORIENTATION = 0x0112  # of EXIF


def decode(
    content: Path | bytes, name: str, white_levels: Mapping[int, int] | None = None
) -> Image.Image:
    """Decodes an image file to RGB, upright.

    The EXIF orientation is applied. Grey, palette and CMYK images are converted; what is
    transparent is laid over white; of an animation the first image counts. Samples of more than 8
    bits are scaled such that their white level becomes 255: of 16 full bits, the high byte is kept.

    Args:
        content: The file, or its bytes.
        name: What messages call it.
        white_levels: Of the dataset, from the function of this name. Without them an image of more
            than 8 bits counts as a dataset of its own.

    Returns:
        An image in mode RGB.

    Raises:
        ValueError: If there is no whole image in it, its samples are negative, no integers or
            signed ones of 8 bits, or there are more pixels than Pillow's `MAX_IMAGE_PIXELS` (89
            million), which may be made to fill the memory.
    """
    with _told(name):
        data = _bytes(content)
        with _opened(data) as image:
            deep = _deep(image, data)
            if deep is None:
                _load(image)
                return _rgb(ImageOps.exif_transpose(image))
            known = white_levels if white_levels and deep.declared in white_levels else None
            small = _scaled(deep, (known or _alone(deep))[deep.declared])
            small.getexif()[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
            return _rgb(ImageOps.exif_transpose(small))


def picture(example: Example, white_levels: Mapping[int, int] | None = None) -> Image.Image:
    """Decodes an example's image, and turns it upright where its source stores it transposed.

    Raises:
        ValueError: See `decode`.
    """
    image = decode(example.content, example.name, white_levels)
    return image.transpose(Image.Transpose.TRANSPOSE) if example.transposed else image


def measure(content: Path | bytes) -> tuple[int, int] | None:
    """What `white_levels` needs of an image; of one with 8 bits a sample, its first bytes are read.

    Args:
        content: The file, or its bytes.

    Returns:
        The largest value that the file says there may be (0 where it says nothing), and the largest
        that there is; None for an image of at most 8 bits a sample, and for what cannot be read.
    """
    with contextlib.suppress(ValueError), _told(""):
        if isinstance(content, Path):
            _check_regular(content)
            with content.open("rb") as stream:
                head = stream.read(32)
        else:
            head = content[:32]
        if head.startswith(_PNG):
            if head[24:25] != b"\x10":
                return None
        elif head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and head[:1] != b"P":
            return None
        data = _bytes(content)
        with _opened(data) as image:
            deep = _deep(image, data)
            return None if deep is None else (deep.declared, int(deep.values.max()))
    return None


def white_levels(measured: Iterable[tuple[int, int] | None]) -> dict[int, int]:
    """Decides for a dataset which value of images with more than 8 bits a sample becomes 255.

    Where files say how many bits are used (sBIT in PNG, BitsPerSample or SMaxSampleValue in TIFF,
    another largest value than 65535 in the header of a PGM or PPM), and none of them holds more, it
    is that. Else it is the largest value of as many bits as the largest value of all needs, such as
    4095 for 4000.

    Args:
        measured: Of all images of all splits, from `measure`.

    Returns:
        The white level of images by what their files say; the key 0 is of files that say nothing.
    """
    largest: dict[int, int] = {}
    for found in measured:
        if found is not None:
            largest[found[0]] = max(largest.get(found[0], 1), found[1])
    return {
        declared: declared if value <= declared else 2 ** value.bit_length() - 1
        for declared, value in largest.items()
    }


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Turns whatever a damaged file makes Pillow's readers stumble over into a message."""
    try:
        yield
        return
    except Image.UnidentifiedImageError:
        reason = f"it is no image, or none of {', '.join(FORMATS)}"
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
    except (
        SyntaxError,
        ValueError,
        EOFError,
        KeyError,
        IndexError,
        TypeError,
        OverflowError,
        MemoryError,
        RecursionError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        reason = str(error) or type(error).__name__
    raise ValueError(f"{name} cannot be read: {reason}; replace or remove it")


def read(content: Path | bytes, name: str) -> bytes:
    """The bytes of an image file, if it is a regular one of at most 1 GiB.

    Raises:
        ValueError: If it cannot be read, or is another kind of file.
    """
    with _told(name):
        return _bytes(content)


def _check_regular(path: Path) -> None:
    """Refuses what would be waited for without end, as pipes and devices."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no regular file")
    if found.st_size > _MAX_BYTES:
        raise ValueError(f"its {found.st_size} bytes are more than {_MAX_BYTES}")


def _bytes(content: Path | bytes) -> bytes:
    if isinstance(content, Path):
        _check_regular(content)
        content = content.read_bytes()
    if not content:
        raise ValueError("the file is empty")
    return content


def _opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    limit = Image.MAX_IMAGE_PIXELS
    if limit and image.width * image.height > limit:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {limit}")
    return image


def _load(image: Image.Image) -> None:
    """Loads an image of at most 8 bits a sample, with what Pillow takes wrongly in TIFF mended."""
    image.load()
    tags = getattr(image, "tag_v2", {})
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        raise ValueError("its samples are signed integers of 8 bits, expected unsigned ones")
    colours = tags.get(_COLOUR_MAP, (2**16 - 1,))
    if image.mode in ("P", "PA") and max(colours) <= 255:
        # The standard has 16 bits. Like libtiff, take numbers that all fit into 8 for 8 bits.
        image.putpalette(np.reshape(colours, (3, -1)).T.astype(np.uint8).tobytes())


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


# --- More than 8 bits a sample --------------------------------------------------------------------


class _Deep(NamedTuple):
    """An image of more than 8 bits a sample.

    Attributes:
        values: int64 `[height, width]`, or `[height, width, channels]` of RGB.
        alpha: int64 `[height, width]`; None where nothing is transparent.
        declared: The largest value that the file says there may be; 0 where it says nothing.
        inverted: Whether 0 is white.
    """

    values: np.ndarray
    alpha: np.ndarray | None
    declared: int
    inverted: bool


def _deep(image: Image.Image, data: bytes) -> _Deep | None:
    """The full samples of an image of more than 8 bits each; None of any other."""
    grey = image.mode == "I" or image.mode.startswith("I;16")
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, expected 8 or 16 bits")
    if image.format == "PNG":
        bits = data[24]
    elif image.format == "PPM":
        bits = _largest_in_header(image).bit_length()
    else:
        bits = max(tags.get(_BITS_PER_SAMPLE, (8,)))
    if not grey and bits <= 8:
        return None
    declared = _declared(image, data, tags, bits)
    if image.format == "PPM":
        values = _netpbm(image, data)
    elif grey:
        values = np.asarray(image).astype(np.int64)
        if _SIGNED not in tags.get(_SAMPLE_FORMAT, ()):
            values &= 2**32 - 1  # Pillow has no unsigned integers of 32 bits
    elif image.format == "PNG" and data[25] == 4:  # grey with alpha
        values = _grey_and_alpha(data)
    else:
        values = _both_bytes(image, data)
    if values.min() < 0:
        raise ValueError(f"its pixels go from {values.min()} to {values.max()}, expected 0 or more")
    alpha, channels = None, 1 if values.ndim == 2 else values.shape[-1]
    key = image.info.get("transparency")
    if channels in (2, 4):
        values, alpha = values[..., :-1], values[..., -1]
    elif isinstance(key, (int, tuple)):
        same = np.atleast_1d(np.reshape(key, (-1,) + (1,) * (values.ndim - 1)) == values.T).T
        alpha = np.where(same.all(-1) if values.ndim == 3 else same, 0, 2**16 - 1)
    if values.shape[-1] == 1 and values.ndim == 3:
        values = values[..., 0]
    return _Deep(values, alpha, declared, tags.get(_PHOTOMETRIC) == 0 and grey)


def _declared(image: Image.Image, data: bytes, tags: Mapping, bits: int) -> int:
    """The largest value that a file says its samples may have; 0 where it says nothing.

    Of 16 bits or 32 nothing is said: that is how a sample is stored, whatever it holds.
    """
    if image.format == "PPM":
        largest = _largest_in_header(image)
        return largest if largest < 2**16 - 1 else 0
    largest = tags.get(_LARGEST_SAMPLE)
    if largest is not None:
        largest = max(np.atleast_1d(largest))
        return int(largest) if 1 <= largest < 2**31 else 0
    if data.startswith(_PNG):
        start = 8
        while start + 8 <= len(data) and data[start + 4 : start + 8] != b"IDAT":
            (length,) = struct.unpack(">I", data[start : start + 4])
            if data[start + 4 : start + 8] == b"sBIT":
                samples = data[start + 8 : start + 8 + (1 if data[25] in (0, 4) else 3)]
                bits = max(samples, default=bits)
                break
            start += length + 12
    return 2**bits - 1 if 1 <= bits < 16 else 0


def _largest_in_header(image: Image.Image) -> int:
    """The largest value that the header of a PGM or PPM names; 255 of other files of their kind."""
    args = cast(ImageFile, image).tile[0].args
    if isinstance(args, tuple):
        return args[-1]
    return 2**16 - 1 if args == "I;16B" else 255


def _netpbm(image: Image.Image, data: bytes) -> np.ndarray:
    """The 16 bits of a PGM or PPM, of which Pillow keeps 8 in colours: int64.

    Its samples follow the header: as text, or of two bytes each, the high one first.
    """
    if image.mode not in ("I", "RGB"):
        raise ValueError(f"it has more than 8 bits a sample, stored as {image.mode}")
    tile = cast(ImageFile, image).tile[0]
    shape = (image.height, image.width, 3)[: 3 if image.mode == "RGB" else 2]
    count, body = math.prod(shape), data[tile.offset :]
    if tile.codec_name == "ppm_plain":
        text = re.sub(rb"#[^\r\n]*", b"", body)  # comments
        numbers = re.match(rb"[\d\s]*(?!\S)", text)
        body = numbers[0].strip() if numbers else b""
        values = np.fromstring(body, np.int64, sep=" ")[:count] if body else np.zeros(0, np.int64)
        if values.size and values.max() >= 2**16:
            raise ValueError(f"one of its samples is {values.max()}, expected 65535 at most")
    else:
        values = np.frombuffer(body[: 2 * min(count, len(body) // 2)], ">u2").astype(np.int64)
    if values.size < count:
        raise ValueError(f"it ends, or is damaged, after {values.size} of {count} samples")
    return values.reshape(shape)


def _both_bytes(image: Image.Image, data: bytes) -> np.ndarray:
    """The 16 bits of colours, of which Pillow keeps the high byte: int64 [height, width, channels].

    The low bytes are what it takes for the high ones if it is told the other order of bytes.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as other:
        tiles = []
        for tile in other.tile:
            args = tile.args if isinstance(tile.args, tuple) else (tile.args,)
            match = re.fullmatch(r"((?:RGB|RGBA|RGBX);16)([BLN])", str(args[0]))
            if match is None:
                raise ValueError(f"it has more than 8 bits a sample, stored as {args[0]}")
            big = match[2] == "B" or (match[2] == "N" and sys.byteorder == "big")
            args = (match[1] + ("L" if big else "B"), *args[1:])
            tiles.append(tile._replace(args=args if isinstance(tile.args, tuple) else args[0]))
        other.tile = tiles
        low = np.asarray(other).astype(np.int64)
    return np.asarray(image).astype(np.int64) << 8 | low


def _grey_and_alpha(data: bytes) -> np.ndarray:
    """A PNG's 16 bits of grey and alpha: int64 [height, width, 2].

    They lie in the file as RGBA of 8 bits does, and are read as such.
    """
    header = data[12:24] + b"\x08\x06" + data[26:29]
    data = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        parts = np.asarray(image).astype(np.int64)
    return parts[..., ::2] << 8 | parts[..., 1::2]


def _alone(deep: _Deep) -> dict[int, int]:
    return white_levels([(deep.declared, int(deep.values.max()))])


def _scaled(deep: _Deep, white: int) -> Image.Image:
    """The image in 8 bits."""

    def scaled(values: np.ndarray, white: int) -> np.ndarray:
        values = np.minimum(values, white)
        # Of 16 bits this is the high byte, as everybody else's, and not a rounded 255 / 65535.
        values = values * 256 // (white + 1) if white >= 255 else values * 255 // white
        return values.astype(np.uint8)

    values = scaled(deep.values, white)
    picture = Image.fromarray(255 - values if deep.inverted else values)
    if deep.alpha is not None:
        opaque = white if deep.alpha.max() <= white else max(white, 2**16 - 1)
        picture.putalpha(Image.fromarray(scaled(deep.alpha, opaque)))
    return picture


# --- What a model takes ---------------------------------------------------------------------------


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
