"""Uploads of changes: the round against plain loops, what it must satisfy, and in what it runs."""

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.monitoring
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from programs import equations

import matu_jax as matu
from matu_jax.algorithms import build, with_heads
from matu_jax.config import NO_DEFENCE, Config, MatuConfig

OPEN = Config(defence=NO_DEFENCE)

# Twelve slots of at most twelve clients: every federation has these shapes, and compiles once.
S, N, T, D = 12, 12, 5, oracle.PARAMETERS
ROUNDS = 3


def _config(magnitude: Any, threshold: float, transfer: Any, similarity: Any = "cross_client"):
    return matu.AggregationConfig.paper(
        magnitude=magnitude,
        agreement_threshold=threshold,
        top_k=2,
        min_similarity=15 / 32,
        transfer=transfer,
        similarity=similarity,
        uploads="change",
    )


CONFIGS = [
    _config("max", 0.4, "none"),
    _config("mean", 0.0, "none", "aggregated"),
    _config("mean", 0.4, "mean"),
    _config("max", 0.0, "mean", "aggregated"),
    _config("max", 0.4, "additive"),
    _config("max", 0.4, "shrinkage"),
    _config("mean", 0.0, "shrinkage"),
]
PLAIN, SHRINKAGE = CONFIGS[0], CONFIGS[5]


def _name(config):
    gate = "gate" if config.agreement_threshold else "open"
    return f"{config.magnitude}-{gate}-{config.transfer}-{config.similarity}"


every_config = pytest.mark.parametrize("config", CONFIGS, ids=_name)


