"""The contract that every algorithm keeps, over the whole table; and each one's own arithmetic."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import matu_jax as matu
from matu_jax.algorithms import ALGORITHMS, build, message_bits, with_heads
from matu_jax.config import Config, ModelConfig

CLIENT = np.array([0, 0, 1, 2, 2, 3])
TASK = np.array([0, 1, 1, 2, 0, 2])
WEIGHT = np.array([10, 20, 30, 40, 50, 60], np.float32)
BASE = {"a": jnp.ones((3, 2)), "b": jnp.ones(5)}
PARAMETERS = 11


def slots_with(weight=WEIGHT):
    return matu.Slots(CLIENT, TASK, np.asarray(weight, np.float32), 4, 3)


def vectors_from(seed):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=(6, *leaf.shape)), jnp.float32)
        for name, leaf in BASE.items()
    }


def one_round(algorithm, state, vectors, slots):
    state, metrics = algorithm.aggregate(state, algorithm.upload(vectors, slots), slots)
    return state, metrics, algorithm.download(state, slots)


@pytest.fixture(params=sorted(ALGORITHMS))
def algorithm(request):
    return build(dataclasses.replace(Config(), algorithm=request.param))


def test_starts_at_the_base(algorithm):
    download = algorithm.download(algorithm.init(BASE, slots_with()), slots_with())
    chex.assert_trees_all_equal(download, jax.tree.map(jnp.zeros_like, vectors_from(0)))


def test_shapes_stay_and_nothing_recompiles(algorithm):
    traces = []

    @jax.jit
    def step(state, vectors, slots):
        traces.append(1)
        return one_round(algorithm, state, vectors, slots)

    state = jax.jit(algorithm.init)(BASE, slots_with())
    for seed, weight in enumerate([WEIGHT, WEIGHT * [1, 1, 0, 0, 0, 1], WEIGHT]):
        new, _, download = step(state, vectors_from(seed), slots_with(weight))
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(download, vectors_from(seed))
        state = new
    assert len(traces) == 1


def test_absent_slots_change_nothing(algorithm):
    slots = slots_with(WEIGHT * [1, 1, 0, 1, 1, 0])
    state = algorithm.init(BASE, slots_with())
    vectors = vectors_from(0)
    garbage = jax.tree.map(lambda x: x.at[jnp.array([2, 5])].set(jnp.nan), vectors)
    expected, _, _ = one_round(algorithm, state, vectors, slots)
    found, _, _ = one_round(algorithm, state, garbage, slots)
    chex.assert_trees_all_equal(found, expected)


def test_nobody_present_changes_no_task_vector(algorithm):
    state, _, _ = one_round(
        algorithm, algorithm.init(BASE, slots_with()), vectors_from(0), slots_with()
    )
    before = algorithm.download(state, slots_with())
    _, _, download = one_round(algorithm, state, vectors_from(1), slots_with(WEIGHT * 0))
    if "unified" in getattr(state, "_fields", ()):
        # MaTU's stateless server keeps each task's vector only as its unified holds it.
        kept = matu.modulate(state.unified)
        expected = jax.tree.map(lambda x: x[TASK], kept)
        masks = matu.unify(expected, dataclasses.replace(slots_with(), task=TASK))
        chex.assert_trees_all_close(download, matu.modulate(masks, slots_with()), rtol=1e-5)
    else:
        chex.assert_trees_all_equal(download, before)


def test_everything_is_finite_for_zero_vectors(algorithm):
    zero = jax.tree.map(jnp.zeros_like, vectors_from(0))
    state, metrics, download = one_round(
        algorithm, algorithm.init(BASE, slots_with()), zero, slots_with()
    )
    chex.assert_tree_all_finite((state, metrics, download))


def weighted(vectors, rows):
    return {
        name: sum(WEIGHT[r] * np.asarray(leaf, np.float64)[r] for r in rows)
        / sum(WEIGHT[r] for r in rows)
        for name, leaf in vectors.items()
    }


def run(name, **changes):
    algorithm = build(dataclasses.replace(Config(), algorithm=name, **changes))
    vectors = vectors_from(3)
    return vectors, one_round(algorithm, algorithm.init(BASE, slots_with()), vectors, slots_with())


def test_fedavg_is_the_mean_over_all_slots_weighted_by_examples():
    vectors, (_, _, download) = run("fedavg")
    for row in range(6):
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, row=row: np.asarray(x[row], np.float64), download),
            weighted(vectors, range(6)),
            rtol=1e-5,
        )


def test_per_task_is_the_mean_over_a_tasks_holders():
    vectors, (_, _, download) = run("per_task")
    for row in range(6):
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, row=row: np.asarray(x[row], np.float64), download),
            weighted(vectors, np.flatnonzero(TASK[row] == TASK)),
            rtol=1e-5,
        )


def test_individual_keeps_every_slot_its_own():
    vectors, (_, _, download) = run("individual")
    chex.assert_trees_all_equal(download, vectors)


def test_matu_is_the_library():
    vectors, (_, metrics, download) = run("matu")
    slots, choices = slots_with(), Config().matu
    config = matu.AggregationConfig(**dataclasses.asdict(choices))
    uploads = matu.unify(vectors, slots, magnitude=config.magnitude)
    previous = matu.unify(jax.tree.map(lambda x: jnp.zeros((3, *x.shape)), BASE))
    result = matu.aggregate(uploads, slots, config, previous)
    chex.assert_trees_all_close(download, matu.modulate(result.downloads, slots), rtol=1e-6)
    np.testing.assert_allclose(metrics["similarity"], result.similarity, rtol=1e-6)


def test_fedprox_penalises_the_distance_from_the_download():
    algorithm = build(dataclasses.replace(Config(), algorithm="fedprox", fedprox_mu=0.5))
    assert algorithm.local.penalty is not None
    a, b = (jax.tree.map(lambda x, r=r: x[r], vectors_from(0)) for r in (0, 1))
    expected = 0.25 * sum(float(((np.asarray(a[n]) - np.asarray(b[n])) ** 2).sum()) for n in a)
    np.testing.assert_allclose(algorithm.local.penalty(a, b), expected, rtol=1e-5)


def traffic(name, weight=WEIGHT):
    algorithm = build(dataclasses.replace(Config(), algorithm=name))
    slots = slots_with(weight)
    state = algorithm.init(BASE, slots)
    uplink, downlink = algorithm.sent(state, algorithm.upload(vectors_from(0), slots))
    return message_bits(uplink, slots), message_bits(downlink, slots)


def test_traffic_is_counted_from_what_is_sent():
    vector = 32 * PARAMETERS
    mask = 8 * (1 + 1) + 32  # 6 and 5 parameters fill one byte each; one float32 scale
    held = np.array([2, 1, 2, 1])
    for direction in (0, 1):
        np.testing.assert_array_equal(traffic("individual")[direction], [0] * 4)
        np.testing.assert_array_equal(traffic("fedavg")[direction], [vector] * 4)
        np.testing.assert_array_equal(traffic("per_task")[direction], held * vector)
        # A client with one task sends its vector alone.
        np.testing.assert_array_equal(traffic("matu")[direction], vector + (held > 1) * held * mask)
        np.testing.assert_array_equal(
            traffic("matu", WEIGHT * [1, 1, 0, 1, 1, 0])[direction][[1, 3]], [0, 0]
        )


def test_unknown_algorithm_is_refused_with_a_hint():
    with pytest.raises(ValueError, match='Did you mean "matu"'):
        build(dataclasses.replace(Config(), algorithm="mattu"))


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_trained_heads_belong_to_tasks(name):
    config = dataclasses.replace(Config(), algorithm=name, model=ModelConfig(head="trained"))
    algorithm = build(config)
    base = {"shared": BASE, "head": {"kernel": jnp.zeros((2, 3))}}
    heads = jnp.arange(36.0).reshape(6, 2, 3)
    vectors = {"shared": vectors_from(0), "head": {"kernel": heads}}
    state = algorithm.init(base, slots_with())
    uploads = algorithm.upload(vectors, slots_with())
    state, _ = algorithm.aggregate(state, uploads, slots_with())
    download = algorithm.download(state, slots_with())["head"]["kernel"]
    rows = np.asarray(heads, np.float64)
    for slot in range(6):
        holders = [slot] if name == "individual" else np.flatnonzero(TASK[slot] == TASK)
        expected = sum(WEIGHT[h] * rows[h] for h in holders) / sum(WEIGHT[h] for h in holders)
        np.testing.assert_allclose(download[slot], expected, rtol=1e-6)
    inner = build(dataclasses.replace(Config(), algorithm=name))
    plain = inner.sent(
        inner.init(BASE, slots_with()), inner.upload(vectors["shared"], slots_with())
    )
    up, _ = with_heads(inner).sent(state, uploads)
    held = np.array([2, 1, 2, 1])
    extra = 0 if name == "individual" else 32 * 6 * held
    np.testing.assert_array_equal(
        message_bits(up, slots_with()), message_bits(plain[0], slots_with()) + extra
    )
