"""The aggregator inside larger programs: transformed, sharded, compiled once, small in memory."""

import dataclasses
from functools import partial

import chex
import jax
import jax.monitoring
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from programs import equations

import matu_jax as matu

# Eight groups of two clients, with three slots and one.
GROUPS, SLOTS, CLIENTS, TASKS = 8, 32, 16, 4
CLIENT = np.array([[2 * g, 2 * g, 2 * g, 2 * g + 1] for g in range(GROUPS)], np.int32).ravel()
TASK = np.array([[g, g + 1, g + 2, g + 3] for g in range(GROUPS)], np.int32).ravel() % TASKS
CONFIG = matu.AggregationConfig.paper(
    transfer="mean", similarity="cross_client", top_k=2, min_similarity=0.25
)


def _slots(seed=0):
    weight = np.random.default_rng(seed).integers(0, 4, SLOTS).astype(np.float32)
    return matu.Slots(CLIENT, TASK, weight, CLIENTS, TASKS)


def _vectors(seed=0):
    drawn = np.random.default_rng(seed).normal(size=(SLOTS, 16, 64))
    return {"kernel": drawn.astype(np.float32)}


def _state():
    """What a server holds before its first round, in the shapes of every later round."""
    return matu.unify(jax.tree.map(lambda leaf: np.zeros_like(leaf[:TASKS]), _vectors()))


def _round(vectors, slots, state, config=CONFIG):
    uploads = matu.unify(vectors, slots)
    return uploads, matu.aggregate(uploads, slots, config, state)


def _close(found, expected):
    """Equal but for the order of float32 sums; masks, and what is not a float, to the bit."""
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for left, right in pairs:
        left, right = np.asarray(left), np.asarray(right)
        if np.issubdtype(left.dtype, np.floating):
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(left, right)


def _mesh():
    devices = jax.devices("cpu")
    if len(devices) < GROUPS:
        pytest.skip(f"{len(devices)} CPU devices, {GROUPS} needed: XLA_FLAGS was set outside")
    return Mesh(np.array(devices[:GROUPS]), ("devices",), axis_types=(AxisType.Auto,))


# ------------------------------------------------------------------ transformations


def test_vmap_over_federations():
    def everything(vectors, slots, state):
        uploads, result = _round(vectors, slots, state)
        return (
            uploads,
            result,
            matu.modulate(result.downloads, slots),
            matu.direction_similarity(vectors),
        )

    seeds = range(3)
    vectors = matu.stack([_vectors(seed) for seed in seeds])
    slots = jax.tree.map(lambda *x: np.stack(x), *[_slots(seed) for seed in seeds])
    states = jax.tree.map(lambda *x: np.stack(x), *[_state()] * len(seeds))
    together = jax.jit(jax.vmap(everything))(vectors, slots, states)
    for seed in seeds:
        one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], together)
        _close(one, everything(_vectors(seed), _slots(seed), _state()))


def test_shard_map_over_groups_of_clients():
    # Every device folds its own clients, as a client side spread over machines does.
    mesh, spec = _mesh(), PartitionSpec("devices")
    per_group = CLIENTS // GROUPS

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    def fold_own(vectors, slots):
        first = jax.lax.axis_index("devices") * per_group
        own = dataclasses.replace(slots, client=slots.client - first, num_clients=per_group)
        uploads = matu.unify(vectors, own)
        return uploads, matu.modulate(uploads, own)

    uploads = matu.unify(_vectors(), _slots())
    expected = uploads, matu.modulate(uploads, _slots())
    _close(fold_own(_vectors(), _slots()), expected)


