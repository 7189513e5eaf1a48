"""Rounds in groups of clients: what is kept of them, and that groups change nothing."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federations import one_device

from matu_jax import Task, algorithms, simulate
from matu_jax.algorithms.contract import by_axis
from matu_jax.config import (
    NO_DEFENCE,
    AttackConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    FailureConfig,
    LocalConfig,
    PrivacyConfig,
    SimulationConfig,
)
from matu_jax.models import Model, metrics
from matu_jax.simulation import batches
from matu_jax.simulation.batches import round_grid, round_groups
from matu_jax.simulation.federation import dealt_out
from matu_jax.simulation.programs import intake_shapes, what_is_kept

SIZE = 12
RAGGED = ((0, 1, 2), (0,), (1, 2), (2,), (0, 1), (1,), (0, 2))


def split(slope, seed, examples=64):
    x = np.random.default_rng(seed).normal(size=(examples, SIZE)).astype(np.float32)
    return {"x": x, "y": slope * x.sum(axis=1)}


TASKS = [
    Task(str(slope), *(split(slope, 3 * number + part) for part in range(3)))
    for number, slope in enumerate((-1.0, 0.5, 2.0))
]


def outputs(params, frozen, batch, task, key=None):
    return batch["x"] @ params["slope"] + params["bias"][0]


def loss(params, frozen, batch, task, key=None):
    return jnp.square(outputs(params, frozen, batch, task) - batch["y"]).mean()


R2 = metrics.r2(lambda outputs, batch: (outputs, batch["y"]))
MODEL = Model({"slope": jnp.zeros(SIZE), "bias": jnp.zeros(1)}, {}, loss, outputs, {"r2": R2})
CONFIG = SimulationConfig(
    rounds=3,
    data=DataConfig(clients=len(RAGGED), assignment=RAGGED, examples_per_slot=8),
    local=LocalConfig(steps=4, batch_examples=3, optimizer="sgd", learning_rate=0.02),
    evaluation=EvaluationConfig(every_rounds=2),
)
BYTES = 4 * 4 * (SIZE + 1) + 2 * 4 * (SIZE + 1)  # of a slot: vectors, and SGD's momentum


def in_groups(monkeypatch, slots):
    """Groups of so many slots."""
    small = functools.partial(batches.grid, vectors_bytes=slots * BYTES)
    monkeypatch.setattr(batches, "grid", small)


def run(config, model=MODEL, tasks=TASKS):
    results = []
    for result in simulate(tasks, model, config, mesh=one_device()):
        state = jax.tree.map(np.array, result.state)
        record = {k: v for k, v in result.record.items() if k != "seconds"}
        results.append((state, record, result.similarity))
    return results


def federation(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    return config, dealt_out(config, TASKS)


def test_a_group_has_whole_clients_and_every_slot_is_in_one(monkeypatch):
    for part in (0, 3):
        config, dealt = federation(clients_per_round=part, rounds=20)
        in_groups(monkeypatch, 4)
        cut = round_grid(config, dealt, one_device(), MODEL)
        assert (cut.slots, cut.chunks) == (4, 1)
        groups = round_groups(config, dealt, cut)
        for index in range(config.rounds):
            found = groups(index)
            assert len(found) <= cut.groups
            rows = np.concatenate([group.rows[group.there] for group in found])
            expected = batches.trained_slots(
                config, dealt.slots, batches.participants(config, dealt.slots, index)
            )
            np.testing.assert_array_equal(np.sort(rows), expected)
            clients = [set(dealt.slots.client[group.rows]) for group in found]
            assert sum(map(len, clients)) == len(set.union(*clients))
            for group in found:
                assert group.rows.shape == group.there.shape == group.number.shape == (4,)
                np.testing.assert_array_equal(
                    group.clients[group.number], dealt.slots.client[group.rows]
                )
        monkeypatch.undo()


def test_a_client_with_more_slots_than_fit_is_a_group(monkeypatch):
    config, dealt = federation()
    in_groups(monkeypatch, 1)
    cut = round_grid(config, dealt, one_device(), MODEL)
    assert cut == (4, 3, 1, 4)
    clients = [dealt.slots.client[g.rows].tolist() for g in round_groups(config, dealt, cut)(0)]
    assert clients == [[0, 0, 0], [1, 2, 2], [3, 4, 4], [5, 6, 6]]


SHAPED = {"fed_lora_b", "fedper", "fedrep", "ntk_fedavg"}  # need models of other shapes


@pytest.mark.parametrize("name", sorted({*algorithms.ALGORITHMS} - SHAPED))
def test_groups_change_no_bit(monkeypatch, name):
    config = dataclasses.replace(CONFIG, algorithm=name)
    whole = run(config)
    in_groups(monkeypatch, 4)
    chex.assert_trees_all_equal(run(config), whole)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "per_task"])
def test_sums_change_no_bit(monkeypatch, name):
    """Neither in groups nor in one go do they end elsewhere than the mean of all uploads."""
    config = dataclasses.replace(CONFIG, algorithm=name, defence=NO_DEFENCE, clients_per_round=5)
    algorithm = algorithms.build(as_config(config))
    assert what_is_kept(config, algorithm) == "sums"
    assert what_is_kept(
        dataclasses.replace(config, failures=FailureConfig(quorum=2)), algorithm
    ) == ("uploads")
    sums = run(config)
    in_groups(monkeypatch, 4)
    chex.assert_trees_all_equal(run(config), sums)
    assert algorithm.groups
    without = algorithm._replace(groups=algorithm.groups._replace(sums=None))
    monkeypatch.setitem(algorithms.ALGORITHMS, name, lambda config: without)
    chex.assert_trees_all_equal(run(config), sums)
    at_once = algorithm._replace(aggregate=algorithm.aggregate)
    assert at_once.groups is None
    monkeypatch.setitem(algorithms.ALGORITHMS, name, lambda config: at_once)
    chex.assert_trees_all_equal(run(config), sums)


def as_config(config):
    return Config(algorithm=config.algorithm, defence=config.defence)


@pytest.mark.parametrize(
    "changes",
    [
        {"failures": FailureConfig(dropout=0.3)},
        {"failures": FailureConfig(dropout=0.3, quorum=2)},
        {"attack": AttackConfig(kind="noise", share=0.4)},
        {"attack": AttackConfig(kind="sign_flip", share=0.4, colludes=True)},
        {"privacy": PrivacyConfig(clip_norm=1.0, noise_multiplier=0.1, seed=0)},
        {"clients_per_round": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["fedavg", "matu"])
def test_groups_change_nothing_of_what_happens_to_clients(monkeypatch, name, changes):
    config = dataclasses.replace(CONFIG, algorithm=name, defence=NO_DEFENCE, rounds=2, **changes)
    whole = run(config)
    in_groups(monkeypatch, 4)
    chex.assert_trees_all_equal(run(config), whole)


def test_sums_whose_rows_fail_are_scaled_up(monkeypatch):
    """Slots of task 1 diverge: what is expected of them does not come."""
    wrong = {"x": TASKS[1].train["x"], "y": np.full(64, 1e30, np.float32)}
    tasks = [TASKS[0], dataclasses.replace(TASKS[1], train=wrong), TASKS[2]]
    for name in ("fedavg", "per_task"):
        config = dataclasses.replace(CONFIG, algorithm=name, defence=NO_DEFENCE)
        algorithm = algorithms.build(as_config(config))
        with monkeypatch.context() as patch:
            in_groups(patch, 4)
            sums = run(config, tasks=tasks)
            without = algorithm._replace(groups=None)
            patch.setitem(algorithms.ALGORITHMS, name, lambda config, found=without: found)
            uploads = run(config, tasks=tasks)
        assert len(sums[0][1]["dropped"]) == 4
        chex.assert_trees_all_close(sums[0][0], uploads[0][0], rtol=2e-6, atol=0)


def test_what_is_kept_of_clients_is_kept_once():
    config, dealt = federation()
    rows, clients = dealt.slots.client.shape[0], dealt.slots.num_clients
    vector = SIZE + 1

    def numbers(name, **changes):
        changed = dataclasses.replace(config, algorithm=name, **changes)
        built = algorithms.build(Config(algorithm=name, defence=changed.defence))
        shapes = intake_shapes(changed, built, MODEL.base, dealt.slots)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert numbers("fedavg", defence=NO_DEFENCE) == vector + 1
    assert numbers("per_task", defence=NO_DEFENCE) == 3 * (vector + 1)
    assert numbers("fedavg") == clients * vector
    assert numbers("ties") == rows * vector
    assert numbers("matu") == clients * vector + rows * (2 + 1) + rows  # masks, and scales
    assert numbers("matu", attack=AttackConfig(kind="noise")) == rows * vector


def test_an_axis_of_another_name_is_refused():
    with pytest.raises(ValueError, match="found 'client', expected one of clients, slots, whole"):
        by_axis(("client", "slots"), (jnp.zeros(1), jnp.zeros(1)))
