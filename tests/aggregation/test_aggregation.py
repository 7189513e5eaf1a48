"""The aggregator against plain float64 loops (`oracle.py`), on the awkward cases by name."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from programs import CONFIGS

import matu_jax as matu
from matu_jax.aggregation.storage import pack
from matu_jax.config import NO_DEFENCE, DefenceConfig, MatuConfig

CLIENT, TASK, WEIGHT = oracle.CLIENT, oracle.TASK, oracle.WEIGHT
OTHERS = ~np.eye(oracle.TASKS, dtype=bool)
_tree, _values = oracle.tree, oracle.values


def _name(config):
    return f"{config.magnitude}-{config.similarity}-{config.transfer}"


def _slots(client=CLIENT, task=TASK, weight=WEIGHT, num_clients=5, num_tasks=5, xp=np):
    return matu.Slots(
        client=xp.asarray(client, np.int32),
        task=xp.asarray(task, np.int32),
        weight=xp.asarray(weight, np.float32),
        num_clients=num_clients,
        num_tasks=num_tasks,
    )


def _nothing(vectors, tasks=oracle.TASKS):
    """What a server holds that has not seen a round: the same as no `previous` at all."""
    return jax.tree.map(np.zeros_like, matu.unify(jax.tree.map(lambda x: x[:tasks], vectors)))


def _round(vectors, slots, config, previous=None):
    """Uploads, the round, and the same round without eq. 8."""
    previous = _nothing(vectors, slots.num_tasks) if previous is None else previous
    uploads = matu.unify(vectors, slots, magnitude=config.magnitude)
    result = matu.aggregate(uploads, slots, config, previous)
    plain = dataclasses.replace(config, magnitude="max", transfer="none")
    return uploads, result, matu.aggregate(uploads, slots, plain, previous)


# ------------------------------------------------------------------ worked by hand


def test_unify_worked_by_hand():
    # Sums (4, -1, 0, 2): elected (+, -, 0, +). Largest agreeing: (3, 2, -, 2).
    vectors = {"w": np.array([[1, -2, 1, 2], [3, 1, -1, 0]], np.float32)}
    unified = matu.unify(vectors, magnitude="max")
    np.testing.assert_array_equal(np.asarray(unified.vector["w"]), [3, -2, 0, 2])
    # Slot 0 agrees at 0, 1, 3: bits 0b1011; slot 1 at 0 alone.
    np.testing.assert_array_equal(np.asarray(unified.masks["w"]), [[0b1011], [0b0001]])
    # (1 + 2 + 1 + 2) / (3 + 2 + 2) and (3 + 1 + 1) / 3.
    np.testing.assert_allclose(np.asarray(unified.scales), [6 / 7, 5 / 3], rtol=1e-6)
    np.testing.assert_allclose(
        np.asarray(matu.modulate(unified)["w"]),
        [[18 / 7, -12 / 7, 0, 12 / 7], [5, 0, 0, 0]],
        rtol=1e-6,
    )


def test_mean_magnitude_worked_by_hand():
    # The mean is over the agreeing entries alone: (1 + 3) / 2, 2 / 1 and 2 / 1 (a zero does not).
    vectors = {"w": np.array([[1, -2, 1, 2], [3, 1, -1, 0]], np.float32)}
    unified = matu.unify(vectors, magnitude="mean")
    np.testing.assert_array_equal(np.asarray(unified.vector["w"]), [2, -2, 0, 2])
    np.testing.assert_allclose(np.asarray(unified.scales), [6 / 6, 5 / 2], rtol=1e-6)


def _clients_with_one_task(rows, task, weight, config):
    """A round in which every slot is a client of its own: the uploads are the vectors."""
    slots = _slots(range(len(rows)), task, weight, len(rows), max(task) + 1)
    uploads = matu.unify({"w": np.asarray(rows, np.float32)}, slots)
    return matu.aggregate(uploads, slots, config)


def test_gate_and_weighted_mean_worked_by_hand():
    config = matu.AggregationConfig.paper(agreement_threshold=0.5, transfer="none")
    rows = [[3, 1, 0], [0, -2, 4], [1, 1, 3], [2, 1, 0], [-3, 1, 0]]
    result = _clients_with_one_task(rows, [0, 0, 1, 1, 1], [1, 3, 100, 100, 56], config)
    np.testing.assert_allclose(
        np.asarray(result.task_vectors["w"]),
        [
            # Agreement ½ is at the threshold and passes; 0 of two opposite signs does not.
            [3 / 4, 0, 3],
            # Agreement 1/3 (by heads, whatever the weights), 1, and 1/3 (zeros count).
            [(100 + 200 - 168) / 256 / 3, 1, 300 / 256 / 3],
        ],
        rtol=1e-6,
    )


# Four tasks with similarities that float32 holds exactly.
FOUR_TASKS = [[1, 1, 1, 1], [2, 2, -2, 0], [4, 0, 4, 0], [-8, 8, 8, -8]]
FOUR_SIMILARITIES = [
    [1, 5 / 8, 3 / 4, 1 / 2],
    [5 / 8, 7 / 8, 1 / 2, 3 / 8],
    [3 / 4, 1 / 2, 3 / 4, 1 / 2],
    [1 / 2, 3 / 8, 1 / 2, 1],
]


def _four_tasks(**fields):
    config = matu.AggregationConfig.paper(**fields)
    return _clients_with_one_task(FOUR_TASKS, range(4), [1, 1, 1, 1], config)


def test_weighted_mean_of_lenders_worked_by_hand():
    result = _four_tasks(transfer="mean", top_k=2, min_similarity=0.0, similarity="cross_client")
    others = ~np.eye(4, dtype=bool)
    np.testing.assert_array_equal(
        np.asarray(result.similarity)[others], np.array(FOUR_SIMILARITIES)[others]
    )
    # Task 0 borrows of task 2 with 3/4 and of task 1 with 5/8.
    share = np.array([1 + 3 + 1.25, 1 + 1.25, 1 + 3 - 1.25, 1])
    np.testing.assert_allclose(
        np.asarray(result.task_vectors["w"])[0], share / (1 + 3 / 4 + 5 / 8), rtol=1e-6
    )


def test_one_lender_and_ties_worked_by_hand():
    result = _four_tasks(transfer="additive", top_k=1, min_similarity=0.0, similarity="aggregated")
    np.testing.assert_array_equal(np.asarray(result.similarity), FOUR_SIMILARITIES)
    own = np.array(FOUR_TASKS)
    # Task 3 is one half like both 0 and 2: the lower index lends.
    expected = [
        own[0] + 3 / 4 * own[2],
        own[1] + 5 / 8 * own[0],
        own[2] + 3 / 4 * own[0],
        own[3] + 1 / 2 * own[0],
    ]
    np.testing.assert_array_equal(np.asarray(result.task_vectors["w"]), expected)


def test_minimum_similarity_is_inclusive_and_top_k_may_exceed_the_tasks():
    result = _four_tasks(
        transfer="additive", top_k=50, min_similarity=0.625, similarity="aggregated"
    )
    own = np.array(FOUR_TASKS)
    expected = [
        own[0] + 5 / 8 * own[1] + 3 / 4 * own[2],
        own[1] + 5 / 8 * own[0],
        own[2] + 3 / 4 * own[0],
        own[3],
    ]
    np.testing.assert_array_equal(np.asarray(result.task_vectors["w"]), expected)


def test_top_k_zero_turns_transfer_off():
    result = _four_tasks(transfer="additive", top_k=0, min_similarity=0.0)
    np.testing.assert_array_equal(np.asarray(result.task_vectors["w"]), FOUR_TASKS)


def test_cross_client_similarity_worked_by_hand():
    # Clients 0 and 1 hold tasks 0 and 1, client 2 holds task 1, client 3 tasks 2 and 3 alone.
    slots = _slots([0, 0, 1, 1, 2, 3, 3], [0, 1, 0, 1, 1, 2, 3], [1.0] * 7, 4, 4)
    rows = [[1, 1], [1, 1], [1, -1], [1, -1], [1, 1], [1, 1], [1, 1]]
    config = matu.AggregationConfig.paper(similarity="cross_client", transfer="none")
    uploads = matu.unify({"w": np.array(rows, np.float32)}, slots)
    found = np.asarray(matu.aggregate(uploads, slots, config).similarity)
    # Of six pairs four are of two clients: (0, task 0) with 1's and 2's task 1, (1, task 0) with
    # 0's and 2's. Their sign products over d = 2 are 0, 1, 0, 0.
    np.testing.assert_allclose(found[[0, 1], [1, 0]], 5 / 8, rtol=1e-6)
    # Tasks 2 and 3 meet at one client only, where the same vector says nothing.
    np.testing.assert_array_equal(found[[2, 3], [3, 2]], 1 / 2)
    # Task 0 with task 2: (1, 1) and (1, -1) against (1, 1).
    np.testing.assert_allclose(found[0, 2], 3 / 4, rtol=1e-6)


# ------------------------------------------------------------------ unify and modulate


@pytest.mark.parametrize("magnitude", ["max", "mean"])
@pytest.mark.parametrize("xp", [np, jnp])
def test_unify_is_the_oracle(magnitude, xp):
    values = _values(1)
    slots = _slots(xp=xp)
    unified = matu.unify(jax.tree.map(xp.asarray, _tree(values)), slots, magnitude=magnitude)
    oracle.assert_unified(unified, values, CLIENT, np.array(WEIGHT) > 0, 5, magnitude)


@pytest.mark.parametrize("magnitude", ["max", "mean"])
def test_unify_of_one_group_is_the_oracle(magnitude):
    values = _values(2)
    unified = matu.unify(_tree(values), magnitude=magnitude)
    assert jax.tree.map(np.shape, unified.vector) == {
        "block": {"kernel": (3, 5)},
        "empty": {},
        "pair": ((),),
    }
    found = oracle.Group(
        oracle.rows(unified.vector, 0),
        oracle.unpacked(unified.masks, unified.vector, 0),
        np.asarray(unified.scales, np.float64),
    )
    oracle.assert_group(found, oracle.unify(values, [True] * 11, magnitude))
    np.testing.assert_allclose(
        oracle.rows(matu.modulate(unified)), oracle.modulate(found), rtol=1e-6
    )


@pytest.mark.parametrize("magnitude", ["max", "mean"])
def test_storage_dtypes_are_kept_and_scales_follow_the_stored_vector(magnitude):
    dtypes = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
    vectors, slots = _tree(_values(3), dtypes), _slots()
    unified = matu.unify(vectors, slots, magnitude=magnitude)
    assert [leaf.dtype for leaf in jax.tree.leaves(unified.vector)] == dtypes
    assert unified.scales.dtype == np.float32
    oracle.assert_unified(unified, oracle.rows(vectors), CLIENT, np.array(WEIGHT) > 0, 5, magnitude)
    modulated = matu.modulate(unified, slots)
    assert [leaf.dtype for leaf in jax.tree.leaves(modulated)] == dtypes


def test_masks_are_packed_row_by_row_and_padded_with_zeros():
    values = _values(4)
    unified = matu.unify(_tree(values), _slots())
    assert jax.tree.map(np.shape, unified.masks) == {
        "block": {"kernel": (11, 2)},
        "empty": {},
        "pair": ((11, 1),),
    }
    for mask, size in zip(jax.tree.leaves(unified.masks), (15, 1), strict=True):
        assert mask.dtype == np.uint8
        bits = oracle.bits_of(np.asarray(mask), size)
        np.testing.assert_array_equal(pack(bits.astype(bool)), np.asarray(mask))


@pytest.mark.parametrize("magnitude", ["max", "mean"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [5 << 15, 140_001])  # whole blocks, and blocks with a rest
def test_a_leaf_of_many_blocks_is_folded_like_its_pieces(size, dtype, magnitude):
    drawn = np.random.default_rng(0).normal(size=(6, size)) * np.logspace(-20, 20, size)
    whole = drawn.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    cuts = [20_000, 40_000, 64_000]
    pieces = dict(zip("abcd", np.split(whole, cuts, axis=1), strict=True))
    slots = matu.Slots([2, 0, 0, 1, 2, 2], [0, 1, 2, 0, 1, 2], [1.0, 1, 0, 1, 1, 1], 3, 3)
    one = matu.unify({"w": whole}, slots, magnitude=magnitude)
    four = matu.unify(pieces, slots, magnitude=magnitude)  # three joined, and one alone
    joined = np.concatenate(jax.tree.leaves(four.vector), axis=1)
    np.testing.assert_array_equal(one.vector["w"], joined)
    masks = [oracle.unpacked(x.masks, x.vector) for x in (one, four)]
    np.testing.assert_array_equal(masks[0], masks[1])
    np.testing.assert_allclose(one.scales, four.scales, rtol=2e-6)
    exact = np.abs(whole[3].astype(np.float64)).sum()
    rebuilt = np.asarray(matu.modulate(one, slots)["w"][3]).astype(np.float64)
    np.testing.assert_allclose(np.abs(rebuilt).sum(), exact, rtol=1e-5)


@pytest.mark.parametrize("magnitude", ["max", "mean"])
def test_scales_are_right_where_sums_of_magnitudes_overflow(magnitude):
    """A power of two changes no scale; the first two of these slots overflow, the others do not."""
    drawn = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    drawn *= np.float32(2.0) ** np.array([[25], [24], [10], [3]], np.float32)
    slots = matu.Slots([0, 0, 0, 1], [0, 1, 2, 0], [1.0, 1, 1, 1], 2, 3)
    plain = matu.unify({"w": drawn[:, :16], "v": drawn[:, 16:]}, slots, magnitude=magnitude)
    huge = drawn * np.float32(2.0**100)
    largest = float(np.finfo(np.float32).max)
    assert (np.abs(huge.astype(np.float64)).sum(axis=1) > largest).tolist() == [
        True,
        True,
        False,
        False,
    ]
    found = matu.unify({"w": huge[:, :16], "v": huge[:, 16:]}, slots, magnitude=magnitude)
    np.testing.assert_allclose(found.scales, plain.scales, rtol=1e-6)
    assert len(set(np.asarray(plain.scales).tolist())) == 4


@pytest.mark.parametrize("magnitude", ["max", "mean"])
def test_modulate_is_the_oracle(magnitude):
    unified = matu.unify(_tree(_values(5)), _slots(), magnitude=magnitude)
    modulated = matu.modulate(unified, _slots())
    assert jax.tree.structure(modulated) == jax.tree.structure(unified.vector)
    assert jax.tree.map(np.shape, modulated) == {
        "block": {"kernel": (11, 3, 5)},
        "empty": {},
        "pair": ((11,),),
    }
    np.testing.assert_allclose(oracle.rows(modulated), oracle.received(unified, CLIENT), rtol=1e-6)


def test_a_client_without_slots_has_a_zero_vector():
    slots = _slots(num_clients=6)
    unified = matu.unify(_tree(_values(6)), slots)
    assert not oracle.rows(unified.vector)[5].any()
    assert not oracle.rows(unified.vector)[4].any()  # client 4 is absent


@pytest.mark.parametrize("magnitude", ["max", "mean"])
def test_all_zero_vectors_unify_to_nothing(magnitude):
    unified = matu.unify(_tree(np.zeros((11, oracle.PARAMETERS))), _slots(), magnitude=magnitude)
    for leaf in jax.tree.leaves(unified):
        assert not np.asarray(leaf).any()


def test_a_slot_outvoted_everywhere_has_scale_zero():
    unified = matu.unify({"w": np.array([[1, -1], [-2, 2]], np.float32)})
    np.testing.assert_array_equal(np.asarray(unified.masks["w"]), [[0], [3]])
    np.testing.assert_array_equal(np.asarray(unified.scales), [0, 1])


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("magnitude", ["max", "mean"])
def test_an_absent_slot_changes_nothing(garbage, magnitude):
    values = _values(7)
    spoiled = values.copy()
    spoiled[np.array(WEIGHT) == 0] = garbage
    clean = matu.unify(_tree(values), _slots(), magnitude=magnitude)
    dirty = matu.unify(_tree(spoiled), _slots(), magnitude=magnitude)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    for mask in jax.tree.leaves(dirty.masks):
        assert not np.asarray(mask)[np.array(WEIGHT) == 0].any()
    assert not np.asarray(dirty.scales)[np.array(WEIGHT) == 0].any()


# ------------------------------------------------------------------ direction similarity


def test_direction_similarity_is_the_oracle():
    values = _values(8)
    found = matu.direction_similarity(_tree(values))
    assert found.dtype == np.float32
    np.testing.assert_allclose(
        np.asarray(found), oracle.aggregated_similarity(values), rtol=0, atol=1e-6
    )


def test_direction_similarity_counts_exact_zeros():
    # Against itself a vector with one zero in four is 7/8 alike; against zero everything is 1/2.
    rows = np.array([[1, -1, 2, 0], [0, 0, 0, 0]], np.float32)
    np.testing.assert_array_equal(
        np.asarray(matu.direction_similarity({"w": rows})), [[7 / 8, 1 / 2], [1 / 2, 1 / 2]]
    )


def test_direction_similarity_over_many_parameters():
    # More parameters than one block of any sensible blocking, and not a multiple of one.
    generator = np.random.default_rng(0)
    rows = generator.integers(-1, 2, (3, 150_001)).astype(np.float32)
    found = np.asarray(matu.direction_similarity({"a": rows[:, :7], "b": rows[:, 7:]}))
    expected = (1 + rows.astype(np.int64) @ rows.astype(np.int64).T / rows.shape[1]) / 2
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_direction_similarity_of_tiny_values_counts_their_signs():
    tiny = np.array([[2.0**-14, -(2.0**-14)], [1, -1]], np.float16)
    np.testing.assert_array_equal(
        np.asarray(matu.direction_similarity({"w": tiny})), np.ones((2, 2))
    )


def test_scales_stay_accurate_over_many_parameters():
    # A single running float32 sum of 3e6 values would be off by about 1e-3.
    generator = np.random.default_rng(1)
    rows = generator.integers(1, 9, (2, 1_500_000)).astype(np.float32) / 8
    rows[0] *= -1
    scales = np.asarray(matu.unify({"w": rows}, magnitude="max").scales, np.float64)
    total = rows.astype(np.float64).sum(axis=0)
    unified = np.where(total > 0, rows[1], np.where(total < 0, rows[0], 0)).astype(np.float64)
    for slot, row in enumerate(rows.astype(np.float64)):
        kept = np.abs(unified[row * unified > 0]).sum()
        np.testing.assert_allclose(scales[slot], np.abs(row).sum() / kept, rtol=2e-6)


# ------------------------------------------------------------------ aggregate


@pytest.mark.parametrize("config", CONFIGS, ids=_name)
def test_a_ragged_round_is_the_oracle(config):
    slots = _slots()
    uploads, result, plain = _round(_tree(_values(9)), slots, config)
    assert not oracle.eq9_in_doubt(result, CLIENT, TASK), "choose another seed"
    oracle.assert_round(result, plain, uploads, slots, config)
    np.testing.assert_array_equal(np.asarray(result.accepted), np.array(WEIGHT) > 0)
    assert result.similarity.shape == (5, 5)
    assert result.similarity.dtype == np.float32


@pytest.mark.parametrize("config", CONFIGS, ids=_name)
def test_from_end_to_end_is_the_oracle(config):
    # Without zeros and without ties, so that no election and no ranking is a matter of rounding.
    values = np.random.default_rng(10).normal(size=(11, oracle.PARAMETERS))
    slots = _slots()
    uploads, result, _ = _round(_tree(values), slots, config)
    assert not oracle.eq9_in_doubt(result, CLIENT, TASK), "choose another seed"

    folded = np.zeros((11, oracle.PARAMETERS))
    for n in range(5):
        listed = [s for s in range(11) if CLIENT[s] == n]
        present = [WEIGHT[s] > 0 for s in listed]
        vectors = oracle.rows(_tree(values))[listed]
        folded[listed] = oracle.modulate(oracle.unify(vectors, present, config.magnitude))
    np.testing.assert_allclose(oracle.received(uploads, CLIENT), folded, rtol=1e-5)

    expected = oracle.aggregate(
        folded,
        CLIENT,
        TASK,
        WEIGHT,
        5,
        5,
        magnitude=config.magnitude,
        agreement_threshold=config.agreement_threshold,
        rule=config.transfer,
        similarity_of=config.similarity,
        top_k=config.top_k,
        min_similarity=config.min_similarity,
    )
    np.testing.assert_allclose(
        oracle.rows(result.task_vectors), expected.task_vectors, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        np.asarray(result.similarity)[OTHERS], expected.similarity[OTHERS], rtol=0, atol=1e-6
    )
    found = oracle.groups(result.downloads, CLIENT, 5)
    for group, wanted in zip(found, expected.downloads, strict=True):
        np.testing.assert_allclose(group.vector, wanted.vector, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(group.masks, wanted.masks)
        np.testing.assert_allclose(group.scales, wanted.scales, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=_name)
def test_a_task_without_reporter_keeps_what_the_server_holds(config):
    slots = _slots()
    everyone = _slots(weight=[1.0] * 11)
    _, first, _ = _round(_tree(_values(11)), everyone, config)
    uploads, result, plain = _round(_tree(_values(12)), slots, config, first.unified)
    assert not oracle.eq9_in_doubt(result, CLIENT, TASK), "choose another seed"
    oracle.assert_round(result, plain, uploads, slots, config, first.unified)
    held = oracle.rows(matu.modulate(first.unified))[3]
    assert held.any()
    np.testing.assert_array_equal(oracle.rows(plain.task_vectors)[3], held)


def test_without_previous_a_task_never_reported_is_zero():
    vectors = _tree(_values(13))
    uploads, result, _ = _round(vectors, _slots(), CONFIGS[0])
    assert not oracle.rows(result.task_vectors)[3:].any()
    without = matu.aggregate(uploads, _slots(), CONFIGS[0])
    jax.tree.map(np.testing.assert_array_equal, without, result)


@pytest.mark.parametrize("config", CONFIGS[:2], ids=_name)
def test_an_unreported_task_is_one_half_like_the_others(config):
    _, result, _ = _round(_tree(_values(14)), _slots(), config)
    found = np.asarray(result.similarity)
    np.testing.assert_array_equal(found[3, :3], [0.5] * 3)
    np.testing.assert_array_equal(found[:3, 4], [0.5] * 3)
    np.testing.assert_array_equal(found[3, 4], 0.5)


def test_a_task_that_holds_nothing_never_lends():
    # Tasks 3 and 4 are one half like everything; as lenders they would only dilute the mean.
    _, result, plain = _round(_tree(_values(15)), _slots(), CONFIGS[2])
    own, found = oracle.rows(plain.task_vectors), np.asarray(result.similarity, np.float64)
    assert (found[:3, :3] < 0.5).any(), "choose another seed"
    expected = oracle.transfer("mean", own[:3], found[:3, :3], [[True] * 3] * 3, 2, 15 / 32)
    np.testing.assert_allclose(oracle.rows(result.task_vectors)[:3], expected, rtol=2e-6, atol=2e-6)


def test_half_precision_storage_is_the_oracle():
    config, slots = CONFIGS[2], _slots()
    dtypes = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
    vectors = _tree(_values(16), dtypes)
    _, first, _ = _round(vectors, _slots(weight=[1.0] * 11), config)
    uploads, result, plain = _round(vectors, slots, config, first.unified)
    for part in (result.task_vectors, result.unified.vector, result.downloads.vector):
        assert [leaf.dtype for leaf in jax.tree.leaves(part)] == dtypes
    assert not oracle.eq9_in_doubt(result, CLIENT, TASK), "choose another seed"
    bfloat16 = 2.0**-7
    oracle.assert_round(result, plain, uploads, slots, config, first.unified, bfloat16)


@pytest.mark.parametrize("config", CONFIGS, ids=_name)
def test_all_zero_vectors_aggregate_to_nothing(config):
    slots = _slots()
    _, result, _ = _round(_tree(np.zeros((11, oracle.PARAMETERS))), slots, config)
    for part in (result.task_vectors, result.unified, result.downloads):
        for leaf in jax.tree.leaves(part):
            assert not np.asarray(leaf).any()
    np.testing.assert_array_equal(np.asarray(result.similarity)[OTHERS], 0.5)


@pytest.mark.parametrize("config", CONFIGS, ids=_name)
def test_nobody_present(config):
    slots = _slots(weight=[0.0] * 11)
    values = np.full((11, oracle.PARAMETERS), np.nan)
    _, result, _ = _round(_tree(values), slots, config)
    assert not np.asarray(result.accepted).any()
    for leaf in jax.tree.leaves(result._replace(accepted=None)):
        assert np.isfinite(np.asarray(leaf)).all()
    assert not oracle.rows(result.task_vectors).any()


def test_nobody_present_keeps_everything():
    config = CONFIGS[0]
    _, first, _ = _round(_tree(_values(17)), _slots(weight=[1.0] * 11), config)
    _, result, _ = _round(_tree(_values(18)), _slots(weight=[0.0] * 11), config, first.unified)
    held = matu.modulate(first.unified)
    jax.tree.map(np.testing.assert_array_equal, result.task_vectors, held)


def test_downloads_cover_absent_slots():
    _, result, _ = _round(_tree(_values(19)), _slots(), CONFIGS[0])
    scales = np.asarray(result.downloads.scales)
    assert scales[7] > 0  # client 3 is absent from task 0
    assert scales[10] > 0  # client 4 is absent altogether
    start = oracle.rows(matu.modulate(result.downloads, _slots()))
    assert start[10].any()


def test_one_slot():
    slots = _slots([0], [0], [5.0], 1, 1)
    vectors = _tree(_values(20, slots=1))
    uploads = matu.unify(vectors, slots)
    config = matu.AggregationConfig.paper(transfer="mean", similarity="aggregated")
    result = matu.aggregate(uploads, slots, config)
    oracle.assert_round(result, result, uploads, slots, config)
    for part in (matu.modulate(result.downloads, slots), result.task_vectors):
        np.testing.assert_allclose(oracle.rows(part), oracle.rows(vectors), rtol=1e-6)


def test_one_parameter():
    # A bare array, one number per slot.
    config, slots = CONFIGS[1], _slots()
    vectors = _values(21)[:, 0].astype(np.float32)
    vectors[0] = 0.0
    uploads, result, plain = _round(vectors, slots, config)
    assert np.shape(uploads.vector) == (5,)
    assert np.shape(uploads.masks) == (11, 1)
    assert not oracle.eq9_in_doubt(result, CLIENT, TASK), "choose another seed"
    oracle.assert_round(result, plain, uploads, slots, config)


def test_a_leaf_without_parameters_changes_nothing():
    vectors, slots = _tree(_values(31)), _slots()
    with_empty = {**vectors, "empty": np.zeros((11, 0, 3), np.float32)}
    found = _round(with_empty, slots, CONFIGS[0])[:2]
    assert found[0].masks["empty"].shape == (11, 0)
    assert found[1].task_vectors["empty"].shape == (5, 0, 3)
    expected = _round(vectors, slots, CONFIGS[0])[:2]
    assert len(jax.tree.leaves(found)) > len(jax.tree.leaves(expected))
    kept = [leaf for leaf in jax.tree.leaves(found) if np.size(leaf)]
    for left, right in zip(kept, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=1e-6)


def test_a_list_of_trees_all_the_way_to_parameters():
    base = jax.tree.map(lambda leaf: leaf[0], _tree(_values(22)))
    tuned = [jax.tree.map(lambda leaf, s=s: leaf[s], _tree(_values(23))) for s in range(11)]
    vectors = matu.task_vectors(matu.stack(tuned), base)
    result = matu.aggregate(matu.unify(vectors, _slots()), _slots(), CONFIGS[0])
    params = matu.apply_vectors(base, matu.modulate(result.downloads, _slots()))
    assert jax.tree.structure(params) == jax.tree.structure(base)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(params))


def test_jax_and_numpy_inputs_agree():
    results = [
        _round(jax.tree.map(xp.asarray, _tree(_values(24))), _slots(xp=xp), CONFIGS[2])[1]
        for xp in (np, jnp)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


# ------------------------------------------------------------------ uploads that are not finite


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("config", CONFIGS[2:], ids=_name)
def test_training_that_diverged_is_refused_by_name(bad, config):
    values = _values(25)
    values[1, 7] = bad  # client 0, task 1, block/kernel
    slots = _slots()
    uploads = matu.unify(_tree(values), slots, magnitude=config.magnitude)
    held = _nothing(_tree(_values(25)))
    result = matu.aggregate(uploads, slots, config, held)
    refused = np.array(CLIENT) == 0
    np.testing.assert_array_equal(np.asarray(result.accepted), (np.array(WEIGHT) > 0) & ~refused)

    without = matu.aggregate(uploads, _slots(weight=np.where(refused, 0, WEIGHT)), config, held)
    jax.tree.map(np.testing.assert_array_equal, result, without)
    for leaf in jax.tree.leaves(result._replace(accepted=None)):
        assert np.isfinite(np.asarray(leaf)).all()

    lines = matu.nonfinite(uploads, slots)
    named = [line for line in lines if "kernel" in line]
    assert named
    for line in lines:
        assert "client 0" in line
    assert any("task" in line and "1" in line for line in named)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_is_refused_by_name(bad):
    slots = _slots()
    uploads = matu.unify(_tree(_values(26)), slots)
    scales = np.array(uploads.scales)
    scales[4] = bad  # client 3, task 1
    spoiled = uploads._replace(scales=scales)
    held = _nothing(_tree(_values(26)))
    result = matu.aggregate(spoiled, slots, CONFIGS[2], held)
    accepted = np.asarray(result.accepted)
    assert not accepted[4]
    assert accepted[(np.array(CLIENT) != 3) & (np.array(WEIGHT) > 0)].all()
    others = _slots(weight=np.where(accepted, WEIGHT, 0))
    without = matu.aggregate(uploads, others, CONFIGS[2], held)
    jax.tree.map(np.testing.assert_array_equal, result, without)
    (line,) = matu.nonfinite(spoiled, slots)
    assert "client 3" in line
    assert "task 1" in line
    assert "scale" in line


def test_finite_uploads_name_nobody():
    slots = _slots()
    assert matu.nonfinite(matu.unify(_tree(_values(27)), slots), slots) == []


def test_what_absent_clients_hold_is_not_named():
    slots = _slots()
    uploads = matu.unify(_tree(_values(28)), slots)
    kernel = np.array(uploads.vector["block"]["kernel"])
    kernel[4] = np.nan
    scales = np.array(uploads.scales)
    scales[[7, 9]] = np.inf
    vector = {**uploads.vector, "block": {"kernel": kernel}}
    spoiled = uploads._replace(vector=vector, scales=scales)
    assert matu.nonfinite(spoiled, slots) == []
    held = _nothing(_tree(_values(28)))
    results = [matu.aggregate(u, slots, CONFIGS[2], held) for u in (spoiled, uploads)]
    jax.tree.map(np.testing.assert_array_equal, *results)


# ------------------------------------------------------------------ slots and configuration


def test_slots_are_a_pytree_with_static_counts():
    slots = _slots()
    assert len(jax.tree.leaves(slots)) == 3
    doubled = jax.jit(lambda s: jax.tree.map(lambda x: x + x, s))(slots)
    assert isinstance(doubled, matu.Slots)
    assert (doubled.num_clients, doubled.num_tasks) == (5, 5)
    np.testing.assert_array_equal(np.asarray(doubled.weight), 2 * np.array(WEIGHT))


def test_the_configuration_is_frozen_and_hashable():
    config = matu.AggregationConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(config) == hash(matu.AggregationConfig())


def test_the_default_is_what_experiments_have_and_the_paper_is_a_preset():
    assert matu.AggregationConfig() == matu.AggregationConfig.of(MatuConfig(), DefenceConfig())
    assert inspect.signature(matu.unify).parameters["magnitude"].default == MatuConfig().magnitude
    paper = matu.AggregationConfig.paper(top_k=2)
    assert (paper.magnitude, paper.agreement_threshold) == ("max", 0.4)
    assert (paper.uploads, paper.transfer, paper.top_k) == ("vector", "none", 2)
    assert paper == matu.AggregationConfig.of(paper, NO_DEFENCE)
    with pytest.raises(ValueError, match=r"transfer: 'shrinkage' needs uploads = 'change'"):
        matu.AggregationConfig.paper(transfer="shrinkage")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("magnitude", "median"),
        ("magnitude", None),
        ("agreement_threshold", -0.1),
        ("agreement_threshold", 1.1),
        ("agreement_threshold", float("nan")),
        ("agreement_threshold", "0.4"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("min_similarity", -0.1),
        ("min_similarity", 1.01),
        ("min_similarity", float("nan")),
        ("min_similarity", None),
        ("transfer", "mena"),
        ("transfer", ["mean"]),
        ("similarity", "cosine"),
    ],
)
def test_a_wrong_setting_is_named(field, value):
    with pytest.raises(ValueError, match=field) as caught:
        matu.AggregationConfig(**{field: value})
    assert str(value) in str(caught.value)


# ------------------------------------------------------------------ errors


def _message(function, *arguments, **keywords):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers look at the message)
        function(*arguments, **keywords)
    return str(caught.value)


def _contains(message, *parts):
    for part in parts:
        assert part in message, message


def test_unify_names_an_unknown_magnitude():
    message = _message(matu.unify, _tree(_values(0)), magnitude="median")
    _contains(message, "magnitude", "median", "max", "mean")


def test_unify_names_a_leaf_of_integers():
    vectors = _tree(_values(0))
    vectors["block"]["kernel"] = vectors["block"]["kernel"].astype(np.int32)
    _contains(_message(matu.unify, vectors, _slots()), "kernel", "int32", "float")


def test_unify_names_a_leaf_with_another_number_of_slots():
    vectors = _tree(_values(0))
    vectors["pair"] = (vectors["pair"][0][:10],)
    _contains(_message(matu.unify, vectors, _slots()), "pair", "(10,)", "11")
    _contains(_message(matu.unify, vectors), "pair", "(10,)", "11")


def test_unify_names_a_leaf_without_slots():
    vectors = _tree(_values(0))
    vectors["pair"] = (np.float32(1.0),)
    _contains(_message(matu.unify, vectors, _slots()), "pair", "()", "11")


def test_a_tree_without_leaves_is_refused():
    assert _message(matu.unify, {"empty": {}})
    assert _message(matu.direction_similarity, {})


def test_slots_of_another_length_are_refused():
    vectors = _tree(_values(0))
    short = _slots(CLIENT[:10], TASK[:10], WEIGHT[:10])
    _contains(_message(matu.unify, vectors, short), "slots", "10", "11")
    uploads = matu.unify(vectors, _slots())
    for function in (matu.aggregate, matu.modulate):
        _contains(_message(function, uploads, short), "11", "10")


def test_slots_whose_columns_differ_in_length_are_refused():
    ragged = _slots(CLIENT, TASK[:10], WEIGHT)
    _contains(_message(matu.unify, _tree(_values(0)), ragged), "task", "10", "11")


@pytest.mark.parametrize(
    ("field", "column", "part"),
    [
        ("client", [*CLIENT[:10], 5], "5"),
        ("client", [*CLIENT[:10], -1], "-1"),
        ("task", [*TASK[:10], 7], "7"),
        ("weight", [*WEIGHT[:10], -2.0], "-2"),
        ("weight", [*WEIGHT[:10], np.nan], "nan"),
    ],
)
def test_slots_out_of_range_are_named(field, column, part):
    slots = _slots(**{field: column})
    _contains(_message(matu.unify, _tree(_values(0)), slots), field, "10", part)


def test_slots_of_the_wrong_kind_are_named():
    slots = dataclasses.replace(_slots(), client=np.array(CLIENT, np.float32))
    _contains(_message(matu.unify, _tree(_values(0)), slots), "client", "float32", "int")


def test_aggregate_names_uploads_of_another_number_of_clients():
    uploads = matu.unify(_tree(_values(0)), _slots())
    message = _message(matu.aggregate, uploads, _slots(num_clients=6))
    _contains(message, "client", "kernel", "(5, 3, 5)", "6")


def test_aggregate_names_masks_that_do_not_fit():
    uploads = matu.unify(_tree(_values(0)), _slots())
    uploads.masks["block"]["kernel"] = np.zeros((11, 1), np.uint8)
    _contains(_message(matu.aggregate, uploads, _slots()), "masks", "kernel", "11", "1", "2")


def test_aggregate_names_masks_that_are_not_packed():
    uploads = matu.unify(_tree(_values(0)), _slots())
    uploads.masks["block"]["kernel"] = np.zeros((11, 2), np.bool_)
    _contains(_message(matu.aggregate, uploads, _slots()), "masks", "kernel", "bool", "uint8")


def test_aggregate_names_masks_that_are_missing():
    uploads = matu.unify(_tree(_values(0)), _slots())
    del uploads.masks["block"]["kernel"]
    _contains(_message(matu.aggregate, uploads, _slots()), "masks", "kernel")


def test_aggregate_names_scales_that_do_not_fit():
    uploads = matu.unify(_tree(_values(0)), _slots())
    message = _message(matu.aggregate, uploads._replace(scales=np.ones(4, np.float32)), _slots())
    _contains(message, "scales", "4", "11")


def test_aggregate_names_a_previous_of_another_number_of_tasks():
    uploads = matu.unify(_tree(_values(0)), _slots())
    previous = matu.unify(_tree(_values(1, slots=4)))
    message = _message(matu.aggregate, uploads, _slots(), CONFIGS[0], previous)
    _contains(message, "previous", "4", "5")


def test_aggregate_names_a_previous_of_another_shape():
    uploads = matu.unify(_tree(_values(0)), _slots())
    vectors = _tree(_values(1, slots=5))
    vectors["block"]["kernel"] = np.zeros((5, 3, 4), np.float32)
    message = _message(matu.aggregate, uploads, _slots(), CONFIGS[0], matu.unify(vectors))
    _contains(message, "previous", "kernel", "(5, 3, 5)", "(3, 4)")


def test_modulate_wants_the_slots_it_was_folded_with():
    per_client = matu.unify(_tree(_values(0)), _slots())
    assert _message(matu.modulate, per_client)
    assert _message(matu.modulate, matu.unify(_tree(_values(0))), _slots())


def test_tasks_that_only_ever_meet_at_one_client_do_not_lend():
    vectors = {"w": jnp.asarray([[1.0, 2.0, -3.0], [2.0, 1.0, -1.0]])}
    slots = matu.Slots(np.array([0, 0]), np.array([0, 1]), np.array([1.0, 1.0]), 1, 2)
    uploads = matu.unify(vectors, slots)
    plain = matu.aggregate(uploads, slots, matu.AggregationConfig.paper(transfer="none"))
    for rule in ("mean", "additive"):
        found = matu.aggregate(uploads, slots, matu.AggregationConfig.paper(transfer=rule))
        np.testing.assert_array_equal(found.task_vectors["w"], plain.task_vectors["w"])


def test_a_task_nobody_reported_borrows_nothing():
    vectors = {"w": jnp.asarray([[1.0, 2.0, -3.0], [2.0, 1.0, -1.0], [1.0, 1.0, 1.0]])}
    everybody = matu.Slots(np.arange(3), np.arange(3), np.ones(3), 3, 3)
    before = matu.aggregate(matu.unify(vectors, everybody), everybody)
    some = matu.Slots(np.arange(3), np.arange(3), np.array([1.0, 1.0, 0.0]), 3, 3)
    for rule in ("mean", "additive"):
        for similarity in ("cross_client", "aggregated"):
            config = matu.AggregationConfig.paper(transfer=rule, similarity=similarity)
            uploads = matu.unify(vectors, some)
            found = matu.aggregate(uploads, some, config, before.unified)
            kept = matu.modulate(before.unified)["w"][2]
            np.testing.assert_allclose(found.task_vectors["w"][2], kept, rtol=1e-6)
