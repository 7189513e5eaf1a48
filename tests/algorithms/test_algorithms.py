"""The contract that every algorithm keeps, over the whole table; and each one's own arithmetic."""

import dataclasses
from types import SimpleNamespace

import chex
import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import BASE, OPEN, PARAMETERS, TASK, WEIGHT, one_round, slots_with, vectors_from

import matu_jax as matu
from matu_jax.algorithms import ALGORITHMS, AlgorithmConfig, build
from matu_jax.config import FedProxConfig, MatuConfig
from matu_jax.fields import kinds
from matu_jax.messages.traffic import message_bits

# The paper's equations as this project reads them; the defaults differ.
PAPER = MatuConfig(magnitude="max", agreement_threshold=0.4, uploads="vector", transfer="none")


VARIANTS = {
    "matu, as in the paper": PAPER,
    "matu, bfloat16": MatuConfig(precision="bfloat16"),
    "matu, int8": MatuConfig(precision="int8"),
    "matu, apart": MatuConfig(downloads="task_vectors"),
    "matu, int8 apart": MatuConfig(downloads="task_vectors", precision="int8"),
}


@pytest.fixture(params=[*sorted(ALGORITHMS), *VARIANTS])
def algorithm(request):
    choices = VARIANTS.get(request.param, MatuConfig())
    return build(dataclasses.replace(OPEN, algorithm=request.param.split(",")[0], matu=choices))


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_keeps_the_contract(algorithm, check):
    check(algorithm)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_trained_heads_belong_to_tasks(name):
    contract.trained_heads_belong_to_tasks(name)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_an_algorithm_reads_no_choices_but_its_own(name):
    given = {each: getattr(OPEN, each) for each in ("defence", "model", "local")}
    own = {name: getattr(OPEN, name)} if name in kinds(AlgorithmConfig) else {}
    assert ALGORITHMS[name](SimpleNamespace(**given, **own)).init
    assert kinds(AlgorithmConfig).keys() <= {"defence", *ALGORITHMS}


def test_what_a_server_keeps():
    """In parameters: one vector, one per task or per slot, a part of one, or nothing."""
    kept = {
        "emr_one_shot": 0,
        "fed_lora_b": 11,
        "fedavg": 25,
        "fedper": 10,
        "fedprox": 25,
        "fedrep": 10,
        "individual": 0,
        "matfl": 6 * 25,
        "ntk_fedavg": 25,
        "per_task": 3 * 25,
        "ties": 25,
    }
    for name, size in kept.items():
        algorithm = build(dataclasses.replace(OPEN, algorithm=name))
        state = algorithm.init(BASE, slots_with())
        assert sum(x.size for x in jax.tree.leaves(algorithm.traffic.kept(state))) == size, name
        assert algorithm.traffic.kept_per_client == (name == "matfl")


def weighted(vectors, rows):
    def mean(leaf):
        rows_of_it = sum(WEIGHT[r] * np.asarray(leaf, np.float64)[r] for r in rows)
        return rows_of_it / sum(WEIGHT[r] for r in rows)

    return jax.tree.map(mean, vectors)


def run(name, **changes):
    algorithm = build(dataclasses.replace(OPEN, algorithm=name, **changes))
    vectors = vectors_from(3)
    return vectors, one_round(algorithm, algorithm.init(BASE, slots_with()), vectors, slots_with())


def test_fedavg_is_the_mean_over_all_slots_weighted_by_examples():
    vectors, (_, _, download) = run("fedavg")
    for row in range(6):
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, row=row: np.asarray(x[row], np.float64), download),
            weighted(vectors, range(6)),
            rtol=1e-5,
            atol=1e-6,
        )


def test_per_task_is_the_mean_over_a_tasks_holders():
    vectors, (_, _, download) = run("per_task")
    for row in range(6):
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, row=row: np.asarray(x[row], np.float64), download),
            weighted(vectors, np.flatnonzero(TASK[row] == TASK)),
            rtol=1e-5,
            atol=1e-6,
        )


