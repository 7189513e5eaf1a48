"""Transfer by shrinkage: weights against a solver of another kind, and what they must satisfy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import matu_jax as matu
from matu_jax.aggregation import shrinkage as module

T, SLOTS, D = 6, 32, 8192
# How far 100 multiplicative updates stay from the minimum: at most 0.002 in a weight over some 450
# rows of drawn federations, 0.0005 in 99 of 100; most stand at the rounding of float32.
WEIGHT_TOLERANCE = 5e-3

_shrinkage = jax.jit(module.shrinkage)
PLAIN = matu.AggregationConfig.paper(uploads="change", agreement_threshold=0.0)
SHRINKAGE = dataclasses.replace(PLAIN, transfer="shrinkage")


def _weights(agreement, energy, equal_holders, allowed):
    arrays = [np.asarray(x, np.float32) for x in (agreement, energy, equal_holders)]
    return np.asarray(_shrinkage(*arrays, np.asarray(allowed, bool)), np.float64)


def _federation(seed, tasks=T, d=400):
    """Tasks some of which share a signal, with noise and one to four holders each."""
    generator = np.random.default_rng(seed)
    signal = generator.normal(size=(tasks, d))
    signal[1] = signal[0] + 0.3 * generator.normal(size=d)
    signal[2] = signal[0] + generator.normal(size=d)
    signal += 0.5 * generator.normal(size=d)
    held = generator.integers(1, 5, tasks)
    task = np.repeat(np.arange(tasks), held)
    noise = generator.uniform(0.3, 4) * generator.normal(size=(len(task), d))
    vectors = (signal[task] + noise).astype(np.float32)
    weight = generator.integers(1, 9, len(task)).astype(np.float32)
    return vectors, task, weight


def _own_clients(task, weight=None):
    """Slots that are clients of their own; absent ones fill up, so that little is compiled."""
    weight = np.ones(len(task)) if weight is None else weight
    client = np.arange(SLOTS, dtype=np.int32)
    return matu.Slots(client, _filled(task, np.int32), _filled(weight, np.float32), SLOTS, T)


def _filled(rows, dtype: Any = np.float32):
    rows = np.asarray(rows, dtype)
    return np.concatenate([rows, np.zeros((SLOTS - len(rows), *rows.shape[1:]), dtype)])


def _mixing(vectors, slots, previous=None):
    """The weights of a round, from what it makes of the changes; and its result."""
    uploads = matu.unify({"w": _filled(vectors)}, slots)
    own = np.asarray(matu.aggregate(uploads, slots, PLAIN).task_vectors["w"], np.float64)
    result = matu.aggregate(uploads, slots, SHRINKAGE, previous)
    mixed = np.asarray(result.task_vectors["w"], np.float64)
    if previous is not None:
        mixed = mixed - np.asarray(previous.task_vectors["w"], np.float64)
    found, _, rank, _ = np.linalg.lstsq(own.T, mixed.T)
    assert rank == slots.num_tasks
    return found.T, result


# ------------------------------------------------------------------ against another solver


@pytest.mark.parametrize("seed", range(8))
def test_the_weights_are_the_minimum_of_the_model(seed):
    vectors, task, weight = _federation(seed)
    client = range(len(task))
    agreement, energy = oracle.evidence(vectors, client, task, weight, T)
    allowed, worth = np.ones((T, T), bool), oracle.worth(task, weight, T)
    found = _weights(agreement, energy, worth, allowed)
    expected = oracle.shrinkage(agreement, energy, worth, allowed)
    np.testing.assert_allclose(found, expected, rtol=0, atol=WEIGHT_TOLERANCE)


def test_many_iterations_reach_the_minimum(monkeypatch):
    # What is left after 100 is only a matter of going on.
    monkeypatch.setattr(module, "_ITERATIONS", 5000)
    longer = jax.jit(lambda *arrays: module.shrinkage(*arrays))
    for seed in range(8):
        vectors, task, weight = _federation(seed)
        agreement, energy = oracle.evidence(vectors, range(len(task)), task, weight, T)
        worth, allowed = oracle.worth(task, weight, T), np.ones((T, T), bool)
        arrays = (jnp.asarray(x, jnp.float32) for x in (agreement, energy, worth))
        found = np.asarray(longer(*arrays, allowed), np.float64)
        expected = oracle.shrinkage(agreement, energy, worth, allowed)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_task_that_may_not_lend_is_left_out_of_the_problem_alone():
    # Tasks 1 and 2 were compared before, but not in this round: what they share still counts, so
    # that task 0 does not take the same thing from both.
    agreement = np.full((T, T), 0.05)
    agreement[:3, :3] = 0.4
    np.fill_diagonal(agreement, 0.45)
    energy, worth = np.ones((T, T)), np.full(T, 2.0)
    allowed = np.ones((T, T), bool)
    allowed[1, 2] = allowed[2, 1] = False
    found = _weights(agreement, energy, worth, allowed)
    np.testing.assert_allclose(
        found, oracle.shrinkage(agreement, energy, worth, allowed), atol=WEIGHT_TOLERANCE
    )
    everybody = _weights(agreement, energy, worth, np.ones((T, T), bool))
    np.testing.assert_allclose(found[0], everybody[0], atol=1e-6)
    assert found[1, 2] == found[2, 1] == 0


def test_a_task_with_one_holder_takes_the_mean_of_the_known():
    agreement = np.array([[0.6, 0.1, 0.3], [0.1, 0.2, 0.1], [0.3, 0.1, 0.0]])
    energy = np.ones((3, 3))
    energy[2, 2] = 0
    known = agreement.copy()
    known[2, 2] = 0.4
    worth, allowed = np.array([2.0, 3.0, 1.0]), np.ones((3, 3), bool)
    found = _weights(agreement, energy, worth, allowed)
    np.testing.assert_allclose(found, _weights(known, np.ones((3, 3)), worth, allowed), atol=1e-6)
    np.testing.assert_allclose(
        found, oracle.shrinkage(agreement, energy, worth, allowed), atol=WEIGHT_TOLERANCE
    )


def test_where_no_task_has_two_holders_the_nearest_stands_in():
    agreement = np.array([[0.0, 0.4, 0.1], [0.4, 0.0, 0.05], [0.1, 0.05, 0.0]])
    energy = 1 - np.eye(3)
    nearest = agreement + np.diag([0.4, 0.4, 0.1])
    worth, allowed = np.ones(3), np.ones((3, 3), bool)
    found = _weights(agreement, energy, worth, allowed)
    np.testing.assert_allclose(found, _weights(nearest, np.ones((3, 3)), worth, allowed), atol=1e-6)
    np.testing.assert_allclose(
        found, oracle.shrinkage(agreement, energy, worth, allowed), atol=WEIGHT_TOLERANCE
    )


def test_worked_by_hand():
    # The median over pairs, 0.1, goes. K: 0.4 on the diagonal, 0.3 between tasks 0 and 1; noise
    # (1 - 0.5) / 2. (0.65, 0.3; 0.3, 0.65) w = (0.4, 0.3) gives w = (0.17, 0.075) / 0.3325.
    agreement = np.full((4, 4), 0.1)
    agreement[0, 1] = agreement[1, 0] = 0.4
    np.fill_diagonal(agreement, 0.5)
    found = _weights(agreement, np.ones((4, 4)), np.full(4, 2.0), np.ones((4, 4), bool))
    np.testing.assert_allclose(found[0], [0.17 / 0.245, 0.075 / 0.245, 0, 0], atol=1e-5)
    np.testing.assert_allclose(found[2:], np.eye(4)[2:], atol=1e-6)


# ------------------------------------------------------------------ for every evidence


def _symmetric(draws, low, high):
    square = hnp.arrays(np.float64, (T, T), elements=st.floats(low, high))
    return draws(square.map(lambda x: (x + x.T) / 2))


@st.composite
def _problems(draw):
    correlation = _symmetric(draw, -0.3, 1.0)
    energy = _symmetric(draw, 0.25, 4.0)
    never = draw(hnp.arrays(np.bool_, (T, T), elements=st.sampled_from([False, False, True])))
    energy[never | never.T] = 0
    refused = draw(hnp.arrays(np.bool_, (T, T), elements=st.sampled_from([False, False, True])))
    allowed = ~(refused | refused.T) & (energy > 0)
    worth = draw(hnp.arrays(np.float64, T, elements=st.floats(1.0, 6.0)))
    return correlation * energy, energy, worth, allowed


@given(_problems())
def test_rows_are_means_of_those_who_may_lend(problem):
    found = _weights(*problem)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    assert not found[~problem[3] & ~np.eye(T, dtype=bool)].any()


@given(_problems())
def test_nothing_near_is_better(problem):
    # First order, whatever the solver: no weight can be moved to gain more than a little. This also
    # holds the problems with several minima, which drawn federations have not shown.
    found = _weights(*problem)
    related, noise = oracle.shrinkage_problem(*problem[:3])
    quadratic = related + np.diag(noise)
    for t in range(T):
        chosen = np.flatnonzero(problem[3][t] | (np.arange(T) == t))
        inside, linear, row = (
            quadratic[np.ix_(chosen, chosen)],
            related[t, chosen],
            found[t, chosen],
        )
        row = row * (linear @ row) / (row @ inside @ row)
        slope = inside @ row - linear
        assert (slope > -0.03).all()
        assert (np.abs(slope * row) < 0.01).all()


@given(_problems(), st.permutations(range(T)))
def test_tasks_may_change_places(problem, order):
    order = np.array(order)
    agreement, energy, worth, allowed = problem
    both = np.ix_(order, order)
    found = _weights(agreement[both], energy[both], worth[order], allowed[both])
    np.testing.assert_allclose(found, _weights(*problem)[both], atol=1e-4)


@given(_problems(), st.sampled_from([2.0**-60, 2.0**-3, 2.0**40]))
def test_the_unit_of_energy_does_not_count(problem, factor):
    agreement, energy, worth, allowed = problem
    scaled = _weights(factor * agreement, factor * energy, worth, allowed)
    np.testing.assert_array_equal(scaled, _weights(*problem))


@given(_problems())
def test_nobody_compared_is_the_identity(problem):
    nothing = np.zeros((T, T))
    nobody = np.zeros((T, T), bool)
    for found in (
        _weights(nothing, nothing, problem[2], problem[3]),
        _weights(problem[0], problem[1], problem[2], nobody),
    ):
        np.testing.assert_array_equal(found != 0, np.eye(T, dtype=bool))
        np.testing.assert_allclose(np.diag(found), 1, rtol=1e-6)


@pytest.mark.parametrize("agreement", [-1.0, 0.0, 0.7, 1.0])
def test_one_task_is_the_identity(agreement):
    assert _weights([[agreement]], [[1.0]], [3.0], [[True]]) == 1


def test_two_tasks_never_lend():
    # All that they share is what all tasks share.
    for shared in (-0.5, 0.0, 0.5, 0.9):
        agreement = [[0.9, shared], [shared, 0.9]]
        found = _weights(agreement, np.ones((2, 2)), [1.0, 1.0], np.ones((2, 2)))
        np.testing.assert_array_equal(found, np.eye(2))


# ------------------------------------------------------------------ in a round


def test_a_round_mixes_with_the_oracles_weights():
    for seed in (20, 21, 22):
        vectors, task, weight = _federation(seed)
        slots = _own_clients(task, weight)
        found, result = _mixing(vectors, slots)
        agreement, energy = oracle.evidence(vectors, range(len(task)), task, weight, T)
        np.testing.assert_allclose(
            np.asarray(result.state.agreement), agreement, rtol=1e-5, atol=1e-3
        )
        np.testing.assert_allclose(np.asarray(result.state.energy), energy, rtol=1e-5)
        expected = oracle.shrinkage(
            agreement, energy, oracle.worth(task, weight, T), np.ones((T, T), bool)
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=WEIGHT_TOLERANCE)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**-3, 3.0, 2.0**20])
def test_one_factor_for_everybody_changes_no_weight(factor):
    vectors, task, weight = _federation(23)
    slots = _own_clients(task, weight)
    before, _ = _mixing(vectors, slots)
    after, _ = _mixing(np.float32(factor) * vectors, slots)
    np.testing.assert_allclose(after, before, atol=2e-6)


def test_renaming_tasks_renames_weights():
    vectors, task, weight = _federation(24)
    name = np.array([3, 5, 0, 1, 4, 2])
    before, _ = _mixing(vectors, _own_clients(task, weight))
    after, _ = _mixing(vectors, _own_clients(name[task], weight))
    np.testing.assert_allclose(after[np.ix_(name, name)], before, atol=2e-5)


def test_noisy_tasks_with_one_signal_are_pooled():
    generator = np.random.default_rng(0)
    held = 2
    signal = generator.normal(size=(T, D))
    signal[1] = signal[0]
    task = np.repeat(np.arange(T), held)
    vectors = signal[task] + 2 * generator.normal(size=(len(task), D))
    found, _ = _mixing(vectors, _own_clients(task))
    np.testing.assert_allclose(found[:2, :2], 0.5, atol=0.06)
    assert found[:2, 2:].sum(axis=1).max() < 0.05
    # Those without a relative lend and borrow next to nothing.
    assert np.diag(found)[2:].min() > 0.8


def test_unrelated_tasks_with_many_holders_keep_to_themselves():
    generator = np.random.default_rng(1)
    signal = generator.normal(size=(T, D))
    task = np.repeat(np.arange(T), 5)
    vectors = signal[task] + 0.5 * generator.normal(size=(len(task), D))
    found, _ = _mixing(vectors, _own_clients(task))
    np.testing.assert_allclose(found, np.eye(T), atol=0.02)


def test_more_noise_borrows_more_and_more_holders_less():
    generator = np.random.default_rng(2)
    signal = generator.normal(size=(T, D))
    signal[1] = signal[0] + 0.7 * generator.normal(size=D)

    def borrowed(held, noise):
        task = np.repeat(np.arange(T), held)
        drawn = np.random.default_rng(3).normal(size=(len(task), D))
        found, _ = _mixing(signal[task] + noise * drawn, _own_clients(task))
        return found[0, 1]

    by_noise = [borrowed(3, noise) for noise in (0.2, 1.0, 3.0)]
    assert by_noise[0] < by_noise[1] < by_noise[2]
    assert by_noise[0] < 0.15
    by_holders = [borrowed(held, 1.0) for held in (2, 3, 5)]
    assert by_holders[0] > by_holders[1] > by_holders[2]


def test_what_all_tasks_share_lends_nothing():
    generator = np.random.default_rng(4)
    common = 2 * generator.normal(size=D)
    task = np.repeat(np.arange(T), 3)
    signal = generator.normal(size=(T, D)) + common
    vectors = signal[task] + generator.normal(size=(len(task), D))
    found, result = _mixing(vectors, _own_clients(task))
    correlation = np.asarray(result.state.agreement) / np.asarray(result.state.energy)
    assert correlation.min() > 0.3
    assert np.diag(found).min() > 0.9


def test_tasks_that_only_meet_at_one_client_do_not_lend():
    generator = np.random.default_rng(5)
    vectors = generator.normal(size=(6, 400)).astype(np.float32)
    slots = dataclasses.replace(_own_clients(range(6)), client=np.zeros(SLOTS, np.int32))
    found, result = _mixing(vectors, slots)
    np.testing.assert_allclose(found, np.eye(T), atol=1e-5)
    assert not np.asarray(result.state.energy).any()


def test_a_single_task_keeps_its_mean():
    vectors = {"w": np.random.default_rng(6).normal(size=(3, 50)).astype(np.float32)}
    slots = matu.Slots(np.arange(3), np.zeros(3, np.int32), np.ones(3, np.float32), 3, 1)
    uploads = matu.unify(vectors, slots)
    found = matu.aggregate(uploads, slots, SHRINKAGE)
    plain = matu.aggregate(uploads, slots, PLAIN)
    np.testing.assert_array_equal(found.task_vectors["w"], plain.task_vectors["w"])


def test_top_k_and_the_least_similarity_do_not_count():
    vectors, task, weight = _federation(25)
    slots = _own_clients(task, weight)
    uploads = matu.unify({"w": _filled(vectors)}, slots)
    found = [
        matu.aggregate(uploads, slots, dataclasses.replace(SHRINKAGE, **fields)).task_vectors["w"]
        for fields in ({"top_k": 0, "min_similarity": 1.0}, {"top_k": 5, "min_similarity": 0.0})
    ]
    np.testing.assert_array_equal(*found)
    plain = matu.aggregate(uploads, slots, PLAIN).task_vectors["w"]
    assert np.abs(np.asarray(found[0]) - np.asarray(plain)).max() > 0.01


# ------------------------------------------------------------------ one loud client


def test_a_loud_client_changes_no_weight_of_its_first_round():
    # Directions are compared, so that its length does not count; its task's mean is another thing.
    vectors, task, weight = _federation(26)
    slots = _own_clients(task, weight)
    loud = vectors.copy()
    loud[0] *= 1024
    before, quiet = _mixing(vectors, slots)
    after, found = _mixing(loud, slots)
    correlation = [
        np.asarray(r.state.agreement) / np.maximum(r.state.energy, 1e-9) for r in (quiet, found)
    ]
    np.testing.assert_allclose(correlation[1], correlation[0], atol=1e-6)
    np.testing.assert_allclose(after, before, atol=1e-4)


def test_a_loud_client_makes_its_round_count_as_its_energy_does():
    # Over rounds: its task's pairs are those of the loud round, as far as its energy goes; the
    # pairs of other tasks do not see it.
    task = np.repeat(np.arange(T), 3)
    slots = _own_clients(task)
    generator = np.random.default_rng(27)
    rounds = generator.normal(size=(2, len(task), 400)).astype(np.float32)
    rounds += generator.normal(size=(T, 400)).astype(np.float32)[task]

    def evidence(factor):
        state, each = None, []
        for number, vectors in enumerate(rounds):
            vectors = vectors.copy()
            vectors[0] *= factor if number else 1
            uploads = matu.unify({"w": _filled(vectors)}, slots)
            state = matu.aggregate(uploads, slots, SHRINKAGE, state).state
            each.append([np.asarray(x, np.float64) for x in (state.agreement, state.energy)])
        first, last = each
        return first, [last[i] - first[i] for i in (0, 1)], last

    first, quiet, _ = evidence(1.0)
    _, loud, summed = evidence(1000.0)
    squares = np.square(rounds[1, task == 0].astype(np.float64)).sum(axis=1)
    grown = (1e6 * squares[0] + squares[1:].sum()) / squares.sum()
    factor = np.ones((T, T))
    factor[0, 1:] = factor[1:, 0] = np.sqrt(grown)
    factor[0, 0] = grown
    for part in (0, 1):
        np.testing.assert_allclose(loud[part] / factor, quiet[part], rtol=1e-3, atol=1e-2)
    pooled, of_loud = summed[0] / summed[1], quiet[0] / quiet[1]
    share = loud[1] / (first[1] + loud[1])
    mixed = share * of_loud + (1 - share) * first[0] / first[1]
    np.testing.assert_allclose(pooled, mixed, atol=1e-4)
    assert share[0].min() > 0.99
    np.testing.assert_allclose(pooled[0], of_loud[0], atol=0.01)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e10, 1e15, 1e20, 1e30, 3e38])
def test_no_size_makes_nan_or_infinity(size):
    # Squares of such numbers do not fit in float32.
    vectors, task, weight = _federation(28)
    slots = _own_clients(task, weight)
    loud = np.clip(vectors, -1, 1)
    loud[0] *= np.float32(size)
    state = None
    for changes in (loud, np.float32(size) * np.clip(vectors, -1, 1), vectors):
        uploads = matu.unify({"w": _filled(changes)}, slots)
        result = matu.aggregate(uploads, slots, SHRINKAGE, state)
        state = result.state
        for leaf in jax.tree.leaves(result):
            assert np.isfinite(np.asarray(leaf)).all()
