"""What must hold for every input (`algorithm.md`), over generated task vectors and participation.

Values are multiples of 1/8, so that the sums behind every election are exact in float32; shapes
never change, so that everything compiles once.
"""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import oracle
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from programs import CONFIGS

import matu_jax as matu

S, N, T, D = oracle.SLOTS, oracle.CLIENTS, oracle.TASKS, oracle.PARAMETERS

HALVES = (ml_dtypes.bfloat16, np.float16)
PLAIN, ADDITIVE = CONFIGS[0], CONFIGS[3]

magnitudes = st.sampled_from(["max", "mean"])
configs = st.sampled_from(CONFIGS)
seeds = st.integers(0, 2**32 - 1)


def eighths(slots=S, bound=24):
    return hnp.arrays(np.int8, (slots, D), elements=st.integers(-bound, bound)).map(
        lambda drawn: drawn.astype(np.float64) / 8
    )


# Distinct (client, task) pairs, about a third of them absent.
participation = st.tuples(
    st.permutations([(n, t) for n in range(N) for t in range(T)]),
    st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0, 3.0]), min_size=S, max_size=S),
).map(lambda drawn: _slots(drawn[0][:S], drawn[1]))


def _slots(pairs, weight):
    return matu.Slots(
        client=np.array([n for n, _ in pairs], np.int32),
        task=np.array([t for _, t in pairs], np.int32),
        weight=np.array(weight, np.float32),
        num_clients=N,
        num_tasks=T,
    )


def _present(slots):
    return np.asarray(slots.weight) > 0


def _flat(unified):
    """Vectors [clients, d], masks [slots, d] and scales [slots]."""
    return (
        oracle.rows(unified.vector),
        oracle.unpacked(unified.masks, unified.vector),
        np.asarray(unified.scales, np.float64),
    )


def _nothing():
    one_per_task = matu.unify(oracle.tree(np.zeros((T, D))))
    return jax.tree.map(np.zeros_like, one_per_task)


def _aggregate(uploads, slots, config, previous=None):
    return matu.aggregate(uploads, slots, config, _nothing() if previous is None else previous)


def _same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def _finite(tree):
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        assert np.isfinite(np.asarray(leaf, np.float64)).all(), jax.tree_util.keystr(path)


# ------------------------------------------------------------------ unify: eqs. 1 to 4


@given(eighths(), participation, magnitudes)
def test_unify_is_the_oracle(values, slots, magnitude):
    unified = matu.unify(oracle.tree(values), slots, magnitude=magnitude)
    oracle.assert_unified(unified, values, slots.client, _present(slots), N, magnitude)


@given(eighths(), participation, magnitudes)
def test_rescaling_keeps_the_mean_absolute_value(values, slots, magnitude):
    vectors, masks, scales = _flat(matu.unify(oracle.tree(values), slots, magnitude=magnitude))
    kept = np.abs(masks * vectors[slots.client]).sum(axis=1)
    total = np.abs(values).sum(axis=1)
    any_kept = kept > 0
    np.testing.assert_allclose((scales * kept)[any_kept], total[any_kept], rtol=1e-6)
    assert not scales[~any_kept].any()


@given(eighths(), participation)
def test_the_maximum_bounds_every_entry_it_stands_for(values, slots):
    vectors, masks, _ = _flat(matu.unify(oracle.tree(values), slots, magnitude="max"))
    assert (np.abs(vectors)[slots.client] >= np.abs(masks * values)).all()


@given(eighths(), participation)
def test_the_mean_lies_between_zero_and_the_maximum(values, slots):
    largest = _flat(matu.unify(oracle.tree(values), slots, magnitude="max"))
    mean = _flat(matu.unify(oracle.tree(values), slots, magnitude="mean"))
    np.testing.assert_array_equal(np.sign(mean[0]), np.sign(largest[0]))
    assert (np.abs(mean[0]) <= np.abs(largest[0]) * (1 + 1e-6)).all()
    np.testing.assert_array_equal(mean[1], largest[1])


