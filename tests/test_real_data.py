"""From image files and a Hugging Face checkpoint to a trained run: every part is the real one."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_clip
from PIL import Image
from rich.console import Console

from matu_jax.config import Config, DataConfig, EvaluationConfig, LocalConfig, ModelConfig
from matu_jax.errors import UserError
from matu_jax.runs.commandline import Source
from matu_jax.runs.plan import check_inputs
from matu_jax.runs.preparing import prepare
from matu_jax.runs.training import train
from matu_jax.runs.workdir import opened
from matu_jax.simulation.federation import federate

pytest.importorskip("torch")
pytest.importorskip("transformers")

TASKS = ("eurosat", "mnist")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Image folders of two datasets whose classes differ in colour, and a tiny CLIP."""
    tiny_clip.register(monkeypatch)
    monkeypatch.setenv("MATU_JAX_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for name in TASKS:
        for split, count in (("train", 12), ("test", 4)):
            for label in range(10):
                folder = tmp_path / "folders" / name / split / f"{label}"
                folder.mkdir(parents=True)
                for i in range(count):
                    colour = np.array([25 * label, 255 - 25 * label, 128])
                    pixels = np.clip(colour + rng.integers(-20, 20, (20, 24, 3)), 0, 255)
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    tiny_clip.save(tiny_clip.clip_model(), tmp_path / "clip")
    tiny_clip.write_tokenizer(tmp_path / "clip")
    return tmp_path


def config_of(places):
    return Config(
        rounds=3,
        data=DataConfig(
            tasks=",".join(TASKS),
            folders=str(places / "folders"),
            clients=2,
            tasks_per_client=2,
            examples_per_slot=0,
        ),
        model=ModelConfig(
            architecture="tiny_clip", checkpoint=str(places / "clip"), logit_scale=0.0
        ),
        local=LocalConfig(steps=40, batch_examples=16, learning_rate=0.003),
        evaluation=EvaluationConfig(every_rounds=3),
    )


def test_prepare_then_train_learns(places):
    config, console = config_of(places), Console(quiet=True)
    with pytest.raises(UserError, match="2 of 2 datasets are not prepared"):
        check_inputs(config, Source(places / "experiment.py"))
    assert prepare(config, console)
    check_inputs(config, Source(places / "experiment.py"))
    federation = federate(config)
    for task in federation.tasks:
        assert isinstance(task.train.images, np.memmap)
        assert (len(task.train.labels), len(task.validation.labels)) == (108, 12)
        assert len(task.test.labels) == 40
        assert task.fingerprint
    indices = [federation.indices[row] for row in np.flatnonzero(federation.slots.task == 0)]
    assert sorted(np.concatenate(indices)) == list(range(108))

    workdir = places / "run"
    with opened(workdir, config):
        summary = train(config, "tiny", workdir, console)
    records = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < records[0]["loss"]
    assert summary["accuracy"]["mean"] > 0.25, summary["accuracy"]  # chance is 0.1
    assert summary["data_fingerprint"]["mnist"] == federation.tasks[1].fingerprint


def test_generated_tasks_and_real_models_do_not_mix(places):
    config = config_of(places)
    generated = dataclasses.replace(config.data, tasks="embedded8")
    with pytest.raises(ValueError, match="images of 32 pixels"):
        federate(dataclasses.replace(config, data=generated))
    unknown = dataclasses.replace(config.model, architecture="tiny_clap")
    with pytest.raises(UserError, match='Did you mean "tiny_clip"'):
        check_inputs(dataclasses.replace(config, model=unknown), Source(places / "experiment.py"))
    typo = dataclasses.replace(config.data, tasks="mnist,eurosta")
    with pytest.raises(ValueError, match="eurosat"):
        federate(dataclasses.replace(config, data=typo))
