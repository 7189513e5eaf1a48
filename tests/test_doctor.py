"""What the doctor finds on this machine, for experiments that can and cannot be run."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import tiny

import matu_jax
from matu_jax import doctor, train
from matu_jax.config import Config
from matu_jax.runs import examination

EXPERIMENTS = Path(matu_jax.__file__).parents[1] / "experiments"


@pytest.fixture
def ask(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    checkpoint = tiny.write_checkpoint(tmp_path / "tiny.safetensors")
    small = [
        f"--config={EXPERIMENTS / 'quickstart.py'}",
        f"--config.model.checkpoint={checkpoint}",
        "--config.data.tasks=hue/grating,tilt/grating",
        "--config.data.clients=2",
        "--config.data.examples_per_slot=8",
        "--config.rounds=2",
        "--config.local.steps=1",
        "--config.evaluation.max_examples=8",
    ]

    def ask(*words, program=doctor.main, experiment=small):
        code = program(["program", *experiment, *words])
        found = capsys.readouterr()
        assert "Traceback" not in found.err
        return code, found.out + found.err

    return ask


def refused(*_):
    raise ValueError("a shard is cut off")


def test_a_run_is_seen_before_in_the_middle_of_and_after_it(ask, tmp_path, monkeypatch):
    run = tmp_path / "run"
    words = [f"--workdir={run}"]
    code, text = ask(*words)
    assert code == 0
    assert f"{run} will be made" in text
    assert "can be run" in text
    assert "per device are needed" in text
    assert "cpu" in text
    assert not run.exists()  # nothing is changed

    assert ask(*words, program=train.main)[0] == 0
    code, text = ask(*words)
    assert (code, "this run is finished" in text) == (0, True)
    (run / "summary.json").unlink()
    code, text = ask(*words)
    assert (code, "goes on after round 2 of 2" in text) == (0, True)
    # What train refuses the doctor does not promise.
    base = next(tmp_path.rglob("tiny.safetensors"))
    whole = base.read_bytes()
    base.write_bytes(whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:])
    code, text = ask(*words)
    assert (code, "other tensors than when this run began" in text) == (2, True)
    base.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr("matu_jax.simulation.federation.base_fingerprint", refused)
        code, text = ask(*words)
    assert (code, "workdir              a shard is cut off" in text) == (2, True)
    for number, left in ((2, "goes on after round 1 of 2"), (1, "no checkpoint can be read")):
        (run / "checkpoints" / f"{number}" / "meta" / "metadata").write_text("damaged")
        code, text = ask(*words)
        assert code == (0 if number == 2 else 2)
        assert f"round {number}" in text
        assert "meta/metadata has changed since it was written" in text
        assert left in text
    code, text = ask(*words, "--config.rounds=3")
    assert code == 2
    assert "config.rounds: there 2, here 3" in text
    assert "can be run" not in text

    (run / "config.json").write_text("{")
    code, text = ask(*words)
    assert (code, "config.json: damaged" in text) == (2, True)


def test_a_folder_of_something_else_and_one_with_a_config_alone(ask, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    code, text = ask(f"--workdir={tmp_path / 'other'}")
    assert (code, "is not empty" in text) == (2, True)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text(json.dumps(dataclasses.asdict(Config())))
    code, text = ask(f"--workdir={tmp_path / 'new'}")
    assert (code, "starts from round 0" in text) == (0, True)


def test_what_is_missing_is_named_with_what_to_do(ask, tmp_path, monkeypatch):
    monkeypatch.setenv("MATU_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    code, text = ask(experiment=[f"--config={EXPERIMENTS / 'vitb32.py'}"])
    assert code == 2
    assert "8 of 8 datasets are not prepared" in text
    assert "python -m matu_jax.prepare" in text
    assert "hf download" in text


def test_a_package_that_privacy_needs_is_named(ask, monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "dp_accounting" else known(name, *rest),
    )
    private = ["--config.privacy.clip_norm=1", "--config.privacy.noise_multiplier=1"]
    for program in (doctor.main, train.main):
        code, text = ask(*private, program=program)
        assert (code, "pip install 'matu_jax[privacy]'" in text) == (2, True)
    assert ask()[0] == 0


def test_extras_are_listed(ask, monkeypatch):
    code, text = ask()
    assert code == 0
    assert "privacy (for config.privacy)" in text
    monkeypatch.setitem(examination._EXTRAS, "prepare", (("json", "no_such_module"), "to prepare"))
    code, text = ask()
    assert code == 0
    assert "not: prepare (to prepare). Where they are needed: pip install 'matu_jax[NAME]'" in text


@pytest.mark.parametrize("platforms", ["cuda", "nonsense"])
@pytest.mark.parametrize("program", ["doctor", "train"])
def test_a_platform_that_is_not_there_is_a_message(ask, tmp_path, program, platforms):
    if platforms == "cuda" and jax.default_backend() == "gpu":
        pytest.skip("it is there")
    experiment = ask(program=lambda words: words[1:])[0]
    run = subprocess.run(
        [sys.executable, "-m", f"matu_jax.{program}", *experiment, f"--workdir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": platforms},
        cwd=EXPERIMENTS.parent,
    )
    text = run.stdout + run.stderr
    assert run.returncode == 2, text
    assert "Traceback" not in text
    assert "JAX finds no device" in text
    assert f"JAX_PLATFORMS is '{platforms}'. Unset it" in " ".join(text.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.roudns=3"], 'Did you mean "rounds"'),
        (["--config.algorithm=mattu"], 'Did you mean "matu"'),
        (["--config.data.tasks=hue/gratings"], "hue/gratings"),
        (["--workdri=x"], 'Did you mean "workdir"'),
    ],
)
def test_mistakes_are_said(ask, words, message):
    code, text = ask(*words)
    assert (code, message in text) == (2, True)


def test_what_does_not_fit_is_said(ask, monkeypatch, tmp_path):
    monkeypatch.setattr(examination, "memory_there", lambda device: 1000)
    code, text = ask()
    assert code == 0
    assert "are there. Lower config.local.parallel_slots" in text
    monkeypatch.setattr(examination.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    code, text = ask(f"--workdir={tmp_path / 'run'}")
    assert (code, "Give a --workdir on another disk" in text) == (2, True)


def test_an_accelerator_that_jax_does_not_use_is_a_note(ask, monkeypatch, tmp_path):
    sign = tmp_path / "driver"
    monkeypatch.setitem(examination._ACCELERATORS, "NVIDIA GPU", ((str(sign),), "pip install it"))
    assert "there is an NVIDIA GPU" not in ask()[1]
    sign.touch()
    code, text = ask()
    assert (code, "there is an NVIDIA GPU that JAX does not use: pip install it" in text) == (
        0,
        True,
    )
