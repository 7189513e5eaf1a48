"""The rivals' own arithmetic, against float64 loops over several rounds with absent clients."""

import dataclasses
import itertools
import math

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_clip
from federations import RUN, federation_of, one_device
from hypothesis import given
from scipy.cluster.hierarchy import fcluster, linkage

import matu_jax as matu
from matu_jax import models
from matu_jax.algorithms import build
from matu_jax.config import (
    NO_DEFENCE,
    Config,
    LocalConfig,
)
from matu_jax.data import Split
from matu_jax.simulation import rounds
from matu_jax.simulation.local import local_training
from matu_jax.trees import leaf_items

OPEN = Config(defence=NO_DEFENCE)

CLIENT = np.array([0, 0, 1, 2, 2, 3, 3])
TASK = np.array([0, 1, 1, 2, 0, 2, 3])
WEIGHT = np.array([10, 20, 30, 40, 50, 60, 70], np.float32)
SLOTS, CLIENTS, TASKS = 7, 4, 4
# Clients 0 and 2; 1 and 3, but for a slot that broke down (so task 0 waits); nobody; 3 alone.
ROUNDS = [WEIGHT * np.asarray(rows, np.float32) for rows in (
    [1, 1, 0, 1, 1, 0, 0],
    [0, 0, 1, 0, 0, 0, 1],
    [0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 1, 1],
    [1, 1, 1, 1, 1, 1, 1],
)]  # fmt: skip

UNSTACKED = {
    "blocks/0/query/lora_a": (3, 2),
    "blocks/0/query/lora_b": (2, 3),
    "blocks/1/query/lora_a": (3, 2),
    "blocks/1/query/lora_b": (2, 3),
    "blocks/2/query/lora_a": (3, 2),
    "blocks/2/query/lora_b": (2, 3),
}
STACKED = {"blocks/query/lora_a": (3, 3, 2), "blocks/query/lora_b": (3, 2, 3)}
FULL = {
    "blocks/0/norm_mlp/scale": (3,),
    "blocks/1/norm_mlp/scale": (3,),
    "blocks/2/norm_mlp/scale": (3,),
    "class_token": (1, 1, 3),
    "norm/scale": (3,),
    "positions": (1, 2, 3),
    "stem/convolutions/0/project/bias": (2,),
}
FULL_STACKED = {
    "blocks/norm_mlp/scale": (3, 3),
    "class_token": (3,),
    "norm/bias": (3,),
    "norm_pre/bias": (3,),
    "patches/kernel": (2, 3),
    "positions": (2, 3),
    "projection/kernel": (3, 2),
}


def nested(leaves):
    tree = {}
    for path, leaf in leaves.items():
        *words, last = path.split("/")
        at = tree
        for word in words:
            at = at.setdefault(int(word) if word.isdigit() else word, {})
        at[last] = leaf
    return tree


def slots_with(weight):
    return matu.Slots(CLIENT, TASK, np.asarray(weight, np.float32), CLIENTS, TASKS)