def _federation(tasks_per_client, seed=0):
    """Slots in no order; `tasks_per_client` distinct tasks each."""
    generator = np.random.default_rng(seed)
    pairs = [
        (n, t)
        for n in range(S // tasks_per_client)
        for t in generator.permutation(T)[:tasks_per_client]
    ]
    pairs = np.array(pairs, np.int32)[generator.permutation(S)]
    return matu.Slots(pairs[:, 0], pairs[:, 1], np.ones(S, np.float32), N, T)


def _participating(slots, seed):
    """About a third of the clients away, and some slots of the others."""
    generator = np.random.default_rng(seed)
    away = generator.random(N) < 0.3
    weight = generator.integers(1, 5, S) * ~away[slots.client] * (generator.random(S) > 0.1)
    return dataclasses.replace(slots, weight=weight.astype(np.float32))


def _changes(seed, dtypes=(np.float32, np.float32)):
    return oracle.tree(np.random.default_rng(seed).normal(size=(S, D)), dtypes)


def _start(dtypes=(np.float32, np.float32)):
    nothing = jnp.zeros((T, T), jnp.float32)
    return matu.ServerState(oracle.tree(np.zeros((T, D)), dtypes), nothing, nothing)


def _seen(slots=None, config=SHRINKAGE, dtypes=(np.float32, np.float32), seed=100):
    """A state after two rounds with everybody."""
    slots, state = _federation(2) if slots is None else slots, _start(dtypes)
    for number in range(2):
        uploads = matu.unify(_changes(seed + number, dtypes), slots, magnitude=config.magnitude)
        state = matu.aggregate(uploads, slots, config, state).state
    return state


def _kept(state):
    return oracle.Kept(
        oracle.rows(state.task_vectors),
        np.asarray(state.agreement, np.float64),
        np.asarray(state.energy, np.float64),
    )


def _rules(config):
    return {
        "magnitude": config.magnitude,
        "agreement_threshold": config.agreement_threshold,
        "rule": config.transfer,
        "similarity_of": config.similarity,
        "top_k": config.top_k,
        "min_similarity": config.min_similarity,
    }


def _assert_change_round(result, uploads, slots, config, previous, relative=1e-5):
    """A round is the oracle's, from the library's own uploads and state; and so are its folds."""
    client, task = slots.client.tolist(), slots.task.tolist()
    weight = np.where(np.asarray(result.accepted), slots.weight, 0).tolist()
    received = oracle.received(uploads, client)
    expected = oracle.change_round(
        received, client, task, weight, N, _kept(previous), **_rules(config)
    )
    found = _kept(result.state)
    np.testing.assert_array_equal(oracle.rows(result.task_vectors), found.task_vectors)
    largest = max(np.abs(expected.kept.task_vectors).max(), np.abs(expected.changes).max())
    close = 5e-3 if config.transfer == "shrinkage" else relative
    np.testing.assert_allclose(
        found.task_vectors, expected.kept.task_vectors, rtol=relative, atol=close * largest
    )
    for part in ("agreement", "energy"):
        np.testing.assert_allclose(
            getattr(found, part), getattr(expected.kept, part), rtol=relative, atol=relative
        )
    others = ~np.eye(T, dtype=bool)
    np.testing.assert_allclose(
        np.asarray(result.similarity)[others], expected.similarity[others], atol=1e-6
    )
    vectors = found.task_vectors
    assert not oracle.eq9_in_doubt(result, client, task), "choose another seed"
    oracle.assert_unified(result.downloads, vectors[task], client, [True] * S, N, config.magnitude)
    whole = oracle.Group(
        oracle.rows(result.unified.vector, 0),
        oracle.unpacked(result.unified.masks, result.unified.vector, 0),
        np.asarray(result.unified.scales, np.float64),
    )
    store = oracle.storage(result.unified.vector, 0)
    oracle.assert_group(whole, oracle.unify(vectors, [True] * T, config.magnitude, store))


def _same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def _close(found, expected, relative=1e-5):
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        left, right = np.asarray(left), np.asarray(right)
        if np.issubdtype(left.dtype, np.floating):
            np.testing.assert_allclose(left, right, rtol=relative, atol=relative)
        else:
            np.testing.assert_array_equal(left, right)


# ------------------------------------------------------------------ the oracle


@pytest.mark.parametrize("tasks_per_client", [1, 2, 3])
@every_config
def test_rounds_are_the_oracle(config, tasks_per_client):
    # Clients train from their downloads towards optima, as well as noise lets them.
    everyone = _federation(tasks_per_client, seed=tasks_per_client)
    generator = np.random.default_rng(tasks_per_client)
    optima = generator.normal(size=(T, D))
    optima[1] = optima[0] + 0.5 * generator.normal(size=D)
    state, down = _start(), np.zeros((S, D))
    for number in range(ROUNDS):
        slots = _participating(everyone, seed=10 * tasks_per_client + number)
        change = (optima[slots.task] - down) / 2 + 0.5 * generator.normal(size=(S, D))
        uploads = matu.unify(oracle.tree(change), slots, magnitude=config.magnitude)
        result = matu.aggregate(uploads, slots, config, state)
        _assert_change_round(result, uploads, slots, config, state)
        state = result.state
        down = oracle.rows(matu.modulate(result.downloads, slots))


@every_config
def test_rounds_from_end_to_end_are_the_oracle(config):
    # Nothing of the library's goes into the oracle, so that errors would add up.
    if config.transfer == "shrinkage":
        pytest.skip("weights are known to 0.005, and a fold may turn on less than that")
    everyone = _federation(2, seed=4)
    generator = np.random.default_rng(4)
    optima = generator.normal(size=(T, D))
    state, kept = _start(), oracle.nothing_kept(T, D)
    download, down = np.zeros((S, D)), np.zeros((S, D))
    for number in range(ROUNDS):
        slots = _participating(everyone, seed=40 + number)
        client, present = slots.client.tolist(), slots.weight > 0
        toward = optima[slots.task] + 0.5 * generator.normal(size=(S, D))
        uploads = matu.unify(oracle.tree((toward - down) / 2), slots, magnitude=config.magnitude)
        result = matu.aggregate(uploads, slots, config, state)
        state, down = result.state, oracle.rows(matu.modulate(result.downloads, slots))

        received = np.zeros((S, D))
        for n in range(N):
            listed = [s for s in range(S) if client[s] == n]
            group = oracle.unify((toward - download)[listed] / 2, present[listed], config.magnitude)
            if listed:
                received[listed] = oracle.modulate(group)
        expected = oracle.change_round(
            received, client, slots.task.tolist(), slots.weight.tolist(), N, kept, **_rules(config)
        )
        kept = expected.kept
        np.testing.assert_allclose(
            oracle.rows(state.task_vectors), kept.task_vectors, rtol=1e-4, atol=1e-4
        )
        for listed, group in zip(expected.listed, expected.downloads, strict=True):
            if listed:
                download[listed] = oracle.modulate(group)
        np.testing.assert_allclose(down, download, rtol=1e-4, atol=1e-4)


def test_worked_by_hand():
    # Two clients with one task each and one with both; task vectors (1, 1) and (-2, 4) are kept.
    slots = matu.Slots(
        np.array([0, 1, 2, 2]), np.array([0, 1, 0, 1]), np.array([1.0, 0.0, 3.0, 1.0]), 3, 2
    )
    changes = {"w": np.array([[2, 2], [9, 9], [4, -2], [4, -2]], np.float32)}
    kept = {"w": np.array([[1, 1], [-2, 4]], np.float32)}
    nothing = jnp.zeros((2, 2), jnp.float32)
    config = matu.AggregationConfig.paper(uploads="change", agreement_threshold=0.5)
    result = matu.aggregate(
        matu.unify(changes, slots), slots, config, matu.ServerState(kept, nothing, nothing)
    )
    # Task 0: (2 + 3 * 4) / 4 = 3.5, and signs that cancel; task 1: (4, -2) of client 2 alone.
    np.testing.assert_allclose(result.task_vectors["w"], [[4.5, 1.0], [2.0, 2.0]], rtol=1e-6)


# ------------------------------------------------------------------ what always holds


@pytest.mark.parametrize("config", CONFIGS[:5], ids=_name)
def test_the_first_round_is_that_of_vectors(config):
    slots = _participating(_federation(2), seed=1)
    uploads = matu.unify(_changes(1), slots, magnitude=config.magnitude)
    as_vectors = dataclasses.replace(config, uploads="vector")
    expected = matu.aggregate(uploads, slots, as_vectors)
    _same(matu.aggregate(uploads, slots, config), expected)


@every_config
def test_no_state_is_a_state_of_zeros(config):
    slots = _participating(_federation(2), seed=2)
    uploads = matu.unify(_changes(2), slots, magnitude=config.magnitude)
    without = matu.aggregate(uploads, slots, config)
    _same(without, matu.aggregate(uploads, slots, config, _start()))


@every_config
def test_an_absent_task_keeps_its_vector_to_the_bit(config):
    everyone, previous = _federation(2), _seen()
    weight = np.where(np.isin(everyone.task, [1, 3]), 0, everyone.weight)
    slots = dataclasses.replace(everyone, weight=weight)
    uploads = matu.unify(_changes(3), slots, magnitude=config.magnitude)
    result = matu.aggregate(uploads, slots, config, previous)
    before, after = oracle.rows(previous.task_vectors), oracle.rows(result.task_vectors)
    np.testing.assert_array_equal(after[[1, 3]], before[[1, 3]])
    assert (after[[0, 2, 4]] != before[[0, 2, 4]]).any(axis=1).all()
    # Nor does anything become known of it.
    for part in ("agreement", "energy"):
        old, new = np.asarray(getattr(previous, part)), np.asarray(getattr(result.state, part))
        np.testing.assert_array_equal(new[[1, 3]], old[[1, 3]])
        np.testing.assert_array_equal(new[:, [1, 3]], old[:, [1, 3]])


@every_config
def test_nobody_present_keeps_everything(config):
    slots, previous = dataclasses.replace(_federation(2), weight=np.zeros(S, np.float32)), _seen()
    spoiled = jax.tree.map(lambda x: np.full_like(x, np.nan), _changes(4))
    result = matu.aggregate(
        matu.unify(spoiled, slots, magnitude=config.magnitude), slots, config, previous
    )
    _same(result.state, previous)
    assert oracle.rows(result.downloads.vector).any()


@every_config
def test_zero_changes_keep_everything(config):
    slots, previous = _federation(2), _seen()
    nothing = jax.tree.map(np.zeros_like, _changes(5))
    uploads = matu.unify(nothing, slots, magnitude=config.magnitude)
    result = matu.aggregate(uploads, slots, config, previous)
    _same(result.state, previous)
    for start in (None, _start()):
        result = matu.aggregate(uploads, slots, config, start)
        for leaf in jax.tree.leaves((result.state, result.unified, result.downloads)):
            assert not np.asarray(leaf).any()


@every_config
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -3e38])
def test_an_absent_slot_changes_nothing(config, garbage):
    slots, previous = _participating(_federation(3), seed=7), _seen()
    absent = slots.weight == 0
    assert absent.any()
    values = oracle.rows(_changes(6))
    uploads = matu.unify(oracle.tree(values), slots, magnitude=config.magnitude)
    values[absent] = garbage
    spoiled = matu.unify(oracle.tree(values), slots, magnitude=config.magnitude)
    scales = np.array(spoiled.scales)
    scales[absent] = garbage
    expected = matu.aggregate(uploads, slots, config, previous)
    _same(matu.aggregate(spoiled._replace(scales=scales), slots, config, previous), expected)


