import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AxisType

from matu_jax import models
from matu_jax.algorithms import LocalRule
from matu_jax.config import LocalConfig, ModelConfig
from matu_jax.data import ImageTask, Split
from matu_jax.models.classification import class_mask
from matu_jax.simulation import integers
from matu_jax.simulation.evaluate import EvaluationSet, evaluation, per_task
from matu_jax.simulation.local import local_training, optimizer
from matu_jax.simulation.placement import on_each, padded_rows
from matu_jax.trees import leaf_items

SLOTS, STEPS, BATCH, CLASSES_OF = 4, 2, 3, (4, 5)
CONFIG = LocalConfig(steps=STEPS, batch_examples=BATCH, optimizer="sgd", learning_rate=0.01)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    checkpoint = tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors")
    config = ModelConfig(checkpoint=checkpoint, lora_rank=2, lora_targets=("query", "mlp_in"))
    return models.build_classifier(config, some_tasks())


def some_tasks(images=32):
    """Tasks of four and of five classes, for their class names alone."""
    pictures = np.zeros((1, images, images, 3), np.uint8)
    split = Split(pictures, np.zeros(1, np.int32))
    return [ImageTask(n, split, split, split, class_names=tuple(n)) for n in ("abcd", "abcde")]


def mesh_of(devices):
    return jax.make_mesh(
        (devices,), ("slots",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


def inputs(model, slots=SLOTS):
    rng = np.random.default_rng(0)
    downloads = jax.tree.map(
        lambda x: jnp.asarray(0.01 * rng.normal(size=(slots, *x.shape)), jnp.float32), model.base
    )
    position = np.stack([np.zeros(slots), np.arange(slots), np.arange(slots) % 2], 1).astype(
        np.int32
    )
    images = rng.integers(0, 256, (slots, STEPS, BATCH, 32, 32, 3)).astype(np.uint8)
    labels = rng.integers(0, 4, (slots, STEPS, BATCH)).astype(np.int32)
    return (model.base, model.frozen), downloads, position, Split(images, labels)


NO_PENALTY = LocalRule()


def train(model, devices=1, config=CONFIG, rule=NO_PENALTY, args=None, chunk=STEPS, seed=0):
    parameters, downloads, position, batches = args or inputs(model)
    local = local_training(model, config, rule, mesh_of(devices), seed=seed)
    carry, advance = jax.jit(local.begin)(downloads), jax.jit(local.advance)
    for first in range(0, STEPS, chunk):
        part = jax.tree.map(lambda x, first=first: x[:, first : first + chunk], batches)
        carry = advance(parameters, carry, downloads, position, part)
    return jax.jit(local.finish)(carry)


def plain_loop(model, slot, penalty=None, momentum=CONFIG.momentum):
    """The same training, one slot and one step after the other, with heavy-ball momentum."""
    (base, frozen), downloads, _, (images, labels) = inputs(model)
    start = jax.tree.map(lambda x: x[slot], downloads)
    vector, velocity = start, jax.tree.map(jnp.zeros_like, start)
    for step in range(STEPS):

        def loss(vector, step=step):
            params = jax.tree.map(lambda b, v: b + v, base, vector)
            logits = model.logits(params, frozen, images[slot, step], jnp.int32(slot % 2))[
                :, : CLASSES_OF[slot % 2]
            ]
            chosen = jax.nn.log_softmax(logits)[jnp.arange(BATCH), labels[slot, step]]
            return -chosen.mean() + (penalty(vector, start) if penalty else 0.0)

        gradient = jax.grad(loss)(vector)
        velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, gradient)
        vector = jax.tree.map(lambda x, v: x - CONFIG.learning_rate * v, vector, velocity)
    return vector


@pytest.mark.parametrize("momentum", [CONFIG.momentum, 0.0])
def test_training_equals_a_plain_loop(model, momentum):
    trained = train(model, config=dataclasses.replace(CONFIG, momentum=momentum))
    for slot in range(SLOTS):
        found = jax.tree.map(lambda x, slot=slot: x[slot], trained.vectors)
        expected = plain_loop(model, slot, momentum=momentum)
        chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-3)
    assert bool(trained.finite.all())


def test_sgd_without_momentum_keeps_no_velocity(model):
    for momentum, kept in ((0.9, True), (0.0, False)):
        config = dataclasses.replace(CONFIG, momentum=momentum)
        state = optimizer(config).init(model.base)
        assert bool(jax.tree.leaves(state)) == kept


