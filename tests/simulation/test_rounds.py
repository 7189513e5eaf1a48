import dataclasses
import functools
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_clip
from federations import RUN, TINY, federation_of, one_device, run
from jax.sharding import AxisType

from matu_jax import algorithms, models
from matu_jax.config import Config, EvaluationConfig, FedProxConfig, LocalConfig, ModelConfig
from matu_jax.data import Split
from matu_jax.runs.checkpoints import Checkpoints
from matu_jax.simulation import batches, evaluate, programs, rounds
from matu_jax.simulation import memory as memory_module
from matu_jax.simulation.batches import round_grid
from matu_jax.simulation.federation import federate
from matu_jax.simulation.local import local_training
from matu_jax.simulation.memory import fitted, predicted_bytes
from matu_jax.simulation.participation import participants, trained_slots
from matu_jax.simulation.programs import shards_server
from matu_jax.simulation.relatedness import related


@pytest.fixture(scope="module")
def uninterrupted(federation, model):
    return list(run(TINY, federation, model))


def test_records_say_what_happened(uninterrupted, federation):
    assert [r.round for r in uninterrupted] == [1, 2, 3]
    assert uninterrupted[0].record["accuracy"] is None
    last = uninterrupted[-1].record
    accuracy = last["accuracy"]
    assert set(accuracy["test_per_task"]) == {task.name for task in federation.tasks}
    assert accuracy["test_mean"] == pytest.approx(np.mean(list(accuracy["test_per_task"].values())))
    assert all(round(a * 24, 6).is_integer() for a in accuracy["test_per_slot"])
    assert last["clients"] == [0, 1, 2]
    assert last["uplink_bits"] > 0
    assert last["similarity_auc"] is not None
    assert uninterrupted[-1].similarity.shape == (3, 3)


def test_nothing_compiles_after_every_program_has_run(uninterrupted):
    assert uninterrupted[0].record["seconds"]["compile"] > 0
    assert uninterrupted[2].record["seconds"]["compile"] == 0  # evaluation ran in round 2


@pytest.mark.parametrize("done", [1, 2])
def test_resumed_equals_uninterrupted_bit_for_bit(uninterrupted, federation, model, done):
    resumed = list(run(TINY, federation, model, start=(done, uninterrupted[done - 1].state)))
    assert [r.round for r in resumed] == [*range(done + 1, 4)]
    chex.assert_trees_all_equal(resumed[-1].state, uninterrupted[-1].state)
    assert resumed[-1].record["accuracy"] == uninterrupted[-1].record["accuracy"]


