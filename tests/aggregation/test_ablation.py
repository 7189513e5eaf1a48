"""The shipped comparisons can be read; the variants of the fold are what they say they are."""

import runpy
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import matu_jax
from matu_jax import algorithms
from matu_jax.aggregation import Slots, direction_similarity
from matu_jax.comparison import plan
from matu_jax.config import NO_DEFENCE, Config, MatuConfig
from matu_jax.messages.traffic import message_bits
from matu_jax.runs.commandline import run_file

OPEN = Config(defence=NO_DEFENCE)

EXPERIMENTS = Path(matu_jax.__file__).parents[1] / "experiments"
SLOTS = Slots(
    client=jnp.array([0, 0, 1, 1, 2, 2]),
    task=jnp.array([0, 1, 1, 2, 2, 0]),
    weight=jnp.array([3.0, 1.0, 2.0, 2.0, 1.0, 4.0]),
    num_clients=3,
    num_tasks=3,
)


@pytest.fixture
def variants():
    """The variants by name, as builders; what the file registers is forgotten afterwards."""
    before = dict(algorithms.ALGORITHMS)
    run_file(EXPERIMENTS / "ablation_products.py")  # which reads ablation_fold.py
    found = {
        name.removeprefix("ablation: "): builder
        for name, builder in algorithms.ALGORITHMS.items()
        if name not in before
    }
    yield found
    algorithms.ALGORITHMS.clear()
    algorithms.ALGORITHMS.update(before)


def tree(seed, *rows):
    """A tree as the adapters': two projections, three blocks deep."""
    keys = iter(jax.random.split(jax.random.key(seed), 12))
    shapes = {"lora_a": (5, 2), "lora_b": (2, 4)}
    return {
        "blocks": {
            block: {
                projection: {
                    name: jax.random.normal(next(keys), (*rows, *shape))
                    for name, shape in shapes.items()
                }
                for projection in ("query", "value")
            }
            for block in range(3)
        }
    }


def rounds_of(algorithm, count, slots=SLOTS):
    state = algorithm.init(tree(9), slots)
    uploads = None
    for index in range(count):
        uploads = algorithm.upload(tree(index, slots.client.shape[0]), slots)
        state, _ = algorithm.aggregate(state, uploads, slots)
    return state, uploads


def bits(algorithm):
    state, uploads = rounds_of(algorithm, 1)
    return [
        message_bits(message, SLOTS).tolist() for message in algorithm.traffic.sent(state, uploads)
    ]


@pytest.mark.parametrize(
    "name",
    [
        "compare8",
        "compare30",
        "settings8",
        "ablation8",
        "ablation_fold",
        "ablation_products",
        "ablation_rules",
        "ablation_similarity",
        "traffic8",
        "downloads8",
        "downloads30",
        "attacks4",
        "defence8",
    ],
)
def test_every_comparison_can_be_read(name, variants):
    del variants
    file = EXPERIMENTS / f"{name}.py"
    comparison = run_file(file)
    plan.check(comparison)
    for run in plan.runs(comparison):
        algorithms.build(plan.run_config(comparison, run))
    assert f"--config experiments/{name}.py" in file.read_text()
    assert len(comparison.seeds) == 3
    assert all(setting.seconds for setting in comparison.settings.values())


@pytest.mark.parametrize(
    ("name", "downloads"), [("folded", "unified"), ("download not folded", "task_vectors")]
)
def test_variants_that_the_library_has_are_what_it_computes(variants, name, downloads):
    choices = MatuConfig(transfer="none", agreement_threshold=0.0, downloads=downloads)
    config = Config(defence=NO_DEFENCE, matu=choices)
    dense, library = variants[name](config), algorithms.build(config)
    for count in (1, 2):
        (state, _), (expected, _) = rounds_of(dense, count), rounds_of(library, count)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6),
            (state.exact, dense.download(state, SLOTS)),
            (expected.server.task_vectors, library.download(expected, SLOTS)),
        )
    assert bits(dense) == bits(library)


def test_a_slot_that_is_absent_changes_nothing(variants):
    absent = SLOTS.weight.at[2].set(0.0)
    slots = Slots(SLOTS.client, SLOTS.task, absent, 3, 3)
    for name, builder in variants.items():
        algorithm = builder(OPEN)
        states = []
        for value in (1.0, 1e6):
            vectors = jax.tree.map(lambda x, v=value: x.at[2].set(v), tree(0, 6))
            state = algorithm.init(tree(9), slots)
            state, _ = algorithm.aggregate(state, algorithm.upload(vectors, slots), slots)
            states.append(state)
        pairs = zip(*map(jax.tree.leaves, states), strict=True)
        assert all((x == y).all() for x, y in pairs), name


