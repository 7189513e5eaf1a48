"""Image folders: every layout, every ugly image, and the same pixels as Hugging Face's."""

import dataclasses
import io
import shutil
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image

from matu_jax.data import Transform, folders
from matu_jax.data.datasets import Dataset

WHITE = [255, 255, 255]


def toys(classes=2, names=(), test="test"):
    row = Dataset("toys", "", "train", test, classes, ("a photo of a {}.",))
    return dataclasses.replace(row, class_names=names)


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tree(root, *paths):
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        noise(8, 6, number).save(root / path)


def labelled(split):
    """Path and label of every example that `folders.source` hands out."""
    return [(example.name, example.label) for example in split]


# ------------------------------------------------------------------ layouts


def test_train_test_and_validation_folders(tmp_path):
    tree(tmp_path, "train/b_b/1.png", "train/a/2.PNG", "train/a/1.jpg", "test/a/9.bmp")
    tree(tmp_path, "test/b_b/9.webp", "val/a/0.png", "val/b_b/0.tif")
    for junk in ("train/a/Thumbs.db", "train/notes.txt", "train/.DS_Store", "toys.tar.gz"):
        (tmp_path / junk).write_bytes(b"x")
    (tmp_path / ".hidden").mkdir()
    source = folders.source(toys(), tmp_path)
    assert labelled(source.train) == [
        (str(tmp_path / path), label)
        for path, label in (
            ("train/a/1.jpg", 0),
            ("train/a/2.PNG", 0),
            ("train/b_b/1.png", 1),
            ("val/a/0.png", 0),
            ("val/b_b/0.tif", 1),
        )
    ]
    assert source.test is not None
    assert [label for _, label in labelled(source.test)] == [0, 1]
    assert source.class_names == ("a", "b b")
    assert source.origin == f"folder {tmp_path}"
    (note,) = source.notes
    assert "3 files are no images" in note
    image, label, _ = source.train[2]
    assert (image.mode, image.size, label) == ("RGB", (8, 6), 1)


def test_class_folders_without_splits(tmp_path):
    tree(tmp_path, *(f"{name}/{i}.png" for name in ("x", "train") for i in range(3)))
    source = folders.source(toys(test=""), tmp_path)
    assert source.test is None
    assert source.class_names == ("train", "x")
    assert [label for _, label in labelled(source.train)] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="expected the official test split"):
        folders.source(toys(), tmp_path)


