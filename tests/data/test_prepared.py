"""The cache: what is kept, killed and resumed preparations, damage, duplicates, seeded splits."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from matu_jax.data import Transform, finishing, images, preparation, prepared, resuming, selection
from matu_jax.data.datasets import DATASETS, Example, Source
from matu_jax.data.splits import counts, places_of

SMALL = Transform(8, "squash", "bilinear")
OFFICIAL, SEEDED = "intel_images", "garbage"  # 6 classes each; the latter without a test split


def paint(file, value, size=(10, 12)):
    """An image of one colour, so that equal values are equal pixels after any transform."""
    file.parent.mkdir(parents=True, exist_ok=True)
    colour = (value % 251, value // 251, 7)
    Image.new("RGB", size, colour).save(file)


def official(root, train=5, test=2, name=OFFICIAL):
    """An image folder of 6 classes with `train` and `test` images each; none equals another."""
    for label in range(6):
        for i in range(train):
            paint(root / name / "train" / f"class_{label}" / f"{i}.png", 100 * label + i)
        for i in range(test):
            paint(root / name / "test" / f"class_{label}" / f"{i}.png", 100 * label + 50 + i)
    return root


def seeded(root, each=10):
    for label in range(6):
        for i in range(each):
            paint(root / SEEDED / f"class_{label}" / f"{i}.png", 100 * label + i)
    return root


@pytest.fixture
def places(tmp_path):
    return {"cache_dir": tmp_path / "cache", "folders": tmp_path / "folders"}


def prepare(name, places, transform=SMALL, **options):
    return preparation.prepare(
        name,
        transform=transform,
        cache_dir=places["cache_dir"],
        image_folders=places["folders"],
        **options,
    )


def load(name, places, **options):
    return prepared.load([name], transform=SMALL, **places, **options)[0]


def shown(split):
    """The value that `paint` drew, for each image."""
    first = split.images[:, 0, 0].astype(int)
    return (first[:, 0] + 251 * first[:, 1]).tolist()


def content(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_what_goes_in_comes_out(places):
    official(places["folders"])
    metadata = prepare(OFFICIAL, places)
    task = load(OFFICIAL, places)
    assert task.name == task.label_space == task.domain == OFFICIAL
    assert task.class_names == tuple(f"class {i}" for i in range(6))
    assert task.fingerprint == metadata["sha256"]
    assert len(task.fingerprint) == 64
    assert task.templates
    train, validation, test = map(shown, (task.train, task.validation, task.test))
    assert test == [100 * label + 50 + i for label in range(6) for i in range(2)]
    assert sorted(train + validation) == [100 * label + i for label in range(6) for i in range(5)]
    assert (len(train), len(validation)) == (27, 3)
    assert train != sorted(train), "in the folder's order, a slice of it would hold few classes"
    for split in (task.train, task.validation, task.test):
        assert split.images.shape[1:] == (8, 8, 3)
        assert [value // 100 for value in shown(split)] == split.labels.tolist()
        assert isinstance(split.images, np.memmap)
        assert not split.images.flags.writeable
    assert task.train.images.base is task.validation.images.base, "slices of one file"
    assert metadata["test_split"] == "official"
    assert metadata["published"] == {"train": 30, "test": 12}
    assert metadata["left_out"] == {"train_in_test": 0, "train_twice": 0}


def test_validation_is_the_tail_of_one_order(places):
    official(places["folders"])
    prepare(OFFICIAL, places)
    few, many = (load(OFFICIAL, places, validation_fraction=f) for f in (0.1, 0.5))
    assert shown(few.train) + shown(few.validation) == shown(many.train) + shown(many.validation)
    assert shown(many.validation)[-3:] == shown(few.validation)
    assert len(shown(load(OFFICIAL, places, validation_fraction=1e-9).validation)) == 1
    with pytest.raises(ValueError, match="no training image is left of 30"):
        load(OFFICIAL, places, validation_fraction=0.999)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        load(OFFICIAL, places, validation_fraction=1.5)


def test_a_missing_test_split_is_seeded_and_said(places):
    seeded(places["folders"])
    metadata = prepare(SEEDED, places)
    task = load(SEEDED, places)
    everything = shown(task.train) + shown(task.validation) + shown(task.test)
    assert sorted(everything) == [100 * label + i for label in range(6) for i in range(10)]
    assert len(task.test.labels) == 12
    assert len(set(task.test.labels.tolist())) > 3
    assert metadata["test_split"].startswith("seeded, no official test split")
    assert task.notes == (f"test: {metadata['test_split']}",)
    again = places["cache_dir"].with_name("old")
    places["cache_dir"].rename(again)
    prepare(SEEDED, places)
    one, other = (content(next(f.glob(f"{SEEDED}-*[0-9a-f]")))
                  for f in (again / "prepared", places["cache_dir"] / "prepared"))  # fmt: skip
    assert one == other


@pytest.mark.parametrize("with_test", [False, True])
def test_a_validation_split_of_ones_own_is_validated_on_and_never_trained_on(places, with_test):
    root = official(places["folders"], name="ward") / "ward"
    for label in range(6):
        for i in range(3):
            paint(root / "Val" / f"class_{label}" / f"{i}.png", 100 * label + 70 + i)
    paint(root / "train/class_0/copy_of_validation.png", 70)
    paint(root / "Val/class_1/copy_of_test.png", 150)
    validated = [100 * label + 70 + i for label in range(6) for i in range(3)] + [150]
    if not with_test:
        shutil.rmtree(root / "test")
    metadata = prepare("ward", places)
    few, many = (load("ward", places, validation_fraction=f) for f in (0.01, 0.9))
    assert shown(few.validation) == shown(many.validation)
    assert sorted(shown(few.validation)) == sorted(validated)
    assert not {*shown(few.train), *shown(few.test)} & {*validated} - {150}
    assert [*few.train.labels] == [value // 100 for value in shown(few.train)]
    assert [*few.validation.labels] == [value // 100 for value in shown(few.validation)]
    assert "validation: the folder's own split, of size 19" in few.notes
    if with_test:
        assert metadata["left_out"] == {"train_in_test": 0, "train_twice": 1}
        assert len(few.train.labels) == 30
        assert few.notes[-1] == "images that are in validation and in test: 1"
    else:
        assert few.notes[0].startswith("test: seeded, no official test split (0.2 of each class")
        assert np.bincount(few.test.labels).tolist() == [1] * 6
        # Of class 0 the copy was drawn for the test split, or left out of train.
        assert len(few.train.labels) in (24, 25)


@pytest.mark.parametrize("sizes", [[2, 2, 2], [1, 2, 30], [1, 1], [5, 10, 3]])
def test_a_seeded_test_split_has_a_fifth_of_each_class_and_trains_on_some(places, sizes):
    for label, size in enumerate(sizes):
        for i in range(size):
            paint(places["folders"] / f"ward/class_{label}/{i}.png", 100 * label + i)
    source = preparation.open_source(
        selection.find("ward", places["folders"]), image_folders=places["folders"]
    )
    found = places_of(source)
    labels = np.array(source.labels)
    tested = np.bincount(labels[found.part == 1], minlength=len(sizes)).tolist()
    wanted = [0 if n == 1 else max(1, round(n / 5)) for n in sizes]
    assert tested == wanted or (wanted == [0, 0] and sum(tested) == 1)
    assert counts(source) == (sum(sizes) - sum(tested), sum(tested))
    for part in (0, 1):
        assert sorted(found.row[found.part == part]) == list(range(found.counts[part]))


def test_where_no_labels_are_known_the_last_fifth_of_the_shuffled_order_is_tested_on():
    source = Source([Example(b"", 0, "")] * 23, None, ("a", "b"), "1", "TFDS")
    keys = [hashlib.sha256(f"0/{i}".encode()).digest() for i in range(23)]
    order = sorted(range(23), key=keys.__getitem__)
    found = places_of(source)
    assert found.counts == (18, 5)
    for place, index in enumerate(order):
        assert (found.part[index], found.row[index]) == divmod(place, 18)


def test_a_test_split_that_was_drawn_otherwise_is_drawn_anew(places):
    seeded(places["folders"])
    prepare(SEEDED, places)
    (folder,) = (places["cache_dir"] / "prepared").glob(f"{SEEDED}-*[0-9a-f]")
    other = prepared.SEEDED.format("all images")
    damage(folder, "metadata.json", f"signed: test_split='{other}'")
    assert prepared.missing([SEEDED], transform=SMALL, **places) == [SEEDED]
    assert "each class" in prepare(SEEDED, places)["test_split"]


def test_an_official_test_split_must_be_there(places):
    seeded(places["folders"])
    shutil.move(places["folders"] / SEEDED, places["folders"] / OFFICIAL)
    with pytest.raises(ValueError, match=r"'intel_images': found no .*/test, expected the off"):
        prepare(OFFICIAL, places)


def test_duplicates_leave_train_and_stay_in_test(places):
    root = official(places["folders"]) / OFFICIAL
    paint(root / "train/class_3/copy_of_test.png", 50)  # labelled otherwise, and still a copy
    paint(root / "train/class_5/copy_of_test.png", 551)
    paint(root / "train/class_0/9_copy.png", 0)
    paint(root / "train/class_1/9_copy.png", 0)
    paint(root / "test/class_0/9_copy.png", 50)
    metadata = prepare(OFFICIAL, places)
    assert metadata["published"] == {"train": 34, "test": 13}
    assert metadata["left_out"] == {"train_in_test": 2, "train_twice": 2}
    assert metadata["test_twice"] == 1
    task = load(OFFICIAL, places)
    kept = shown(task.train) + shown(task.validation)
    assert sorted(kept) == [100 * label + i for label in range(6) for i in range(5)]
    assert shown(task.test).count(50) == 2
    assert task.notes == ("images that are in test more than once: 1",)
    labels = [*task.train.labels, *task.validation.labels]
    assert labels == [value // 100 for value in kept], "labels moved with their images"


@pytest.mark.parametrize("make", [official, seeded])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_an_interrupted_preparation_goes_on_to_the_same_bytes(places, monkeypatch, make, stop):
    name = {official: OFFICIAL, seeded: SEEDED}[make]
    make(places["folders"])
    paint(places["folders"] / name / ("train" if make is official else "") / "class_0/z.png", 1)
    whole = {**places, "cache_dir": places["cache_dir"].with_name("whole")}
    monkeypatch.setattr(preparation, "CHUNK", 10)
    prepare(name, whole)
    calls = []

    def interrupt(done, total):
        calls.append(done)
        if len(calls) == stop + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(name, places, progress=interrupt)
    assert prepared.missing([name], transform=SMALL, **places) == [name]
    with pytest.raises(ValueError, match="not prepared"):
        load(name, places)
    seen = []
    prepare(name, places, progress=lambda done, total: seen.append(done))
    assert seen[0] == calls[-1] > 0
    folders = [prepared.location(name, transform=SMALL, **where) for where in (whole, places)]
    assert content(folders[0]) == content(folders[1])
    assert {f.suffix for f in folders[1].parent.iterdir()} == {"", ".lock"}


@pytest.mark.parametrize(
    "broken", ["np.save", "Path.unlink", "Path.rename", "_shorten", "sync", "replace_file", "note"]
)
def test_a_kill_at_the_end_does_no_harm(places, monkeypatch, broken):
    """Stops in each step of the last stage, after and before it did its work."""
    official(places["folders"])
    for i in range(8):
        paint(places["folders"] / OFFICIAL / f"train/class_2/copy{i}.png", 50 + i // 4)
    whole = {**places, "cache_dir": places["cache_dir"].with_name("whole")}
    prepare(OFFICIAL, whole)
    owner, attribute = {
        "np.save": (np, "save"),
        "Path.unlink": (Path, "unlink"),
        "Path.rename": (Path, "rename"),
        "note": (resuming, "replace_file"),
    }.get(broken, (finishing, broken))
    real = getattr(owner, attribute)
    for before in (True, False):
        for call in range(1, 4):
            count = []

            def stopping(*args, before=before, call=call, count=count, **options):
                count.append(1)
                if before and len(count) == call:
                    raise KeyboardInterrupt
                real(*args, **options)
                if len(count) == call:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(owner, attribute, stopping)
                with contextlib.suppress(KeyboardInterrupt):
                    prepare(OFFICIAL, places)
            prepare(OFFICIAL, places)
            one, other = (
                prepared.location(OFFICIAL, transform=SMALL, **where) for where in (whole, places)
            )
            assert content(one) == content(other)
            shutil.rmtree(places["cache_dir"])


def test_kill_9_and_resume(places):
    official(places["folders"])
    whole = {**places, "cache_dir": places["cache_dir"].with_name("whole")}
    prepare(OFFICIAL, whole)
    code = textwrap.dedent(f"""
        import sys, time
        from matu_jax.data import Transform, preparation
        preparation.CHUNK = 6
        def progress(done, total):
            print(done, flush=True)
            time.sleep(30 if done == 24 else 0)
        preparation.prepare({OFFICIAL!r}, transform={SMALL!r}, progress=progress,
            cache_dir={str(places["cache_dir"])!r}, image_folders={str(places["folders"])!r})
        """)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "24":
            break
    with pytest.raises(ValueError, match="another process is preparing it"):
        prepare(OFFICIAL, places)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    seen = []
    prepare(OFFICIAL, places, progress=lambda done, total: seen.append(done))
    assert seen[0] == 24
    one, other = (
        prepared.location(OFFICIAL, transform=SMALL, **where) for where in (whole, places)
    )
    assert content(one) == content(other)


def test_a_begun_preparation_of_other_data_is_not_gone_on_with(places, monkeypatch):
    official(places["folders"])
    monkeypatch.setattr(preparation, "CHUNK", 10)

    def interrupt(done, total):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(OFFICIAL, places, progress=interrupt)
    paint(places["folders"] / OFFICIAL / "train/class_0/new.png", 99)
    seen = []
    prepare(OFFICIAL, places, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 43)
    assert 99 in shown(load(OFFICIAL, places).train) + shown(load(OFFICIAL, places).validation)


def changed_state(partial, how):
    """Damages what an interrupted preparation of 42 images has left."""
    file = partial / "progress.json"
    found = json.loads(file.read_text())
    if how.startswith("file: "):
        file.write_bytes(how.removeprefix("file: ").encode("latin-1"))
    elif how.startswith("unsigned: "):
        file.write_text(json.dumps(found | json.loads(how.removeprefix("unsigned: "))))
    elif how.startswith("signed: "):  # as if it had been written so
        found |= json.loads(how.removeprefix("signed: "))
        file.write_text(json.dumps(found | {"checksum": prepared.checksum(found)}))
    elif how.startswith("without: "):
        (partial / how.removeprefix("without: ")).unlink()
    elif how.startswith("short: "):
        array = partial / how.removeprefix("short: ")
        os.truncate(array, array.stat().st_size - 1)
    else:
        np.save(partial / "test_images.npy", np.zeros((3, 8, 8, 3), np.uint8))


@pytest.mark.parametrize("done", [20, 42])
@pytest.mark.parametrize(
    "how",
    [
        'unsigned: {"done": 41}',
        'unsigned: {"white_levels": {"0": 1023}}',
        'signed: {"done": 9999}',
        'signed: {"done": -10}',
        'signed: {"done": true}',
        'signed: {"done": 20.0}',
        'signed: {"done": "20"}',
        'signed: {"done": null}',
        'signed: {"white_levels": {"0": 0}}',
        'signed: {"white_levels": {"0": true}}',
        'signed: {"white_levels": {"many": 255}}',
        'signed: {"white_levels": {"-1": 255}}',
        'signed: {"white_levels": []}',
        'signed: {"plan": null}',
        "file: ",
        "file: [1]",
        "file: \xff{}",
        "file: {}",
        "without: progress.json",
        "without: train_images.npy",
        "without: test_all_labels.npy",
        "short: test_images.npy",
        "short: train_all_contents.npy",
        "another shape",
    ],
)
def test_what_was_begun_is_believed_only_if_it_is_whole(places, monkeypatch, done, how):
    official(places["folders"])
    monkeypatch.setattr(preparation, "CHUNK", 10)

    def interrupt(now, total):
        if now == done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(OFFICIAL, places, progress=interrupt)
    (partial,) = places["cache_dir"].glob("prepared/*.partial")
    changed_state(partial, how)
    seen = []
    prepare(OFFICIAL, places, progress=lambda now, total: seen.append((now, total)))
    assert seen[0] == (0, 42)
    assert shown(load(OFFICIAL, places).test) == [
        100 * label + 50 + i for label in range(6) for i in range(2)
    ]


@pytest.mark.parametrize("name", ["train_images.npy", "test_all_hashes.npy", "progress.json"])
def test_a_pipe_in_what_was_begun_starts_it_anew(places, monkeypatch, name):
    monkeypatch.setattr(preparation, "CHUNK", 20)
    official(places["folders"])

    def interrupt(done, total):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(OFFICIAL, places, progress=interrupt)
    (partial,) = (places["cache_dir"] / "prepared").glob("*.partial")
    (partial / name).unlink()
    os.mkfifo(partial / name)
    started = []
    prepare(OFFICIAL, places, progress=lambda done, total: started.append(done))
    assert started[0] == 0
    assert len(load(OFFICIAL, places).train.labels) == 27


def test_pipes_in_the_cache_are_not_waited_at(places):
    official(places["folders"])
    prepare(OFFICIAL, places)
    folder = prepared.location(OFFICIAL, transform=SMALL, **places)
    os.mkfifo(folder / "seen_again")
    for file in files(places):
        os.utime(file, ns=(0, 0))
    assert prepared.missing([OFFICIAL], transform=SMALL, **places) == []
    assert (folder / "seen_again").is_file(), "replaced"
    lock = folder.with_name(folder.name + ".lock")
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(ValueError, match=r"\.lock is no regular file; remove it"):
        prepare(OFFICIAL, places)


def test_training_images_shortened_to_another_number_are_told(places):
    official(places["folders"])
    paint(places["folders"] / OFFICIAL / "train/class_0/copy.png", 0)

    def interrupt(done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(OFFICIAL, places, progress=interrupt)
    (partial,) = places["cache_dir"].glob("prepared/*.partial")
    finishing._shorten(partial / "train_images.npy", 7)
    with pytest.raises(ValueError, match=r"found 7 images, expected 30; remove .*\.partial and"):
        prepare(OFFICIAL, places)
    shutil.rmtree(partial)
    assert prepare(OFFICIAL, places)["splits"]["train"]["examples"] == 30


@pytest.mark.parametrize("name", ["ward", OFFICIAL])
def test_folders_of_one_name_are_told_apart_by_their_place(places, tmp_path, name):
    other = {**places, "folders": tmp_path / "elsewhere"}
    official(places["folders"], name=name)
    official(other["folders"], name=name, train=7)
    first = prepare(name, places)
    assert prepared.missing([name], transform=SMALL, **other) == [name]
    prepare(name, other)
    counts = [len(load(name, place).train.labels) for place in (places, other)]
    assert counts == [27, 38], "one does not take the other's place"
    assert prepare(name, places) == first
    (tmp_path / "link").symlink_to(places["folders"])
    through_link = {**places, "folders": tmp_path / "link"}
    assert prepared.missing([name], transform=SMALL, **through_link) == []
    shutil.rmtree(places["folders"])
    assert len(load(name, places).train.labels) == 27
    assert load(name, places).templates


def test_a_folder_called_as_a_dataset_of_tfds_does_not_take_its_place(places):
    def location():
        return prepared.location("mnist", transform=SMALL, **places)

    tfds = location()
    (places["folders"] / "mnist").mkdir(parents=True)
    folder = location()
    shutil.rmtree(places["folders"] / "mnist")
    assert (location(), folder.parent) == (tfds, tfds.parent)
    assert folder != tfds


def test_a_very_long_name_fits_into_the_cache(places):
    name = "ü" * 120
    official(places["folders"], name=name)
    prepare(name, places)
    assert load(name, places).name == name


def test_what_is_prepared_is_left_alone(places, monkeypatch):
    official(places["folders"])
    first = prepare(OFFICIAL, places)
    monkeypatch.setattr(preparation, "open_source", None)
    assert prepare(OFFICIAL, places) == first


def test_a_changed_folder_is_noticed_and_a_removed_one_is_not_needed(places):
    official(places["folders"])
    prepare(OFFICIAL, places)
    assert prepared.missing([OFFICIAL], transform=SMALL, **places) == []
    other = Transform(9, "squash", "bilinear")
    assert prepared.missing([OFFICIAL], transform=other, **places) == [OFFICIAL]
    paint(places["folders"] / OFFICIAL / "train/class_0/new.png", 99)
    assert prepared.missing([OFFICIAL], transform=SMALL, **places) == [OFFICIAL]
    with pytest.raises(
        ValueError, match=r"image folder has changed since \(1 of 1\): intel_images"
    ):
        load(OFFICIAL, places)
    assert prepare(OFFICIAL, places)["published"]["train"] == 31
    shutil.rmtree(places["folders"])
    assert len(load(OFFICIAL, places).test.labels) == 12


def files(places):
    return sorted((places["folders"] / OFFICIAL).rglob("*.png"))


def test_replaced_images_of_the_same_size_and_time_are_noticed(places):
    official(places["folders"])
    first = prepare(OFFICIAL, places)
    file = files(places)[0]
    before, content = file.stat(), file.read_bytes()
    file.write_bytes(content[:-1] + b"!")  # in the checksum of IEND, which is not looked at
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert prepared.missing([OFFICIAL], transform=SMALL, **places) == [OFFICIAL]
    assert prepare(OFFICIAL, places)["contents"] != first["contents"]
    assert prepared.missing([OFFICIAL], transform=SMALL, **places) == []


def test_copied_and_touched_images_are_the_same(places, monkeypatch):
    official(places["folders"])
    first = prepare(OFFICIAL, places)
    for file in files(places):
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    monkeypatch.setattr(preparation, "open_source", None)
    assert prepared.missing([OFFICIAL], transform=SMALL, **places) == []
    assert prepare(OFFICIAL, places) == first
    # It is read once only.
    monkeypatch.setattr(images, "read", None)
    assert prepared.missing([OFFICIAL], transform=SMALL, **places) == []
    file = places["folders"] / OFFICIAL / "train/class_0/0.png"
    file.rename(file.with_name("zzz.png"))
    monkeypatch.undo()
    assert prepared.missing([OFFICIAL], transform=SMALL, **places) == [OFFICIAL], "another order"


@pytest.mark.parametrize("changed", [False, True])
def test_a_process_reads_a_folder_once_where_the_cache_cannot_be_written(
    places, monkeypatch, changed
):
    official(places["folders"])
    prepare(OFFICIAL, places)
    for file in files(places):
        os.utime(file, ns=(0, 0))
    if changed:
        paint(files(places)[0], 77)

    def refused(file, *args, **options):
        raise PermissionError(13, "Permission denied", str(file))

    read, names = images.read, []
    monkeypatch.setattr(prepared, "replace_file", refused)
    monkeypatch.setattr(
        images, "read", lambda content, name: names.append(name) or read(content, name)
    )
    absent = [OFFICIAL] if changed else []
    assert prepared.missing([OFFICIAL], transform=SMALL, **places) == absent
    assert sorted(names) == sorted(map(str, files(places)))
    assert prepared.missing([OFFICIAL], transform=SMALL, **places) == absent
    assert len(names) == 42
    if not changed:
        load(OFFICIAL, places)
        prepare(OFFICIAL, places)
        assert len(names) == 42
    # What has changed since is read again.
    paint(files(places)[0], 78)
    assert prepared.missing([OFFICIAL], transform=SMALL, **places) == [OFFICIAL]
    assert len(names) == 84


def test_what_the_table_says_belongs_to_what_is_prepared(places, monkeypatch):
    root = official(places["folders"]) / OFFICIAL
    for split in ("train", "test"):
        for label in range(6):
            (root / split / f"class_{label}").rename(root / split / str(label))
    prepare(OFFICIAL, places)
    assert load(OFFICIAL, places).class_names == tuple("012345")
    row = dataclasses.replace(DATASETS[OFFICIAL], class_names=tuple("abcdef"))
    monkeypatch.setitem(DATASETS, OFFICIAL, row)
    assert prepared.missing([OFFICIAL], transform=SMALL, **places) == [OFFICIAL]
    prepare(OFFICIAL, places)
    assert load(OFFICIAL, places).class_names == tuple("abcdef")


def deep(file, largest, count=20):
    """A 16-bit image that goes from 0 to `largest`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    values = np.linspace(0, largest, count**2).astype(np.uint16).reshape(count, count)
    Image.fromarray(values).save(file)