def changes_for(shapes, seed=0, still=""):
    """What every slot learns in every round: two directions, and noise; zero for leaves `still`."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in ROUNDS:
        common = {path: rng.normal(size=(2, *shape)) for path, shape in shapes.items()}
        learnt = {
            path: np.stack([common[path][s % 2] for s in range(SLOTS)])
            + rng.normal(size=(SLOTS, *shape))
            for path, shape in shapes.items()
        }
        result.append(
            {path: x * (not (still and path.endswith(still))) for path, x in learnt.items()}
        )
    return result


def played(algorithm, shapes, changes):
    """Downloads and what is evaluated after every round; absent rows hold NaN, or large numbers."""
    base = nested({path: jnp.ones(shape) for path, shape in shapes.items()})
    everybody = slots_with(WEIGHT)
    state = algorithm.init(base, everybody)
    garbage = np.where(np.arange(SLOTS) % 2, 1e3, np.nan).astype(np.float32)

    @jax.jit
    def step(state, change, slots):
        vectors = jax.tree.map(jnp.add, algorithm.download(state, slots), change)

        def spoil(leaf):
            def column(x):
                return x.reshape(-1, *([1] * (leaf.ndim - 1)))

            return jnp.where(column(slots.weight == 0), column(garbage), leaf)

        vectors = jax.tree.map(spoil, vectors)
        return algorithm.aggregate(state, algorithm.upload(vectors, slots), slots)[0]

    history = []
    for weight, change in zip(ROUNDS, changes, strict=True):
        tree = nested({path: jnp.asarray(x, jnp.float32) for path, x in change.items()})
        state = step(state, tree, slots_with(weight))
        history.append(
            tuple(
                {path: np.asarray(x) for path, x in leaf_items(vectors(state, everybody))}
                for vectors in (algorithm.download, algorithm.evaluated or algorithm.download)
            )
        )
    return history


def compare(found, expected):
    """Found: path to `[slots, ...]`; expected: for every slot, path to `[...]`."""
    for slot, path in itertools.product(range(SLOTS), found):
        np.testing.assert_allclose(
            found[path][slot], expected[slot][path], rtol=2e-5, atol=2e-5, err_msg=f"{slot} {path}"
        )


def zero(shapes):
    return {path: np.zeros(shape) for path, shape in shapes.items()}


def partly_shared(shapes, changes, shared):
    """FedAvg of the entries of which `shared[path]` is True; the others stay with their slot."""
    mean, own, history = zero(shapes), [zero(shapes) for _ in range(SLOTS)], []
    for weight, change in zip(ROUNDS, changes, strict=True):
        trained = [
            {p: np.where(shared[p], mean[p], own[s][p]) + change[p][s] for p in shapes}
            for s in range(SLOTS)
        ]
        sums, total = zero(shapes), 0.0
        for client in range(CLIENTS):
            rows = [s for s in range(SLOTS) if CLIENT[s] == client and weight[s] > 0]
            examples = sum(float(weight[s]) for s in rows)
            for path in shapes:
                for s in rows:  # the client's mean, weighted by the client's examples
                    sums[path] += examples * (weight[s] / examples * trained[s][path])
            total += examples
        if total:
            mean = {path: sums[path] / total for path in shapes}
        for s in np.flatnonzero(weight):
            own[s] = trained[s]
        history.append(
            [{p: np.where(shared[p], mean[p], own[s][p]) for p in shapes} for s in range(SLOTS)]
        )
    return history


def first_rows(shapes, rows):
    """Which entries are shared: all, none, or a leaf's first rows."""
    result = {}
    for path, shape in shapes.items():
        result[path] = np.zeros(shape, bool)
        result[path][: rows[path]] = True
    return result


ALL = None  # as the end of a slice
SPLITS = [
    (UNSTACKED, 1, {p: 0 if p.startswith("blocks/2") else ALL for p in UNSTACKED}),
    (UNSTACKED, 2, {p: ALL if p.startswith("blocks/0") else 0 for p in UNSTACKED}),
    (STACKED, 1, dict.fromkeys(STACKED, 2)),
    (STACKED, 2, dict.fromkeys(STACKED, 1)),
    (FULL, 1, {p: 0 if p in ("blocks/2/norm_mlp/scale", "norm/scale") else ALL for p in FULL}),
    (
        FULL_STACKED,
        1,
        dict.fromkeys(FULL_STACKED, ALL)
        | {"blocks/norm_mlp/scale": 2, "norm/bias": 0, "projection/kernel": 0},
    ),
]