def test_masks_and_scales(variants):
    vectors = tree(0, 6)
    found = {
        name: variants[name](OPEN).upload(vectors, SLOTS)[0]["blocks"][0]["query"]["lora_a"]
        for name in (
            "folded",
            "masks off",
            "scales off",
            "least-squares scales",
            "scales per layer",
        )
    }
    query = vectors["blocks"][0]["query"]["lora_a"]
    plain = found["scales off"]
    # Without masks a client's two slots differ by their scale alone.
    ratio = found["masks off"][0] / found["masks off"][1]
    np.testing.assert_allclose(ratio, ratio.reshape(-1)[0], rtol=1e-5)
    assert (found["masks off"] != 0).all()
    # Without scales, what both slots of a client keep is the mean of them.
    both = (plain[0] != 0) & (plain[1] != 0)
    np.testing.assert_allclose(plain[0][both], (query[0] + query[1])[both] / 2, rtol=1e-5)
    # Per layer, every leaf keeps its mean magnitude.
    np.testing.assert_allclose(
        jnp.abs(found["scales per layer"]).sum((1, 2)), jnp.abs(query).sum((1, 2)), rtol=1e-5
    )


def test_least_squares_scales_are_nearer_than_others(variants):
    vectors = tree(0, 6)

    def error(name):
        folded = variants[name](OPEN).upload(vectors, SLOTS)[0]
        parts = jax.tree.map(lambda x, y: jnp.square(x - y).sum(axis=(1, 2)), vectors, folded)
        return np.sum(jax.tree.leaves(parts), axis=0)

    assert (error("least-squares scales") < error("folded")).all()
    # The best scale is near 1 where what two slots share is balanced.
    assert (error("least-squares scales") <= error("scales off")).all()
    assert (error("least-squares scales") < 0.999 * error("scales off")).any()


def test_what_is_not_folded_is_exact_and_costs_its_traffic(variants):
    folded, whole = (
        bits(variants["folded"](OPEN)),
        bits(variants["upload not folded"](OPEN)),
    )
    assert whole[1] == folded[1]
    assert whole[0] == [2 * 32 * (2 * 3 * (10 + 8))] * 3
    assert bits(variants["download not folded"](OPEN)) == [folded[0], whole[0]]
    vectors = tree(0, 6)
    algorithm = variants["upload not folded"](OPEN)
    jax.tree.map(np.testing.assert_array_equal, algorithm.upload(vectors, SLOTS)[0], vectors)
    algorithm = variants["download not folded"](OPEN)
    state, _ = rounds_of(algorithm, 2)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y[SLOTS.task]),
        algorithm.download(state, SLOTS),
        state.exact,
    )


def test_b_only_trains_and_sends_b_alone(variants):
    algorithm = variants["B only"](OPEN)
    trains = algorithm.local.trains(tree(0), jnp.float32(0))
    assert trains["blocks"][0]["query"] == {"lora_a": 0.0, "lora_b": 1.0}
    vector, masks = 32 * 2 * 3 * 8, 2 * 2 * 24
    assert bits(algorithm)[0] == [vector + masks + 2 * 32] * 3


@pytest.mark.parametrize("name", ["mean of 3", "mean of 3, sharpened"])
def test_transfer_mixes_by_similarity_of_slots_of_different_clients(variants, name):
    changes = tree(0, 6)
    algorithm = variants[name](OPEN)
    uploads = algorithm.upload(changes, SLOTS)
    state, _ = algorithm.aggregate(algorithm.init(tree(9), SLOTS), uploads, SLOTS)
    similarity = np.asarray(direction_similarity(uploads[0]), np.float64)
    client, task, weight = (np.asarray(x) for x in (SLOTS.client, SLOTS.task, SLOTS.weight))
    between = np.zeros((3, 3))
    for t in range(3):
        for u in range(3):
            pairs = [
                similarity[i, j]
                for i in range(6)
                for j in range(6)
                if (task[i], task[j]) == (t, u) and client[i] != client[j]
            ]
            between[t, u] = np.mean(pairs)
    others = ~np.eye(3, dtype=bool)
    if "sharpened" in name:
        low, high = np.median(between[others]), between[others].max()
        between = np.clip((between - low) / (high - low), 0, None)
    mixing = np.where(others, between, 1.0)
    mixing /= mixing.sum(axis=1, keepdims=True)
    leaf = np.asarray(uploads[0]["blocks"][0]["query"]["lora_a"], np.float64)
    means = np.stack(
        [np.average(leaf[task == t], axis=0, weights=weight[task == t]) for t in range(3)]
    )
    np.testing.assert_allclose(
        state.exact["blocks"][0]["query"]["lora_a"], np.tensordot(mixing, means, 1), atol=1e-5
    )


