"""The program that prepares datasets, on generated image folders."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import matu_jax
from matu_jax import compare, prepare, train
from matu_jax.data import Transform, preparation, prepared
from matu_jax.models.architectures import ARCHITECTURES
from matu_jax.runs.commandline import read_config
from matu_jax.runs.plan import check_inputs
from matu_jax.simulation.federation import load_tasks

EXPERIMENT = str(Path(matu_jax.__file__).parents[1] / "experiments" / "vitb32.py")
TRANSFORM = ARCHITECTURES["clip_vit_b32"].transform
INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from matu_jax import prepare
from matu_jax.data import images, preparation
preparation.CHUNK, left, apply = 8, iter(range(40)), images.apply
def interrupted(*arguments):
    if next(left, None) == 39:
        os.kill(os.getpid(), signal.{signal})
    return apply(*arguments)
images.apply = interrupted
sys.exit(prepare.main(sys.argv))
"""

COMPARISON = """
from matu_jax.comparison.plan import Comparison, Setting
from matu_jax.config import Config, DataConfig, ModelConfig


def get_config():
    experiment = Config(
        data=DataConfig(tasks="mnist", tasks_per_client=1),
        model=ModelConfig(architecture="clip_vit_b32", checkpoint="random"),
    )
    settings = {"two": Setting("", {"data.clients": 2}), "three": Setting("", {"data.clients": 3})}
    arms = {"matu": {}, "per_task": {"algorithm": "per_task"}}
    return Comparison("t", experiment, settings, arms)
"""


def dataset(root, name, classes, train=6, test=2):
    """Writes an image folder; the first image of class 0 in test is one of train, too."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label in range(classes):
            folder = root / name / split / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (root / name / "test/0/0.png").write_bytes((root / name / "train/0/0.png").read_bytes())


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setenv("MATU_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MATU_JAX_FOLDERS", str(tmp_path / "images"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("COLUMNS", "160")
    dataset(tmp_path / "images", "mnist", 10)
    return tmp_path / "images"


def run(*arguments):
    return prepare.main(["prepare", "--config", EXPERIMENT, *arguments])


def row(text, name):
    """The cells of a dataset's line in the printed table."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"│ {name} ")]
    return [cell.strip() for cell in line.strip("│").split("│")]


def content(cache):
    return {
        str(file.relative_to(cache)): file.read_bytes()
        for file in cache.rglob("*")
        if file.is_file() and file.suffix != ".lock"
    }


def test_as_a_user(images, tmp_path):
    command = [sys.executable, "-m", "matu_jax.prepare", "--config", EXPERIMENT]
    done = subprocess.run(
        [*command, "--config.data.tasks=mnist", f"--config.data.folders={images}"],
        cwd=Path(EXPERIMENT).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert row(done.stdout, "mnist") == [
        "mnist", "folder", "59", "20", "11.3 MiB", "1 + 0", "prepared now",
    ]  # fmt: skip
    assert "mnist: images for train: 59, for test: 20" in done.stdout
    assert str(tmp_path / "cache" / "prepared") in done.stdout
    (task,) = prepared.load(["mnist"], transform=TRANSFORM)
    assert [len(split.labels) for split in (task.train, task.validation, task.test)] == [53, 6, 20]


def test_what_is_prepared_is_left_alone_unless_the_folder_changes(images, tmp_path, capsys):
    assert run("--config.data.tasks=mnist") == 0
    before = content(tmp_path / "cache")
    capsys.readouterr()
    assert run("--config.data.tasks=mnist") == 0
    assert row(capsys.readouterr().out, "mnist")[-1] == "prepared"
    assert content(tmp_path / "cache") == before
    (images / "mnist/train/3/0.png").unlink()
    assert prepared.missing(["mnist"], transform=TRANSFORM) == ["mnist"]
    assert run("--config.data.tasks=mnist", "--dry-run") == 0
    expected = "to be prepared anew, since the image folder, or how it is divided, has changed"
    assert row(capsys.readouterr().out, "mnist")[-1] == expected
    assert content(tmp_path / "cache") == before
    assert run("--config.data.tasks=mnist") == 0
    assert row(capsys.readouterr().out, "mnist")[2:] == [
        "58", "20", "11.2 MiB", "1 + 0", expected.removeprefix("to be "),
    ]  # fmt: skip
    assert prepared.missing(["mnist"], transform=TRANSFORM) == []


def test_what_is_damaged_is_prepared_anew(images, tmp_path, capsys):
    assert run("--config.data.tasks=mnist") == 0
    before = content(tmp_path / "cache")
    file = prepared.location("mnist", transform=TRANSFORM) / "train_images.npy"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"train_images\.npy"):
        prepared.load(["mnist"], transform=TRANSFORM)
    capsys.readouterr()
    assert run("--config.data.tasks=mnist") == 0
    out = capsys.readouterr().out
    assert row(out, "mnist")[-1] == "prepared anew, since it is damaged"
    assert "train_images.npy: found" in out
    assert content(tmp_path / "cache") == before


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_the_same_command_goes_on_after_an_interruption(images, tmp_path, monkeypatch, name):
    code = INTERRUPTED.format(signal=name)
    command = [sys.executable, "-c", code, "--config", EXPERIMENT, "--config.data.tasks=mnist"]
    stopped = subprocess.run(command, capture_output=True, text=True)
    if name == "SIGKILL":
        assert stopped.returncode == -signal.SIGKILL
    else:
        assert stopped.returncode == 130
        assert stopped.stderr == "Interrupted. The same command goes on.\n"
    assert prepared.missing(["mnist"], transform=TRANSFORM) == ["mnist"]
    with pytest.raises(ValueError, match=r"mnist; run python -m matu_jax\.prepare"):
        prepared.load(["mnist"], transform=TRANSFORM)
    (partial,) = (tmp_path / "cache/prepared").glob("mnist-*.partial")
    assert (partial / "progress.json").exists()
    decoded = []
    monkeypatch.setattr(preparation, "CHUNK", 8)
    apply = preparation.images.apply
    monkeypatch.setattr(preparation.images, "apply", lambda *a: decoded.append(0) or apply(*a))
    assert run("--config.data.tasks=mnist") == 0
    assert 40 <= len(decoded) < 80  # of 80 in all; the others were done before
    monkeypatch.setenv("MATU_JAX_CACHE", str(tmp_path / "whole"))
    assert run("--config.data.tasks=mnist") == 0
    assert content(tmp_path / "cache") == content(tmp_path / "whole")