@every_config
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_change_that_is_not_finite_takes_no_part(config, bad):
    slots, previous = _federation(2), _seen()
    values = oracle.rows(_changes(7))
    uploads = matu.unify(oracle.tree(values), slots, magnitude=config.magnitude)
    values[5, 3] = bad
    spoiled = matu.unify(oracle.tree(values), slots, magnitude=config.magnitude)
    refused = slots.client == slots.client[5]
    result = matu.aggregate(spoiled, slots, config, previous)
    np.testing.assert_array_equal(np.asarray(result.accepted), ~refused)
    others = dataclasses.replace(slots, weight=np.where(refused, 0, slots.weight))
    _same(result, matu.aggregate(uploads, others, config, previous))


@pytest.mark.parametrize("config", [PLAIN, SHRINKAGE], ids=_name)
def test_half_precision_storage_is_kept(config):
    dtypes = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
    everyone = _federation(2)
    slots, previous = _participating(everyone, seed=8), _seen(everyone, config, dtypes)
    uploads = matu.unify(_changes(8, dtypes), slots, magnitude=config.magnitude)
    result = matu.aggregate(uploads, slots, config, previous)
    for part in (result.state.task_vectors, result.unified.vector, result.downloads.vector):
        assert [leaf.dtype for leaf in jax.tree.leaves(part)] == dtypes
    assert result.state.agreement.dtype == result.state.energy.dtype == np.float32
    _assert_change_round(result, uploads, slots, config, previous, relative=2.0**-7)


