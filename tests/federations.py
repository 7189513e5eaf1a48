"""Small federations, models and runs that several test files share."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
import tiny_clip
from jax.sharding import AxisType

import matu_jax as matu
from matu_jax import algorithms, models
from matu_jax.config import Config, DataConfig, EvaluationConfig, LocalConfig, ModelConfig
from matu_jax.data import ImageTask, Split
from matu_jax.simulation import rounds
from matu_jax.simulation.federation import Federation, federate

TINY = Config(
    rounds=3,
    data=DataConfig(tasks="hue/grating,ground/grating,hue/plaid", clients=3, examples_per_slot=16),
    model=ModelConfig(checkpoint="random", lora_rank=2, lora_targets=("query",)),
    local=LocalConfig(steps=2, batch_examples=4),
    evaluation=EvaluationConfig(every_rounds=2, batch_examples=16),
)


@pytest.fixture(scope="module")
def federation():
    whole = federate(TINY)
    few = tuple(
        dataclasses.replace(
            task,
            validation=Split(*(x[:16] for x in task.validation)),
            test=Split(*(x[:24] for x in task.test)),
        )
        for task in whole.tasks
    )
    return whole._replace(tasks=few)


def one_device():
    return jax.make_mesh((1,), ("slots",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def model(tmp_path_factory, federation):
    checkpoint = tiny.write_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny.safetensors", depth=2
    )
    config = dataclasses.replace(TINY.model, checkpoint=checkpoint)
    return models.build_classifier(config, federation.tasks)


def run(config, federation, model, start=None, mesh=None):
    algorithm = algorithms.build(config)
    for result in rounds.run(
        config, algorithm, model, federation, mesh=mesh or one_device(), start=start
    ):
        yield tiny.kept(result)


RUN = Config(
    rounds=2,
    clients_per_round=2,
    data=DataConfig(tasks="a,b", clients=3, tasks_per_client=2, examples_per_slot=6),
    model=ModelConfig(
        architecture="tiny_vit", checkpoint="random", lora_rank=2, lora_targets=("query",),
        head="trained",
    ),
    local=LocalConfig(steps=2, batch_examples=3),
    evaluation=EvaluationConfig(every_rounds=2, batch_examples=8),
)  # fmt: skip


def federation_of(config):
    rng = np.random.default_rng(0)

    def split():
        pictures = rng.integers(0, 256, (20, tiny_clip.SIZE, tiny_clip.SIZE, 3)).astype(np.uint8)
        return Split(pictures, np.arange(20, dtype=np.int32) % 3)

    tasks = tuple(
        ImageTask(n, split(), split(), split(), label_space=n, domain=n, class_names=tuple("abc"))
        for n in ("a", "b")
    )
    client, task = np.repeat(np.arange(3, dtype=np.int32), 2), np.tile([0, 1], 3).astype(np.int32)
    indices = [np.arange(6) for _ in client]
    weight = np.full(6, 6, np.float32)
    return Federation(tasks, matu.Slots(client, task, weight, 3, 2), indices)
