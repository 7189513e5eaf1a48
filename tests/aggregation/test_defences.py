"""Defences against clients that lie: against dense float64 arithmetic, and what they guarantee."""

import dataclasses

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import matu_jax as matu
from matu_jax.aggregation.robust import agreement_weights, clip_factors, smallest_length
from matu_jax.algorithms import ALGORITHMS, build
from matu_jax.algorithms.means import defended_mean
from matu_jax.config import NO_DEFENCE, Config, DefenceConfig

# Task 0 has five holders, task 1 three, task 2 one, task 3 two; clients hold one or two tasks.
CLIENT = np.array([0, 0, 1, 1, 2, 2, 3, 4, 5, 5, 6])
TASK = np.array([0, 1, 0, 1, 0, 2, 0, 0, 1, 3, 3])
WEIGHT = np.array([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110], np.float32)
CLIENTS, TASKS = 7, 4
SLOTS = matu.Slots(CLIENT, TASK, WEIGHT, CLIENTS, TASKS)
RULES = [
    DefenceConfig(clip=0.8, weighting="examples"),
    DefenceConfig(clip=0.0, trim=1, weighting="examples"),
    DefenceConfig(clip=1.2, trim=2, weighting="examples"),
    DefenceConfig(clip=0.0, weighting="agreement"),
    DefenceConfig(clip=1.0, weighting="agreement"),
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=str)