def test_all_splits_are_scaled_alike_and_it_is_said(places, monkeypatch):
    root = places["folders"] / "scans"
    for label in "ab":
        for i in range(6):
            deep(root / "train" / label / f"{i}.png", 1000 + 10 * i + (label == "b"))
    deep(root / "test/a/0.png", 4000)
    paint(root / "test/b/0.png", 5)
    whole = {**places, "cache_dir": places["cache_dir"].with_name("whole")}
    metadata = prepare("scans", whole)
    assert metadata["white_levels"] == {"0": 4095}
    assert "images of more than 8 bits that do not say their largest value: 0 to 4095" in (
        " ".join(metadata["notes"])
    )
    task = load("scans", whole)
    assert task.notes == prepared.notes(metadata) == tuple(metadata["notes"])
    assert task.test.images[0].max() > 230
    assert 40 < task.train.images.max() < 70, "as dark as they are beside the test's"
    # An interrupted preparation keeps to what was decided.
    monkeypatch.setattr(preparation, "CHUNK", 4)

    def interrupt(done, total):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare("scans", places, progress=interrupt)
    monkeypatch.setattr(images, "measure", None)
    assert prepare("scans", places) == metadata


def test_classes_without_images_are_told(places):
    root = official(places["folders"], name="ward") / "ward"
    shutil.rmtree(root / "test/class_3")
    for i in range(2):
        shutil.copy(root / f"train/class_2/{i}.png", root / f"test/class_0/copy{i}.png")
    for i in range(2, 5):
        (root / f"train/class_2/{i}.png").unlink()
    notes = prepare("ward", places)["notes"]
    assert "classes without an image in train: class 2" in notes
    assert "classes without an image in test: class 3" in notes


