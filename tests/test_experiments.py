"""The shipped experiments: each can be read, and the main one runs at full width."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import matu_jax
from matu_jax.data.datasets import DATASETS
from matu_jax.runs.commandline import read_config
from matu_jax.simulation.federation import task_names

ROOT = Path(matu_jax.__file__).parents[1]
EXPERIMENTS = sorted((ROOT / "experiments").glob("vit*.py"))


def program(*arguments, **environment):
    """Runs the training program as a user would, with as many CPU devices as it likes."""
    settings = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "matu_jax.train", *arguments],
        cwd=ROOT,
        env=settings | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_experiment_can_be_read_and_its_tasks_are_held(file):
    config, _, _ = read_config(["train", "--config", str(file)], "")
    names = task_names(config)
    assert len(names) in (8, 30)
    assert set(names) <= set(DATASETS)
    assert config.data.clients * config.data.tasks_per_client >= len(names)
    text = file.read_text()
    assert f"--config experiments/{file.name}" in text
    assert "{" not in text.split('"""')[1]  # nothing left to fill in


def test_without_network_and_checkpoint_one_quick_message_says_what_to_do(tmp_path):
    empty = {"HF_HOME": str(tmp_path / "hub"), "MATU_JAX_CACHE": str(tmp_path / "cache")}
    seconds, starting = [], []
    for _ in range(3):  # the quickest of three, since other tests share the processors
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import matu_jax.train"], check=True, cwd=ROOT)
        middle = time.perf_counter()
        done = program("--config", "experiments/vitb32.py", HF_HUB_OFFLINE="1", **empty)
        seconds.append(time.perf_counter() - middle)
        starting.append(middle - begin)
    assert done.returncode == 2
    for words in (
        "8 of 8 datasets are not prepared",
        "python -m matu_jax.prepare --config experiments/vitb32.py",
        "hf download openai/clip-vit-base-patch32",
        "--config.model.checkpoint=FOLDER",
    ):
        assert words in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    if (os.cpu_count() or 1) > 1:
        assert min(seconds) - min(starting) < 2
    assert not list(tmp_path.rglob("config.json"))


def test_vitb32_runs_at_full_width(tmp_path):
    done = program(
        "--config=experiments/vitb32.py",
        "--config.model.checkpoint=random",
        "--config.data=synthetic",
        "--config.model.compute_dtype=float32",  # CPUs emulate bfloat16, slowly
        "--config.data.clients=4",
        "--config.rounds=2",
        "--config.local.steps=2",
        "--config.local.batch_examples=2",
        "--config.evaluation.max_examples=2",
        "--config.evaluation.every_rounds=2",
        f"--workdir={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    assert "1,179,648 of 90,654,976" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["accuracy"]["per_task"]) == 8
    # One adapter of 1,179,648 float32, and two masks of a bit each, and two scales.
    bits = 1_179_648 * 32 + 2 * (1_179_648 + 32)
    assert summary["communication"]["uplink_bits_per_client_round"] == bits
    records = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[1]["seconds"]["local_training"] > 0
    assert all(x["loss"] is not None for x in records)