def configured(name, local=OPEN.local, **own):
    fields = {"algorithm": name} | {f"{name}.{field}": value for field, value in own.items()}
    return build(dataclasses.replace(OPEN, local=local).with_fields(fields))


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
@pytest.mark.parametrize("case", range(len(SPLITS)))
def test_the_last_blocks_and_what_follows_them_stay_with_their_slot(name, case):
    shapes, blocks, rows = SPLITS[case]
    algorithm, changes = configured(name, personal_blocks=blocks), changes_for(shapes)
    shared = first_rows(shapes, rows)
    expected = partly_shared(shapes, changes, shared)
    for (download, evaluated), wanted in zip(
        played(algorithm, shapes, changes), expected, strict=True
    ):
        compare(download, wanted)
        compare(evaluated, wanted)
    base = nested({path: jnp.ones(shape) for path, shape in shapes.items()})
    state = algorithm.init(base, slots_with(WEIGHT))
    kept = sum(x.size for x in jax.tree.leaves(algorithm.traffic.kept(state)))
    assert kept == sum(mask.sum() for mask in shared.values())


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
@pytest.mark.parametrize("shapes", [UNSTACKED, STACKED], ids=["unstacked", "stacked"])
def test_a_block_has_to_be_shared(name, shapes):
    base = nested({path: jnp.ones(shape) for path, shape in shapes.items()})
    for blocks in (3, 4):
        with pytest.raises(
            ValueError, match=rf"config\.{name}\.personal_blocks: found {blocks}.* 3 "
        ):
            configured(name, personal_blocks=blocks).init(base, slots_with(WEIGHT))
    configured(name, personal_blocks=2).init(base, slots_with(WEIGHT))
    with pytest.raises(ValueError, match=rf"config\.{name}\.personal_blocks"):
        configured(name).init({"norm": jnp.ones(3)}, slots_with(WEIGHT))


@pytest.mark.parametrize(
    ("steps", "fraction", "expected"),
    [
        *((4, 0.5, 2), (5, 0.5, 3), (50, 0.1, 5), (25, 0.6, 15), (20, 0.9, 18), (20, 2 / 3, 13)),
        *((3, 0.1, 1), (2, 0.9, 1)),  # at least one step for each
    ],
)  # fmt: skip
def test_fedrep_trains_one_part_after_the_other(steps, fraction, expected):
    local = LocalConfig(steps=steps)
    rule = configured("fedrep", local=local, personal_fraction=fraction).local
    assert rule.trains is not None
    assert rule.head_trains is not None
    vector = nested({path: jnp.ones(shape) for path, shape in STACKED.items()})
    # As in training: float32, and under jit, where a division may become a multiplication.
    progress = jax.jit(lambda step: step.astype(jnp.float32) / steps)
    for step in range(steps):
        now = progress(jnp.int32(step))
        early = step < expected
        assert float(rule.head_trains(now)) == early
        for _, factor in leaf_items(rule.trains(vector, now)):
            whole = np.broadcast_to(factor, (3, 1, 1))[:, 0, 0]
            np.testing.assert_array_equal(whole, [not early, not early, early])


def test_fedrep_needs_steps_for_both_parts():
    with pytest.raises(ValueError, match=r"config.local.steps: found 1, .*Set at least 2"):
        configured("fedrep", local=LocalConfig(steps=1))


@pytest.mark.parametrize("shapes", [UNSTACKED, STACKED], ids=["unstacked", "stacked"])
@pytest.mark.parametrize("trains_a", [False, True])
def test_fed_lora_b_shares_b_alone(shapes, trains_a):
    algorithm = configured("fed_lora_b", trains_a=trains_a)
    changes = changes_for(shapes, still="" if trains_a else "lora_a")
    shared = {path: np.full(shape, path.endswith("lora_b")) for path, shape in shapes.items()}
    for (download, _), wanted in zip(
        played(algorithm, shapes, changes), partly_shared(shapes, changes, shared), strict=True
    ):
        compare(download, wanted)
    if trains_a:
        assert algorithm.local.trains is None
        return
    assert algorithm.local.trains is not None
    vector = nested({path: jnp.ones(shape) for path, shape in shapes.items()})
    for path, factor in leaf_items(algorithm.local.trains(vector, jnp.float32(0))):
        assert float(factor) == path.endswith("lora_b")


def test_fed_lora_b_needs_adapters():
    with pytest.raises(ValueError, match=r"adapters.*config\.model\.trainable is 'full'"):
        build(OPEN.with_fields({"algorithm": "fed_lora_b", "model.trainable": "full"}))
    with pytest.raises(ValueError, match=r"arrays \(w\) none has a path that ends with lora_a"):
        configured("fed_lora_b").init({"w": jnp.zeros(3)}, slots_with(WEIGHT))