def test_classes_that_all_are_validated_on_are_told(places):
    """A folder's own validation split: what remains of train counts, not both together."""
    root = places["folders"] / "ward"
    for label in range(3):
        for i in range(4):
            paint(root / f"train/class_{label}/{i}.png", 10 * label + i)
            paint(root / f"test/class_{label}/{i}.png", 100 + 10 * label + i)
    shutil.copytree(root / "train/class_2", root / "val/class_2")
    paint(root / "val/class_0/0.png", 200)
    notes = prepare("ward", places)["notes"]
    assert "classes without an image in train: class 2" in notes
    assert "classes without an image in validation: class 1" in notes


def test_classes_that_the_division_leaves_out_are_told(places):
    root = places["folders"] / "ward"
    for label in range(6):
        paint(root / f"train/class_{label}/0.png", 10 * label)
        paint(root / f"test/class_{label}/0.png", 100 + 10 * label)
    prepare("ward", places)
    task = load("ward", places)
    (lost,) = np.setdiff1d(np.arange(6), task.train.labels)
    note = "classes without an image to train on: all are held out to validate on"
    assert f"{note}: class {lost}" in task.notes


def test_all_missing_ones_are_listed_with_the_command(places):
    official(places["folders"])
    prepare(OFFICIAL, places)
    with pytest.raises(
        ValueError, match=r"not prepared .*\(2 of 3\): gtsrb, mnist; run python -m matu_jax"
    ):
        prepared.load(["gtsrb", OFFICIAL, "mnist"], transform=SMALL, **places)
    with pytest.raises(ValueError, match="unknown dataset 'mnits'; did you mean 'mnist'"):
        prepared.missing(["mnits"], transform=SMALL, **places)
    with pytest.raises(ValueError, match=r"such as \['mnist'\], got the one string"):
        prepared.load("mnist", transform=SMALL, **places)


