"""Image files: every ugly one, the same pixels as Hugging Face's, and more than 8 bits a sample."""

import ast
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import matu_jax
from matu_jax.data import Transform, images

WHITE = [255, 255, 255]


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def read(path, image, **options):
    image.save(path, **options)
    return np.asarray(images.decode(path, str(path)))


def test_grey_palette_and_bilevel(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = read(tmp_path / "g.png", Image.fromarray(ramp))
    assert (grey == ramp[..., None]).all()
    palette = noise(16, 16).quantize(8)
    assert (read(tmp_path / "p.png", palette) == np.asarray(palette.convert("RGB"))).all()
    assert set(read(tmp_path / "b.png", Image.fromarray(ramp > 99)).ravel()) == {0, 255}


def test_grey_of_16_bits_keeps_the_upper_8(tmp_path):
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for name in ("g.png", "g.tif", "g.pgm"):
        got = read(tmp_path / name, Image.fromarray(ramp))
        assert (got == (ramp >> 8)[..., None]).all(), name
    with pytest.raises(ValueError, match=r"f\.tif cannot be read: .*floating"):
        read(tmp_path / "f.tif", Image.fromarray(ramp.astype(np.float32)))


def test_what_is_transparent_lies_over_white(tmp_path):
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    clear.putpixel((0, 0), (200, 0, 0, 255))
    clear.putpixel((1, 0), (200, 0, 0, 51))
    got = read(tmp_path / "rgba.png", clear)
    assert got[3, 3].tolist() == WHITE
    assert got[0, 0].tolist() == [200, 0, 0]
    assert got[0, 1].tolist() == [244, 204, 204]
    assert read(tmp_path / "la.png", Image.new("LA", (4, 4), (9, 0)))[0, 0].tolist() == WHITE
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert read(tmp_path / "p.png", palette, transparency=1)[0, 0].tolist() == WHITE
    many = read(tmp_path / "pb.png", palette, transparency=b"\xff\x00")
    assert many[0, 0].tolist() == WHITE
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    assert read(tmp_path / "key.png", keyed, transparency=(1, 2, 3))[0, 0].tolist() == WHITE


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = read(tmp_path / "c.jpg", image, quality=95)[4, 4].astype(int)
    assert abs(red - [255, 0, 0]).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = Image.fromarray(np.kron(np.array([[0, 255, 90], [60, 160, 200]]), np.ones((16, 16)))
                              .astype(np.uint8))  # fmt: skip
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the inverses, by number of Transpose
    stored = upright.transpose(Image.Transpose(turn[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = read(tmp_path / "e.jpg", stored, exif=exif, quality=100)
    assert got.shape == (32, 48, 3)
    assert abs(got[..., 0].astype(int) - np.asarray(upright)).max() < 9


def test_a_wrong_ending_is_no_obstacle(tmp_path):
    noise(9, 7).save(tmp_path / "really.png")
    (tmp_path / "really.png").rename(tmp_path / "png.jpg")
    assert (np.asarray(images.decode(tmp_path / "png.jpg", "it")) == np.asarray(noise(9, 7))).all()


def bomb():
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def jpeg():
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, "jpeg")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; replace or remove it"),
        (b"<html>404</html>", "it is no image"),
        (jpeg()[:900], "truncated"),
        (jpeg()[:30], ""),
        (bomb(), "decompression bomb"),
    ],
    ids=["empty", "html", "truncated", "header", "bomb"],
)
def test_unreadable_images_are_told(tmp_path, content, message):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken\.jpg cannot be read: .*{message}"):
        images.decode(path, str(path))


def test_a_somewhat_large_image_is_refused_too(tmp_path, monkeypatch):
    noise(40, 40).save(tmp_path / "l.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # twice this is an error of Pillow's
    with pytest.raises(ValueError, match=r"it cannot be read: .*decompression bomb"):
        images.decode(tmp_path / "l.png", "it")


# ------------------------------------------------------------------ transforms

SIZES = [
    (224, 224), (300, 200), (200, 300), (500, 17), (17, 500), (640, 481), (481, 640), (225, 224),
    (31, 32), (1, 1), (333, 225), (1023, 767), (100, 99), (3, 200),
]  # fmt: skip


@pytest.mark.parametrize("size", [224, 33])
@pytest.mark.parametrize("shape", SIZES)
def test_pixels_are_those_of_hugging_face(shape, size):
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    vit = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")
    image, square = noise(*shape), {"height": size, "width": size}
    plain = {"do_rescale": False, "do_normalize": False}
    theirs = clip.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square, **plain)
    expected = theirs(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    got = images.apply(image, Transform(size))
    assert got.dtype == np.uint8
    assert np.array_equal(got, expected)
    theirs = vit.ViTImageProcessorPil(size=square, **plain)
    expected = theirs(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert np.array_equal(images.apply(image, Transform(size, "squash", "bilinear")), expected)


def test_transforms_that_cannot_be_are_told():
    with pytest.raises(ValueError, match="expected resize 'shortest_side' or 'squash'"):
        images.apply(noise(4, 4), Transform(8, "stretch"))
    with pytest.raises(ValueError, match="1 x 9000 pixels is too thin"):
        images.apply(noise(1, 9000), Transform(224))


# ------------------------------------------------------------------ more than 8 bits a sample


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples, bits_said=0, key=None):
    """A PNG of 16 bits a sample, written by hand: `[height, width, channels]`."""
    height, width, channels = samples.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in samples)
    data = b"\x89PNG\r\n\x1a\n"
    data += chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    if bits_said:
        data += chunk(b"sBIT", bytes([bits_said] * channels))
    if key is not None:
        data += chunk(b"tRNS", np.array(key, ">u2").tobytes())
    return data + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def tiff(samples, bits=16, photometric=1, largest=0, order="<", extra=None):
    """An uncompressed TIFF, written by hand: `[height, width]` or `[height, width, channels]`."""
    height, width, *rest = samples.shape
    channels = rest[0] if rest else 1
    if bits == 12:
        shifts = np.arange(11, -1, -1)
        data = np.packbits((samples[..., None] >> shifts & 1).reshape(height, -1), axis=1).tobytes()
    else:
        data = samples.astype(f"{order}i8").astype(f"{order}u{bits // 8}").tobytes()
    tags = {
        256: width, 257: height, 258: [bits] * channels, 259: 1, 262: photometric, 273: 8,
        277: channels, 278: height, 279: len(data), **(extra or {}),
    }  # fmt: skip
    if largest:
        tags[341] = largest
    entries = b""
    for tag, value in sorted(tags.items()):
        values = value if isinstance(value, list) else [value]
        packed = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed) > 4:
            packed, data = struct.pack(order + "I", 8 + len(data)), data + packed
        entries += struct.pack(order + "HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    out = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8 + len(data)) + data
    return out + struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0)


