"""Image folders: every layout, every ugly image, and the same pixels as Hugging Face's."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from matu_jax.data import Transform, folders
from matu_jax.data.datasets import Dataset

WHITE = [255, 255, 255]


def toys(classes=2, names=()):
    return Dataset(
        name="toys",
        tfds="",
        train="train",
        test="test",
        num_classes=classes,
        templates=("a photo of a {}.",),
        class_names=names,
    )


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tree(root, *paths):
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        noise(8, 6, number).save(root / path)


def labelled(root, split):
    return [(str(p.relative_to(root)), y) for p, y in zip(split.paths, split.labels, strict=True)]


# ------------------------------------------------------------------ layouts


def test_train_and_test_folders(tmp_path):
    tree(tmp_path, "train/b_b/1.png", "train/a/2.PNG", "train/a/1.jpg", "test/a/9.bmp")
    tree(tmp_path, "test/b_b/9.webp", "val/a/0.png", "val/b_b/0.tif")
    for junk in ("train/a/Thumbs.db", "train/notes.txt", "train/.DS_Store", "toys.tar.gz"):
        (tmp_path / junk).write_bytes(b"x")
    (tmp_path / ".hidden").mkdir()
    source = folders.open_source(tmp_path, toys())
    assert labelled(tmp_path, source.train) == [
        ("train/a/1.jpg", 0),
        ("train/a/2.PNG", 0),
        ("train/b_b/1.png", 1),
        ("val/a/0.png", 0),
        ("val/b_b/0.tif", 1),
    ]
    assert labelled(tmp_path, source.test) == [("test/a/9.bmp", 0), ("test/b_b/9.webp", 1)]
    assert source.split_origin == "as in the folders train and val, test"
    assert source.class_names == ("a", "b b")
    image, label = source.train[2]
    assert image.mode == "RGB"
    assert image.size == (8, 6)
    assert label == 1


def test_class_folders_are_divided_by_class_and_by_seed(tmp_path):
    tree(tmp_path, *(f"{name}/{i}.png" for name in ("x", "train") for i in range(10)))
    source = folders.open_source(tmp_path, toys())
    train, test = labelled(tmp_path, source.train), labelled(tmp_path, source.test)
    assert not set(train) & set(test)
    assert len(train) == 16
    assert [label for _, label in test] == [0, 0, 1, 1]
    assert "seed 0" in source.split_origin
    again, other = (folders.open_source(tmp_path, toys(), seed=seed) for seed in (0, 1))
    assert labelled(tmp_path, again.test) == test
    assert labelled(tmp_path, other.test) != test


def test_version_follows_the_listing(tmp_path):
    tree(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    versions = [folders.open_source(tmp_path, toys()).version]
    (tmp_path / "notes.txt").write_text("ignored")
    assert folders.open_source(tmp_path, toys()).version == versions[0]
    (tmp_path / "a/1.png").rename(tmp_path / "a/3.png")
    versions.append(folders.open_source(tmp_path, toys()).version)
    noise(30, 30).save(tmp_path / "b/1.png")
    versions.append(folders.open_source(tmp_path, toys()).version)
    versions.append(folders.open_source(tmp_path, toys(names=("b", "a"))).version)
    assert len(set(versions)) == 4


def test_order_of_labels(tmp_path):
    def classes(root, names=()):
        source = folders.open_source(root, toys(11, names))
        return [source.train.paths[source.train.labels.index(i)].parent.name for i in range(11)]

    tree(tmp_path / "n", *(f"{i}/{j}.png" for i in range(11) for j in (1, 2)))
    assert classes(tmp_path / "n") == [str(i) for i in range(11)]
    words = tuple("red,tree frog,c,d,e,f,g,h,i,j,k".split(","))
    tree(tmp_path / "w", *(f"{w.replace(' ', '_')}/{j}.png" for w in words for j in (1, 2)))
    assert classes(tmp_path / "w", words) == [w.replace(" ", "_") for w in words]
    # Other names than the table's: alphabetical, unless some name shows that this is wrong.
    assert classes(tmp_path / "w", tuple(f"class {i}" for i in range(11)))[0] == "c"
    with pytest.raises(ValueError, match=r"'red' is number 9 .* but number 0 of"):
        classes(tmp_path / "w", ("red", *(f"class {i}" for i in range(10))))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["train/a/1.png", "val/a/1.png"], "test/ is missing"),
        (["test/a/1.png"], "train/ is missing"),
        (["train/a/1.png", "test/a/1.png", "extra/a/1.png"], "extra/ is no split"),
        (["train/a/1.png", "train/b/1.png", "test/a/1.png"], r"test/ has 1.*In one only: b"),
        (["a/1.png", "a/2.png"], r"found 1 classes \(a\), expected 2"),
        (["a/1.png", "b/1.png", "b/2.png"], "class 'a' has one image"),
        (
            ["1.png", "a/1.png", "a/2.png"],
            r"found 1 things that are no images of a class: .*1\.png",
        ),
        (["a/deep/1.png", "a/2.png", "b/1.png", "b/2.png"], "a/deep"),
        ([], "there is no class folder"),
    ],
)
def test_wrong_layouts_are_told(tmp_path, paths, message):
    tree(tmp_path, *paths)
    with pytest.raises(ValueError, match=f"(?s)dataset 'toys'.*{message}"):
        folders.open_source(tmp_path, toys())


def test_foreign_files_and_empty_classes_are_told(tmp_path):
    tree(tmp_path, "a/1.png", "a/2.png")
    for number in range(7):
        (tmp_path / f"a/{number}.exe").write_bytes(b"x")
    (tmp_path / "a/gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"found 8 things .*0\.exe.*, \.\.\..*Move the others"):
        folders.open_source(tmp_path, toys())
    (tmp_path / "a/empty").mkdir()
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="class folder .*c has no image"):
        folders.open_source(tmp_path, toys())
    with pytest.raises(ValueError, match="no such folder"):
        folders.open_source(tmp_path / "typo", toys())


# ------------------------------------------------------------------ images


def read(path, image, **options):
    image.save(path, **options)
    return np.asarray(folders.read_image(path))


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
    with pytest.raises(ValueError, match=r"f\.tif: .*floats"):
        read(tmp_path / "f.tif", Image.fromarray(ramp.astype(np.float32)))
    with pytest.raises(ValueError, match=r"i\.tif: .*expected 0 to 65535"):
        read(tmp_path / "i.tif", Image.fromarray(ramp.astype(np.int32) * 100))


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
    assert (np.asarray(folders.read_image(tmp_path / "png.jpg")) == np.asarray(noise(9, 7))).all()


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
        (b"", "the file is empty. Replace it or remove it"),
        (b"<html>404</html>", "cannot be read as an image .*UnidentifiedImageError"),
        (jpeg()[:900], "cannot be read as an image .*truncated"),
        (jpeg()[:30], "cannot be read as an image"),
        (bomb(), "too large to be decoded safely"),
    ],
)
def test_unreadable_images_are_told(tmp_path, content, message):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken\.jpg: .*{message}"):
        folders.read_image(path)


def test_a_somewhat_large_image_is_refused_too(tmp_path, monkeypatch):
    noise(40, 40).save(tmp_path / "l.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # twice this is an error of Pillow's
    with pytest.raises(ValueError, match="too large to be decoded safely"):
        folders.read_image(tmp_path / "l.png")


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
    with pytest.raises(ValueError, match="expected shortest_side or squash"):
        folders.apply(noise(4, 4), Transform(8, "stretch"))
    with pytest.raises(ValueError, match="1 x 9000 pixels is too elongated"):
        folders.apply(noise(1, 9000), Transform(224))