def damage(folder, file, how):
    path = folder / file
    if how == "remove":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "flip":
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    elif how == "header":
        path.write_bytes(b"\0" * 10 + path.read_bytes()[10:])
    elif how == "not UTF-8":
        path.write_bytes(b"\xff" + path.read_bytes())
    elif how == "deep":
        path.write_text("[" * 100_000)
    elif how == "list":
        path.write_text("[]")
    elif how.startswith("signed: "):  # with a checksum that holds
        field, _, value = how.removeprefix("signed: ").partition("=")
        metadata = json.loads(path.read_text()) | {field: json.loads(value.replace("'", '"'))}
        path.write_text(json.dumps(metadata | {"checksum": prepared.checksum(metadata)}))
    else:
        metadata = json.loads(path.read_text())
        metadata["class_names"].reverse()
        path.write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("file", "how", "message"),
    [
        ("train_images.npy", "remove", r"train_images\.npy: found no file, expected \d+ bytes"),
        ("test_images.npy", "truncate", r"test_images\.npy: found \d+, expected \d+ bytes"),
        ("test_images.npy", "header", r"test_\*\.npy cannot be read"),
        ("train_labels.npy", "flip", r"train_labels\.npy: its hash is another"),
        ("metadata.json", "remove", r"metadata\.json cannot be read"),
        ("metadata.json", "truncate", r"metadata\.json cannot be read"),
        ("metadata.json", "edit", r"metadata\.json was changed"),
        ("metadata.json", "not UTF-8", r"metadata\.json cannot be read .*not UTF-8"),
        ("metadata.json", "deep", r"metadata\.json cannot be read .*nested more than 100 deep"),
        ("metadata.json", "list", r"metadata\.json cannot be read .*damaged"),
        ("metadata.json", "signed: splits={}", r"splits\.train: missing"),
        ("metadata.json", "signed: test_twice=-1", r"test_twice: found -1"),
        ("metadata.json", "signed: format=1", r"format: found 1"),
        ("metadata.json", "signed: white_levels={'0': 0}", r"white_levels\.0: found 0"),
        ("metadata.json", "signed: class_names=3", r"class_names: found 3"),
        ("metadata.json", "signed: transform=null", r"transform: found None"),
        (
            "metadata.json",
            "signed: validation=30",
            r"found validation 30, expected less than the 30",
        ),
        ("metadata.json", "signed: name='mnist'", r"metadata\.json is of 'mnist'"),
    ],
)
def test_damage_is_named_and_mended(places, file, how, message):
    official(places["folders"])
    first = prepare(OFFICIAL, places)
    damage(prepared.location(OFFICIAL, transform=SMALL, **places), file, how)
    with pytest.raises(ValueError, match=rf"(?s)'intel_images': .*{message}.*; remove .* prepare"):
        load(OFFICIAL, places)
    assert prepare(OFFICIAL, places) == first
    assert load(OFFICIAL, places).fingerprint == first["sha256"]


