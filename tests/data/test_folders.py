"""Image folders: every layout, and what is wrong with them."""

import dataclasses
import os
import shutil
import types
import unicodedata

import numpy as np
import pytest
from PIL import Image

from matu_jax.data import folders, images
from matu_jax.data.datasets import Dataset


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
    assert (source.validation, source.labels) == (2, (0, 0, 1, 0, 1))
    assert source.class_names == ("a", "b b")
    assert source.origin == f"folder {tmp_path}"
    (note,) = source.notes
    assert "files that are no images: 3, such as" in note
    image, label = images.picture(source.train[2]), source.train[2].label
    assert (image.mode, image.size, label) == ("RGB", (8, 6), 1)


@pytest.mark.parametrize("name", ["val", "Valid", "VALIDATION"])
def test_a_validation_split_is_trained_on_where_the_table_has_it_so_and_this_is_said(
    tmp_path, name
):
    tree(tmp_path, "train/a/1.png", "train/b/1.png", f"{name}/a/2.png", "test/b/3.png")
    row = dataclasses.replace(toys(), train="train+validation")
    told = ("images of the validation split that are trained on: 1",)
    for dataset, validation, notes in ((row, 0, told), (toys(), 1, ())):
        source = folders.source(dataset, tmp_path)
        assert len(source.train) == 3
        assert (source.validation, source.notes) == (validation, notes)


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


def test_version_follows_classes_that_changed_their_places(tmp_path):
    """Images of one size that were written and moved in one tick of the clock."""
    tree(tmp_path, "cat/1.png", "dog/1.png")
    for name in ("cat", "dog"):
        (tmp_path / name / "1.png").write_bytes(name.encode())
        os.utime(tmp_path / name / "1.png", ns=(0, 0))
    states = {os.stat(tmp_path / name / "1.png").st_ino for name in ("cat", "dog")}
    assert len(states) == 2

    def same_clock(entry):
        found = entry_stat(entry)
        times = {"st_ctime_ns": 0, "st_mtime_ns": 0}
        names = ("st_mode", "st_size", "st_ino", "st_dev")
        return types.SimpleNamespace(**{name: getattr(found, name) for name in names}, **times)

    entry_stat = os.DirEntry.stat

    class Entry:
        def __init__(self, entry):
            self._entry = entry

        def __getattr__(self, name):
            return getattr(self._entry, name)

        def stat(self):
            return same_clock(self._entry)

    entries = folders._entries
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "_entries", lambda folder: map(Entry, entries(folder)))
        before = folders.source(toys(test=""), tmp_path).version
        assert folders.source(toys(test=""), tmp_path).version == before
        (tmp_path / "cat").rename(tmp_path / "tmp")
        (tmp_path / "dog").rename(tmp_path / "cat")
        (tmp_path / "tmp").rename(tmp_path / "dog")
        assert folders.source(toys(test=""), tmp_path).version != before


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
        ValueError, match=r"'ward': .*: found classes: 1 \(Grüner Apfel\), expected 2"
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
        (["train/a/1.png", "test/a/1.png"], r"found classes: 1 \(a.*expected 2"),
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


def test_what_is_no_file_is_refused_and_loops_end(tmp_path):
    tree(tmp_path / "f", "train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png")
    for name, make in {
        "pipe.png": os.mkfifo,
        "zero.png": lambda path: path.symlink_to("/dev/zero"),
    }.items():
        path = tmp_path / "f/train/a" / name
        make(path)
        with pytest.raises(ValueError, match=rf"{name} is no regular file; remove it"):
            folders.source(toys(), tmp_path / "f")
        path.unlink()
    loop = tmp_path / "f/train/a/loop.png"
    loop.symlink_to(loop)
    with pytest.raises(ValueError, match=r"loop\.png cannot be read: Too many levels"):
        folders.source(toys(), tmp_path / "f")
    loop.unlink()
    (tmp_path / "f/train/a/up").symlink_to(tmp_path / "f")
    with pytest.raises(ValueError, match="a/up: found a folder where images were expected"):
        folders.source(toys(), tmp_path / "f")


def test_links_that_lead_out_of_the_folder_are_followed_and_told(tmp_path):
    tree(tmp_path / "f", "train/a/1.png", "train/b/1.png", "test/a/1.png")
    tree(tmp_path, "elsewhere/1.png")
    (tmp_path / "f/train/a/inside.png").symlink_to("1.png")
    assert folders.source(toys(), tmp_path / "f").notes == ()
    (tmp_path / "f/train/a/out.png").symlink_to(tmp_path / "elsewhere/1.png")
    (tmp_path / "f/test/b").symlink_to(tmp_path / "elsewhere")
    source = folders.source(toys(), tmp_path / "f")
    assert len(source.train) == 4
    assert source.notes == (f"links out of the folder: 2, such as {tmp_path}/f/test/b",)


def test_a_file_name_that_is_not_utf_8_can_be_told(tmp_path):
    tree(tmp_path, "train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png")
    with open(os.fsencode(tmp_path) + b"/train/a/\xff.png", "wb") as file:
        file.write(b"no image")
    source = folders.source(toys(), tmp_path)
    (name,) = [e.name for e in source.train if "xff" in e.name]
    assert name.encode()
    with pytest.raises(ValueError, match=r"\\xff\.png cannot be read"):
        images.decode(source.train[1].content, source.train[1].name)
    os.rename(tmp_path / "train/b", os.fsencode(tmp_path) + b"/train/\xfe")
    with pytest.raises(ValueError, match=r"train: the name '\\udcfe' in it is not UTF-8; rename"):
        folders.source(toys(), tmp_path)
