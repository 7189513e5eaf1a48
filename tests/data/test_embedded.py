import dataclasses
import hashlib
import itertools
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

from matu_jax.data import ImageTask, Split, embedded, fingerprint, rendering, sprites
from matu_jax.data.embedded_tasks import DOMAINS, EIGHT, TASKS, relatedness
from matu_jax.data.pretraining import pretraining_images

SMALL = {"train_examples": 400, "validation_examples": 120, "test_examples": 120}
PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tasks(cache) -> dict[str, ImageTask]:
    return {task.name: task for task in embedded.load(TASKS, cache_dir=cache, **SMALL)}


def _prints(tasks) -> list[dict[str, str]]:
    return [fingerprint(task) for task in tasks]


def test_the_table_has_thirty_tasks_of_eight_to_ten_classes():
    assert len(TASKS) == 30
    assert len({spec.domain for spec in TASKS.values()}) == 5
    for name, spec in TASKS.items():
        assert name == spec.name == f"{spec.label_space}/{spec.domain}"
        assert 8 <= len(spec.class_names) == len(set(spec.class_names)) <= 10
    for space in ("hue", "position", "tilt", "ground", "flow"):
        assert sum(spec.label_space == space for spec in TASKS.values()) == 5
    assert len(EIGHT) == 8
    assert "handwritten" in {TASKS[name].domain for name in EIGHT}  # real digits


def test_a_label_space_means_the_same_in_every_domain():
    names = {}
    for spec in TASKS.values():
        assert names.setdefault(spec.label_space, spec.class_names) == spec.class_names


def test_relatedness_is_the_declared_truth():
    assert relatedness("hue/noise", "hue/plaid") == "label_space"
    assert relatedness("digit/grating", "digit/handwritten") == "label_space"
    assert relatedness("hue/noise", "tilt/noise") == "domain"
    assert relatedness("hue/noise", "tilt/plaid") == "neither"
    assert relatedness("hue/noise", "hue/noise") == "both"
    found = {"label_space": 0, "domain": 0, "neither": 0}
    for a, b in itertools.combinations(TASKS, 2):
        assert relatedness(a, b) == relatedness(b, a)
        found[relatedness(a, b)] += 1
    # Five attributes in five domains, digit and letter in two; 15 pairs in each of five domains.
    assert found == {"label_space": 5 * 10 + 2, "domain": 5 * 15, "neither": 435 - 52 - 75}
    eight = [relatedness(a, b) for a, b in itertools.combinations(EIGHT, 2)]
    assert [eight.count(kind) for kind in found] == [4, 12, 12]


def test_tasks_keep_the_contract(tasks):
    assert list(tasks) == list(TASKS)
    for name, task in tasks.items():
        spec = TASKS[name]
        assert (task.label_space, task.domain) == (spec.label_space, spec.domain)
        assert task.num_classes == len(spec.class_names)
        for part, count in zip(PARTS, SMALL.values(), strict=True):
            split: Split = getattr(task, part)
            assert split.images.shape == (count, 32, 32, 3)
            assert split.images.dtype == np.uint8
            assert split.labels.dtype == np.int32


def test_every_class_of_every_split_is_equally_frequent(tasks):
    for task in tasks.values():
        for part in PARTS:
            counts = np.bincount(getattr(task, part).labels, minlength=task.num_classes)
            assert counts.max() - counts.min() <= 1, (task.name, part)


def test_tasks_of_a_domain_ask_about_the_same_images(tasks):
    for a, b in itertools.combinations(tasks.values(), 2):
        same = all(
            np.array_equal(getattr(a, part).images, getattr(b, part).images) for part in PARTS
        )
        assert same == (a.domain == b.domain)


def test_attributes_are_independent(tasks):
    """Pearson's chi-squared of every pair of attributes stays near its degrees of freedom."""
    for a, b in itertools.combinations(tasks.values(), 2):
        if a.domain != b.domain:
            continue
        table = np.zeros((a.num_classes, b.num_classes))
        np.add.at(table, (a.train.labels, b.train.labels), 1)
        expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
        statistic = ((table - expected) ** 2 / expected).sum()
        freedom = (a.num_classes - 1) * (b.num_classes - 1)
        assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom), (a.name, b.name)


def test_splits_share_no_image(tasks):
    for task in tasks.values():
        hashes = [
            {hashlib.sha256(image.tobytes()).hexdigest() for image in getattr(task, part).images}
            for part in PARTS
        ]
        assert len(set.union(*hashes)) == sum(map(len, hashes)) == 640


def test_real_digits_are_divided_before_they_are_drawn():
    from sklearn.datasets import load_digits

    digits = sprites.SPRITES["handwritten"]()
    _, target = load_digits(return_X_y=True)
    np.testing.assert_array_equal(digits.identity, target)
    assert np.bincount(digits.split).sum() == 1797
    drawn = [{a.tobytes() for a in digits.atlas[digits.split == part]} for part in range(3)]
    assert [len(part) > 280 for part in drawn] == [True] * 3
    for one, other in itertools.combinations(drawn, 2):
        assert not one & other