def changes(seed):
    """Rows with something in common per task, of different lengths, and with exact zeros."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(TASKS, 30))[TASK]
    x = (shared + rng.normal(size=shared.shape)) * rng.lognormal(sigma=0.7, size=(len(shared), 1))
    x[rng.random(x.shape) < 0.1] = 0
    return x.astype(np.float32)


def as_tree(x):
    return {"a": jnp.asarray(x[:, :18].reshape(-1, 6, 3)), "b": jnp.asarray(x[:, 18:])}


def as_rows(tree):
    return np.concatenate([np.asarray(x).reshape(len(x), -1) for x in (tree["a"], tree["b"])], 1)


def expected_means(x, lengths, weight, group, groups, rule):
    """The rules in float64: clipped, then trimmed or weighted, group by group."""
    x, there = x.astype(np.float64), weight > 0
    if rule.clip:
        longest = rule.clip * np.median(lengths[there & (lengths > 0)])
        x = x * np.minimum(1, longest / np.maximum(lengths, 1e-30))[:, None]
    means = np.zeros((groups, x.shape[1]))
    for g in range(groups):
        rows = np.flatnonzero(there & (group == g))
        if not len(rows):
            continue
        if rule.trim:
            cut = min(rule.trim, (len(rows) - 1) // 2)
            means[g] = np.sort(x[rows], axis=0)[cut : len(rows) - cut].mean(axis=0)
            continue
        share = weight[rows].astype(np.float64)
        if rule.weighting == "agreement" and len(rows) >= 5:
            sign = np.sign(x[rows])
            agree = [
                np.mean([sign[i] @ sign[j] for j in range(len(rows)) if j != i])
                / np.abs(sign[i]).sum()
                for i in range(len(rows))
            ]
            enough = max(np.sort(agree)[(len(rows) - 1) // 2] / 2, 1e-30)
            trusted = share * np.clip(np.array(agree) / enough, 0, 1)
            share = trusted if trusted.sum() > 0 else share
        means[g] = share @ x[rows] / share.sum()
    return means


@every_rule
@pytest.mark.parametrize("seed", range(3))
def test_the_aggregator_follows_the_rules(rule, seed):
    config = matu.AggregationConfig.paper(
        magnitude="mean",
        agreement_threshold=0.0,
        uploads="change",
        **dataclasses.asdict(rule),
    )
    weight = WEIGHT * (np.random.default_rng(seed).random(len(WEIGHT)) < 0.9)
    slots = dataclasses.replace(SLOTS, weight=weight.astype(np.float32))
    uploads = matu.unify(as_tree(changes(seed)), slots, magnitude="mean")
    found = matu.aggregate(uploads, slots, config).task_vectors
    folded = as_rows(matu.modulate(uploads, slots))
    lengths = np.asarray(uploads.scales) * np.linalg.norm(as_rows(uploads.vector), axis=1)[CLIENT]
    expected = expected_means(folded, lengths, weight, TASK, TASKS, rule)
    np.testing.assert_allclose(as_rows(found), expected, rtol=2e-5, atol=2e-6)


@every_rule
@pytest.mark.parametrize("seed", range(3))
def test_other_means_follow_the_same_rules(rule, seed):
    weight = (WEIGHT * (np.random.default_rng(seed).random(len(WEIGHT)) < 0.9)).astype(np.float32)
    x = changes(seed)
    before = np.random.default_rng(9).normal(size=(TASKS, 30)).astype(np.float32)
    moved, total = defended_mean(
        as_tree(before[TASK] + x),
        as_tree(before),
        jnp.asarray(weight),
        jnp.asarray(TASK),
        TASKS,
        rule,
    )
    lengths = np.linalg.norm(x, axis=1)
    expected = before + expected_means(x, lengths, weight, TASK, TASKS, rule)
    np.testing.assert_allclose(as_rows(moved), expected, rtol=2e-5, atol=5e-6)
    np.testing.assert_allclose(total, np.bincount(TASK, weight, TASKS))


def test_without_defences_nothing_is_different():
    x, old = as_tree(changes(0)), as_tree(np.zeros((TASKS, 30), np.float32))
    groups = jnp.asarray(WEIGHT), jnp.asarray(TASK), TASKS
    plain, _ = defended_mean(x, old, *groups, NO_DEFENCE)
    wide, _ = defended_mean(x, old, *groups, DefenceConfig(clip=1e6, weighting="examples"))
    chex.assert_trees_all_close(plain, wide, rtol=1e-6)


@given(st.integers(0, 10_000), st.sampled_from([1e2, 1e6, 1e30]), st.booleans())
def test_one_liar_moves_a_task_no_further_than_clip_allows(seed, factor, through_scales):
    """Whatever it sends: its task moves by its share of clip times the median length."""
    uploads = matu.unify(as_tree(changes(seed)), SLOTS, magnitude="mean")
    config = matu.AggregationConfig.paper(
        agreement_threshold=0.0, uploads="change", magnitude="mean", clip=1.0
    )

    def lie(unified):
        if through_scales:
            return unified._replace(scales=unified.scales.at[7].mul(factor))  # client 4, task 0
        return unified._replace(vector=jax.tree.map(lambda v: v.at[4].mul(-factor), unified.vector))

    honest = matu.aggregate(uploads, SLOTS, config)
    lied = matu.aggregate(lie(uploads), SLOTS, config)
    lengths = np.asarray(uploads.scales) * np.linalg.norm(as_rows(uploads.vector), axis=1)[CLIENT]
    # The liar's own length may move the median to the next one up.
    bound = np.sort(lengths)[len(lengths) // 2 + 1]
    share = WEIGHT[7] / WEIGHT[TASK == 0].sum()
    distance = np.linalg.norm(as_rows(lied.task_vectors) - as_rows(honest.task_vectors), axis=1)
    # Others may be clipped less than before, by as much as the median moves.
    slack = sum(
        WEIGHT[s] / WEIGHT[TASK == 0].sum() * (bound - np.median(lengths))
        for s in np.flatnonzero(TASK == 0)
    )
    assert distance[0] <= 2 * share * bound + slack + 1e-5
    chex.assert_tree_all_finite(lied.downloads)


def in_another_form(unified, client, vector, scales):
    """A client's upload with its vector and its scales multiplied."""
    rows = np.where(np.arange(CLIENTS) == client, vector, 1).astype(np.float32)
    slots = np.where(client == CLIENT, scales, 1).astype(np.float32)
    return unified._replace(
        vector=jax.tree.map(lambda v: v * rows.reshape(-1, *[1] * (v.ndim - 1)), unified.vector),
        scales=unified.scales * slots,
    )


@pytest.mark.parametrize("power", [-110, -70, -40, 40, 70])
def test_an_upload_counts_the_same_in_whatever_form_it_is_written(power):
    """Powers of 2 move from vector to scales without rounding: so must what comes out."""
    config = matu.AggregationConfig()
    uploads = matu.unify(as_tree(changes(1)), SLOTS, magnitude="mean")
    expected = matu.aggregate(uploads, SLOTS, config)
    other = in_another_form(uploads, 1, 2.0**power, 2.0**-power)
    chex.assert_tree_all_finite(other.vector)
    found = matu.aggregate(other, SLOTS, config)
    chex.assert_trees_all_equal(found.task_vectors, expected.task_vectors)
    chex.assert_trees_all_equal(found.state.energy, expected.state.energy)
    assert bool(found.accepted.all())


