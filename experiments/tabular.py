"""Regression on a table: four measurements of diabetes patients, each from all the others.

    python -m matu_jax.compare --config experiments/tabular.py --tune   # learning rates
    python -m matu_jax.compare --config experiments/tabular.py

Tasks, model and metrics are this file's own, entered into SOURCES and MODELS. The table comes with
scikit-learn: 442 patients, ten measurements and the progression of the disease after a year. A task
is one column, read from the ten others, with zeros where it stands itself. Patients are divided
once for all tasks: nobody is in the training data of one task and in the test data of another.
Results: results/tabular/report.md.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.datasets import load_diabetes

from matu_jax.comparison.plan import Comparison, Setting
from matu_jax.config import CheckpointConfig, Config, DataConfig, LocalConfig, ModelConfig
from matu_jax.data import SOURCES, Task
from matu_jax.models import MODELS, metrics
from matu_jax.models.modules import of_nnx

TARGETS = {"bmi": 2, "blood pressure": 3, "blood sugar": 9, "progression": 10}
SIZES = {"train": 300, "validation": 60, "test": 82}


def tasks(config):
    table, progression = load_diabetes(return_X_y=True, scaled=False)
    table = np.column_stack([table, progression])
    table = np.random.default_rng(config.seed).permutation(table)
    train = table[: SIZES["train"]]
    table = ((table - train.mean(axis=0)) / train.std(axis=0)).astype(np.float32)
    ends = np.cumsum(list(SIZES.values()))[:-1]
    parts = dict(zip(SIZES, np.split(table, ends), strict=True))

    def split(rows, column):
        others = np.arange(rows.shape[1]) != column
        return {"x": rows * others, "y": rows[:, column]}

    return [
        Task(
            name,
            *(split(rows, column) for rows in parts.values()),
            label_space=name,
            domain="diabetes",
            chance={"r2": 0.0},  # of the mean
        )
        for name, column in TARGETS.items()
    ]


def model(config, tasks, *, seed):
    rngs = nnx.Rngs(seed)
    last = nnx.Linear(32, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)  # starts at the mean
    net = nnx.Sequential(nnx.Linear(11, 32, rngs=rngs), nnx.tanh, last)

    def pair(found, batch):
        return found, batch["y"]

    return of_nnx(
        net,
        nnx.Param,
        outputs=lambda net, batch, task, key: net(batch["x"])[:, 0],
        loss=lambda found, batch: jnp.square(found - batch["y"]).mean(),
        metrics={"r2": metrics.r2(pair), "mean squared error": metrics.mean_squared_error(pair)},
    )


SOURCES["diabetes"], MODELS["mlp"] = tasks, model


def get_config():
    return Comparison(
        title="Regression on a table of patients",
        experiment=Config(
            rounds=10,
            data=DataConfig(source="diabetes", clients=8, tasks_per_client=2),
            model=ModelConfig("mlp"),
            local=LocalConfig(steps=20, batch_examples=16, learning_rate=3e-3),
            checkpoint=CheckpointConfig(every_rounds=10),
        ),
        settings={
            "diabetes": Setting(
                "Four regressions, eight clients with two each, so four holders of each, who have "
                "75 patients.",
                {},
                seconds=3,
            )
        },
        arms={
            "matu": {},
            "per_task": {"algorithm": "per_task"},
            "individual": {"algorithm": "individual"},
            "fedavg": {"algorithm": "fedavg"},
            "untrained": {"algorithm": "untrained", "rounds": 1, "local.steps": 1},
        },
        seeds=(0, 1, 2),
        search={"local.learning_rate": (3e-3, 1e-3, 3e-4, 1e-2)},
        trials=6,
        tuned="results/tabular/tuned.json",
    )
