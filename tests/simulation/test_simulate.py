"""Federations of one's own tasks and models: regressions that are worked out again in numpy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from sklearn.metrics import r2_score

import matu_jax
from matu_jax.config import (
    AttackConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LocalConfig,
    ModelConfig,
    SimulationConfig,
)
from matu_jax.data.batching import round_indices
from matu_jax.models import Model, metrics
from matu_jax.simulation.federation import dealt_out
from matu_jax.simulation.measures import Measure

CONFIG = SimulationConfig(
    algorithm="individual",
    rounds=2,
    data=DataConfig(clients=3, tasks_per_client=2),
    local=LocalConfig(steps=4, batch_examples=5, optimizer="sgd", momentum=0.0, learning_rate=0.1),
)
SLOPES = {"up": 1.0, "down": -1.0, "steep": 3.0}


def task_of(name, sizes=(40, 21, 33)):
    rng = np.random.default_rng(len(name))

    def split(examples):
        x = rng.normal(size=(examples, 2)).astype(np.float32)
        return {"x": x, "y": (SLOPES[name] * x[:, 0] + x[:, 1]).astype(np.float32)}

    return matu_jax.Task(name, *map(split, sizes))


def outputs(params, frozen, batch, task, key=None):
    return batch["x"] @ params["w"] + frozen["shift"]


def loss(params, frozen, batch, task, key=None):
    return jnp.square(outputs(params, frozen, batch, task) - batch["y"]).mean()


R2 = metrics.r2(lambda outputs, batch: (outputs, batch["y"]))
MSE = metrics.mean_squared_error(lambda outputs, batch: (outputs, batch["y"]))
MODEL = Model(
    {"w": jnp.full(2, 0.5)}, {"shift": jnp.float32(0.1)}, loss, outputs, {"r2": R2, "mse": MSE}
)
TASKS = [task_of(name) for name in SLOPES]


def mesh_of(devices):
    return jax.make_mesh(
        (devices,), ("slots",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


def last(config=CONFIG, model=MODEL, tasks=TASKS, devices=1):
    return list(matu_jax.simulate(tasks, model, config, mesh=mesh_of(devices)))[-1]


@pytest.fixture(scope="module")
def result():
    return last()


def test_training_is_that_of_a_plain_loop(result):
    federation = dealt_out(CONFIG, TASKS)
    for slot, (client, number) in enumerate(
        zip(federation.slots.client, federation.slots.task, strict=True)
    ):
        weights, train = np.full(2, 0.5), TASKS[number].train
        for index in range(CONFIG.rounds):
            drawn = round_indices(
                [federation.indices[slot]],
                np.array([client]),
                np.array([number]),
                seed=0,
                round_index=index,
                steps=4,
                batch_size=5,
            )
            for rows in drawn[0]:
                x, y = train["x"][rows], train["y"][rows]
                weights -= 0.1 * 2 * x.T @ (x @ weights + 0.1 - y) / 5
        found = 0.5 + np.asarray(result.vectors["w"][slot])
        np.testing.assert_allclose(found, weights, rtol=1e-4, atol=1e-5)


def test_metrics_are_of_every_example_once(result):
    slots = dealt_out(CONFIG, TASKS).slots
    expected = []
    for slot, number in enumerate(slots.task):
        test = TASKS[number].test
        predicted = test["x"] @ (0.5 + np.asarray(result.vectors["w"][slot])) + 0.1
        expected.append(r2_score(test["y"], predicted))
    record = result.record
    np.testing.assert_allclose(record["r2"]["test_per_slot"], expected, rtol=1e-4)
    by_task = [np.mean(np.array(expected)[slots.task == t]) for t in range(3)]
    assert record["r2"]["test_per_task"] == pytest.approx(dict(zip(SLOPES, by_task, strict=True)))
    assert record["r2"]["test_mean"] == pytest.approx(np.mean(by_task))
    assert record["mse"].keys() == record["r2"].keys()
    assert "accuracy" not in record


def test_devices_and_slots_at_once_change_nothing(result):
    config = dataclasses.replace(CONFIG, local=dataclasses.replace(CONFIG.local, parallel_slots=2))
    other = last(config, devices=2)
    np.testing.assert_allclose(other.vectors["w"], result.vectors["w"], atol=1e-6)


def test_matu_keeps_unlike_tasks_apart():
    """Opposite slopes: one model for all explains nothing, one unified vector nearly everything."""
    config = dataclasses.replace(CONFIG, rounds=8, local=LocalConfig(steps=20, learning_rate=0.03))
    found = {
        name: last(dataclasses.replace(config, algorithm=name)).record["r2"]["test_per_task"]
        for name in ("matu", "fedavg")
    }
    assert found["matu"]["down"] > 0.5 > 0 > found["fedavg"]["down"]


def test_heads_belong_to_tasks():
    def with_head(params, frozen, batch, task, key=None):
        return batch["x"] @ params["shared"]["w"] * params["head"]["slope"]

    def its_loss(params, frozen, batch, task, key=None):
        return jnp.square(with_head(params, frozen, batch, task) - batch["y"]).mean()

    base = {"shared": {"w": jnp.ones(2)}, "head": {"slope": jnp.ones(1)}}
    model = Model(base, {}, its_loss, with_head, {"r2": R2}, trains_heads=True)
    result = last(dataclasses.replace(CONFIG, algorithm="fedavg"), model)
    slots = dealt_out(CONFIG, TASKS).slots
    assert len(np.unique(np.asarray(result.vectors["shared"]["w"]), axis=0)) == 1
    slopes = np.asarray(result.vectors["head"]["slope"])[:, 0]
    for number in range(3):
        assert len(set(slopes[slots.task == number].tolist())) == 1
    assert len(set(slopes.tolist())) == 3


def replaced(**fields):
    return dataclasses.replace(MODEL, **fields)


MEAN = metrics.Metric(lambda outputs, batch: {"all": outputs.sum()}, lambda sums: sums["all"])
ONE = jnp.ones(1)
LOGITS = metrics.accuracy(lambda outputs, batch: (batch["x"], batch["y"]))
NOTHING = metrics.Metric(lambda outputs, batch: {}, lambda sums: 0)
FAILS = metrics.Metric(lambda outputs, batch: outputs, lambda sums: 1 / 0)
NO_NAN = {"x": np.zeros((3, 2), np.float32), "y": np.zeros(3, np.float32)}


@pytest.mark.parametrize(
    ("config", "model", "words"),
    [
        ({"model": ModelConfig(lora_rank=4)}, MODEL, "config.model: found .*simulate takes tasks"),
        ({"data": DataConfig(tasks="a")}, MODEL, "config.data.tasks: found 'a'"),
        (
            {"data": DataConfig(dirichlet_alpha=0.5)},
            MODEL,
            "dirichlet_alpha: found 0.5.*'up' is no",
        ),
        ({"attack": AttackConfig("label_flip", share=1.0)}, MODEL, "attack.kind: .*about labels"),
        ({"data": DataConfig(sites="there")}, MODEL, "config.data.sites: found 'there'"),
        ({"data": DataConfig(manifest="m.csv")}, MODEL, "config.data.manifest: found 'm.csv'"),
        ({"checkpoint": CheckpointConfig(keep=7)}, MODEL, "config.checkpoint: found .*no files"),
        ({"rounds": 0}, MODEL, "config.rounds: found 0, expected at least 1"),
        ({"algorithm": "ntk_fedavg"}, MODEL, r"needs Model\(..., linearise=...\)"),
        (
            {},
            replaced(loss=lambda p, f, b, *_: outputs(p, f, b, 0)),
            r"model.loss: returned float32\[13\], expected one float",
        ),
        ({}, replaced(loss=lambda *_: None), "model.loss: returned NoneType, expected one float"),
        ({}, replaced(loss=lambda *_: (1.0, {})), "model.loss: returned tuple, expected one float"),
        (
            {},
            replaced(loss=lambda p, f, b, *_: b["z"].mean()),
            r"model.loss: KeyError: 'z' \(.*test_simulate.py, line \d+\)",
        ),
        ({}, replaced(outputs=lambda p, *_: p["v"]), "model.outputs: KeyError: 'v'"),
        (
            {},
            replaced(loss=lambda p, f, b, *_: (b["x"] @ jnp.ones(3)).mean()),
            r"model.loss: TypeError: dot_general.*\(\S*test_simulate.py, line \d+\)",
        ),
        (
            {},
            replaced(outputs=lambda p, f, b, *_: (b["x"] @ p["w"], p["w"])),
            r"model.outputs: 1: found \[2\], expected \[13, ...\]",
        ),
        (
            {"local": LocalConfig(weight_decay=0.1)},
            MODEL,
            "weight_decay: found 0.1, but config.loc",
        ),
        ({"local": LocalConfig(momentum=0.5)}, MODEL, "momentum: found 0.5, .* set it to 'sgd'"),
        ({}, replaced(outputs=lambda *_: {}), "model.outputs: returned no array"),
        ({}, replaced(base={"a/b": ONE, "a": {"b": ONE}}), "base: two leaves have the path a/b"),
        ({}, replaced(metrics={"all": LOGITS}), r"\['all'\].sums: .*found \[13, 2\] and expected"),
        ({}, replaced(base={}), "model.base: found no array"),
        ({}, replaced(base={"w": jnp.ones(2, int)}), "base: w: found int32, expected an array of"),
        ({}, replaced(base={"w": 0.5}), "base: w: found float, expected an array of floats"),
        ({}, replaced(base={"w": jnp.array([jnp.inf])}), "base: w: holds a number that is not fin"),
        ({}, replaced(trains_heads=True), "base: found w; with trains_heads expected"),
        ({}, replaced(metrics={}), "model.metrics: found none"),
        ({}, replaced(metrics={"r2": outputs}), r"metrics\['r2'\]: found function, expected a"),
        ({}, replaced(metrics={"a\n": R2}), "expected 1 to 60 printable characters"),
        ({}, replaced(metrics={"no": NOTHING}), r"metrics\['no'\].sums: returned no array"),
        ({}, replaced(metrics={"no": FAILS}), r"metrics\['no'\].value: ZeroDivisionError: .*line"),
        ({}, replaced(metrics={"loss": R2}), "none of the names that records and summaries have"),
        (
            {},
            replaced(metrics={"mean": MEAN}),
            r"model.metrics\['mean'\].sums: all: found float32\[\], expected",
        ),
    ],
)
def test_what_breaks_the_contract_is_refused(config, model, words):
    own = {each.name: getattr(CONFIG, each.name) for each in dataclasses.fields(CONFIG)}
    made = (Config if "checkpoint" in config else SimulationConfig)(**own | config)
    with pytest.raises(ValueError, match=words):
        last(made, model)


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"test": {"x": NO_NAN["x"]}}, "'test' against one of 'train'.*missing leaves: y"),
        ({"test": NO_NAN | {"y": np.zeros(2, np.float32)}}, "differ in their number of examples"),
        ({"test": NO_NAN | {"y": np.zeros(3, int)}}, "y: found int64, expected float32"),
        (
            {"validation": NO_NAN | {"y": np.array([0, np.nan, 1], np.float32)}},
            "NaN, first in example 1",
        ),
        (
            {"test": NO_NAN | {"y": np.array([0, 1, np.inf], np.float32)}},
            "y holds a number that is infinite in float32, first in example 2",
        ),
        ({"train": {"x": np.array([1.0, 1e300])}}, "infinite in float32, first in example 1"),
        ({"train": {"x": np.ma.zeros(3)}}, "x is MaskedArray"),
        ({"train": {"x": np.zeros(3, ">f4")}}, "x holds >f4, expected numbers of at most 64 bits"),
        ({"chance": {"r2": "0"}}, "chance.*found '0', expected a finite"),
        ({"train": {"x": 1.7e9 + np.arange(9.0)}}, "differ by less than float32 can tell"),
        ({"sites": {"train": [0, 1, 1]}}, "sites: found 0 for the split 'train', expected a name"),
        ({"train": {}}, "there is no array"),
        ({"train": {"x": np.array(["a", "b"])}}, "x holds <U1, expected numbers"),
        ({"train": {"x": np.array([0, 2**31])}}, "x runs from 0 to 2147483648, beyond the 32 bits"),
        ({"train": {"x": 3.0}}, "x is float of shape"),
        ({"test": {"x": NO_NAN["x"][:0], "y": NO_NAN["y"][:0]}}, "there is no example"),
    ],
)
def test_what_is_no_task_is_refused(splits, words):
    with pytest.raises(ValueError, match=rf"(?s)task 'mine'.*{words}"):
        matu_jax.Task("mine", **{"train": NO_NAN, "validation": NO_NAN, "test": NO_NAN} | splits)


def test_tasks_of_two_forms_are_refused():
    split = {"x": np.zeros((9, 3), np.float32), "y": np.zeros(9, np.float32)}
    other = matu_jax.Task("other", split, split, split)
    with pytest.raises(ValueError, match=r"(?s)'other' against one of 'up'.*x: found \(3,\)"):
        last(tasks=[*TASKS, other])


@pytest.mark.parametrize(
    ("dtype", "number"), [(jnp.int32, 1_000_000), (jnp.int32, -(2**31)), (jnp.uint32, 3 * 10**9)]
)
def test_sums_of_integers_do_not_overflow(dtype, number):
    def sums(outputs, batch):
        return {"sum": jnp.full(len(batch["y"]), number, dtype), "all": jnp.ones(len(batch["y"]))}

    mean = metrics.Metric(sums, lambda sums: sums["sum"] / sums["all"])
    tasks = [task_of(name, (5, 3000, 7)) for name in SLOPES]
    record = last(dataclasses.replace(CONFIG, rounds=1), replaced(metrics={"mean": mean}), tasks)
    assert record.record["mean"]["validation_per_task"] == dict.fromkeys(SLOPES, float(number))


def test_arguments_that_are_none_of_these_are_refused():
    cases: Any = (
        (TASKS, {"rounds": 1}, None, "config: found dict, expected a SimulationConfig"),
        (MODEL, CONFIG, None, "tasks: found Model, expected some matu_jax.Task"),
        (
            TASKS,
            CONFIG,
            jax.make_mesh((1,), ("x",)),
            r"mesh: found the axes \('x',\), expected one",
        ),
    )
    for tasks, config, mesh, words in cases:
        with pytest.raises(ValueError, match=words):
            matu_jax.simulate(tasks, MODEL, config, mesh=mesh)
    config = dataclasses.replace(CONFIG, rounds=1)
    assert len(list(matu_jax.simulate((task for task in TASKS), MODEL, config))) == 1


def test_tasks_of_one_name_are_refused():
    with pytest.raises(ValueError, match="tasks: found the tasks up, up; expected at least one"):
        last(tasks=[TASKS[0], TASKS[0]])
    with pytest.raises(ValueError, match="tasks: found the tasks none"):
        last(tasks=[])
    with pytest.raises(ValueError, match=r"found dict among tasks, expected matu_jax\.Task"):
        last(tasks=[NO_NAN])


def test_a_metric_is_measured_on_the_tasks_that_ask_for_it_alone():
    """Its value need not be defined on others, such as that of a class which they lack."""

    def sums(outputs, batch):
        return {"far": jnp.abs(batch["y"]) > 5, "all": jnp.ones_like(batch["y"], jnp.int32)}

    def value(sums):
        assert sums["far"] == 0
        return 1 / sums["all"]

    tasks = [
        dataclasses.replace(task, metrics=("r2",) if task.name == "steep" else ("r2", "near"))
        for task in TASKS
    ]
    assert [(np.abs(task.test["y"]) > 5).any() for task in tasks] == [False, False, True]
    model = replaced(metrics={"r2": R2, "near": metrics.Metric(sums, value)})
    record = last(dataclasses.replace(CONFIG, rounds=1), model, tasks).record
    found = record["near"]["test_per_task"]
    assert found == pytest.approx({"up": 1 / 33, "down": 1 / 33, "steep": np.nan}, nan_ok=True)


def test_the_chance_of_no_metric_is_refused():
    tasks = [dataclasses.replace(task, chance={"rr2": 0.0}) for task in TASKS]
    with pytest.raises(ValueError, match=r"'up': chance: found 'rr2', no metric.*mean \"r2\""):
        last(tasks=tasks)


def test_the_face_imports_what_is_heavy_when_asked():
    assert matu_jax.simulate.__module__ == "matu_jax.simulation.simulate"
    with pytest.raises(AttributeError, match="no attribute 'simulated'"):
        _ = matu_jax.simulated  # pyright: ignore[reportAttributeAccessIssue]


POSITIVE = metrics.accuracy(lambda outputs, batch: (outputs > 0, batch["y"] > 0))


@pytest.mark.parametrize("metrics", [MODEL.metrics, {"accuracy": POSITIVE}])
@pytest.mark.parametrize("wrong", [jnp.nan, jnp.inf])
def test_a_slot_that_diverged_makes_no_round_the_best(metrics, wrong):
    """Outputs that are not finite are infinitely bad; they are not left out of a mean."""

    def diverging(params, frozen, batch, task, key=None):
        found = outputs(params, frozen, batch, task)
        return jnp.where(task == 1, wrong, found)

    model = replaced(outputs=diverging, metrics=metrics)
    (first, *_) = matu_jax.simulate(TASKS, model, CONFIG)
    name = next(iter(metrics))
    assert not np.isfinite(first.record[name]["test_mean"])
    by_task = list(first.record[name]["test_per_task"].values())
    assert [bool(np.isfinite(value)) for value in by_task] == [True, False, True]
    assert Measure(name).rank(first.record[name]["test_mean"]) == -np.inf