def test_all_unreadable_images_are_named(places, monkeypatch):
    root = official(places["folders"]) / OFFICIAL
    monkeypatch.setattr(preparation, "CHUNK", 10)
    (root / "train/class_3/0.png").write_bytes(b"")
    (root / "test/class_4/0.png").write_bytes(b"<html>")
    Image.new("RGB", (1, 200_000_000 // 8**2)).save(root / "test/class_5/1.png")
    with pytest.raises(ValueError, match=r"images that cannot be used: 3\n") as caught:
        prepare(OFFICIAL, places, transform=Transform(8))
    for wanted in (
        "class_3/0.png cannot be read: the file is empty; replace or remove it",
        "class_4/0.png cannot be read: it is no image",
        "class_5/1.png: an image of 1 x 3125000 pixels is too thin",
    ):
        assert wanted in str(caught.value)
    assert not prepared.location(OFFICIAL, transform=Transform(8), **places).exists()


def test_many_unreadable_images_end_it_early(places):
    root = official(places["folders"], train=30) / OFFICIAL
    for file in root.glob("train/*/*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"images that cannot be used: \d+ or more\n"):
        prepare(OFFICIAL, places)


def test_too_small_a_disk_is_told_before_the_work(places, monkeypatch):
    official(places["folders"])
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10)
    )
    with pytest.raises(ValueError, match=r"'intel_images': 0\.0 GB are needed in .*MATU_JAX_CACHE"):
        prepare(OFFICIAL, places)


def test_a_disk_that_fills_up_meanwhile_is_told(places, monkeypatch):
    def full(descriptor, start, length):
        raise OSError(28, "No space left on device")

    official(places["folders"])
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"GB are needed in .*, and .* are free; set MATU_JAX_CA"):
        prepare(OFFICIAL, places)
    monkeypatch.undo()
    prepare(OFFICIAL, places)


