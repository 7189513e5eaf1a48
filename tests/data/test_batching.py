import numpy as np
import pytest

from matu_jax.data import ImageTask, Split
from matu_jax.data.batching import gather, round_indices

CLIENT = np.array([0, 0, 1, 2], np.int32)
TASK = np.array([0, 2, 1, 0], np.int32)
INDICES = [np.arange(10), np.arange(100, 107), np.arange(3), np.arange(10, 50)]


def _draw(**changes):
    arguments = {"seed": 1, "round_index": 2, "steps": 5, "batch_size": 4} | changes
    return round_indices(INDICES, CLIENT, TASK, **arguments)


def _task(name: str, size: int = 4, examples: int = 50) -> ImageTask:
    rng = np.random.default_rng(len(name))

    def split() -> Split:
        images = rng.integers(256, size=(examples, size, size, 3)).astype(np.uint8)
        return Split(images, rng.integers(3, size=examples).astype(np.int32))

    return ImageTask(name, split(), split(), split(), class_names=("a", "b", "c"))


def test_every_epoch_sees_each_example_once():
    drawn = _draw()
    assert drawn.dtype == np.int64
    assert drawn.shape == (4, 5, 4)
    for indices, slot in zip(INDICES, drawn.reshape(4, -1), strict=True):
        for start in range(0, 20, len(indices)):
            epoch = slot[start : start + len(indices)]
            assert len(np.unique(epoch)) == len(epoch)
            assert set(epoch) <= set(indices)
            if len(epoch) == len(indices):
                assert set(epoch) == set(indices)


def test_epochs_rounds_seeds_clients_and_tasks_differ():
    epochs = _draw(steps=10)[0].reshape(4, 10)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    same = [np.arange(40)] * 4
    orders = {
        tuple(slot.ravel())
        for seed in (0, 1)
        for round_index in (0, 1)
        for slot in round_indices(
            same, CLIENT, TASK, seed=seed, round_index=round_index, steps=5, batch_size=4
        )
    }
    assert len(orders) == 16


def test_a_slot_draws_the_same_whatever_the_other_slots():
    full = _draw()
    np.testing.assert_array_equal(full, _draw())
    order = np.array([3, 1, 2, 0])
    shuffled = round_indices(
        [INDICES[slot] for slot in order],
        CLIENT[order],
        TASK[order],
        seed=1,
        round_index=2,
        steps=5,
        batch_size=4,
    )
    np.testing.assert_array_equal(shuffled, full[order])
    alone = round_indices(
        INDICES[2:3], CLIENT[2:3], TASK[2:3], seed=1, round_index=2, steps=5, batch_size=4
    )
    np.testing.assert_array_equal(alone, full[2:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"round_index": -1}, "round_index must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_round_indices_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        _draw(**changes)


def test_round_indices_names_the_empty_slot():
    with pytest.raises(ValueError, match=r"slot 1 \(client 0, task 2\) has no training example"):
        round_indices(
            [INDICES[0], np.empty(0, np.int64), *INDICES[2:]],
            CLIENT,
            TASK,
            seed=0,
            round_index=0,
            steps=1,
            batch_size=1,
        )
    with pytest.raises(ValueError, match="got 3, 4 and 4"):
        round_indices(INDICES[:3], CLIENT, TASK, seed=0, round_index=0, steps=1, batch_size=1)


def test_gather_stacks_the_train_examples():
    tasks = [_task("a"), _task("bb"), _task("ccc")]
    indices = np.random.default_rng(0).integers(50, size=(4, 2, 3))
    images, labels = gather(tasks, TASK, indices)
    assert images.shape == (4, 2, 3, 4, 4, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32
    for slot, step, item in np.ndindex(4, 2, 3):
        train = tasks[TASK[slot]].train
        chosen = indices[slot, step, item]
        np.testing.assert_array_equal(images[slot, step, item], train.images[chosen])
        assert labels[slot, step, item] == train.labels[chosen]


def test_gather_names_what_is_wrong():
    with pytest.raises(
        ValueError, match=r"'big' against one of 'a': .*\n  images: found \(8, 8, 3\)"
    ):
        gather([_task("a"), _task("big", 8)], TASK[:1], np.zeros((1, 1, 1), int))
    with pytest.raises(ValueError, match=r"slot 0: indices run from 50 to 50.* task 'a' has 50"):
        gather([_task("a")], TASK[:1], np.full((1, 1, 1), 50))
    with pytest.raises(ValueError, match="task_of_slot has 4 slots, indices have 1"):
        gather([_task("a")], TASK, np.zeros((1, 1, 1), int))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), np.zeros(2, np.int32), "images must be uint8"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int32), "images must be uint8"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int64), r"labels must be int32 \[2\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int32), r"labels must be int32 \[2\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0, np.int32), "there is no example"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.full(2, 2, np.int32), "labels run from 2 to 2"),
    ],
)
def test_a_task_refuses_a_split_that_breaks_the_contract(images, labels, message):
    good = Split(np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int32))
    with pytest.raises(ValueError, match=f"task 'x', split 'test': {message}"):
        ImageTask("x", good, good, Split(images, labels), class_names=("a", "b"))