def test_penalty_enters_the_loss(model):
    def penalty(vector, download):
        gaps = jax.tree.map(lambda v, d: jnp.sum((v - d) ** 2), vector, download)
        return 3.0 * jnp.stack(jax.tree.leaves(gaps)).sum()

    trained = train(model, rule=LocalRule(penalty=penalty))
    found = jax.tree.map(lambda x: x[1], trained.vectors)
    chex.assert_trees_all_close(found, plain_loop(model, 1, penalty), atol=1e-5, rtol=1e-3)
    without = jax.tree.map(lambda x: x[1], train(model).vectors)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(found, without, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_what_does_not_train_stays_exactly_as_it_is(model, optimizer):
    """Gradient, momentum and decay do not move it; a rule by which everything trains is none."""
    config = dataclasses.replace(CONFIG, optimizer=optimizer, weight_decay=0.3)
    parameters, downloads, *rest = inputs(model)
    downloads = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x) if path[-1].key == "lora_a" else x, downloads
    )
    args = (parameters, downloads, *rest)

    def rule_for(factors):
        return LocalRule(trains=lambda vector, progress: factors(vector))

    only_b = rule_for(
        lambda vector: jax.tree_util.tree_map_with_path(
            lambda path, x: float(path[-1].key == "lora_b"), vector
        )
    )
    start, found = leaf_items(downloads), leaf_items(train(model, 1, config, only_b, args).vectors)
    for (path, before), (_, after) in zip(start, found, strict=True):
        if path.endswith("lora_a"):
            np.testing.assert_array_equal(after, 0, err_msg=path)
        else:
            assert np.abs(np.asarray(after - before)).max() > 1e-4
    everything = rule_for(lambda vector: jax.tree.map(lambda x: 1.0, vector))
    chex.assert_trees_all_close(
        train(model, 1, config, everything, args).vectors,
        train(model, 1, config, NO_PENALTY, args).vectors,
        atol=1e-7,
    )


def test_progress_is_the_part_of_the_steps_that_is_done(model):
    """In one go and in chunks: only the second half of the steps moves anything."""
    rule = LocalRule(
        trains=lambda vector, progress: jax.tree.map(
            lambda _: (progress >= 0.5).astype(jnp.float32), vector
        )
    )
    parameters, downloads, position, batches = inputs(model)
    late = (parameters, downloads, position, jax.tree.map(lambda x: x[:, 1:], batches))
    local = local_training(model, CONFIG, NO_PENALTY, mesh_of(1))
    carry = jax.jit(local.advance)(late[0], jax.jit(local.begin)(downloads), *late[1:])
    for chunk in (1, STEPS):
        found = train(model, rule=rule, chunk=chunk).vectors
        chex.assert_trees_all_close(found, carry.vector, atol=1e-7)


@pytest.mark.parametrize(("devices", "parallel"), [(2, 0), (4, 0), (1, 2), (1, 3), (1, 4), (2, 2)])
def test_devices_and_chunks_do_not_change_the_result(model, devices, parallel):
    one = train(model)
    other = train(model, devices, dataclasses.replace(CONFIG, parallel_slots=parallel))
    chex.assert_trees_all_close(other.vectors, one.vectors, atol=1e-6, rtol=1e-4)


def test_a_round_in_chunks_of_steps_equals_a_round_in_one_go(model):
    config = dataclasses.replace(CONFIG, optimizer="adam")
    whole, chunked = train(model, config=config), train(model, config=config, chunk=1)
    chex.assert_trees_all_close(chunked.vectors, whole.vectors, atol=1e-6, rtol=1e-4)
    np.testing.assert_allclose(chunked.loss, whole.loss, rtol=1e-6)


def test_dropout_is_drawn_from_seed_round_client_task_and_step():
    config = ModelConfig(
        checkpoint="random", lora_rank=2, lora_targets=("query",), lora_dropout=0.5
    )
    model = models.build_classifier(config, some_tasks())

    def vectors(position=None, chunk=STEPS, seed=0, parallel=0):
        parameters, downloads, usual, *rest = inputs(model)
        args = (parameters, downloads, usual if position is None else position, *rest)
        options = dataclasses.replace(CONFIG, parallel_slots=parallel)
        trained = train(model, config=options, args=args, chunk=chunk, seed=seed)
        return np.concatenate(
            [np.asarray(x).reshape(SLOTS, -1) for x in jax.tree.leaves(trained.vectors)], axis=1
        )

    usual = inputs(model)[2]
    found = vectors()
    np.testing.assert_allclose(vectors(chunk=1), found, atol=1e-6)
    np.testing.assert_allclose(vectors(parallel=4), found, atol=1e-6)
    for axis in range(3):
        moved = usual.copy()
        moved[:, axis] += 1
        if axis == 2:
            continue  # another task has other classes, too; its key is folded in like the others
        assert np.abs(vectors(position=moved) - found).max() > 1e-5
    assert np.abs(vectors(seed=1) - found).max() > 1e-5