def test_nothing_left_to_train_on_is_told(places):
    root = official(places["folders"], train=1, test=1) / OFFICIAL
    for file in root.glob("test/*/*.png"):
        shutil.copy(file, root / "train" / file.parent.name / "0.png")
    with pytest.raises(ValueError, match="0 of 6 training images are left"):
        prepare(OFFICIAL, places)


def test_a_folder_that_is_not_there_names_where_to_get_it(places):
    with pytest.raises(ValueError, match=r"found no .*/gtsrb; get it from https://.*train/<class>"):
        prepare("gtsrb", places)


def test_an_unwritable_cache_is_told(places):
    places["cache_dir"].write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot be written .*MATU_JAX_CACHE"):
        prepare(OFFICIAL, places)


def test_defaults_follow_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MATU_JAX_CACHE", str(tmp_path))
    monkeypatch.delenv("MATU_JAX_FOLDERS", raising=False)
    assert prepared.location("mnist", transform=SMALL).parent == tmp_path / "prepared"
    assert selection.image_folder("mnist") is None
    assert selection.image_folder("gtsrb") == tmp_path / "folders" / "gtsrb"
    monkeypatch.setenv("MATU_JAX_FOLDERS", str(tmp_path / "mine"))
    (tmp_path / "mine/mnist").mkdir(parents=True)
    assert selection.image_folder("mnist") == tmp_path / "mine/mnist", "a folder goes before TFDS"
    assert selection.image_folder("mnist", tmp_path / "other") is None


def test_missing_loads_nothing_heavy_and_is_quick(tmp_path):
    code = textwrap.dedent(f"""
        import sys, time
        from matu_jax.data import Transform, prepared, selection
        start = time.perf_counter()
        names = selection.resolve("vision8")
        assert prepared.missing(names, transform=Transform(), cache_dir={str(tmp_path)!r}) == [
            *names]
        assert time.perf_counter() - start < 1
        heavy = "PIL tensorflow_datasets tensorflow array_record flax scipy"
        print([name for name in heavy.split() if name in sys.modules])
        """)
    start = time.perf_counter()
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.stdout.strip() == "[]", printed.stderr
    assert time.perf_counter() - start < 60
