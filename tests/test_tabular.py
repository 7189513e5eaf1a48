"""The table and the model of experiments/tabular.py, against scikit-learn's."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_diabetes

import matu_jax
from matu_jax.config import DataConfig, LocalConfig, ModelConfig, SimulationConfig
from matu_jax.data import SOURCES, SPLITS
from matu_jax.models import MODELS

FILE = Path(matu_jax.__file__).parents[1] / "experiments" / "tabular.py"


@pytest.fixture
def tabular(monkeypatch):
    for registry, name in ((SOURCES, "diabetes"), (MODELS, "mlp")):
        monkeypatch.setitem(registry, name, None)  # gone after the test
    spec = importlib.util.spec_from_file_location("tabular", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_whole_table_is_standardised_by_training_patients_alone(tabular):
    progression = tabular.tasks(DataConfig(seed=3))[-1]
    tables = {}
    for part in SPLITS:  # its task reads all other columns
        split = getattr(progression, part)
        tables[part] = np.column_stack([split["x"][:, :-1], split["y"]]).astype(np.float64)
    np.testing.assert_allclose(tables["train"].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(tables["train"].std(axis=0), 1, atol=1e-5)
    found = np.concatenate(list(tables.values()))
    table, last = load_diabetes(return_X_y=True, scaled=False)
    expected = np.column_stack([table, last])
    found, expected = ((x - x.mean(axis=0)) / x.std(axis=0) for x in (found, expected))
    order = [np.lexsort(np.round(x, 4).T) for x in (found, expected)]
    np.testing.assert_allclose(found[order[0]], expected[order[1]], atol=1e-4)


def test_regressions_begin_at_the_mean_and_are_learnt_in_a_federation(tabular):
    tasks = tabular.tasks(DataConfig())
    model = tabular.model(ModelConfig("mlp"), tasks, seed=0)
    found = model.outputs(model.base, model.frozen, tasks[0].test, np.int32(0))
    np.testing.assert_array_equal(found, np.zeros(82))
    config = SimulationConfig(
        rounds=4,
        data=DataConfig(clients=4, tasks_per_client=2),
        local=LocalConfig(steps=20, batch_examples=16, learning_rate=1e-2),
    )
    *_, last = matu_jax.simulate(tasks, model, config)
    assert all(value > 0 for value in last.record["r2"]["test_per_task"].values())
    assert last.record["r2"]["test_mean"] > 0.2