@given(eighths(), st.permutations(range(N)), magnitudes)
def test_modulate_undoes_unify_for_clients_with_one_slot(values, order, magnitude):
    # Five clients with one slot each; the other six slots are absent.
    client = np.array([*order, *order, 0], np.int32)
    task = np.array([0] * N + [1] * N + [2], np.int32)
    weight = np.array([1.0] * N + [0.0] * (S - N), np.float32)
    slots = matu.Slots(client, task, weight, N, T)
    unified = matu.unify(oracle.tree(values), slots, magnitude=magnitude)
    modulated = oracle.rows(matu.modulate(unified, slots))
    np.testing.assert_allclose(modulated[:N], values[:N], rtol=1e-6)
    assert not modulated[N:].any()


@given(eighths(), participation, magnitudes, st.permutations(range(S)))
def test_unify_follows_a_permutation_of_slots(values, slots, magnitude, order):
    order = np.array(order)
    shuffled = dataclasses.replace(
        slots, client=slots.client[order], task=slots.task[order], weight=slots.weight[order]
    )
    before = matu.unify(oracle.tree(values), slots, magnitude=magnitude)
    after = matu.unify(oracle.tree(values[order]), shuffled, magnitude=magnitude)
    _same(after.vector, before.vector)
    _same(after.masks, jax.tree.map(lambda mask: mask[order], before.masks))
    _same(after.scales, before.scales[order])


@given(eighths(), participation, magnitudes, st.permutations(range(N)))
def test_unify_follows_a_permutation_of_clients(values, slots, magnitude, name):
    name = np.array(name, np.int32)
    renamed = dataclasses.replace(slots, client=name[slots.client])
    before = matu.unify(oracle.tree(values), slots, magnitude=magnitude)
    after = matu.unify(oracle.tree(values), renamed, magnitude=magnitude)
    _same(jax.tree.map(lambda leaf: leaf[name], after.vector), before.vector)
    _same(after.masks, before.masks)
    _same(after.scales, before.scales)


@given(eighths(), participation, magnitudes, st.permutations(range(D)))
def test_unify_follows_a_permutation_of_parameters(values, slots, magnitude, order):
    # Parameters change places across leaves too.
    order = np.array(order)
    before = _flat(matu.unify(oracle.tree(values), slots, magnitude=magnitude))
    after = _flat(matu.unify(oracle.tree(values[:, order]), slots, magnitude=magnitude))
    np.testing.assert_array_equal(after[0], before[0][:, order])
    np.testing.assert_array_equal(after[1], before[1][:, order])
    np.testing.assert_allclose(after[2], before[2], rtol=1e-6)


@given(eighths(), participation, magnitudes, st.sampled_from([2.0**-20, 0.5, 3.0, 2.0**20]))
def test_unify_follows_one_positive_factor(values, slots, magnitude, factor):
    before = _flat(matu.unify(oracle.tree(values), slots, magnitude=magnitude))
    after = _flat(matu.unify(oracle.tree(factor * values), slots, magnitude=magnitude))
    np.testing.assert_allclose(after[0], factor * before[0], rtol=1e-6)
    np.testing.assert_array_equal(after[1], before[1])
    np.testing.assert_allclose(after[2], before[2], rtol=1e-6)


@given(eighths(bound=127), participation, magnitudes)
def test_masks_and_scales_are_those_of_the_vector_as_stored(values, slots, magnitude):
    # Means of these do not fit in the 8 or 11 bits of a half-precision number.
    tree = oracle.tree(values, HALVES)
    unified = matu.unify(tree, slots, magnitude=magnitude)
    vectors, masks, scales = _flat(unified)
    stored, present = oracle.rows(tree), _present(slots)
    expected = (stored * vectors[slots.client] > 0) & present[:, None]
    np.testing.assert_array_equal(masks, expected)
    kept = np.abs(masks * vectors[slots.client]).sum(axis=1)
    total = np.abs(stored).sum(axis=1)
    np.testing.assert_allclose((scales * kept)[kept > 0], total[kept > 0], rtol=1e-6)