def test_one_failing_dataset_keeps_none_back(images, capsys):
    dataset(images, "beans", 3)
    for name in ("1.png", "4.png"):
        (images / "beans/train/1" / name).write_bytes(b"no image")
    tasks = "--config.data.tasks=beans,garbage,mnist"
    assert run(tasks, "--dry-run") == 2
    out = capsys.readouterr().out
    assert row(out, "beans")[1:] == ["folder", "18", "6", "3.45 MiB", "", "to be prepared"]
    assert row(out, "mnist")[1:] == ["folder", "60", "20", "11.5 MiB", "", "to be prepared"]
    assert row(out, "garbage")[-1] == "not prepared"
    assert run(tasks) == 2
    out = capsys.readouterr().out
    for name in ("1.png", "4.png"):
        assert f"{images}/beans/train/1/{name} cannot be read: it is no image" in out
    assert f"dataset 'garbage': found no {images}/garbage; get it from https://" in out
    states = [row(out, name)[-1] for name in ("beans", "garbage", "mnist")]
    assert states == ["not prepared", "not prepared", "prepared now"]
    assert "2 of 3 datasets cannot be prepared: beans, garbage;" in out
    for name in ("1.png", "4.png"):
        (images / "beans/train/1" / name).unlink()
    assert run("--config.data.tasks=beans,mnist") == 0
    out = capsys.readouterr().out
    assert [row(out, name)[-1] for name in ("beans", "mnist")] == ["prepared now", "prepared"]


def test_a_test_split_that_is_not_official_is_said(images, capsys):
    dataset(images / "all", "train", 6, train=5, test=1)
    (images / "all/train/train").rename(images / "garbage")
    assert run("--config.data.tasks=garbage", "--dry-run") == 0
    out = capsys.readouterr().out
    assert row(out, "garbage")[2:4] == ["24", "6"]
    assert "to be prepared; test: seeded, no official test split (0.2 of" in out.replace("│", "")
    assert run("--config.data.tasks=garbage") == 0
    out = capsys.readouterr().out
    assert row(out, "garbage")[2:4] == ["24", "6"]
    assert "prepared now; test: seeded, no official test split" in " ".join(row(out, "garbage"))


