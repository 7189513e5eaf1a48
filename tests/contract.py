"""The contract that every algorithm keeps, as functions of an algorithm that assert it."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

import matu_jax as matu
from matu_jax.algorithms import build, with_heads
from matu_jax.config import NO_DEFENCE, Config, ModelConfig
from matu_jax.messages.traffic import message_bits

OPEN = Config(defence=NO_DEFENCE)

CLIENT = np.array([0, 0, 1, 2, 2, 3])
TASK = np.array([0, 1, 1, 2, 0, 2])
WEIGHT = np.array([10, 20, 30, 40, 50, 60], np.float32)
# Two blocks, of 10 and 15 parameters; 11 of the 25 are those of a B, 14 those of an A.
BASE = {
    "blocks": {
        0: {"query": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 2))}},
        1: {"query": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones(7)}},
    }
}
PARAMETERS = 25
HEADS_OF_THEIR_OWN = {"emr_one_shot", "fedper", "fedrep", "individual", "matfl", "untrained"}


def slots_with(weight=WEIGHT):
    return matu.Slots(CLIENT, TASK, np.asarray(weight, np.float32), 4, 3)


def vectors_from(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=(6, *x.shape)), jnp.float32), BASE)


def one_round(algorithm, state, vectors, slots):
    if algorithm.sends_change:
        vectors = jax.tree.map(jnp.subtract, vectors, algorithm.download(state, slots))
    state, metrics = algorithm.aggregate(state, algorithm.upload(vectors, slots), slots)
    return state, metrics, algorithm.download(state, slots)


def starts_at_the_base(algorithm):
    download = algorithm.download(algorithm.init(BASE, slots_with()), slots_with())
    chex.assert_trees_all_equal(download, jax.tree.map(jnp.zeros_like, vectors_from(0)))


def shapes_stay_and_nothing_recompiles(algorithm):
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


def absent_slots_change_nothing(algorithm):
    slots = slots_with(WEIGHT * [1, 1, 0, 1, 1, 0])
    state = algorithm.init(BASE, slots_with())
    vectors = vectors_from(0)
    expected, _, _ = one_round(algorithm, state, vectors, slots)
    for value in (jnp.nan, 1e3):
        garbage = jax.tree.map(lambda x, v=value: x.at[jnp.array([2, 5])].set(v), vectors)
        found, _, _ = one_round(algorithm, state, garbage, slots)
        chex.assert_trees_all_equal(found, expected)


def nobody_present_changes_no_task_vector(algorithm):
    state, _, _ = one_round(
        algorithm, algorithm.init(BASE, slots_with()), vectors_from(0), slots_with()
    )
    before = algorithm.download(state, slots_with())
    _, _, download = one_round(algorithm, state, vectors_from(1), slots_with(WEIGHT * 0))
    if isinstance(getattr(state, "server", None), matu.Unified):
        # MaTU's stateless server keeps each task's vector only as its unified holds it.
        kept = matu.modulate(state.server)
        expected = jax.tree.map(lambda x: x[TASK], kept)
        slots = dataclasses.replace(slots_with(), task=TASK)
        masks = matu.unify(expected, slots, magnitude="max")
        chex.assert_trees_all_close(download, matu.modulate(masks, slots_with()), rtol=1e-5)
    else:
        chex.assert_trees_all_equal(download, before)


def everything_is_finite_for_zero_vectors(algorithm):
    zero = jax.tree.map(jnp.zeros_like, vectors_from(0))
    state, metrics, download = one_round(
        algorithm, algorithm.init(BASE, slots_with()), zero, slots_with()
    )
    chex.assert_tree_all_finite((state, metrics, download))
    if algorithm.evaluated:
        chex.assert_tree_all_finite(algorithm.evaluated(state, slots_with()))


def what_is_evaluated_is_a_vector_per_slot_and_the_base_at_first(algorithm):
    evaluated = jax.jit(algorithm.evaluated or algorithm.download)
    state = algorithm.init(BASE, slots_with())
    chex.assert_trees_all_equal(
        evaluated(state, slots_with()), jax.tree.map(jnp.zeros_like, vectors_from(0))
    )
    state, _, _ = one_round(algorithm, state, vectors_from(0), slots_with())
    vectors = evaluated(state, slots_with())
    chex.assert_trees_all_equal_shapes_and_dtypes(vectors, vectors_from(0))
    chex.assert_tree_all_finite(vectors)
    assert all(np.abs(np.asarray(x[:, 0])).max() > 0 for x in jax.tree.leaves(vectors))


def what_trains_is_said_for_every_leaf(algorithm):
    if algorithm.local.trains is None:
        return
    vector = jax.tree.map(jnp.zeros_like, BASE)
    for progress in (0.0, 0.25, 0.5, 0.75):
        factors = algorithm.local.trains(vector, jnp.float32(progress))
        whole = jax.tree.map(
            lambda x, f: jnp.broadcast_to(jnp.float32(f), x.shape), vector, factors
        )
        values = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(whole)])
        assert set(values) <= {0.0, 1.0}
        idle = algorithm.local.head_trains and not algorithm.local.head_trains(
            jnp.float32(progress)
        )
        assert values.any() or idle


CHECKS = (
    starts_at_the_base,
    shapes_stay_and_nothing_recompiles,
    absent_slots_change_nothing,
    nobody_present_changes_no_task_vector,
    everything_is_finite_for_zero_vectors,
    what_is_evaluated_is_a_vector_per_slot_and_the_base_at_first,
    what_trains_is_said_for_every_leaf,
)


def trained_heads_belong_to_tasks(name):
    config = dataclasses.replace(OPEN, algorithm=name, model=ModelConfig(head="trained"))
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
        alone = name in HEADS_OF_THEIR_OWN
        holders = [slot] if alone else np.flatnonzero(TASK[slot] == TASK)
        expected = sum(WEIGHT[h] * rows[h] for h in holders) / sum(WEIGHT[h] for h in holders)
        np.testing.assert_allclose(download[slot], expected, rtol=1e-6)
    inner = build(dataclasses.replace(OPEN, algorithm=name))
    # Else a download that replaces its own would not be evaluated.
    assert (algorithm.evaluated is None) == (inner.evaluated is None)
    plain = inner.traffic.sent(
        inner.init(BASE, slots_with()), inner.upload(vectors["shared"], slots_with())
    )
    up, _ = with_heads(inner).traffic.sent(state, uploads)
    held = np.array([2, 1, 2, 1])
    extra = 0 if name in HEADS_OF_THEIR_OWN else 32 * 6 * held
    np.testing.assert_array_equal(
        message_bits(up, slots_with()), message_bits(plain[0], slots_with()) + extra
    )