def flat(vector):
    return np.concatenate([vector[path].ravel() for path in sorted(vector)])


def matfl_weights(vectors, rows, grouping, threshold):
    """The weights of the rows present, `[rows, rows]`."""
    mean = sum(flat(vectors[s]) for s in rows) / len(rows)
    deviation = [flat(vectors[s]) - mean for s in rows]
    cosine = np.eye(len(rows))
    for i, j in itertools.permutations(range(len(rows)), 2):
        norms = np.linalg.norm(deviation[i]) * np.linalg.norm(deviation[j])
        cosine[i, j] = deviation[i] @ deviation[j] / norms
    if grouping == "hard" and len(rows) > 1:
        distance = 1 - cosine[np.triu_indices(len(rows), 1)]
        label = fcluster(linkage(distance, "average"), 1 + threshold, "distance")
        weight = (label[:, None] == label[None]).astype(float)
    else:
        weight = np.maximum(cosine + threshold, 0)
    return weight / weight.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("shapes", [UNSTACKED, STACKED], ids=["unstacked", "stacked"])
@pytest.mark.parametrize("grouping", ["soft", "hard"])
@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.3, 0.9])
def test_matfl_is_the_mean_of_those_that_moved_alike(shapes, grouping, threshold):
    algorithm = configured("matfl", grouping=grouping, threshold=threshold)
    changes = changes_for(shapes, seed=4)
    own = [zero(shapes) for _ in range(SLOTS)]
    for number, (download, _) in enumerate(played(algorithm, shapes, changes)):
        rows = np.flatnonzero(ROUNDS[number])
        trained = {s: {p: own[s][p] + changes[number][p][s] for p in shapes} for s in rows}
        if rows.size:
            weights = matfl_weights(trained, rows, grouping, threshold)
            if threshold == 0 and number == 4:
                assert 0 < (weights == 0).sum() < weights.size - len(rows)
        for i, s in enumerate(rows):
            own[s] = zero(shapes)
            for (j, r), p in itertools.product(enumerate(rows), shapes):
                own[s][p] = own[s][p] + weights[i, j] * trained[r][p]
        compare(download, own)