@given(
    st.integers(0, 10_000),
    st.floats(-44, 38),
    st.floats(-44, 38),
    st.sampled_from(["as it is", "one number", "everywhere the same"]),
)
def test_what_a_server_keeps_is_bounded_by_clip_whatever_one_sends(seed, vector, scales, form):
    """Task vectors, agreement and energy, for vectors and scales of any size, those of 0 too."""
    limit = 1.5
    config = matu.AggregationConfig(clip=limit, weighting="examples")
    uploads = matu.unify(as_tree(changes(seed)), SLOTS, magnitude="mean")
    lengths = np.asarray(uploads.scales) * np.linalg.norm(as_rows(uploads.vector), axis=1)[CLIENT]
    lie = {
        "as it is": lambda v: v,
        "one number": lambda v: jnp.zeros_like(v).at[..., 0].set(1.0),
        "everywhere the same": jnp.ones_like,
    }[form]
    said = uploads._replace(vector=jax.tree.map(lambda v: v.at[0].set(lie(v[0])), uploads.vector))
    with np.errstate(over="ignore"):
        factors = [min(float(np.float32(10.0**x)), 3e38) for x in (vector, scales)]
    said = in_another_form(said, 0, *factors)
    said = jax.tree.map(lambda x: jnp.nan_to_num(x) if x.dtype == jnp.float32 else x, said)
    found = matu.aggregate(said, SLOTS, config)
    # A liar with two slots can move the median by two places.
    longest = limit * np.sort(lengths)[len(lengths) // 2 + 2]
    moved = np.linalg.norm(as_rows(found.task_vectors), axis=1)
    assert moved.max() <= longest * (1 + 1e-4)
    for evidence in (found.state.energy, found.state.agreement):
        assert np.abs(evidence).max() <= longest**2 * (1 + 1e-4)


@pytest.mark.parametrize(
    ("client", "task"),
    [
        ([0, 0, 1, 1], [0, 1, 0, 1]),
        ([0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 3], [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]),
    ],
    ids=["half of the clients", "one client with most slots"],
)
def test_neither_half_of_the_clients_nor_one_with_many_slots_sets_what_is_clipped(client, task):
    """Client 0 sends scales a billion times too large; without clip that is what the state gets."""
    client, task = np.array(client), np.array(task)
    clients, tasks = client.max() + 1, task.max() + 1
    slots = matu.Slots(client, task, np.full(len(client), 9.0, np.float32), clients, tasks)
    x = np.random.default_rng(0).normal(size=(len(client), 30)).astype(np.float32)
    config = matu.AggregationConfig()
    uploads = matu.unify(as_tree(x), slots, magnitude="mean")
    scales = uploads.scales * np.where(client == 0, 1e9, 1).astype(np.float32)
    found = matu.aggregate(uploads._replace(scales=scales), slots, config)
    honest = np.asarray(uploads.scales) * np.linalg.norm(as_rows(uploads.vector), axis=1)[client]
    longest = 1.5 * 2 * honest[client > 0].max()
    assert np.linalg.norm(as_rows(found.task_vectors), axis=1).max() <= longest * (1 + 1e-4)
    assert float(found.state.energy.max()) <= longest**2 * (1 + 1e-4)
    moved, _ = defended_mean(
        as_tree(np.where((client == 0)[:, None], 1e9 * x, x)),
        as_tree(np.zeros((tasks, 30), np.float32)),
        jnp.asarray(slots.weight),
        jnp.asarray(task),
        int(tasks),
        DefenceConfig(weighting="examples"),
        slots,
    )
    longest = 1.5 * 2 * np.linalg.norm(x[client > 0], axis=1).max()
    assert np.linalg.norm(as_rows(moved), axis=1).max() <= longest * (1 + 1e-4)


def test_means_of_the_largest_numbers_there_are_stay_finite():
    """Shares of 1/6 add up to a little more than 1."""
    largest = np.full((6, 5), np.finfo(np.float32).max)
    one = jnp.zeros(6, jnp.int32)
    for rule in (NO_DEFENCE, DefenceConfig(clip=2.0, weighting="examples"), RULES[1]):
        before = {"w": jnp.full((1, 5), np.finfo(np.float32).max)}
        moved, _ = defended_mean({"w": jnp.asarray(largest)}, before, jnp.ones(6), one, 1, rule)
        chex.assert_tree_all_finite(moved)
        before = {"w": jnp.zeros((1, 5))}
        moved, _ = defended_mean({"w": jnp.asarray(largest)}, before, jnp.ones(6), one, 1, rule)
        chex.assert_tree_all_finite(moved)


def test_numbers_that_some_devices_take_for_zero_pass_no_clip():
    """No length sees them there; a scale makes them long where they are none."""
    lengths = jnp.array([1.0, 1.0, 0.0])
    unseen = jnp.array([1.0, 1.0, 3e38]) * smallest_length(10_000)
    rest = jnp.ones(3, bool), 1.5, jnp.arange(3), 3, unseen
    np.testing.assert_allclose(clip_factors(lengths, *rest)[:2], 1.0)
    assert clip_factors(lengths, *rest)[2] * unseen[2] <= 1.5 * (1 + 1e-6)
    assert clip_factors(jnp.zeros(3), *rest)[2] == 0


MEAN = jax.jit(defended_mean, static_argnums=(4, 5))
HUGE = st.sampled_from([1e3, 1e6, 1e10, 1e19, 1e30, 3.4e38])


@given(
    st.integers(0, 10_000),
    st.integers(1, 9),
    st.sampled_from([1, 3]),
    st.lists(st.tuples(HUGE, st.sampled_from([-1, 1])), max_size=4),
)
def test_what_trim_leaves_out_leaves_no_trace(seed, holders, trim, lies):
    """The trimmed mean of numbers near 0.01 among those of liars, against float64."""
    rng = np.random.default_rng(seed)
    x = (0.01 + 0.001 * rng.standard_normal((9, 12))).astype(np.float32)
    liars = rng.permutation(holders)[: len(lies)]
    for row, (size, sign) in zip(liars, lies, strict=False):
        x[row] = sign * size * (1 if rng.random() < 0.5 else rng.random(12))
    cut = min(trim, (holders - 1) // 2)
    kept = np.sort(x[:holders].astype(np.float64), axis=0)[cut : holders - cut]
    weight = np.where(np.arange(9) < holders, 9.0, 0.0).astype(np.float32)
    slots = matu.Slots(np.arange(9), np.zeros(9, int), weight, 9, 2)
    config = matu.AggregationConfig.paper(
        trim=trim, agreement_threshold=0.0, uploads="change", transfer="shrinkage"
    )
    found = matu.aggregate(matu.unify({"w": x}, slots), slots, config)
    rule = DefenceConfig(clip=0.0, trim=trim, weighting="examples")
    other, _ = MEAN({"w": x}, {"w": np.zeros((2, 12), np.float32)}, weight, slots.task, 2, rule)
    limit = np.finfo(np.float32).max
    for mean in (found.task_vectors["w"], other["w"]):
        # Two numbers that count and nearly cancel may leave the rounding of the larger.
        slack = 1e-6 * np.abs(kept).max(axis=0)
        expected = np.clip(kept.mean(axis=0), -limit, limit)
        assert (np.abs(np.asarray(mean, np.float64)[0] - expected) <= slack).all()
    if holders > 1 and np.abs(kept).max() < 1e10:
        energy = (kept**2).mean(axis=0).sum()
        np.testing.assert_allclose(found.state.energy[0, 0], energy, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_no_finite_upload_leaves_a_number_that_is_not(name):
    """Opposite liars with the largest numbers there are: sums of them are infinite, or not one."""
    algorithm = build(Config(algorithm=name, defence=NO_DEFENCE))
    base = {"blocks": {"w": {"lora_a": jnp.zeros((2, 3, 2)), "lora_b": jnp.zeros((2, 2, 3))}}}
    sign = np.where(np.arange(len(CLIENT)) % 2, -1, 1)
    vectors = jax.tree.map(
        lambda x: jnp.asarray(
            np.broadcast_to(3.4e38 * sign.reshape(-1, *[1] * x.ndim), (len(CLIENT), *x.shape)),
            jnp.float32,
        ),
        base,
    )
    state = algorithm.init(base, SLOTS)
    for _ in range(2):
        state, _ = algorithm.aggregate(state, algorithm.upload(vectors, SLOTS), SLOTS)
    chex.assert_tree_all_finite(algorithm.download(state, SLOTS))


def test_who_agrees_half_as_much_as_the_median_keeps_its_weight():
    agreement = np.array([0.4, 0.5, 0.3, 0.1, -0.2, 0.2, 0.9], np.float32)  # the last is absent
    weight = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0], np.float32)
    nonzero = np.full(7, 10.0, np.float32)
    common = agreement * nonzero * 5 + nonzero
    group = jnp.zeros(7, jnp.int32)

    def weights(common):
        return agreement_weights(
            jnp.asarray(common), jnp.asarray(nonzero), jnp.asarray(weight), group, 1
        )

    found = weights(common)
    # Of -0.2, 0.1, 0.2, 0.3, 0.4, 0.5 the lower median is 0.2: from 0.1 on weights stay.
    np.testing.assert_allclose(found, [1, 2, 3, 4, 0, 6, 0], rtol=1e-5)
    found = weights(common - 2)
    np.testing.assert_allclose(found[3], 4 * (0.1 - 0.04) / (0.2 - 0.04) * 2, rtol=1e-5)


@pytest.mark.parametrize(
    "rule",
    [
        DefenceConfig(clip=0.0, trim=1, weighting="examples"),
        DefenceConfig(clip=0.0, weighting="agreement"),
    ],
    ids=["trim", "agreement"],
)
def test_a_flipped_sign_is_left_out(rule):
    """Five holders of one task who agree up to noise, one of which sends the opposite."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=30)
    x = (truth + 0.1 * rng.normal(size=(5, 30))).astype(np.float32)
    x[2] *= -1
    slots = matu.Slots(np.arange(5), np.zeros(5, int), np.ones(5, np.float32), 5, 1)
    uploads = matu.unify(as_tree(x), slots)
    config = matu.AggregationConfig.paper(uploads="change", agreement_threshold=0.0)
    naive = as_rows(matu.aggregate(uploads, slots, config).task_vectors)[0]
    config = dataclasses.replace(config, **dataclasses.asdict(rule))
    found = as_rows(matu.aggregate(uploads, slots, config).task_vectors)[0]
    assert np.linalg.norm(found - truth) < 0.3 * np.linalg.norm(naive - truth)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"clip": -1.0}, "AggregationConfig.clip: found -1.0"),
        ({"clip": float("nan")}, "AggregationConfig.clip: found nan"),
        ({"trim": 1.5}, "AggregationConfig.trim: found 1.5"),
        ({"weighting": "trust"}, "AggregationConfig.weighting: found 'trust'"),
        (
            {"trim": 1, "weighting": "agreement"},
            "for a trimmed mean set AggregationConfig.weighting",
        ),
    ],
)
def test_choices_are_checked(fields, words):
    with pytest.raises(ValueError, match=words):
        matu.AggregationConfig(**fields)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_an_algorithm_defends_itself_or_says_that_it_cannot(name):
    plain = Config(algorithm=name, defence=NO_DEFENCE)
    defended = dataclasses.replace(
        plain, defence=DefenceConfig(clip=0.5, trim=1, weighting="examples")
    )
    try:
        build(defended)
    except ValueError as error:
        if f"'{name}' has no defences" not in str(error):
            raise
        return
    base = {"blocks": {"w": {"lora_a": jnp.zeros((2, 3, 2)), "lora_b": jnp.zeros((2, 2, 3))}}}
    rng = np.random.default_rng(0)
    vectors = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=(len(CLIENT), *x.shape)), jnp.float32), base
    )

    def after(config):
        algorithm = build(config)
        state = algorithm.init(base, SLOTS)
        state, _ = algorithm.aggregate(state, algorithm.upload(vectors, SLOTS), SLOTS)
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(algorithm.traffic.kept(state))])

    assert not np.allclose(after(plain), after(defended))