def test_a_dry_run_tells_what_is_known_and_what_is_not(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    (tmp_path / "elsewhere.png").write_bytes((images / "mnist/train/3/0.png").read_bytes())
    (images / "mnist/train/3/linked.png").symlink_to(tmp_path / "elsewhere.png")
    (images / "mnist/train/3/notes.txt").touch()
    later = "Decided while preparing: which images are left out of train, which value becomes white"
    assert run("--config.data.tasks=mnist,dtd,eurosat", "--dry-run") == 0
    out = capsys.readouterr().out
    assert row(out, "mnist")[-1] == (
        f"to be prepared; files that are no images: 1, such as {images}/mnist/train/3/notes.txt; "
        f"links out of the folder: 1, such as {images}/mnist/train/3/linked.png"
    )
    assert row(out, "dtd")[-1] == "to be prepared, downloaded if need be"
    assert row(out, "eurosat")[-1] == (
        "to be prepared, downloaded if need be; "
        "test: seeded, no official test split (0.2 of all images, seed 0)"
    )
    assert later in out
    assert run("--config.data.tasks=mnist") == 0
    capsys.readouterr()
    assert run("--config.data.tasks=mnist", "--dry-run") == 0
    assert later not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.data.tasks=mnis"], "config.data.tasks: unknown dataset 'mnis'; did you mean"),
        (["--config.data.folders=/nowhere"], "config.data.folders: /nowhere: there is no such"),
        (["--config.model.architecture=clip_vit_b23"], 'Did you mean "clip_vit_b32"?'),
        (["--dryrun"], 'Did you mean "dry-run"?'),
        (["--dry-run=yes"], "--dry-run: found 'yes', expected no value."),
    ],
)
def test_mistakes_are_told(images, capsys, arguments, message):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_comparison_is_prepared_and_asked_for(images, tmp_path, capsys):
    file = tmp_path / "comparison.py"
    file.write_text(COMPARISON)
    words = ["--config", str(file), "--workdir", str(tmp_path / "run")]
    assert compare.main(["compare", *words]) == 2
    err = capsys.readouterr().err
    assert "1 of 1 datasets are not prepared (mnist)" in err
    assert f"python -m matu_jax.prepare --config {file}" in " ".join(err.split())
    assert prepare.main(["prepare", *words[:2]]) == 0
    assert prepared.missing(["mnist"], transform=TRANSFORM, folders=str(images)) == []
    # Settings that ask for the same data ask for it once.
    assert capsys.readouterr().out.count("Images of 224 pixels") == 1
    assert prepare.main(["prepare", *words[:2], "--config.data.taks=svhn"]) == 2
    assert 'Did you mean "tasks"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config.model.architecture=embedded", "--config.data.tasks="],
            "The embedded benchmark is generated",
        ),
        (["--config.data.tasks=hue/noise"], "The embedded benchmark is generated"),
        (["--config.data=synthetic"], "stand-ins are generated"),
    ],
)
def test_nothing_to_prepare(images, tmp_path, capsys, arguments, message):
    assert run(*arguments) == 0
    assert message in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


def test_folders_of_ones_own_need_no_entry_anywhere(images, tmp_path, capsys):
    own = tmp_path / "own"
    dataset(own, "my ward [a]", 2)
    dataset(own, "眼科", 3)
    (own / "眼科/test").rename(tmp_path / "test")
    words = ["--config.data.tasks=", f"--config.data.folders={own}"]
    words += ["--config.model.architecture=embedded", "--config.model.checkpoint=embedded"]
    assert run(*words) == 2
    assert "config.model.head: found 'frozen' for my ward [a], 眼科, a" in capsys.readouterr().err
    assert run(*words, "--config.model.head=trained") == 0
    out = capsys.readouterr().out
    assert row(out, "my ward [a]")[1:4] == ["folder", "11", "4"]
    assert row(out, "眼科")[1:4] == ["folder", "15", "3"], "one of each class"
    assert "test: seeded, no official test split" in " ".join(row(out, "眼科"))
    names = ("my ward [a]", "眼科")
    (task, _) = prepared.load(names, transform=Transform(32), folders=own)
    assert task.train.images.shape[1:] == (32, 32, 3)
    assert run("--config.data.tasks=my ward", f"--config.data.folders={own}") == 2
    assert "did you mean 'my ward [a]'" in capsys.readouterr().err


def test_what_a_message_tells_to_run_does_it(images, tmp_path, capsys):
    """The command is run as it stands there, by a shell, whatever names it holds."""
    own = tmp_path / "my images & [others]"
    dataset(own, "left; right", 2)
    words = [
        "--config.data.tasks=left; right",
        f"--config.data.folders={own}",
        "--config.model.architecture",
        "vit_b16",
        "--config.model.head=trained",
        "--config.model.checkpoint=random",
    ]
    assert train.main(["train", "--config", EXPERIMENT, *words]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "matu_jax.prepare" in line]
    program, *rest = shlex.split(told[0])
    assert (program, *rest[:2]) == ("python", "-m", "matu_jax.prepare")
    assert prepare.main(rest[1:]) == 0
    capsys.readouterr()
    config, source, _ = read_config(["train", "--config", EXPERIMENT, *words], "")
    check_inputs(config, source)
    # What a program says that has no file of the experiment's holds all that matters.
    (own / "left; right/train/0/0.png").unlink()
    with pytest.raises(ValueError, match="experiment file") as caught:
        load_tasks(config)
    program, _, told = str(caught.value).partition(
        "with --config and the run's experiment file, and"
    )
    assert program.endswith("; run python -m matu_jax.prepare ")
    told = shlex.split(told.removeprefix(" with "))
    assert prepare.main(["prepare", "--config", EXPERIMENT, *told]) == 0
    assert load_tasks(config)


def test_without_a_folder_it_is_tfds(images, capsys):
    assert run("--config.data.tasks=dtd", "--dry-run") == 0
    out = capsys.readouterr().out
    assert row(out, "dtd")[1].startswith("TFDS dtd")
    assert row(out, "dtd")[-1] == "to be prepared, downloaded if need be"