def test_shard_map_over_federations():
    # Every device is the server of its own two clients.
    mesh, spec = _mesh(), PartitionSpec("devices")
    client = np.tile(np.array([0, 0, 0, 1], np.int32), GROUPS)
    slots = dataclasses.replace(_slots(), client=client, num_clients=CLIENTS // GROUPS)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec)
    def rounds(vectors, slots, state):
        return jax.tree.map(lambda leaf: leaf[None], _round(vectors, slots, state))

    together = rounds(_vectors(), slots, _state())
    for group in range(GROUPS):
        rows = slice(4 * group, 4 * group + 4)
        own = jax.tree.map(lambda leaf, rows=rows: leaf[rows], (_vectors(), slots))
        one = jax.tree.map(lambda leaf, group=group: leaf[group], together)
        _close(one, _round(own[0], own[1], _state()))


@pytest.mark.parametrize("axis", [0, 1], ids=["slots", "parameters"])
def test_sharded_inputs_give_the_same_round(axis):
    mesh = _mesh()

    def placed(tree):
        """Splits every leaf along one axis, over all devices; whole if it has no such axis."""

        def place(leaf):
            spec = ["devices" if i == axis else None for i in range(np.ndim(leaf))]
            return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

        return jax.tree.map(place, tree)

    vectors, slots = placed(_vectors()), placed(_slots())
    uploads = jax.jit(matu.unify)(vectors, slots)
    expected = matu.unify(_vectors(), _slots())
    _close(uploads, expected)
    _close(jax.jit(matu.modulate)(uploads, slots), matu.modulate(expected, _slots()))
    _close(matu.direction_similarity(vectors), matu.direction_similarity(_vectors()))
    aggregate = jax.jit(partial(matu.aggregate, config=CONFIG))
    result = aggregate(placed(expected), slots, previous=_state())
    _close(result, matu.aggregate(expected, _slots(), CONFIG, _state()))


# ------------------------------------------------------------------ one compilation


def _play(rounds, step):
    """Rounds with other clients, tasks and weights each, the state going from one to the next."""
    state = _state()
    generator = np.random.default_rng(1)
    for number in range(rounds):
        order = generator.permutation(SLOTS)
        slots = dataclasses.replace(_slots(number), client=CLIENT[order], task=TASK[order])
        _, result = step(_vectors(number), slots, state)
        state = result.unified
    return result


def test_rounds_compile_once(compilations):
    # The public functions called directly, from numpy, as a notebook does.
    _play(2, _round)
    before = len(compilations)
    _play(4, _round)
    assert len(compilations) == before


def test_rounds_inside_jit_trace_once(compilations):
    step = jax.jit(chex.assert_max_traces(n=1)(_round))
    result = _play(4, step)
    assert compilations
    _close(result, _play(4, _round))


def _specification(slots, clients, tasks, size, leaves=2):
    """Shapes alone: uploads and slots of a federation that is never made."""

    vectors = {f"leaf{i}": jax.ShapeDtypeStruct((slots, size), np.float32) for i in range(leaves)}
    index = jax.ShapeDtypeStruct((slots,), np.int32)
    weight = jax.ShapeDtypeStruct((slots,), np.float32)
    where = matu.Slots(index, index, weight, clients, tasks)
    return vectors, jax.eval_shape(matu.unify, vectors, where), where


def test_programs_do_not_grow_with_slots_clients_tasks_or_parameters():
    # No Python loop over any of them: the program is the same, whatever their number. The sums
    # of up to eight tasks are written out.
    sizes = []
    for slots, clients, tasks, size in ((6, 3, 8, 1_500), (96, 24, 12, 4_100)):
        vectors, uploads, where = _specification(slots, clients, tasks, size)
        sizes.append(
            [
                equations(jax.make_jaxpr(matu.unify)(vectors, where).jaxpr),
                equations(
                    jax.make_jaxpr(partial(matu.aggregate, config=CONFIG))(uploads, where).jaxpr
                ),
            ]
        )
    assert min(sizes[0]) > 1
    assert sizes[0] == sizes[1]


# ------------------------------------------------------------------ memory


def _temporary_bytes(function, *specifications):
    analysis = jax.jit(function).lower(*specifications).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


MANY, FEW_CLIENTS, FEW_TASKS, SIZE, LEAVES = 256, 16, 8, 1 << 18, 2


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        matu.AggregationConfig.paper(
            magnitude="mean", transfer="additive", similarity="aggregated", min_similarity=0.25
        ),
    ],
    ids=["max-cross_client-mean", "mean-aggregated-additive"],
)
def test_a_round_needs_no_array_of_slots_by_parameters(config):
    # Beside its inputs and outputs (masks: one bit for each slot and parameter; one vector for
    # each client and task) a round may hold another set of masks and some rows of parameters for
    # each task and client, never a float32 for each slot and parameter.
    d = SIZE * LEAVES
    _, uploads, slots = _specification(MANY, FEW_CLIENTS, FEW_TASKS, SIZE, LEAVES)
    used = _temporary_bytes(partial(matu.aggregate, config=config), uploads, slots)
    assert used <= MANY * d / 8 + (6 * FEW_TASKS + FEW_CLIENTS) * d * 4
    assert used < MANY * d * 4 / 3


@pytest.mark.parametrize("magnitude", ["max", "mean"])
def test_unify_does_not_copy_its_vectors(magnitude):
    d = SIZE * LEAVES
    vectors, _, slots = _specification(MANY, FEW_CLIENTS, FEW_TASKS, SIZE, LEAVES)
    used = _temporary_bytes(partial(matu.unify, magnitude=magnitude), vectors, slots)
    assert used <= MANY * d / 8 + 4 * FEW_CLIENTS * d * 4
    assert used < MANY * d * 4 / 3