def test_individual_keeps_every_slot_its_own():
    vectors, (_, _, download) = run("individual")
    chex.assert_trees_all_equal(download, vectors)


@pytest.mark.parametrize("choices", [PAPER, MatuConfig()], ids=["paper", "default"])
def test_matu_is_the_library(choices):
    vectors, (_, metrics, download) = run("matu", matu=choices)
    slots, config = slots_with(), matu.AggregationConfig.of(choices)
    uploads = matu.unify(vectors, slots, magnitude=config.magnitude)
    result = matu.aggregate(uploads, slots, config)  # of the first round, in which all is zero
    chex.assert_trees_all_close(download, matu.modulate(result.downloads, slots), rtol=1e-6)
    np.testing.assert_allclose(metrics["similarity"], result.similarity, rtol=1e-6)


def test_fedprox_penalises_the_distance_from_the_download():
    algorithm = build(dataclasses.replace(OPEN, algorithm="fedprox", fedprox=FedProxConfig(mu=0.5)))
    assert algorithm.local.penalty is not None
    a, b = (jax.tree.map(lambda x, r=r: x[r], vectors_from(0)) for r in (0, 1))
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    expected = 0.25 * sum(float(((np.asarray(x) - np.asarray(y)) ** 2).sum()) for x, y in pairs)
    np.testing.assert_allclose(algorithm.local.penalty(a, b), expected, rtol=1e-5)


def traffic(name, weight=WEIGHT):
    algorithm = build(dataclasses.replace(OPEN, algorithm=name))
    slots = slots_with(weight)
    state = algorithm.init(BASE, slots)
    uplink, downlink = algorithm.traffic.sent(state, algorithm.upload(vectors_from(0), slots))
    return message_bits(uplink, slots), message_bits(downlink, slots)


def test_traffic_is_counted_from_what_is_sent():
    vector = 32 * PARAMETERS
    mask = 8 * (1 + 1 + 1 + 1) + 32  # no leaf fills more than one byte; one float32 scale
    held = np.array([2, 1, 2, 1])
    for direction in (0, 1):
        np.testing.assert_array_equal(traffic("individual")[direction], [0] * 4)
        for name in ("fedavg", "fedprox", "ntk_fedavg"):
            np.testing.assert_array_equal(traffic(name)[direction], [vector] * 4)
        np.testing.assert_array_equal(traffic("per_task")[direction], held * vector)
        # A client with one task sends its vector alone.
        np.testing.assert_array_equal(traffic("matu")[direction], vector + (held > 1) * held * mask)
        np.testing.assert_array_equal(
            traffic("matu", WEIGHT * [1, 1, 0, 1, 1, 0])[direction][[1, 3]], [0, 0]
        )
        np.testing.assert_array_equal(traffic("matfl")[direction], held * vector)
        for name, shared in (("fedper", 10), ("fedrep", 10), ("fed_lora_b", 11)):
            np.testing.assert_array_equal(traffic(name)[direction], [32 * shared] * 4)
    for name in ("ties", "emr_one_shot"):
        np.testing.assert_array_equal(traffic(name)[0], held * vector)
    np.testing.assert_array_equal(traffic("ties")[1], [vector] * 4)
    np.testing.assert_array_equal(traffic("emr_one_shot")[1], vector + held * mask)


def test_unknown_algorithm_is_refused_with_a_hint():
    with pytest.raises(ValueError, match='Did you mean "matu"'):
        build(dataclasses.replace(OPEN, algorithm="mattu"))