def test_a_slot_that_goes_wrong_is_reported_and_zeroed(model):
    parameters, downloads, *rest = inputs(model)
    downloads = jax.tree.map(lambda x: x.at[2].set(jnp.nan), downloads)
    trained = train(model, args=(parameters, downloads, *rest))
    np.testing.assert_array_equal(trained.finite, [True, True, False, True])
    chex.assert_tree_all_finite(trained.vectors)


def test_optimisers_are_those_of_the_config(model):
    results = {
        name: train(model, config=dataclasses.replace(CONFIG, optimizer=name)).vectors
        for name in ("adam", "adamw", "sgd")
    }
    decayed = dataclasses.replace(CONFIG, optimizer="adamw", weight_decay=0.5)
    chex.assert_trees_all_close(results["adam"], results["adamw"])
    for a, b in (
        (results["adam"], results["sgd"]),
        (results["adamw"], train(model, config=decayed).vectors),
    ):
        assert optax.tree.norm(optax.tree.sub(a, b)) > 1e-3


def test_rows_are_padded_to_the_devices():
    np.testing.assert_array_equal(padded_rows(np.arange(3), 4), [0, 1, 2, 2])
    np.testing.assert_array_equal(padded_rows(np.arange(4), 4), [0, 1, 2, 3])


def test_class_mask_hides_the_classes_a_task_lacks():
    np.testing.assert_array_equal(class_mask(jnp.int32(2), 4) < -1e8, [False, False, True, True])


EXAMPLE_BYTES = 32 * 32 * 3 + 4


@pytest.mark.parametrize(
    ("budget", "pieces"), [(10**9, 1), (12 * EXAMPLE_BYTES, 3), (3 * EXAMPLE_BYTES, 7)]
)
def test_accuracy_counts_every_example_once(model, budget, pieces):
    """Whatever the pieces: all at once, or streamed by few slots and few batches."""
    rng = np.random.default_rng(1)
    splits = [
        Split(
            rng.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8),
            rng.integers(0, 4, n).astype(np.int32),
        )
        for n in (14, 5)
    ]
    (base, frozen), vectors, *_ = inputs(model)
    task, mesh = np.array([0, 1, 1, 0]), mesh_of(2)
    examples = EvaluationSet(splits, task, mesh, batch_examples=3, budget_bytes=budget)
    assert len(examples.pieces) == pieces
    program, traces = evaluation(model, model.metrics, mesh), []

    @jax.jit
    def measure(*args):
        traces.append(1)
        return program(*args)

    counts = np.zeros((SLOTS, 2), int)
    for i, piece in enumerate(examples.pieces):
        loaded = examples.load(i)
        assert sum(x.nbytes for x in loaded[0]) == examples.piece_bytes
        found = measure(
            (base, frozen, *on_each(loaded, mesh)),
            jax.tree.map(lambda x, rows=piece.slots: x[rows], vectors),
            piece.local,
            task[piece.slots].astype(np.int32),
        )["accuracy"]
        found = [integers.joined(np.asarray(found[name])) for name in ("right", "examples")]
        found = np.stack(found, axis=1)
        counts[piece.slots[: piece.rows]] += found[: piece.rows]
    assert len(traces) == 1
    for slot in range(SLOTS):
        params = jax.tree.map(lambda b, v, slot=slot: b + v[slot], base, vectors)
        split = splits[task[slot]]
        logits = np.asarray(model.logits(params, frozen, split.images, jnp.int32(task[slot])))
        right = logits[:, : CLASSES_OF[task[slot]]].argmax(1) == split.labels
        np.testing.assert_array_equal(counts[slot], [right.sum(), len(split.labels)])


def test_evaluation_on_a_drawn_part_of_each_split():
    splits = [
        Split(np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1), np.zeros(n, np.int32))
        for n in (30, 4)
    ]

    def drawn(seed):
        part = EvaluationSet(
            splits, np.array([0, 1]), mesh_of(1), batch_examples=8, max_examples=8, seed=seed
        )
        (images, _), there = part.load(0)
        return [images[task][there[task]].reshape(-1).tolist() for task in range(2)]

    first, second = drawn(0)
    assert len(set(first)) == 8
    assert second == [0, 1, 2, 3]
    assert drawn(0)[0] == first != drawn(1)[0]


def test_per_task_means():
    np.testing.assert_allclose(
        per_task(np.array([0.5, 1.0, 0.2]), np.array([0, 0, 2]), 3), [0.75, np.nan, 0.2]
    )