@pytest.mark.parametrize("shards", [False, True])
def test_what_replaces_a_part_of_an_algorithm_runs(federation, model, shards, monkeypatch):
    """On several devices too, with as many parameters as the server is sharded from."""
    monkeypatch.setattr(programs, "SHARDED_FROM", 0 if shards else 10**12)
    mesh = jax.make_mesh((4,), ("slots",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    built = algorithms.build(TINY)
    assert shards_server(model, built, mesh) == shards
    before = jax.tree.leaves(built.traffic.kept(built.init(model.base, federation.slots)))
    for mine in (
        built._replace(aggregate=lambda state, uploads, slots: (state, {})),
        built._replace(upload=lambda v, s: jax.tree.map(jnp.zeros_like, built.upload(v, s))),
        built.__replace__(aggregate=lambda state, uploads, slots: (state, {})),
    ):
        (result,) = rounds.run(
            dataclasses.replace(TINY, rounds=1), mine, model, federation, mesh=mesh
        )
        for found, expected in zip(
            jax.tree.leaves(mine.traffic.kept(result.state)), before, strict=True
        ):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("devices", "shards"), [(4, False), (8, False), (4, True)])
def test_number_of_devices_does_not_change_the_result(
    federation, model, devices, shards, monkeypatch
):
    """6 slots, and the parameters of the server's arithmetic if they are many."""
    monkeypatch.setattr(programs, "SHARDED_FROM", 0 if shards else 10**12)
    # Plain SGD: Adam's first steps divide rounding noise by rounding noise where gradients vanish.
    local = dataclasses.replace(TINY.local, optimizer="sgd", learning_rate=0.01)
    config = dataclasses.replace(TINY, rounds=1, local=local)
    mesh = jax.make_mesh(
        (devices,), ("slots",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    (one,), (many,) = (
        list(run(config, federation, model)),
        list(run(config, federation, model, mesh=mesh)),
    )
    chex.assert_trees_all_close(many.state, one.state, atol=1e-6, rtol=1e-4)
    assert many.record["accuracy"] == one.record["accuracy"]


def test_a_sharded_server_goes_on_from_its_checkpoint_on_one_device(
    federation, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(programs, "SHARDED_FROM", 0)
    mesh = jax.make_mesh((4,), ("slots",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    algorithm = algorithms.build(TINY)
    results, similar = [], []
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for result in rounds.run(TINY, algorithm, model, federation, mesh=mesh):
            leaves = jax.tree.leaves(result.state)
            assert any(not leaf.sharding.is_fully_replicated for leaf in leaves)
            checkpoints.save(result.round, result.state, {})
            results.append(result.record)
            similar.append(result.similarity)
    assert results[2]["seconds"]["compile"] == 0  # evaluation ran in round 2
    shutil.rmtree(tmp_path / "3")
    target = jax.eval_shape(lambda: algorithm.init(model.base, federation.slots))
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        found = checkpoints.restore(target)
    assert found is not None
    (last,) = run(TINY, federation, model, start=found[:2])
    assert last.record["loss"] == pytest.approx(results[2]["loss"], rel=1e-4)
    assert last.similarity is not None
    np.testing.assert_allclose(last.similarity, similar[2], atol=2e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"trainable": "full"}, "matu": {"precision": "int8"}},
        {"matu": {"downloads": "task_vectors", "precision": "int8"}},
        {"privacy": {"clip_norm": 1.0, "noise_multiplier": 0.1, "seed": 0}},
        {"attack": {"kind": "noise", "share": 0.4}},
    ],
    ids=str,
)
def test_a_sharded_server_has_its_part_of_stacked_blocks(monkeypatch, changes):
    """Three blocks are one leaf, of which four devices have equal parts; heads train as well."""
    tiny_clip.register(monkeypatch)
    config = dataclasses.replace(
        RUN,
        algorithm="matu",
        local=dataclasses.replace(RUN.local, optimizer="sgd", learning_rate=0.01),
    )
    for block, fields in changes.items():
        block_config = dataclasses.replace(getattr(config, block), **fields)
        config = dataclasses.replace(config, **{block: block_config})
    federation = federation_of(config)
    model = models.build_classifier(config.model, federation.tasks)
    one = list(run(config, federation, model))
    here = []

    def noted(state):
        for leaf in jax.tree.leaves(state):
            if leaf.shape[-1] >= 32:
                here.append(leaf.addressable_shards[0].data.size / leaf.size)
        return state

    monkeypatch.setattr(programs, "SHARDED_FROM", 0)
    monkeypatch.setattr(rounds, "agreed", noted)
    mesh = jax.make_mesh((4,), ("slots",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    many = list(run(config, federation, model, mesh=mesh))
    assert here
    assert set(here) == {0.25}
    vectors = [  # not the masks: where a gradient vanishes (biases of keys), signs are of rounding
        algorithms.build(config).download(results[-1].state, federation.slots)
        for results in (many, one)
    ]
    chex.assert_trees_all_close(*vectors, atol=1e-6, rtol=1e-4)
    assert many[-1].record["accuracy"] == one[-1].record["accuracy"]
    for key in ("uplink_bits", "downlink_bits", "uplink_frame_bits", "downlink_frame_bits"):
        assert many[-1].record[key] == one[-1].record[key]


def test_a_server_is_sharded_over_devices_that_divide_the_parameters(model, monkeypatch):
    def shares(count):
        mesh = jax.make_mesh((count,), ("slots",), axis_types=(AxisType.Auto,),
                             devices=jax.devices()[:count])  # fmt: skip
        return shards_server(model, algorithms.build(TINY), mesh)

    assert [shares(count) for count in (1, 4)] == [False, False]  # few parameters
    monkeypatch.setattr(programs, "SHARDED_FROM", 0)
    assert [shares(count) for count in (1, 2, 4, 5)] == [False, True, True, False]


def test_seed_changes_the_result(uninterrupted, federation, model):
    other = list(run(dataclasses.replace(TINY, seed=1, rounds=1), federation, model))
    assert other[0].record["loss"] != uninterrupted[0].record["loss"]


@pytest.mark.parametrize("name", sorted(algorithms.ALGORITHMS))
def test_every_algorithm_runs_in_parts_and_goes_on_from_disk(federation, model, name, tmp_path):
    """One of three clients a round; after the first, a run from the checkpoint equals the other."""
    config = dataclasses.replace(
        TINY,
        algorithm=name,
        clients_per_round=1,
        rounds=2,
        evaluation=EvaluationConfig(every_rounds=2, batch_examples=16),
    )
    results = list(run(config, federation, model))
    for result in results:
        assert len(result.record["clients"]) == 1
        if name == "individual":
            assert result.record["uplink_bits"] == 0
            present = np.isin(federation.slots.client, result.record["clients"])
            moved = [
                bool(np.any(np.stack([x[s].any() for x in jax.tree.leaves(result.state)])))
                for s in range(6)
            ]
            if result.round == 1:
                np.testing.assert_array_equal(moved, present)
    assert np.isfinite(results[-1].record["accuracy"]["test_mean"])
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, results[0].state, {})
        target = jax.eval_shape(algorithms.build(config).init, model.base, federation.slots)
        found = checkpoints.restore(target)
    assert found is not None
    (resumed,) = run(config, federation, model, start=found[:2])
    chex.assert_trees_all_equal(resumed.state, results[1].state)
    for key in ("accuracy", "loss", "uplink_bits", "downlink_bits", "clients"):
        assert resumed.record[key] == results[1].record[key]


@pytest.mark.parametrize("name", ["matu", "individual"])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_heads_of_both_kinds_in_one_run(federation, model, name, head):
    """The exception is task 2; a frozen head stays zero at clients and server."""
    other = {"frozen": "trained", "trained": "frozen"}[head]
    choices = dataclasses.replace(
        TINY.model, checkpoint="random", head=head, task_heads=(("hue/plaid", other),)
    )
    config = dataclasses.replace(TINY, algorithm=name, rounds=1, model=choices)
    mixed = models.build_classifier(config.model, federation.tasks)
    (result,) = run(config, federation, mixed)
    assert np.isfinite(result.record["accuracy"]["test_mean"])
    slots = federation.slots
    vectors = algorithms.build(config).download(result.state, slots)
    moved = np.abs(np.asarray(vectors["head"]["kernel"])).sum(axis=(1, 2)) > 0
    kind = np.where(slots.task == 2, other, head)
    np.testing.assert_array_equal(moved, kind == "trained")


def test_participants_are_drawn_anew_and_every_round_trains_as_many_slots():
    config = dataclasses.replace(
        TINY, clients_per_round=2, data=dataclasses.replace(TINY.data, clients=4)
    )
    client = np.array([0, 0, 0, 1, 2, 2, 3])
    slots = rounds.Slots(client, np.zeros(7, int), np.ones(7, np.float32), 4, 1)
    drawn = set()
    for index in range(20):
        chosen = participants(config, slots, index)
        rows = trained_slots(config, slots, chosen)
        assert chosen.sum() == 2
        assert len(rows) == 5 == len(set(rows))
        assert set(np.flatnonzero(chosen[client])) <= set(rows)
        drawn.add(tuple(np.flatnonzero(chosen)))
    assert len(drawn) > 3


def test_a_slot_that_diverges_is_dropped_by_name(federation, model):

    def loss(params, frozen, batch, task, key=None):
        out = model.loss(params, frozen, batch, task, key)
        return out * jax.numpy.where(batch.images[0, 0, 0, 0] == 255, jax.numpy.nan, 1.0)

    marked = federation.tasks[2].train.images.copy()
    marked[:, 0, 0, 0] = 255
    others = [
        dataclasses.replace(
            task, train=Split(np.minimum(task.train.images, 254), task.train.labels)
        )
        for task in federation.tasks[:2]
    ]
    bad = dataclasses.replace(
        federation.tasks[2], train=Split(marked, federation.tasks[2].train.labels)
    )
    config = dataclasses.replace(TINY, rounds=1)
    results = list(
        run(
            config,
            federation._replace(tasks=(*others, bad)),
            dataclasses.replace(model, loss=loss),
        )
    )
    dropped = results[0].record["dropped"]
    holders = federation.slots.client[federation.slots.task == 2].tolist()
    assert [d["client"] for d in dropped] == holders
    assert {d["task"] for d in dropped} == {"hue/plaid"}
    chex.assert_tree_all_finite(results[0].state)


def test_related_tasks_share_a_label_space(federation):
    np.testing.assert_array_equal(related(federation.tasks), [[1, 0, 1], [0, 1, 0], [1, 0, 1]])


def test_predicted_memory_is_near_what_xla_needs(federation):
    """The part that grows with the model and the batch: a step's activations."""
    config = dataclasses.replace(
        TINY, local=LocalConfig(steps=2, batch_examples=64), model=ModelConfig(checkpoint="random")
    )
    model = models.build_classifier(config.model, federation.tasks)
    algorithm = algorithms.build(config)
    predicted = predicted_bytes(config, model, algorithm, federation, one_device())
    local = local_training(model, config.local, algorithm.local, one_device())
    vectors = jax.tree.map(lambda x: np.zeros((6, *x.shape), np.float32), model.base)
    images = np.zeros((6, 2, 64, 32, 32, 3), np.uint8)
    labels = np.zeros((6, 2, 64), np.int32)
    shapes = (jax.eval_shape(local.begin, vectors), vectors, np.zeros((6, 3), np.int32))
    compiled = (
        jax.jit(local.advance)
        .lower((model.base, model.frozen), *shapes, Split(images, labels))
        .compile()
    )
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert 0.5 < predicted["activations"] / analysis.temp_size_in_bytes < 2


def test_on_an_accelerator_as_many_slots_train_at_once_as_memory_allows(federation, monkeypatch):
    config = dataclasses.replace(TINY, model=ModelConfig(checkpoint="random"))
    model = models.build_classifier(config.model, federation.tasks)
    algorithm, mesh = algorithms.build(config), one_device()

    def needed(count):
        local = dataclasses.replace(config.local, parallel_slots=count)
        trial = dataclasses.replace(config, local=local)
        return sum(predicted_bytes(trial, model, algorithm, federation, mesh).values())

    def chosen(memory, config=config):
        monkeypatch.setattr(memory_module, "memory_there", lambda device: memory)
        found = fitted(config, model, algorithm, federation, mesh)
        return found.local.parallel_slots

    assert chosen(10**15) == 0  # on CPU, the platform's default stays
    monkeypatch.setattr(memory_module, "on_cpu", lambda mesh: False)
    assert chosen(None) == 0
    assert chosen(10**15) == 6
    assert needed(3) < needed(4)
    assert chosen(needed(4) / 0.9 * 1.001) == 4
    assert chosen(needed(4) / 0.9 * 0.999) == 3
    assert chosen(1) == 1
    two = dataclasses.replace(config, local=dataclasses.replace(config.local, parallel_slots=2))
    assert chosen(10**15, two) == 2


def test_pieces_over_several_devices_equal_a_round_in_one_go(federation, model, monkeypatch):
    local = dataclasses.replace(TINY.local, optimizer="sgd", learning_rate=0.01)
    config = dataclasses.replace(TINY, rounds=1, local=local)
    (whole,) = run(config, federation, model)
    mesh = jax.make_mesh((4,), ("slots",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    for room, name in ((batches, "grid"), (evaluate, "EvaluationSet")):
        monkeypatch.setattr(room, name, functools.partial(getattr(room, name), budget_bytes=1))
    assert round_grid(config, federation, mesh, model) == (2, 4, 2, 1)  # 6 slots, 2 of them twice
    (pieces,) = run(config, federation, model, mesh=mesh)
    chex.assert_trees_all_close(pieces.state, whole.state, atol=1e-6, rtol=1e-4)
    assert pieces.record["accuracy"] == whole.record["accuracy"]
    assert pieces.record["loss"] == pytest.approx(whole.record["loss"], rel=1e-5)


@pytest.mark.parametrize("budget", [6 * 4 * 3072, 2 * 4 * 3072])
def test_a_round_fed_in_pieces_equals_a_round_in_one_go(
    uninterrupted, federation, model, budget, monkeypatch
):
    """Budget for a step of all six slots, or of two: groups of slots and chunks of steps."""
    monkeypatch.setattr(batches, "grid", functools.partial(batches.grid, budget_bytes=budget))
    monkeypatch.setattr(
        evaluate, "EvaluationSet", functools.partial(evaluate.EvaluationSet, budget_bytes=budget)
    )
    cut = round_grid(TINY, federation, one_device(), model)
    assert cut.groups * cut.chunks > 1
    pieces = list(run(TINY, federation, model))
    for one, other in zip(uninterrupted, pieces, strict=True):
        assert other.record["loss"] == pytest.approx(one.record["loss"], rel=1e-4)
        assert other.record["uplink_bits"] == one.record["uplink_bits"]
    first = [x.state for x in (pieces[0], uninterrupted[0])]
    chex.assert_trees_all_close(*first, atol=1e-4, rtol=1e-2)
    assert pieces[2].record["seconds"]["compile"] == 0
    resumed = list(run(TINY, federation, model, start=(1, pieces[0].state)))
    chex.assert_trees_all_equal(resumed[-1].state, pieces[-1].state)


def test_config_mistakes_in_the_data_are_named():
    for change, words in (
        ({"tasks": "hue/gratin"}, "hue/grating"),
        ({"clients": 1, "tasks_per_client": 2}, "config.data.*too few"),
        ({"examples_per_slot": 5000}, "hue/grating|task 0"),
    ):
        config = dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, **change))
        with pytest.raises(ValueError, match=words):
            federate(config)


def test_slots_at_once_and_one_by_one_give_the_same_run(federation, model):
    """At once as on accelerators: downloads, carries and what is donated must not get mixed up."""
    local = dataclasses.replace(TINY.local, optimizer="sgd", learning_rate=0.01)
    config = dataclasses.replace(
        TINY, algorithm="fedprox", rounds=2, fedprox=FedProxConfig(mu=1.0), local=local
    )
    at_once = dataclasses.replace(
        config, local=dataclasses.replace(local, parallel_slots=len(federation.slots.task))
    )
    one, other = (list(run(c, federation, model)) for c in (config, at_once))
    chex.assert_trees_all_close(other[0].state, one[0].state, atol=1e-5, rtol=1e-3)
    assert other[1].record["loss"] == pytest.approx(one[1].record["loss"], rel=1e-3)


def test_what_aggregate_returns_is_checked_in_the_first_round(federation, model):
    inner = algorithms.build(TINY)

    def halved(state, uploads, slots):
        new, metrics = inner.aggregate(state, uploads, slots)
        return jax.tree.map(lambda x: x.astype("bfloat16"), new), metrics

    for aggregate, words in (
        (
            halved,
            "config.algorithm 'matu': aggregate: the new state against the old: dtypes differ",
        ),
        (lambda state, *_: state, "aggregate: returned MatuState, expected a pair"),
    ):
        broken = inner._replace(aggregate=aggregate)
        with pytest.raises(ValueError, match=words):
            next(rounds.run(TINY, broken, model, federation))


def test_what_is_no_algorithm_is_refused(monkeypatch):
    for made, words in (
        (lambda config: "mine", "its function in ALGORITHMS returned str, expected an Algorithm"),
        (
            lambda config: algorithms.build(Config())._replace(heads=True),
            "'mine': heads: found True, expected the DefenceConfig",
        ),
    ):
        monkeypatch.setitem(algorithms.ALGORITHMS, "mine", made)
        with pytest.raises(ValueError, match=words):
            algorithms.build(Config(algorithm="mine"))