def test_the_largest_numbers_stay_finite():
    largest = np.finfo(np.float32).max
    slots, state = _federation(2), _start()
    changes = jax.tree.map(lambda x: np.sign(x) * largest, _changes(9))
    for config in (SHRINKAGE, CONFIGS[4]):
        for _ in range(3):
            result = matu.aggregate(matu.unify(changes, slots), slots, config, state)
            state = result.state
            for leaf in jax.tree.leaves(result):
                assert np.isfinite(np.asarray(leaf)).all()


# ------------------------------------------------------------------ inside larger programs


def _round(changes, slots, state, config=SHRINKAGE):
    uploads = matu.unify(changes, slots, magnitude=config.magnitude)
    return matu.aggregate(uploads, slots, config, state)


def test_jit_and_vmap_over_federations_equal_the_eager_round():
    seeds = range(3)
    all_slots = [_participating(_federation(2), seed) for seed in seeds]
    states = [_seen(seed=50 + seed) for seed in seeds]
    changes = [_changes(seed) for seed in seeds]
    stacked = [jax.tree.map(lambda *x: np.stack(x), *each) for each in (changes, all_slots, states)]
    together = jax.jit(jax.vmap(_round))(*stacked)
    for seed in seeds:
        expected = _round(changes[seed], all_slots[seed], states[seed])
        _close(jax.tree.map(lambda leaf, seed=seed: leaf[seed], together), expected, 1e-4)
    _close(
        jax.jit(_round)(changes[0], all_slots[0], states[0]),
        _round(changes[0], all_slots[0], states[0]),
        1e-4,
    )