@pytest.mark.parametrize(("precision", "bits"), [("float32", 32), ("int8", 8)])
def test_task_vectors_down_are_the_servers_own(precision, bits):
    """To half a step of int8; k tasks take k vectors."""
    folded, apart = (
        build(dataclasses.replace(OPEN, matu=MatuConfig(downloads=d, precision=precision)))
        for d in ("unified", "task_vectors")
    )
    slots, vectors = slots_with(), vectors_from(0)
    states = [
        one_round(algorithm, algorithm.init(BASE, slots), vectors, slots)[0]
        for algorithm in (folded, apart)
    ]
    exact = jax.tree.map(lambda x: x[slots.task], states[0].server.task_vectors)
    found = apart.download(states[1], slots)
    half = 0 if precision == "float32" else 0.5 / 127
    for x, y in zip(*map(jax.tree.leaves, (exact, found)), strict=True):
        largest = np.abs(np.asarray(x)).reshape(len(x), -1).max(axis=1)
        off = np.abs(np.asarray(x - y)).reshape(len(x), -1).max(axis=1)
        assert (off <= (half + 1e-6) * largest).all()
    uploads = apart.upload(vectors, slots)
    sent = [message_bits(message, slots) for message in apart.traffic.sent(states[1], uploads)]
    leaves = len(jax.tree.leaves(BASE))
    scales = 32 * leaves if precision == "int8" else 0  # each leaf is less than a block
    np.testing.assert_array_equal(sent[1], np.array([2, 1, 2, 1]) * (PARAMETERS * bits + scales))
    before = [message_bits(message, slots) for message in folded.traffic.sent(states[0], uploads)]
    np.testing.assert_array_equal(sent[0], before[0])
    kept = jax.tree.leaves(apart.traffic.kept(states[1]))
    assert sum(x.size for x in kept) == 3 * PARAMETERS + 2 * 9  # task vectors and the evidence


@pytest.mark.parametrize("name", ["matu", *list(VARIANTS)[1:]])
def test_what_has_not_changed_has_no_direction(name):
    """Clients that leave what they received as it was report zeros, not what rounding leaves."""
    algorithm = build(dataclasses.replace(OPEN, matu=VARIANTS.get(name, MatuConfig())))
    assert algorithm.sends_change
    slots, download = slots_with(), jax.jit(algorithm.download)

    @jax.jit
    def upload(state, vectors):
        before = algorithm.download(state, slots)
        return algorithm.upload(jax.tree.map(jnp.subtract, vectors, before), slots)

    state = algorithm.init(BASE, slots)
    for seed in range(2):
        state, _, _ = one_round(algorithm, state, vectors_from(seed), slots)
    uploads = upload(state, download(state, slots))
    chex.assert_trees_all_equal(uploads, jax.tree.map(jnp.zeros_like, uploads))


def test_task_vectors_down_need_a_server_that_keeps_them():
    choices = MatuConfig(uploads="vector", transfer="none", downloads="task_vectors")
    words = "config.matu.downloads: 'task_vectors' needs config.matu.uploads = 'change'"
    with pytest.raises(ValueError, match=words):
        build(dataclasses.replace(OPEN, matu=choices))


@pytest.mark.parametrize(("precision", "bits"), [("bfloat16", 16), ("int8", 8)])
def test_fewer_bits_cross_the_network_and_little_is_lost(precision, bits):
    exact, coarse = (
        build(dataclasses.replace(OPEN, matu=MatuConfig(precision=p)))
        for p in ("float32", precision)
    )
    slots, vectors = slots_with(), vectors_from(0)
    found = []
    for algorithm in (exact, coarse):
        state = algorithm.init(BASE, slots)
        uploads = algorithm.upload(vectors, slots)
        sent = [message_bits(message, slots) for message in algorithm.traffic.sent(state, uploads)]
        found.append((sent, one_round(algorithm, state, vectors, slots)[2]))
    leaves = len(jax.tree.leaves(BASE))
    extra = 32 * leaves if precision == "int8" else 0  # each leaf is less than a block
    for before, after in zip(found[0][0], found[1][0], strict=True):
        np.testing.assert_array_equal(before - after, PARAMETERS * (32 - bits) - extra)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(found[0][1]))
    chex.assert_trees_all_close(found[1][1], found[0][1], atol=0.03 * largest)
    moved = [
        jnp.abs(x - y).max()
        for x, y in zip(*map(jax.tree.leaves, (found[0][1], found[1][1])), strict=True)
    ]
    assert max(map(float, moved)) > 0
