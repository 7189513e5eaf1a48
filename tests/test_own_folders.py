"""Image folders of one's own, from files to what was learnt, on a backbone of one layer."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import matu_jax
from matu_jax import compare, doctor, export, prepare, train
from matu_jax.runs.commandline import read_config

EXPERIMENTS = Path(matu_jax.__file__).parents[1] / "experiments"


def script(name):
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two small tasks of the example's: ten digits, and four ways to turn one."""
    folder = tmp_path_factory.mktemp("my images [1]")
    for task in ("digits", "digits turned"):
        script("make_example_folders").write(folder, task, {"train": 200, "test": 100})
        (folder / task / "read me.txt").touch()
    return folder


@pytest.fixture
def words(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("MATU_JAX_CACHE", str(tmp_path / "cache"))
    checkpoint = tiny.write_checkpoint(tmp_path / "tiny.safetensors")
    return [
        "program",
        f"--config={EXPERIMENTS / 'own_folders.py'}",
        f"--config.data.folders={folders}",
        f"--config.model.checkpoint={checkpoint}",
    ]


def test_what_is_learnt_is_more_than_chance_and_than_the_untrained_model(
    words, folders, tmp_path, capsys
):
    run, small = tmp_path / "run", ["--config.data.clients=2", "--config.rounds=3"]
    small += ["--config.local.steps=40", "--config.local.learning_rate=0.01"]
    assert prepare.main([*words, *small]) == 0
    capsys.readouterr()
    assert doctor.main([*words, *small]) == 0
    note = f"digits: files that are no images: 1, such as {folders / 'digits'}/read me.txt"
    assert f"note     data                 {note}" in capsys.readouterr().out
    assert train.main([*words, *small, f"--workdir={run}"]) == 0
    out = capsys.readouterr().out
    for task in ("digits", "digits turned"):
        assert (
            f"data: {task}: files that are no images: 1, such as {folders / task}/read me.txt"
            in out
        )
    config, _, _ = read_config([*words, *small], "")
    before = dict(script("own_folders_baselines").baselines(config))
    after = json.loads((run / "summary.json").read_text())["accuracy"]["per_task"]
    assert set(after) == set(before) == {"digits", "digits turned"}
    # Over 100 test images, five standard deviations of chance are 15 and 22 points.
    assert after["digits"] > max(before["digits"]["chance"], before["digits"]["untrained"]) + 0.2
    turned = before["digits turned"]
    assert after["digits turned"] > max(turned["chance"], turned["untrained"]) + 0.22
    for task, row in before.items():
        assert row["chance"] <= (0.2 if task == "digits" else 0.35)
        assert row["pixels"] > row["chance"] + 0.2, task
        # Few validation images choose the penalty here, and one layer knows little of turns.
        assert row["features"] > row["chance"] + 0.05, task
    out = tmp_path / "out"
    command = ["export", f"--workdir={run}", "--task=digits turned", f"--out={out}"]
    assert export.main([*command, "--format=safetensors"]) == 0
    assert "three quarters" in (out / "head.safetensors").read_bytes().decode(errors="ignore")
    assert "Traceback" not in capsys.readouterr().err


def test_frozen_heads_are_refused_with_what_to_set(words, capsys):
    assert prepare.main(words) == 0
    assert train.main([*words, "--config.model.head=frozen", "--config.data.clients=2"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "found 'frozen' for digits, digits turned" in message
    assert "Set config.model.head = 'trained'" in message


def test_the_example_folders_are_balanced_and_their_splits_are_different_pictures(tmp_path):
    made = script("make_example_folders")
    made.write(tmp_path, "photographs", {"train": 12, "test": 6})
    counts = {}
    for path in sorted(tmp_path.rglob("*.png")):
        part, name = path.relative_to(tmp_path / "photographs").parts[:2]
        counts[part, name] = counts.get((part, name), 0) + 1
        with Image.open(path) as image:
            assert image.size == (made.PIXELS, made.PIXELS)
    names = ("china", "flower", "portrait")
    assert counts == {(p, n): {"train": 4, "test": 2}[p] for p in ("train", "test") for n in names}
    again = list(made.photographs("train", 3, np.random.default_rng(0)))
    assert [name for _, name in again] == list(names)
    assert made.main(["make", str(tmp_path)]) == 2  # never into a folder that is there


def test_scans_of_training_are_not_tested_on_whatever_is_asked(monkeypatch):
    made = script("make_example_folders")
    monkeypatch.setattr(made, "FASHION", Path("nowhere"))  # no scanner shows it

    def scans(task, part):
        pictures = made.SCANS[task](part, 2000, np.random.default_rng(0))
        return {np.ascontiguousarray(picture).tobytes() for picture, _ in pictures}

    looks = {}
    for task in made.SCANS:
        if not task.startswith("photographs"):
            look = task.split()[1:]
            for part in ("train", "test"):
                looks.setdefault((part, *look), set()).update(scans(task, part))
    for look in ((), ("negative",), ("sideways",)):
        train, test = looks["train", *look], looks["test", *look]
        assert (len(train), len(test)) == (1200, 597)
        assert not train & test


def test_scanners_show_the_same_pictures_otherwise():
    made = script("make_example_folders")

    def pictures(task):
        return list(made.SCANS[task]("train", 30, np.random.default_rng(0)))

    plain, odd = pictures("digits"), pictures("parity")
    for (picture, digit), (same, parity) in zip(plain, odd, strict=True):
        np.testing.assert_array_equal(picture, same)
        assert parity == ("odd" if digit in "13579" else "even")
    for question in ("digits", "parity"):
        for (one, name), (other, same) in zip(
            pictures(question), pictures(f"{question} negative"), strict=True
        ):
            np.testing.assert_array_equal(one + other, np.full_like(one, 255))
            assert name == same
    for (one, _), (other, _) in zip(plain, pictures("digits sideways"), strict=True):
        np.testing.assert_array_equal(one, other[::-1].T)


def test_image_folders_of_scanners_are_compared(tmp_path, monkeypatch):
    made = script("make_example_folders")
    monkeypatch.setenv("MATU_JAX_CACHE", str(tmp_path / "cache"))
    for task in ("digits", "digits negative", "parity"):
        made.write(tmp_path / "scans", task, {"train": 120, "test": 60}, made.SCANS)
    words = [
        f"--config={EXPERIMENTS / 'own_images.py'}",
        f"--config.data.folders={tmp_path / 'scans'}",
        f"--config.model.checkpoint={tiny.write_checkpoint(tmp_path / 'tiny.safetensors')}",
        "--config.data.clients=2",
        "--config.rounds=2",
        f"--workdir={tmp_path / 'run'}",
        "--seeds=0",
        "--arms=matu,untrained",
    ]
    assert prepare.main(["prepare", *words[:4]]) == 0
    assert compare.main(["compare", *words]) == 0
    (setting,) = json.loads((tmp_path / "run" / "comparison.json").read_text())["settings"]
    assert setting["tasks"] == ["digits", "digits negative", "parity"]
    assert {arm["label"] for arm in setting["arms"]} == {"matu", "untrained"}