@pytest.mark.parametrize("axis", [0, 1], ids=["slots", "parameters"])
def test_sharded_inputs_give_the_same_round(axis):
    devices = jax.devices("cpu")
    if len(devices) < 4:
        pytest.skip(f"{len(devices)} CPU devices, 4 needed: XLA_FLAGS was set outside")
    mesh = Mesh(np.array(devices[:4]), ("devices",), axis_types=(AxisType.Auto,))

    def placed(tree):
        def place(leaf):
            split = np.ndim(leaf) > axis and np.shape(leaf)[axis] % 4 == 0
            spec = ["devices" if split and i == axis else None for i in range(np.ndim(leaf))]
            return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

        return jax.tree.map(place, tree)

    changes = {"w": np.random.default_rng(0).normal(size=(S, 64)).astype(np.float32)}
    slots = _participating(_federation(2), seed=1)
    kept = {"w": np.random.default_rng(1).normal(size=(T, 64)).astype(np.float32)}
    state = _seen()._replace(task_vectors=kept)
    found = jax.jit(_round)(placed(changes), placed(slots), placed(state))
    _close(found, _round(changes, slots, state), 1e-4)


def test_rounds_compile_once(compilations):
    def play(rounds):
        state = _start()
        for number in range(rounds):
            slots = _participating(_federation(1 + number % 3, seed=number), seed=number)
            state = _round(_changes(number), slots, state).state
        return state

    play(2)
    before = len(compilations)
    play(6)
    assert len(compilations) == before


def _specification(slots, clients, tasks, size):
    vectors = {f"leaf{i}": jax.ShapeDtypeStruct((slots, size), np.float32) for i in range(2)}
    index = jax.ShapeDtypeStruct((slots,), np.int32)
    weight = jax.ShapeDtypeStruct((slots,), np.float32)
    where = matu.Slots(index, index, weight, clients, tasks)
    kept = jax.tree.map(lambda x: jax.ShapeDtypeStruct((tasks, size), x.dtype), vectors)
    evidence: Any = jax.ShapeDtypeStruct((tasks, tasks), np.float32)
    state = matu.ServerState(kept, evidence, evidence)
    return jax.eval_shape(matu.unify, vectors, where), where, state


def _with_state(uploads, slots, state):
    return matu.aggregate(uploads, slots, SHRINKAGE, state)


def test_programs_do_not_grow():
    # The sums of up to eight tasks are written out.
    sizes = [
        equations(jax.make_jaxpr(_with_state)(*_specification(*shape)).jaxpr)
        for shape in ((6, 3, 8, 1_500), (96, 24, 12, 4_100))
    ]
    assert sizes[0] == sizes[1]


def test_a_round_needs_no_array_of_slots_by_parameters():
    slots, clients, tasks, size = 256, 16, 8, 1 << 17
    specification = _specification(slots, clients, tasks, size)
    analysis = jax.jit(_with_state).lower(*specification).compile().memory_analysis()
    assert analysis is not None
    d = 2 * size
    assert analysis.temp_size_in_bytes <= slots * d / 8 + (6 * tasks + clients) * d * 4


# ------------------------------------------------------------------ errors


def _message(function, *arguments, **keywords):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers look at the message)
        function(*arguments, **keywords)
    return str(caught.value)


def _contains(message, *parts):
    for part in parts:
        assert part in message, message


def test_a_state_of_the_wrong_kind_is_named():
    slots = _federation(2)
    uploads = matu.unify(_changes(0), slots)
    result = matu.aggregate(uploads, slots, PLAIN)
    message = _message(matu.aggregate, uploads, slots, PLAIN, result.unified)
    _contains(message, "previous", "Unified", "'change'", ".state")
    vector = dataclasses.replace(PLAIN, uploads="vector")
    message = _message(matu.aggregate, uploads, slots, vector, result.state)
    _contains(message, "previous", "ServerState", "'vector'", ".unified")


def test_a_state_that_does_not_fit_is_named():
    slots, state = _federation(2), _start()
    call = partial(_message, matu.aggregate, matu.unify(_changes(0), slots), slots, PLAIN)
    few = jax.tree.map(lambda x: x[:4], state.task_vectors)
    _contains(call(state._replace(task_vectors=few)), "previous.task_vectors", "kernel", "4", "5")
    other = dict(state.task_vectors, block={"kernel": np.zeros((T, 3, 4), np.float32)})
    _contains(call(state._replace(task_vectors=other)), "previous.task_vectors", "kernel", "(3, 4)")
    missing = dict(state.task_vectors, block={})
    _contains(call(state._replace(task_vectors=missing)), "previous.task_vectors", "kernel")
    whole = jax.tree.map(lambda x: np.zeros(x.shape, np.int32), state.task_vectors)
    _contains(call(state._replace(task_vectors=whole)), "previous.task_vectors", "int32")
    for part in ("agreement", "energy"):
        for wrong in (np.zeros((4, 4), np.float32), np.zeros(5, np.float32)):
            message = call(state._replace(**{part: wrong}))
            _contains(message, f"previous.{part}", str(list(wrong.shape)), "[5, 5]")