@pytest.mark.parametrize("grouping", ["soft", "hard"])
@pytest.mark.parametrize("threshold", [-1.0, -0.5, 0.0, 1.0])
def test_matfl_where_there_is_nothing_to_compare(grouping, threshold):
    """The same vector everywhere, or a slot alone: everybody's vector stays what it is."""
    algorithm = configured("matfl", grouping=grouping, threshold=threshold)
    vector = {"w": np.random.default_rng(0).normal(size=5).astype(np.float32)}
    everywhere = {"w": jnp.tile(vector["w"][None], (SLOTS, 1))}
    for present in (WEIGHT, WEIGHT * (np.arange(SLOTS) == 2)):
        slots = slots_with(present)
        state, _ = algorithm.aggregate(jax.tree.map(jnp.zeros_like, everywhere), everywhere, slots)
        expected = np.where(present[:, None] > 0, vector["w"][None], 0)
        np.testing.assert_allclose(state["w"], expected, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_matfl_compares_directions_whatever_their_length(size):
    algorithm = configured("matfl", grouping="hard")
    signs = np.array([1, 1, 1, -1, -1, -1, -1], np.float32)[:, None]
    lengths = np.array([1, 2, 3, 1, 2, 3, 4], np.float32)[:, None]
    vectors = {"w": jnp.asarray(size * signs * lengths * np.ones((1, 4), np.float32))}
    state, _ = algorithm.aggregate(vectors, vectors, slots_with(WEIGHT))
    expected = np.where(signs > 0, 2 * size, -2.5 * size) * np.ones((1, 4))
    np.testing.assert_allclose(state["w"], expected, rtol=1e-5)


def ties_of(vectors, keep):
    """TIES of flat vectors, entry by entry."""
    trimmed = []
    for vector in vectors:
        count = math.ceil(round(keep * len(vector), 9))
        smallest = sorted(abs(x) for x in vector)[-count]
        trimmed.append([x if abs(x) >= smallest else 0.0 for x in vector])
    result = []
    for entries in zip(*trimmed, strict=True):
        elected = np.sign(sum(entries))
        agree = [x for x in entries if elected != 0 and np.sign(x) == elected]
        result.append(sum(agree) / len(agree) if agree else 0.0)
    return np.array(result)


@pytest.mark.parametrize("shapes", [UNSTACKED, STACKED], ids=["unstacked", "stacked"])
@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
def test_ties_trims_elects_and_averages_what_agrees(shapes, keep):
    changes = changes_for(shapes, seed=2)
    merged = np.zeros(sum(math.prod(shape) for shape in shapes.values()))
    for number, (download, _) in enumerate(played(configured("ties", keep=keep), shapes, changes)):
        rows = np.flatnonzero(ROUNDS[number])
        learnt = [flat({p: changes[number][p][s] for p in shapes}) for s in rows]
        if rows.size:
            merged = ties_of([merged + x for x in learnt], keep)
        for slot in range(SLOTS):
            found = flat({path: download[path][slot] for path in shapes})
            np.testing.assert_allclose(found, merged, rtol=2e-5, atol=2e-5)


def ties_once(vectors, keep):
    algorithm = configured("ties", keep=keep)
    rows = len(vectors)
    slots = matu.Slots(
        np.arange(rows), np.zeros(rows, np.int32), np.ones(rows, np.float32), rows, 1
    )
    vectors = np.asarray(vectors, np.float32)
    half = vectors.shape[1] // 2
    tree = {"a": jnp.asarray(vectors[:, :half]), "b": jnp.asarray(vectors[:, half:])}
    state = algorithm.init(jax.tree.map(lambda x: x[0], tree), slots)
    state, _ = algorithm.aggregate(state, algorithm.upload(tree, slots), slots)
    return np.concatenate([state["a"], state["b"]])


@given(st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4),
       st.sampled_from([0.1, 1 / 3, 0.5, 0.7, 1.0]))  # fmt: skip
def test_ties_with_equal_magnitudes_and_zeros(vectors, keep):
    np.testing.assert_allclose(ties_once(vectors, keep), ties_of(vectors, keep), rtol=1e-6)


def test_ties_keeps_a_slot_alone_as_it_is_and_cuts_over_all_leaves():
    vector = np.array([[5.0, 0.0, -3.0, 1.0, -2.0, 4.0]], np.float32)
    np.testing.assert_array_equal(ties_once(vector, 1.0), vector[0])
    np.testing.assert_array_equal(ties_once(vector, 0.5), [5, 0, -3, 0, 0, 4])
    np.testing.assert_array_equal(ties_once(vector, 0.51), [5, 0, -3, 0, -2, 4])
    many = np.arange(1.0, 101)[None]
    assert np.count_nonzero(ties_once(many, 0.07)) == 7  # 0.07 * 100 is above 7 in floats


def emr_of(vectors):
    """EMR-Merging of flat vectors: `[vectors, parameters]`, what each becomes."""
    d = len(vectors[0])
    unified = np.zeros(d)
    for i in range(d):
        entries = [v[i] for v in vectors]
        elected = np.sign(sum(entries))
        unified[i] = elected * max([abs(x) for x in entries if np.sign(x) == elected != 0] or [0])
    result = []
    for vector in vectors:
        mask = vector * unified > 0
        kept = np.abs(unified[mask]).sum()
        scale = np.abs(vector).sum() / kept if kept else 0.0
        result.append(scale * mask * unified)
    return result