# ------------------------------------------------------------------ similarity: eq. 7


@given(eighths())
def test_similarity_is_symmetric_and_the_oracle(values):
    found = np.asarray(matu.direction_similarity(oracle.tree(values)))
    np.testing.assert_array_equal(found, found.T)
    assert ((found >= 0) & (found <= 1)).all()
    np.testing.assert_allclose(found, oracle.aggregated_similarity(values), rtol=0, atol=1e-6)


@given(eighths(S // 2))
def test_similarity_with_itself_and_its_negative(values):
    values = np.where(values == 0, 0.125, values)
    rows = np.concatenate([values, -values, values[:1]])
    found = np.asarray(matu.direction_similarity(oracle.tree(rows)))
    half = S // 2
    np.testing.assert_array_equal(np.diag(found), 1)
    np.testing.assert_array_equal(np.diag(found[:half, half : 2 * half]), 0)
    np.testing.assert_array_equal(found[0, -1], 1)
    # What agrees with a vector disagrees with its negative.
    np.testing.assert_allclose(found[:half, :half], 1 - found[:half, half : 2 * half], atol=1e-6)


@given(eighths(), st.lists(st.floats(2.0**-40, 2.0**40), min_size=S, max_size=S))
def test_similarity_does_not_see_positive_factors(values, factors):
    scaled = values * np.array(factors)[:, None]
    _same(
        matu.direction_similarity(oracle.tree(values)),
        matu.direction_similarity(oracle.tree(scaled)),
    )


@given(eighths(), participation, st.sampled_from(CONFIGS[:2]))
def test_similarity_of_tasks_is_symmetric(values, slots, config):
    result = _aggregate(matu.unify(oracle.tree(values), slots), slots, config)
    found = np.asarray(result.similarity)
    np.testing.assert_array_equal(found, found.T)
    assert ((found >= 0) & (found <= 1)).all()


# ------------------------------------------------------------------ the round: eqs. 5 to 9


@given(eighths(), eighths(), participation, configs)
def test_a_round_is_the_oracle(before, values, slots, config):
    everyone = dataclasses.replace(slots, weight=np.ones(S, np.float32))
    previous = _aggregate(matu.unify(oracle.tree(before), everyone), everyone, PLAIN).unified
    uploads = matu.unify(oracle.tree(values), slots, magnitude=config.magnitude)
    result = matu.aggregate(uploads, slots, config, previous)
    assume(not oracle.eq9_in_doubt(result, slots.client.tolist(), slots.task.tolist()))
    plain = dataclasses.replace(config, magnitude="max", transfer="none")
    untransferred = matu.aggregate(uploads, slots, plain, previous)
    oracle.assert_round(result, untransferred, uploads, slots, config, previous)
    np.testing.assert_array_equal(np.asarray(result.accepted), _present(slots))


@given(eighths(), participation, magnitudes)
def test_a_client_alone_with_a_task_gets_its_vector_back(values, slots, magnitude):
    uploads = matu.unify(oracle.tree(values), slots, magnitude=magnitude)
    found = oracle.rows(_aggregate(uploads, slots, PLAIN).task_vectors)
    sent = oracle.rows(matu.modulate(uploads, slots))
    present = _present(slots)
    for s in np.flatnonzero(present):
        if (slots.task[present] == slots.task[s]).sum() == 1:
            np.testing.assert_allclose(found[slots.task[s]], sent[s], rtol=1e-6)
            if (slots.client[present] == slots.client[s]).sum() == 1:
                np.testing.assert_allclose(found[slots.task[s]], values[s], rtol=1e-6)


@given(eighths(), participation, configs, seeds)
def test_an_absent_slot_changes_nothing_at_all(values, slots, config, seed):
    absent = ~_present(slots)
    generator = np.random.default_rng(seed)
    spoiled = values.copy()
    garbage = [np.nan, np.inf, -np.inf, 3e38, -7.0]
    spoiled[absent] = generator.choice(garbage, (absent.sum(), D))
    clean = matu.unify(oracle.tree(values), slots, magnitude=config.magnitude)
    dirty = matu.unify(oracle.tree(spoiled), slots, magnitude=config.magnitude)
    _same(clean, dirty)

    # Nor does what it, or a client that is altogether absent, may have sent.
    def resent(leaf):
        leaf = np.array(leaf)
        leaf[np.setdiff1d(np.arange(N), slots.client[~absent])] = generator.choice(garbage)
        return leaf

    scales = np.array(clean.scales)
    scales[absent] = generator.choice(garbage, absent.sum())
    # Set bits of parameters, leaving the padding (one bit of two bytes, seven of one) zero.
    masks = jax.tree.map(np.array, clean.masks)
    masks["block"]["kernel"][absent] = generator.integers(0, 128, (absent.sum(), 2))
    masks["pair"][0][absent] = generator.integers(0, 2, (absent.sum(), 1))
    vector = jax.tree.map(resent, clean.vector)
    resent_uploads = clean._replace(vector=vector, masks=masks, scales=scales)
    _same(_aggregate(clean, slots, config), _aggregate(resent_uploads, slots, config))
    assert matu.nonfinite(resent_uploads, slots) == []


@given(eighths(), participation, configs)
def test_an_absent_slot_need_not_be_listed(values, slots, config):
    # The last slot absent, against the last slot standing in for another one that is absent.
    weight = np.array(slots.weight)
    weight[-1] = 0
    slots = dataclasses.replace(slots, weight=weight)
    moved = dataclasses.replace(
        slots,
        client=np.append(slots.client[:-1], np.int32((slots.client[-1] + 1) % N)),
        task=np.append(slots.task[:-1], np.int32((slots.task[-1] + 1) % T)),
    )
    uploads = [matu.unify(oracle.tree(values), each) for each in (slots, moved)]
    _same(*uploads)
    left, right = (_aggregate(uploads[0], each, config) for each in (slots, moved))
    _same(left.task_vectors, right.task_vectors)
    _same(left.similarity, right.similarity)
    _same(left.unified, right.unified)


@given(eighths(), participation, st.sampled_from(CONFIGS[2:]), st.permutations(range(S)))
def test_a_round_does_not_see_the_order_of_slots(values, slots, config, order):
    order = np.array(order)
    shuffled = dataclasses.replace(
        slots, client=slots.client[order], task=slots.task[order], weight=slots.weight[order]
    )
    uploads = matu.unify(oracle.tree(values), slots, magnitude=config.magnitude)
    plain = dataclasses.replace(config, magnitude="max", transfer="none")
    before = _aggregate(uploads, slots, plain)
    moved = matu.unify(oracle.tree(values[order]), shuffled, magnitude=config.magnitude)
    after = _aggregate(moved, shuffled, plain)
    expected = oracle.rows(before.task_vectors)
    np.testing.assert_allclose(
        oracle.rows(after.task_vectors), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max()
    )
    _same(after.accepted, before.accepted[order])


@given(eighths(), participation, configs, st.sampled_from([2.0**-100, 3.0, 2.0**100]))
def test_a_round_does_not_see_the_unit_of_weights(values, slots, config, unit):
    uploads = matu.unify(oracle.tree(values), slots, magnitude=config.magnitude)
    scaled = dataclasses.replace(slots, weight=slots.weight * np.float32(unit))
    plain = dataclasses.replace(config, magnitude="max", transfer="none")
    before, after = (_aggregate(uploads, each, plain) for each in (slots, scaled))
    expected = oracle.rows(before.task_vectors)
    np.testing.assert_allclose(
        oracle.rows(after.task_vectors), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max()
    )


@given(eighths(), participation, st.integers(0, S - 1), configs, st.sampled_from([np.nan, np.inf]))
def test_an_upload_that_is_not_finite_takes_no_part(values, slots, slot, config, bad):
    weight = np.array(slots.weight)
    weight[slot] = 1.0
    slots = dataclasses.replace(slots, weight=weight)
    spoiled = values.copy()
    spoiled[slot, 3] = bad
    uploads = matu.unify(oracle.tree(spoiled), slots, magnitude=config.magnitude)
    result = _aggregate(uploads, slots, config)
    client = slots.client[slot]
    np.testing.assert_array_equal(
        np.asarray(result.accepted), _present(slots) & (slots.client != client)
    )
    others = dataclasses.replace(slots, weight=np.where(slots.client == client, 0, weight))
    clean = matu.unify(oracle.tree(values), others, magnitude=config.magnitude)
    _same(result, _aggregate(clean, others, config))
    lines = matu.nonfinite(uploads, slots)
    assert any("kernel" in line for line in lines)
    assert all(f"client {client}" in line for line in lines)


# ------------------------------------------------------------------ nothing overflows

_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)
RAGGED = _slots(list(zip(oracle.CLIENT, oracle.TASK, strict=True)), oracle.WEIGHT)
# All that one slot has left of its vector is tiny: its scale is beyond float32.
OUTVOTED = np.zeros((S, D), np.float32)
OUTVOTED[1], OUTVOTED[2] = 1.0, -2.0
OUTVOTED[1:3, -1] = 2e-38
extremes = st.sampled_from(
    [
        x * sign
        for x in (0.0, _SMALLEST, 1e-30, 1.0, 1e30, _LARGEST / 2, _LARGEST)
        for sign in (1, -1)
    ]
)


def extreme_arrays(shape):
    return hnp.arrays(np.float32, shape, elements=extremes)


@given(extreme_arrays((S, D)), participation, configs)
@example(OUTVOTED, RAGGED, ADDITIVE)
@example(np.full((S, D), _LARGEST, np.float32), RAGGED, ADDITIVE)
@example(np.full((S, D), _SMALLEST, np.float32), RAGGED, ADDITIVE)
def test_nothing_is_nan_or_infinite_from_end_to_end(values, slots, config):
    vectors = oracle.tree(values)
    uploads = matu.unify(vectors, slots, magnitude=config.magnitude)
    _finite(uploads)
    _finite(matu.modulate(uploads, slots))
    _finite(matu.direction_similarity(vectors))
    result = _aggregate(uploads, slots, config)
    _finite(result)
    np.testing.assert_array_equal(np.asarray(result.accepted), _present(slots))
    _finite(matu.modulate(result.downloads, slots))
    following = matu.aggregate(uploads, slots, config, result.unified)
    _finite(following)


@given(
    extreme_arrays((N, D)),
    extreme_arrays((S,)),
    extreme_arrays((T, D)),
    extreme_arrays((T,)),
    participation,
    extreme_arrays((S,)),
    configs,
    seeds,
)
def test_no_finite_upload_makes_nan_or_infinity(
    vectors, scales, held, held_scales, slots, weight, config, seed
):
    # Numbers that unify would not make, but a faulty or hostile client may send.
    generator = np.random.default_rng(seed)

    def masks(slots):
        return {
            "block": {"kernel": generator.integers(0, 128, (slots, 2)).astype(np.uint8)},
            "empty": {},
            "pair": (generator.integers(0, 2, (slots, 1)).astype(np.uint8),),
        }

    slots = dataclasses.replace(slots, weight=np.abs(weight))
    uploads = matu.Unified(oracle.tree(vectors), masks(S), scales)
    one = jax.tree.map(lambda leaf: leaf[0], oracle.tree(held))
    previous = matu.Unified(one, masks(T), held_scales)
    _finite(matu.modulate(uploads, slots))
    _finite(matu.modulate(previous))
    _finite(matu.aggregate(uploads, slots, config, previous))


@given(eighths(bound=127), participation)
def test_half_precision_does_not_overflow(values, slots):
    # Up to 65504, the largest float16, and its neighbours in bfloat16.
    vectors = oracle.tree(values / max(1, np.abs(values).max()) * 65504, HALVES)
    config = CONFIGS[2]
    uploads = matu.unify(vectors, slots, magnitude=config.magnitude)
    _finite(uploads)
    _finite(matu.modulate(uploads, slots))
    _finite(_aggregate(uploads, slots, config))