@pytest.mark.parametrize(
    "fields",
    [{"uploads": "vector"}, {"uploads": "change", "similarity": "aggregated"}],
    ids=["vectors", "aggregated"],
)
def test_shrinkage_without_its_evidence_is_refused(fields):
    message = _message(matu.AggregationConfig, transfer="shrinkage", **fields)
    _contains(message, "transfer", "shrinkage", "uploads", "'change'", "'cross_client'")
    _contains(message, *(repr(value) for value in fields.values()))


@pytest.mark.parametrize("value", ["changes", None, True])
def test_an_unknown_kind_of_upload_is_named(value):
    with pytest.raises(ValueError, match="uploads") as caught:
        matu.AggregationConfig.paper(uploads=value)
    assert str(value) in str(caught.value)


# ------------------------------------------------------------------ the algorithm


def _algorithm(**fields):
    choices = MatuConfig(
        **{"transfer": "none", "magnitude": "max", "agreement_threshold": 0.4} | fields
    )
    return build(dataclasses.replace(OPEN, algorithm="matu", matu=choices))


def _as_clients(seed, rows):
    """Slots that are the only ones of their client and of their task."""
    values = np.random.default_rng(seed).normal(size=(rows, D))
    index = np.arange(rows, dtype=np.int32)
    return oracle.tree(values), matu.Slots(index, index, np.ones(rows, np.float32), rows, rows)


def test_clients_with_a_task_of_their_own_get_their_vectors_back():
    vectors, slots = _as_clients(0, 4)
    base = jax.tree.map(lambda x: x[0], vectors)
    algorithm = _algorithm(uploads="change")
    assert algorithm.sends_change
    assert not _algorithm(uploads="vector").sends_change
    state = algorithm.init(base, slots)
    assert not oracle.rows(algorithm.download(state, slots)).any()
    for number in range(3):
        # Somebody is away in the second round, and keeps what it has.
        weight = np.array([1, 1, 1, number != 1], np.float32)
        slots = dataclasses.replace(slots, weight=weight)
        before = algorithm.download(state, slots)
        wanted = jax.tree.map(lambda x, n=number: np.float32(n + 1) * x, vectors)
        change = jax.tree.map(jnp.subtract, wanted, before)
        state, metrics = algorithm.aggregate(state, algorithm.upload(change, slots), slots)
        found = oracle.rows(algorithm.download(state, slots))
        np.testing.assert_allclose(found[:3], oracle.rows(wanted)[:3], rtol=1e-5, atol=1e-6)
        away = oracle.rows(before if number == 1 else wanted)[3]
        np.testing.assert_allclose(found[3], away, rtol=1e-5, atol=1e-6)
        assert metrics["similarity"].shape == (4, 4)


@pytest.mark.parametrize("transfer", ["none", "shrinkage"])
def test_the_algorithm_is_the_aggregator(transfer):
    everyone, state = _federation(2), None
    algorithm = _algorithm(uploads="change", transfer=transfer)
    config = matu.AggregationConfig.of(_matu_config(transfer))
    own = algorithm.init(jax.tree.map(lambda x: x[0], _changes(0)), everyone)
    state = _start()
    _same(own.server, state)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), own)
    for number in range(2):
        slots = _participating(everyone, seed=number)
        own, _ = algorithm.aggregate(own, algorithm.upload(_changes(number), slots), slots)
        result = _round(_changes(number), slots, state, config)
        state = result.state
        _same(own.server, state)
        _same(own.downloads, result.downloads)
        _same(algorithm.download(own, slots), matu.modulate(result.downloads, slots))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), own) == shapes
    # What a server keeps are the task vectors and the evidence, whatever the number of clients.
    _same(algorithm.traffic.kept(own), state)