def ramp(top, channels=0):
    """From 0 to `top`, in order, over 30 x 30 samples of each channel."""
    values = np.linspace(0, top, 900).round().astype(np.int64).reshape(30, 30)
    return (
        np.stack([np.roll(values, 90 * i, 0) for i in range(channels)], -1) if channels else values
    )


def pixels(data, levels=None):
    return np.asarray(images.decode(data, "it", levels)).astype(int)


def high_byte(values, bits):
    """What is expected of `bits` full bits, by definition."""
    return values >> bits - 8


FILES = {
    "12 bits in a PNG": (lambda: png(ramp(4095, 1)), 12, 1),
    "12 bits in an RGB PNG": (lambda: png(ramp(4095, 3)), 12, 3),
    "16 bits in an RGB PNG": (lambda: png(ramp(65535, 3)), 16, 3),
    "10 bits in a PNG": (lambda: png(ramp(1023, 1)), 10, 1),
    "8 bits in a PNG": (lambda: png(ramp(255, 1)), 8, 1),
    "12 bits in a TIFF": (lambda: tiff(ramp(4095)), 12, 1),
    "12 packed bits in a TIFF": (lambda: tiff(ramp(4095), bits=12), 12, 1),
    "12 bits in an RGB TIFF": (lambda: tiff(ramp(4095, 3), photometric=2), 12, 3),
    "12 bits in a big-endian RGB TIFF": (
        lambda: tiff(ramp(4095, 3), photometric=2, order=">"), 12, 3,
    ),
    "12 bits in a PGM": (lambda: b"P5 30 30 65535\n" + ramp(4095).astype(">u2").tobytes(), 12, 1),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_every_bit_depth_fills_the_8_bits(what):
    make, bits, channels = FILES[what]
    expected = high_byte(ramp(2**bits - 1, channels), bits)
    assert (pixels(make()) == expected).all()
    assert images.measure(make()) in ((0, 2**bits - 1), (4095, 4095))


def netpbm(samples, largest, text=False):
    """A PGM, or of `[height, width, 3]` a PPM, written by hand."""
    kind = {(2, False): 5, (2, True): 2, (3, False): 6, (3, True): 3}[samples.ndim, text]
    head = b"P%d # a comment\n%d %d\n%d\n" % (kind, *samples.shape[1::-1], largest)
    if not text:
        return head + samples.astype(">u2" if largest > 255 else "u1").tobytes()
    lines = [" ".join(map(str, line.ravel())) for line in samples]
    return head + " # 7 samples\n".join(lines).encode()


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("channels", [0, 3])
@pytest.mark.parametrize("bits", range(9, 17))
def test_every_pgm_and_ppm_of_two_bytes_fills_the_8_bits(bits, channels, text):
    samples, top = ramp(2**bits - 1, channels), 2**bits - 1
    grey = (30, 30, 3 if channels else 1)
    stored, said = netpbm(samples, 65535, text), netpbm(samples, top, text)
    assert images.measure(stored) == (0, top)
    assert images.measure(said) == (top if bits < 16 else 0, top)
    for data in (stored, said):
        assert (pixels(data) == high_byte(samples, bits).reshape(grey)).all()
    dark = netpbm(ramp(400, channels), 65535, text)
    levels = images.white_levels(map(images.measure, (stored, dark)))
    assert pixels(dark, levels).max() == 400 * 256 >> bits, "one white level for the dataset"


@pytest.mark.parametrize("text", [False, True])
def test_colours_of_a_ppm_are_in_order_and_scaled_by_its_largest_value(text):
    samples = np.array([[[0, 150, 300], [300, 1, 299]]])
    expected = [[0, 150 * 256 // 301, 255], [255, 0, 299 * 256 // 301]]
    assert pixels(netpbm(samples, 300, text))[0].tolist() == expected
    small = np.array([[[0, 50, 100], [100, 100, 0]]])  # one byte each: Pillow's to scale
    assert pixels(netpbm(small, 100, text))[0, 0].tolist() == [0, 128, 255]


def test_damaged_pgm_and_ppm_are_told():
    for channels in (0, 3):
        data, count = netpbm(ramp(4095, channels), 65535), 900 * (channels or 1)
        for cut, left in ((data[:-1], count - 1), (data[: -2 * count], 0)):
            with pytest.raises(ValueError, match=rf"it ends, .* after {left} of {count} samples"):
                pixels(cut)
        text = netpbm(ramp(4095, channels), 4095, text=True)
        for wrong, words in (
            (text.rpartition(b" ")[0], f"after {count - 1} of"),
            (text.replace(b" 4095", b" -4095"), r"after \d+ of"),
            (text.replace(b" 4095", b" 4095.5"), r"after \d+ of"),
            (text.replace(b" 4095", b" 65536"), "is 65536, expected 65535 at most"),
            (text.replace(b" 4095", b" " + b"9" * 40), "expected 65535 at most"),
            (b"P2 3 3 4095\n", "after 0 of 9"),
        ):
            with pytest.raises(ValueError, match=words):
                pixels(wrong)
            assert images.measure(wrong) is None
    with pytest.raises(ValueError, match="more than 8 bits a sample, stored as CMYK"):
        pixels(b"P0CMYK 1 1 65535\n" + bytes(8))


def test_integers_of_32_bits_are_scaled_too(tmp_path):
    for top in (255, 4095, 2**20 - 1):
        Image.fromarray(ramp(top).astype(np.int32)).save(tmp_path / "i.tif")
        got = np.asarray(images.decode(tmp_path / "i.tif", "i"))
        assert (got[..., 0] == ramp(top) // ((top + 1) // 256)).all()
    Image.fromarray(ramp(255).astype(np.int32) - 9).save(tmp_path / "i.tif")
    with pytest.raises(ValueError, match="its pixels go from -9 to 246, expected 0 or more"):
        images.decode(tmp_path / "i.tif", "i")
    unsigned = np.array([[0, 2**31, 2**32 - 1]])
    assert pixels(tiff(unsigned, bits=32))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("order", "<>")
def test_signed_integers_of_8_bits_are_refused(order):
    for lowest in (-128, 0):
        data = tiff(ramp(127) + lowest, bits=8, order=order, extra={339: 2})
        with pytest.raises(ValueError, match="signed integers of 8 bits, expected unsigned ones"):
            pixels(data)
    assert (pixels(tiff(ramp(255), bits=8, order=order)) == ramp(255)[..., None]).all()
    assert (pixels(tiff(ramp(255), bits=8, order=order, extra={339: 1})).max()) == 255


@pytest.mark.parametrize("unit", [1, 257])
def test_the_palette_of_a_tiff_has_8_bits_or_16(unit):
    red = np.arange(256)
    palette = np.stack([red, 255 - red, red // 2])
    data = tiff(ramp(255), bits=8, photometric=3, extra={320: (palette * unit).ravel().tolist()})
    assert (pixels(data) == palette.T[ramp(255)]).all()


def test_a_dataset_has_one_white_level():
    bright, dark = png(ramp(4000, 1)), png(ramp(400, 1))
    levels = images.white_levels(map(images.measure, (dark, bright, dark)))
    assert levels == {0: 4095}
    assert pixels(bright, levels).max() == 4000 >> 4
    assert pixels(dark, levels).max() == 400 >> 4, "a dark image stays darker than a bright one"
    assert pixels(dark).max() == 400 >> 1, "alone, 400 tells of 9 bits"
    assert images.white_levels([None, images.measure(b"no image"), None]) == {}


def test_a_file_that_says_its_bits_is_believed_unless_it_holds_more():
    said, same = png(ramp(900, 1), bits_said=12), png(ramp(900, 1))
    assert images.measure(said) == (4095, 900)
    levels = images.white_levels(map(images.measure, (said, same)))
    assert levels == {4095: 4095, 0: 1023}
    assert (pixels(said, levels).max(), pixels(same, levels).max()) == (900 >> 4, 900 >> 2)
    # As the standard of PNG has it: 12 bits, spread over all 16.
    full = png(ramp(4095, 1) * 16, bits_said=12)
    levels = images.white_levels(map(images.measure, (said, full)))
    assert levels == {4095: 65535}
    assert pixels(full, levels).max() == 4095 >> 4
    assert pixels(tiff(ramp(900), largest=1000)).max() == 900 * 256 // 1001
    half = b"P5 30 30 4095\n" + ramp(2047).astype(">u2").tobytes()
    assert abs(pixels(half).max() - 127) <= 1


def test_transparency_of_16_bits_lies_over_white():
    grey = np.stack([ramp(4095), np.where(ramp(899) < 450, 0, 65535)], -1)
    got = pixels(png(grey))[..., 0]
    assert (got.ravel()[:450] == 255).all()
    assert (got.ravel()[450:] == high_byte(ramp(4095), 12).ravel()[450:]).all()
    colours = np.concatenate([ramp(4095, 3), np.full((30, 30, 1), 4095)], -1)
    assert (pixels(png(colours)) == high_byte(ramp(4095, 3), 12)).all(), "opaque in 12 bits"
    keyed = pixels(png(ramp(4095, 1), key=[0]))[..., 0].ravel()
    assert keyed[0] == 255
    assert keyed[1] == 0
    keyed = pixels(png(ramp(4095, 3), key=ramp(4095, 3)[0, 0]))
    assert keyed[0, 0].tolist() == WHITE
    assert (keyed[1:] == high_byte(ramp(4095, 3), 12)[1:]).all()


def test_zero_can_be_white():
    got = pixels(tiff(ramp(4095), photometric=0))[..., 0]
    assert (got == 255 - high_byte(ramp(4095), 12)).all()


def test_an_all_black_image_is_black():
    assert (pixels(png(np.zeros((4, 4, 1), int))) == 0).all()


# ------------------------------------------------------------------ files that are a danger


def test_no_program_is_run_for_a_file_that_claims_to_be_an_image(tmp_path, monkeypatch):
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for first in (b"%!PS-Adobe-3.0 EPSF-3.0", b"\xc5\xd0\xd3\xc6" + bytes(28) + b"%!PS-Adobe-3.0"):
        data = first + b"\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
        with pytest.raises(ValueError, match="it is no image, or none of BMP, GIF, JPEG, PNG,"):
            images.decode(data, "x.jpg")
        assert images.measure(data) is None
    assert not (tmp_path / "ran").exists()


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    (tmp_path / "y.jpg").symlink_to("/dev/zero")
    for name in ("x.jpg", "y.jpg"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read: it is no regular file"):
            images.decode(tmp_path / name, name)
        assert images.measure(tmp_path / name) is None


def test_pictures_are_never_opened_as_whatever_pillow_knows():
    """Without `formats`, Pillow hands PostScript to another program."""
    package, opened = Path(matu_jax.__file__).parent, 0
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                opened += 1
                assert "formats" in [keyword.arg for keyword in node.keywords], file
    assert opened