def test_version_follows_the_listing(tmp_path):
    def version():
        return folders.source(toys(test=""), tmp_path).version

    tree(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    versions = [version()]
    (tmp_path / "notes.txt").write_text("no image")
    assert version() == versions[0]
    (tmp_path / "a/1.png").rename(tmp_path / "a/3.png")
    versions.append(version())
    noise(30, 30).save(tmp_path / "b/1.png")
    versions.append(version())
    (tmp_path / "b").rename(tmp_path / "c")
    versions.append(version())
    assert len(set(versions)) == 4


def test_names_of_classes(tmp_path):
    tree(tmp_path / "n", *(f"{i}/1.png" for i in range(11)))
    words = ("red", "tree frog", *"cdefghijk")
    numbered = folders.source(toys(11, words, ""), tmp_path / "n")
    assert numbered.class_names == words
    assert [name.split("/")[-2] for name, _ in labelled(numbered.train)] == list(
        map(str, range(11))
    )
    # Folders with names of their own go by these, whatever the order of the table's.
    tree(tmp_path / "w", *(f"{word.replace(' ', '_')}/1.png" for word in words))
    assert folders.source(toys(11, words, ""), tmp_path / "w").class_names == tuple(sorted(words))
    (tmp_path / "n/10").rename(tmp_path / "n/12")
    with pytest.raises(ValueError, match=r"found class folders 0 to 12 .*expected 0 to 10"):
        folders.source(toys(11, words, ""), tmp_path / "n")


def test_a_folder_of_ones_own_brings_its_classes(tmp_path):
    own = Dataset("ward", "", "train", "", 0, ("a photo of a {}.",))
    tree(tmp_path / "ward", "TRAIN/Grüner Apfel/1.png", "TRAIN/眼/1.png", "Test/眼/2.png")
    source = folders.source(own, tmp_path / "ward")
    assert source.class_names == ("Grüner Apfel", "眼")
    assert source.test is not None
    assert [label for _, label in labelled(source.test)] == [1]
    (tmp_path / "ward/Test").rename(tmp_path / "test")
    assert folders.source(own, tmp_path / "ward").test is None
    shutil.rmtree(tmp_path / "ward/TRAIN/眼")
    with pytest.raises(
        ValueError, match=r"'ward': found 1 classes in .*\(Grüner Apfel\), expected 2"
    ):
        folders.source(own, tmp_path / "ward")


def test_classes_that_are_called_the_same(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    tree(tmp_path, f"train/{composed}/1.png", "train/b/1.png", f"test/{decomposed}/1.png")
    source = folders.source(toys(), tmp_path)
    assert source.class_names == ("b", composed)
    assert source.test is not None
    assert [label for _, label in labelled(source.test)] == [1], "one class, spelled in two ways"
    tree(tmp_path, f"train/{decomposed}/1.png")
    with pytest.raises(
        ValueError, match=r"train: the classes 'e\\u0301' and '\\xe9' are called the"
    ):
        folders.source(toys(), tmp_path)
    shutil.rmtree(tmp_path / "train" / decomposed)
    (tmp_path / "train/b").rename(tmp_path / "train" / "É")
    with pytest.raises(
        ValueError, match=r"the class folders 'É', 'é' in .* all read as 'é'; rename"
    ):
        folders.source(toys(), tmp_path)
    shutil.rmtree(tmp_path / "train" / composed)
    with pytest.raises(
        ValueError, match=r"class 'é', which .*train lacks, where it is 'É': rename"
    ):
        folders.source(toys(), tmp_path)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["train/a/1.png", "val/a/1.png", "train/b/1.png"], "found no .*/test, expected"),
        (["test/a/1.png"], "no train"),
        (["val/a/1.png", "valid/a/1.png", "train/a/1.png"], "found val and valid, expected one"),
        (["train/a/1.png", "test/a/1.png", "extra/a/1.png"], "found a folder where images were"),
        (["train/a/1.png", "train/b/1.png", "test/c/1.png"], r"class 'c', which .*train lacks"),
        (["train/a/1.png", "test/a/1.png"], r"found 1 classes .* \(a.*expected 2"),
        (["train/1.png", "test/a/1.png"], "train: found no folder in it"),
        (["a/deep/1.png", "a/2.png", "b/1.png"], "a/deep: found a folder where images were"),
        ([], "found no folder in it"),
    ],
)
def test_wrong_layouts_are_told(tmp_path, paths, message):
    tree(tmp_path, *paths)
    with pytest.raises(ValueError, match=message):
        folders.source(toys(), tmp_path)


def test_empty_classes_and_dead_links_are_told(tmp_path):
    tree(tmp_path, "train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png")
    (tmp_path / "train/c").mkdir()
    with pytest.raises(ValueError, match="train/c: found no image in it"):
        folders.source(toys(3), tmp_path)
    (tmp_path / "train/c/gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"gone\.png cannot be read: No such file"):
        folders.source(toys(3), tmp_path)
    with pytest.raises(ValueError, match="typo cannot be listed: No such file"):
        folders.source(toys(), tmp_path / "typo")


# ------------------------------------------------------------------ images


def read(path, image, **options):
    image.save(path, **options)
    return np.asarray(folders.decode(path, str(path)))


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
    assert (np.asarray(folders.decode(tmp_path / "png.jpg", "it")) == np.asarray(noise(9, 7))).all()


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
        folders.decode(path, str(path))


def test_a_somewhat_large_image_is_refused_too(tmp_path, monkeypatch):
    noise(40, 40).save(tmp_path / "l.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # twice this is an error of Pillow's
    with pytest.raises(ValueError, match=r"it cannot be read: .*decompression bomb"):
        folders.decode(tmp_path / "l.png", "it")


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
    got = folders.apply(image, Transform(size))
    assert got.dtype == np.uint8
    assert np.array_equal(got, expected)
    theirs = vit.ViTImageProcessorPil(size=square, **plain)
    expected = theirs(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert np.array_equal(folders.apply(image, Transform(size, "squash", "bilinear")), expected)


def test_transforms_that_cannot_be_are_told():
    with pytest.raises(ValueError, match="expected resize 'shortest_side' or 'squash'"):
        folders.apply(noise(4, 4), Transform(8, "stretch"))
    with pytest.raises(ValueError, match="1 x 9000 pixels is too thin"):
        folders.apply(noise(1, 9000), Transform(224))