def test_an_overlap_of_splits_is_refused(tasks):
    task = tasks["hue/noise"]
    pool = {f"{part}/images": getattr(task, part).images for part in PARTS}
    embedded._check_disjoint("noise", pool)
    pool["test/images"] = np.concatenate([pool["test/images"], pool["train/images"][:1]])
    with pytest.raises(RuntimeError, match="'noise': an image stands in both train and test"):
        embedded._check_disjoint("noise", pool)


def test_labels_are_what_the_images_show(tasks):
    """Reads hue, ground and position off the pixels, by a rule and without training."""
    for domain in ("grating", "plaid"):
        images = tasks[f"hue/{domain}"].train.images.astype(float)
        bright = images.max(-1) > 175  # the ink, in these domains
        rows, columns = np.mgrid[:32, :32]
        place = {
            "x": (bright * columns).sum((1, 2)) / bright.sum((1, 2)) - 15.5,
            "y": (bright * rows).sum((1, 2)) / bright.sum((1, 2)) - 15.5,
        }
        position = tasks[f"position/{domain}"].train.labels
        for axis, cell in (("x", position % 3), ("y", position // 3)):
            assert np.corrcoef(place[axis], cell)[0, 1] > 0.87
        for space, where in (("hue", bright), ("ground", ~bright)):
            colour = (images * where[..., None]).sum((1, 2)) / where.sum((1, 2))[:, None]
            red, green, blue = colour.T
            hue = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * np.pi)
            task = tasks[f"{space}/{domain}"]
            guess = np.round(hue * task.num_classes) % task.num_classes
            assert np.mean(guess == task.train.labels) > 0.95, (space, domain)


def test_flow_and_tilt_turn_clockwise(tasks):
    """The background repeats along its lines; the bar is the sprite's foot."""
    task = tasks["flow/grating"]
    images = task.train.images.astype(float).mean(-1)
    down, right = images[:, 1:, :-1] - images[:, :-1, :-1], images[:, :-1, 1:] - images[:, :-1, :-1]
    # The gradient runs across the lines; its doubled angle may be averaged.
    doubled = ((right + 1j * down) ** 2).mean((1, 2))
    found = (np.angle(doubled) / 2 + np.pi / 2) % np.pi
    guess = np.round(found / np.deg2rad(22.5)) % 8
    assert np.mean(guess == task.train.labels) > 0.6  # by chance 0.125; the sprite is in the way

    # What stood at the top of a sprite goes to the right when it is tilted.
    nothing = rendering.Scene(*(np.zeros(1) for _ in rendering.Scene._fields))
    scene = nothing._replace(
        position=np.zeros((1, 2)),
        tilt=np.full(1, np.pi / 4),
        size=np.full(1, 22.0),
        ink_value=np.ones(1),
    )
    sprite = np.zeros((1, 64, 64), np.uint8)
    sprite[:, 6:20, 26:38] = 255
    drawn = rendering.render(
        np.random.default_rng(0), sprite, np.zeros(1, int), rendering.texture_tiles("swell"), scene
    )[0].mean(-1)
    lit = drawn > 128
    assert lit[:16, 16:].sum() > 10
    assert lit[16:].sum() == lit[:, :16].sum() == 0


def test_the_same_seed_gives_the_same_images_and_another_gives_others(tmp_path):
    names = ["hue/noise", "digit/handwritten"]
    first = _prints(embedded.load(names, seed=3, cache_dir=tmp_path / "a", **SMALL))
    again = _prints(embedded.load(names, seed=3, cache_dir=tmp_path / "b", **SMALL))
    other = _prints(embedded.load(names, seed=4, cache_dir=tmp_path / "a", **SMALL))
    assert first == again
    for one, another in zip(first, other, strict=True):
        assert not set(one.values()) & set(another.values())


def test_a_split_does_not_depend_on_the_size_of_the_others(tmp_path):
    (one,) = embedded.load(["hue/noise"], cache_dir=tmp_path, **SMALL)
    (other,) = embedded.load(
        ["hue/noise"],
        cache_dir=tmp_path,
        train_examples=300,
        validation_examples=120,
        test_examples=120,
    )
    np.testing.assert_array_equal(one.test.images, other.test.images)
    assert len(other.train.labels) == 300


def test_fingerprint_tells_splits_images_and_labels_apart(tasks):
    task = tasks["hue/noise"]
    original = fingerprint(task)
    assert set(original) == set(PARTS)
    assert len(set(original.values())) == 3
    assert original != fingerprint(tasks["tilt/noise"])
    images = task.test.images.copy()
    images[0, 0, 0, 0] ^= 1
    changed = dataclasses.replace(task, test=Split(images, task.test.labels))
    assert fingerprint(changed)["train"] == original["train"]
    assert fingerprint(changed)["test"] != original["test"]


def test_the_cache_is_read_and_says_the_same(cache, tasks, monkeypatch):
    def refuse(*_):
        raise AssertionError("generated although the cache holds it")

    monkeypatch.setattr(embedded, "_generate", refuse)
    assert _prints(embedded.load(TASKS, cache_dir=cache, **SMALL)) == _prints(tasks.values())
    monkeypatch.setenv("MATU_JAX_CACHE", str(cache))
    assert len(embedded.load(TASKS, cache_dir=None, **SMALL)) == 30
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "garbage", "empty", "pipe", "other arrays"]
)
def test_a_damaged_cache_file_is_generated_anew_with_a_warning(tmp_path, damage):
    good = _prints(embedded.load(["hue/noise"], cache_dir=tmp_path, **SMALL))
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 3
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "garbage":
        file.write_bytes(b"no archive at all")
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "pipe":
        file.unlink()
        os.mkfifo(file)
    else:
        with np.load(file) as stored:
            arrays = dict(stored)
        arrays["test/hue"] = arrays["test/hue"][:-1]
        np.savez(file, **arrays)
    with pytest.warns(UserWarning, match=f"{file.name} cannot be used and is generated anew"):
        assert _prints(embedded.load(["hue/noise"], cache_dir=tmp_path, **SMALL)) == good
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _prints(embedded.load(["hue/noise"], cache_dir=tmp_path, **SMALL)) == good
    assert list(tmp_path.iterdir()) == [file]


