"""The experiments of tasks that are no benchmark's: their arms, and what they are measured by."""

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import matu_jax
from matu_jax.comparison import plan
from matu_jax.config import DataConfig, ModelConfig, SimulationConfig
from matu_jax.data import SOURCES, SPLITS
from matu_jax.models import MODELS
from matu_jax.simulation.measures import main_measure, measure_of

ROOT = Path(matu_jax.__file__).parents[1]
OWN = {"tabular": ("diabetes", "mlp"), "dense": ("pixels", "dense"), "text": ("text", "decoder")}
ARMS = {"matu", "per_task", "individual", "fedavg", "untrained"}


@pytest.fixture(autouse=True)
def models_of_experiments(monkeypatch, tmp_path):
    monkeypatch.setenv("MATU_JAX_CACHE", str(tmp_path / "cache"))
    for source, model in OWN.values():
        monkeypatch.setitem(SOURCES, source, None)  # gone after the test
        monkeypatch.setitem(MODELS, model, None)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def read(name) -> Any:
    return runpy.run_path(str(ROOT / "experiments" / f"{name}.py"))


@pytest.mark.parametrize("name", [*OWN, "own_images"])
def test_a_proof_has_the_five_arms_and_three_seeds(name):
    comparison = read(name)["get_config"]()
    plan.check(comparison)
    assert set(comparison.arms) == ARMS
    assert len(comparison.seeds) == 3
    assert (ROOT / "experiments" / comparison.tuned).exists()
    found, tuning = plan.with_tuned(comparison, plan.Source(ROOT / f"experiments/{name}.py"))
    assert set(found.arms) == ARMS
    assert tuning is not None
    assert tuning["seed"] not in comparison.seeds


@pytest.mark.parametrize("name", [*OWN, "own_images"])
def test_the_results_of_a_proof_are_of_five_arms_and_three_seeds(name):
    file = ROOT / "experiments" / "results" / name / "comparison.json"
    found = json.loads(file.read_text("utf-8"))
    assert len(found["seeds"]) == 3
    (setting,) = found["settings"]
    assert setting["missing"] == []
    assert {arm["label"] for arm in setting["arms"]} == ARMS
    for arm in setting["arms"]:
        reached = arm[measure_of(arm).name]
        for values in (
            reached["per_seed"],
            [each["mean"] for each in reached["per_task"].values()],
        ):
            assert values
            assert np.isfinite(np.array(values, float)).all(), arm["label"]
        assert len(reached["per_seed"]) == 3


def test_dense_tasks_are_measured_each_by_its_own(monkeypatch):
    experiment = read("dense")
    monkeypatch.setitem(experiment["tasks"].__globals__, "SIZES", dict.fromkeys(SPLITS, 12))
    monkeypatch.setitem(experiment["tasks"].__globals__, "STEPS", 2)
    tasks = experiment["tasks"](DataConfig())
    assert [task.name for task in tasks][:5] == [
        "colours/grating",
        "height/grating",
        "edges/grating",
        "orientation/grating",
        "colours/plaid",
    ]
    model = experiment["model"](ModelConfig("dense"), tasks, seed=0)
    assert main_measure(model.metrics, tasks).name == "score"
    config = SimulationConfig(
        rounds=1, data=DataConfig(clients=4, tasks_per_client=2, examples_per_slot=6)
    )
    config = dataclasses.replace(config, local=dataclasses.replace(config.local, steps=2))
    (result,) = matu_jax.simulate(tasks, model, config)
    record = result.record
    own = record["score"]["test_per_task"]
    assert own["colours/plaid"] == record["mean iou"]["test_per_task"]["colours/plaid"]
    assert own["edges/plaid"] == record["r2"]["test_per_task"]["edges/plaid"]
    assert np.isnan(record["r2"]["test_per_task"]["colours/plaid"])
    assert record["score"]["test_mean"] == pytest.approx(np.mean(list(own.values())))