def test_similarity_of_products_looks_at_what_the_kernels_gain(variants):
    # Two clients with one task each. Both flip the sign of A and of B, one after the other: the
    # adapters' own changes differ, their products' do not.
    slots = Slots(jnp.array([0, 1]), jnp.array([0, 1]), jnp.ones(2), 2, 2)

    def filled(a, b):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.full(x.shape, a if path[-1].key == "lora_a" else b), tree(9)
        )

    base = filled(1.0, 0.0)
    changes = matu_jax.stack([filled(0.0, 1.0), filled(-2.0, -1.0)])
    lent = {}
    for name in ("mean of 3", "mean of 3, of products"):
        algorithm = variants[name](OPEN)
        state = algorithm.init(base, slots)
        state, _ = algorithm.aggregate(state, algorithm.upload(changes, slots), slots)
        lent[name] = float(state.exact["blocks"][0]["query"]["lora_b"][0].mean())
    assert lent["mean of 3, of products"] == pytest.approx(0.0)  # similarity 1: half and half
    assert lent["mean of 3"] > 0.4  # B's signs are opposite and A's says nothing


def gains(vectors, base):
    """What A B has gained over the base's, in float64, by projection: `[slots, in, out]`."""
    found = {}
    for block, projections in vectors["blocks"].items():
        for projection, pair in projections.items():
            start = base["blocks"][block][projection]
            a, b = (
                np.asarray(start[n], np.float64) + np.asarray(pair[n]) for n in ("lora_a", "lora_b")
            )
            first = np.asarray(start["lora_a"], np.float64) @ np.asarray(start["lora_b"])
            found[block, projection] = a @ b - first
    return found


@pytest.mark.parametrize("name", ["products, not folded", "products folded"])
def test_products_are_averaged_and_handed_out_as_the_nearest_factors(variants, name):
    algorithm, base = variants[name](OPEN), tree(9)
    state = algorithm.init(base, SLOTS)
    expected = {key: np.zeros((3, 5, 4)) for key in gains(algorithm.download(state, SLOTS), base)}
    fold = runpy.run_path(str(EXPERIMENTS / "ablation_fold.py"))["fold"]
    folded = partial(fold, slots=SLOTS) if name == "products folded" else lambda x: x
    task, weight = (np.asarray(x) for x in (SLOTS.task, SLOTS.weight))
    for seed in (0, 1):
        before, changes = algorithm.download(state, SLOTS), tree(seed, 6)
        start, end = gains(before, base), gains(jax.tree.map(jnp.add, before, changes), base)
        sent = folded({str(key): jnp.float32(end[key] - start[key]) for key in end})
        state, _ = algorithm.aggregate(state, algorithm.upload(changes, SLOTS), SLOTS)
        for key, whole in expected.items():
            for t in range(3):
                rows = np.asarray(sent[str(key)], np.float64)[task == t]
                whole[t] += np.average(rows, axis=0, weights=weight[task == t])
            np.testing.assert_allclose(state.exact["blocks"][key[0]][key[1]], whole, atol=1e-4)
        handed = folded({str(key): jnp.float32(whole[task]) for key, whole in expected.items()})
        for key, found in gains(algorithm.download(state, SLOTS), base).items():
            first = np.asarray(base["blocks"][key[0]][key[1]]["lora_a"], np.float64)
            first = first @ np.asarray(base["blocks"][key[0]][key[1]]["lora_b"])
            u, s, v = np.linalg.svd(np.asarray(handed[str(key)], np.float64) + first)
            nearest = (u[..., :2] * s[..., None, :2]) @ v[..., :2, :]
            np.testing.assert_allclose(found + first, nearest, atol=1e-3)
    up, down = (
        message_bits(m, SLOTS)
        for m in algorithm.traffic.sent(state, algorithm.upload(tree(0, 6), SLOTS))
    )
    numbers = 6 * 5 * 4
    masks = 2 * 6 * 8 * -(-20 // 8) + 2 * 32
    each = 32 * numbers + masks if name == "products folded" else 2 * 32 * numbers
    assert up.tolist() == down.tolist() == [each] * 3