@pytest.mark.parametrize("shapes", [UNSTACKED, STACKED], ids=["unstacked", "stacked"])
def test_emr_one_shot_trains_alone_and_merges_who_has_trained(shapes):
    algorithm, changes = configured("emr_one_shot"), changes_for(shapes, seed=5)
    assert algorithm.traffic.one_shot
    own, examples = [zero(shapes) for _ in range(SLOTS)], [0.0] * SLOTS
    for number, (download, evaluated) in enumerate(played(algorithm, shapes, changes)):
        for s in np.flatnonzero(ROUNDS[number]):
            own[s] = {p: own[s][p] + changes[number][p][s] for p in shapes}
            examples[s] = float(WEIGHT[s])
        compare(download, own)
        tasks = []
        for task in range(TASKS):
            holders = [s for s in range(SLOTS) if TASK[s] == task and examples[s]]
            total = sum(examples[s] for s in holders)
            tasks.append(
                sum((examples[s] / total * flat(own[s]) for s in holders), 0 * flat(own[0]))
            )
        merged = emr_of(tasks)
        for slot in range(SLOTS):
            found = flat({path: evaluated[path][slot] for path in shapes})
            np.testing.assert_allclose(found, merged[TASK[slot]], rtol=2e-5, atol=2e-5)
    assert number == 4
    assert all(examples)


def test_emr_one_shot_of_one_task_is_the_mean_of_its_holders():
    """And so it is in full: a slot that never took part starts from the others' merge."""
    algorithm = configured("emr_one_shot")
    slots = matu.Slots(np.arange(3), np.zeros(3, np.int32), np.array([1, 3, 0], np.float32), 3, 1)
    rows = jnp.asarray([[1.0, -2.0], [5.0, 2.0], [np.nan, np.nan]])
    state = algorithm.init({"w": jnp.zeros(2)}, slots)
    state, _ = algorithm.aggregate(state, algorithm.upload({"w": rows}, slots), slots)
    assert algorithm.evaluated is not None
    evaluated = algorithm.evaluated(state, slots)["w"]
    np.testing.assert_allclose(evaluated, np.tile([[4.0, 1.0]], (3, 1)), rtol=1e-6)
    np.testing.assert_allclose(algorithm.download(state, slots)["w"], [[1, -2], [5, 2], [0, 0]])


# In training: a stacked tower of three blocks, with trained heads where it says so.

STEPS, PARTS = 4, 2


@pytest.fixture
def tower(monkeypatch):
    tiny_clip.register(monkeypatch)

    def built():
        return RUN.model, models.build_classifier(RUN.model, [tiny_clip.task()])

    return built