def test_an_unwritable_cache_warns_once_and_loads_all_the_same(tmp_path, tasks):
    (tmp_path / "file").write_text("in the way")
    names = ["hue/noise", "hue/plaid"]
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        loaded = embedded.load(names, cache_dir=tmp_path / "file" / "below", **SMALL)
    assert len(caught) == 1
    assert _prints(loaded) == _prints(tasks[name] for name in names)


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.warns(UserWarning, match="disk full"):
        embedded.load(["hue/noise"], cache_dir=tmp_path, **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (["heu/noise"], {}, "unknown task 'heu/noise'; did you mean 'hue/noise'"),
        (["zzzz"], {}, "unknown task 'zzzz'; the tasks are digit/handwritten, "),
        (["hue/noise", "hue/noise"], {}, "'hue/noise' is named more than once"),
        ("hue/noise", {}, r"names must be several names, such as \['hue/noise'\]"),
        (["hue/noise"], {"train_examples": 0}, "train_examples must be at least 1, got 0"),
        (["hue/noise"], {"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_load_names_what_is_wrong(tmp_path, names, changes, message):
    with pytest.raises(ValueError, match=message):
        embedded.load(names, cache_dir=tmp_path, **(SMALL | changes))
    assert not list(tmp_path.iterdir())


def test_relatedness_names_an_unknown_task():
    with pytest.raises(ValueError, match="did you mean 'hue/noise'"):
        relatedness("hue/plaid", "hue/nois")


def test_pretraining_images_are_seeded_and_fully_described():
    one, again = pretraining_images(600, 5), pretraining_images(600, 5)
    other = pretraining_images(600, (5, 1))
    for name, array in one._asdict().items():
        np.testing.assert_array_equal(array, getattr(again, name))
        assert not np.array_equal(array, getattr(other, name))
        assert len(array) == 600
    assert one.images.dtype == np.uint8
    assert one.identity.dtype == np.int32
    classes = sprites.PRETRAINING_GLYPHS + sprites.PRETRAINING_SHAPES
    assert len(set(classes)) == len(classes) >= 40
    assert set(pretraining_images(5000, 0).identity) == set(range(len(classes)))
    for value, low, high in ((one.hue, 0, 1), (one.ground, 0, 1), (one.flow, 0, np.pi)):
        assert value.dtype == np.float32
        assert low <= value.min() < value.max() <= high
    with pytest.raises(ValueError, match="count must be at least 1"):
        pretraining_images(0, 0)


def test_pretraining_uses_other_sprites_and_textures():
    asked = {*sprites.DIGITS, *sprites.LETTERS, *sprites.SHAPES}
    assert not asked & {*sprites.PRETRAINING_GLYPHS, *sprites.PRETRAINING_SHAPES}
    seen = {a.tobytes() for a in sprites.SPRITES["pretraining"]().atlas}
    tiles = {tile.tobytes() for tile in rendering.texture_tiles("pretraining")}
    for domain in DOMAINS.values():
        atlas = sprites.SPRITES[domain.sprites]().atlas
        assert not seen & {a.tobytes() for a in atlas}
        assert not tiles & {
            tile.tobytes() for tile in rendering.texture_tiles(domain.style.texture)
        }


def test_every_glyph_is_in_its_font():
    """A font draws the same box for every character that it lacks."""
    for fonts, characters in (
        (sprites._PRETRAINING_FONTS, sprites.PRETRAINING_GLYPHS),
        (itertools.chain(*sprites._FONTS), sprites.DIGITS + sprites.LETTERS),
    ):
        for font in fonts:
            missing = np.asarray(sprites._glyph("\U0010fffe", font))
            for character in characters:
                found = np.asarray(sprites._glyph(character, font))
                assert found.shape != missing.shape or (found != missing).any(), (font, character)


def test_data_is_numpy_only():
    code = (
        "import sys, matu_jax.data.embedded, matu_jax.data.partition, matu_jax.data.batching\n"
        "print([name for name in ('flax', 'sklearn', 'matplotlib.pyplot') if name in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "[]"