def _matu_config(transfer):
    return MatuConfig(transfer=transfer, magnitude="max", agreement_threshold=0.4, uploads="change")


def test_changes_of_heads_are_added_to_the_heads_of_tasks():
    everyone = _federation(2)
    heads = np.random.default_rng(1).normal(size=(2, S, 3)).astype(np.float32)
    algorithm = with_heads(_algorithm(uploads="change"))
    base = {"shared": jax.tree.map(lambda x: x[0], _changes(0)), "head": {"b": heads[0, 0]}}
    state = algorithm.init(base, everyone)
    expected = np.zeros((T, 3))
    for number in range(2):
        slots = _participating(everyone, seed=number)
        if number:
            slots.weight[slots.task == 2] = 0
        change = {"shared": _changes(number), "head": {"b": heads[number]}}
        state, _ = algorithm.aggregate(state, algorithm.upload(change, slots), slots)
        for t in range(T):
            held = oracle.holders(t, slots.task, slots.weight)
            total = sum(slots.weight[s] for s in held)
            for s in held:
                expected[t] += slots.weight[s] / total * heads[number, s]
        found = np.asarray(algorithm.download(state, slots)["head"]["b"])
        np.testing.assert_allclose(found, expected[slots.task], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ a federation of quadratics


def _distances(uploads, pairs, rounds=40, d=256):
    """How far server and downloads end from the optima, relative to their length.

    Every local step goes half-way from the download to the optimum of its task; tasks 0 and 1, and
    2 and 3, ask for nearly opposite things.
    """
    generator = np.random.default_rng(0)
    optima = generator.normal(size=(4, d))
    optima[1::2] = -0.8 * optima[::2] + 0.6 * generator.normal(size=(2, d))
    task = np.array(pairs, np.int32).ravel()
    client = np.repeat(np.arange(len(pairs), dtype=np.int32), 2)
    slots = matu.Slots(client, task, np.ones(len(task), np.float32), len(pairs), 4)
    algorithm = _algorithm(uploads=uploads, agreement_threshold=0.0)
    wanted = jnp.asarray(optima[task], jnp.float32)

    @jax.jit
    def step(state):
        download = algorithm.download(state, slots)["w"]
        change = (wanted - download) / 2
        sent = change if algorithm.sends_change else download + change
        return algorithm.aggregate(state, algorithm.upload({"w": sent}, slots), slots)[0]

    state = algorithm.init({"w": jnp.zeros(d)}, slots)
    downs = []
    for _ in range(rounds):
        state = step(state)
        down = np.asarray(algorithm.download(state, slots)["w"])
        downs.append(np.linalg.norm(down - wanted) / np.linalg.norm(wanted))
    kept = state.server
    vectors = kept.task_vectors if uploads == "change" else matu.modulate(kept)
    server = np.linalg.norm(np.asarray(vectors["w"]) - optima) / np.linalg.norm(optima)
    fold = np.asarray(matu.modulate(matu.unify({"w": wanted}, slots), slots)["w"])
    lost = np.linalg.norm(fold - wanted) / np.linalg.norm(wanted)
    return {"server": server, "down": float(np.mean(downs[-10:])), "fold": lost}


def test_changes_find_the_optima_where_clients_hold_other_pairs():
    # Measured: server 0.24 against 0.86, downloads 0.59 against 0.70; folding the optima
    # themselves loses 0.56.
    pairs = [(0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2)]
    change, vector = _distances("change", pairs), _distances("vector", pairs)
    assert change["server"] < 0.35 < 0.8 < vector["server"]
    assert change["down"] < vector["down"] - 0.05
    assert change["down"] < change["fold"] + 0.08


def test_changes_find_the_optima_but_not_their_fold_where_pairs_never_change():
    # With the same two opposite tasks at all clients the server is near the optima (0.36 against
    # 0.92), but no fold serves both: downloads turn from one to the other instead of settling on
    # the fold of the optima, where those of vectors do.
    pairs = [(0, 1), (2, 3)] * 3
    change, vector = _distances("change", pairs), _distances("vector", pairs)
    assert change["server"] < 0.5 < 0.85 < vector["server"]
    np.testing.assert_allclose(vector["down"], vector["fold"], atol=0.02)
    assert vector["down"] < change["down"] < 1.2