def trained_in_parts(model, config, rule):
    """The vectors after every part of a round's steps, from a start that is not zero."""
    rng = np.random.default_rng(0)
    start = jax.tree.map(
        lambda x: jnp.asarray(0.05 * rng.normal(size=(2, *x.shape)), jnp.float32), model.base
    )
    images = rng.integers(0, 256, (2, STEPS, 3, tiny_clip.SIZE, tiny_clip.SIZE, 3))
    images = images.astype(np.uint8)
    labels = rng.integers(0, 3, (2, STEPS, 3)).astype(np.int32)
    position = np.zeros((2, 3), np.int32)
    local = local_training(model, config, rule, one_device())
    carry, advance = jax.jit(local.begin)(start), jax.jit(local.advance)
    history = [start]
    for first in range(0, STEPS, STEPS // PARTS):
        part = np.s_[:, first : first + STEPS // PARTS]
        batches = Split(images[part], labels[part])
        carry = advance((model.base, model.frozen), carry, start, position, batches)
        history.append(carry.vector)
    return [dict(leaf_items(jax.tree.map(np.asarray, x))) for x in history]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_fedrep_moves_one_part_at_a_time(tower, optimizer):
    model_config, model = tower()
    local = LocalConfig(
        steps=STEPS, batch_examples=3, optimizer=optimizer, learning_rate=0.01, weight_decay=0.1
    )
    config = dataclasses.replace(OPEN, algorithm="fedrep", model=model_config, local=local)
    config = config.with_fields({"fedrep.personal_fraction": 1 / PARTS})
    start, middle, end = trained_in_parts(model, local, build(config).local)
    for path in start:
        head, stacked = path.startswith("head"), np.s_[:, :2]
        if head:
            assert (middle[path] != start[path]).any(), path
            np.testing.assert_array_equal(end[path], middle[path], err_msg=path)
            continue
        np.testing.assert_array_equal(middle[path][stacked], start[path][stacked], err_msg=path)
        assert (middle[path][:, 2] != start[path][:, 2]).any(), path
        assert (end[path][stacked] != middle[path][stacked]).any(), path
        np.testing.assert_array_equal(end[path][:, 2], middle[path][:, 2], err_msg=path)


def test_fed_lora_b_leaves_a_alone_but_not_the_head(tower):
    model_config, model = tower()
    local = LocalConfig(steps=STEPS, batch_examples=3)
    config = dataclasses.replace(OPEN, algorithm="fed_lora_b", model=model_config, local=local)
    start, _, end = trained_in_parts(model, local, build(config).local)
    for path in start:
        assert (end[path] == start[path]).all() == path.endswith("lora_a"), path


def run(name, **changes):
    config = dataclasses.replace(RUN, algorithm=name, **changes)
    federation = federation_of(config)
    model = models.build_classifier(config.model, federation.tasks)
    algorithm = build(config)
    results = [
        tiny.kept(result)
        for result in rounds.run(config, algorithm, model, federation, mesh=one_device())
    ]
    return algorithm, federation, model, results


@pytest.mark.parametrize(
    "name", ["emr_one_shot", "fed_lora_b", "fedper", "fedrep", "matfl", "ntk_fedavg", "ties"]
)
def test_a_stacked_tower_with_trained_heads_runs(monkeypatch, name):
    tiny_clip.register(monkeypatch)
    algorithm, federation, model, results = run(name)
    assert np.isfinite(results[-1].record["accuracy"]["test_mean"])
    size = sum(x.size for x in jax.tree.leaves(model.base["shared"]))
    bits = [result.record["uplink_bits"] for result in results]
    if name in ("fedper", "fedrep"):  # two of three blocks, from each of two clients
        assert bits == [2 * 32 * size * 2 // 3] * 2
    if name == "emr_one_shot":  # all six slots, once
        assert bits == [0, 6 * 32 * size]
    vectors = algorithm.download(results[-1].state, federation.slots)
    chex.assert_tree_all_finite(vectors)
    moved = {path: np.abs(x).max() > 0 for path, x in leaf_items(vectors)}
    assert moved["head/kernel"]
    # Where the head is zero, the backbone's derivative is: linearised, it never moves.
    assert moved["shared/blocks/query/lora_b"] == (name != "ntk_fedavg")


def test_ntk_fedavg_is_linear_in_the_vector(monkeypatch):
    """With frozen heads: logits at a mean of vectors are the mean of the logits; A has no part."""
    tiny_clip.register(monkeypatch)
    model_config = dataclasses.replace(RUN.model, architecture="tiny_clip", head="frozen")
    algorithm, federation, model, results = run("ntk_fedavg", model=model_config)
    vector = jax.tree.map(lambda x: x[0], algorithm.download(results[-1].state, federation.slots))
    sizes = {path: np.abs(x).max() for path, x in leaf_items(vector)}
    assert sizes["blocks/query/lora_a"] == 0
    assert sizes["blocks/query/lora_b"] > 1e-3
    _, _, _, plain = run("fedavg", model=model_config)
    state = dict(leaf_items(plain[-1].state))
    assert np.abs(state["blocks/query/lora_a"]).max() > 1e-3

    tangent = models.linearised(model)

    def logits(vector):
        params = jax.tree.map(jnp.add, model.base, vector)
        batch = jax.tree.map(lambda x: x[:4], federation.tasks[0].test)
        return jax.jit(tangent.outputs)(params, tangent.frozen, batch, jnp.int32(0))

    other = jax.tree.map(lambda x: -3 * jnp.flip(x, axis=-1), vector)
    mean = jax.tree.map(lambda x, y: 0.25 * x + 0.75 * y, vector, other)
    np.testing.assert_allclose(
        logits(mean), 0.25 * logits(vector) + 0.75 * logits(other), rtol=1e-4, atol=1e-4
    )
    assert np.abs(logits(vector) - logits(other)).max() > 1e-2
