import itertools

import numpy as np
import pytest

from matu_jax.data.partition import assign, partition


def _labels(num_tasks: int = 3, examples: int = 600, classes: int = 10) -> list[np.ndarray]:
    return [
        np.random.default_rng(task).permutation(np.arange(examples, dtype=np.int32) % classes)
        for task in range(num_tasks)
    ]


def _tasks_of(client: np.ndarray, task: np.ndarray, number: int) -> list[int]:
    return task[client == number].tolist()


@pytest.mark.parametrize(
    ("clients", "each", "tasks"),
    [(8, 1, 8), (8, 2, 8), (12, 3, 8), (30, 2, 30), (5, 8, 8), (7, 3, 5)],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_assign_gives_equal_shares_of_distinct_tasks(clients, each, tasks, seed):
    client, task = assign(clients, each, tasks, seed)
    assert client.dtype == task.dtype == np.int32
    np.testing.assert_array_equal(client, np.repeat(np.arange(clients), each))
    for number in range(clients):
        assert len(set(_tasks_of(client, task, number))) == each
    holders = np.bincount(task, minlength=tasks)
    assert holders.min() >= 1
    assert holders.max() - holders.min() <= 1


def test_assign_follows_the_seed_and_pairs_at_random():
    np.testing.assert_array_equal(assign(8, 2, 8, 3), assign(8, 2, 8, 3))
    pairs = set()
    for seed in range(60):
        client, task = assign(8, 2, 8, seed)
        pairs |= {tuple(_tasks_of(client, task, number)) for number in range(8)}
    assert pairs == set(itertools.combinations(range(8), 2))


def test_assign_takes_given_lists():
    client, task = assign(3, 1, 4, 0, given=[[2, 0], [1], [3, 1, 2]])
    np.testing.assert_array_equal(client, [0, 0, 1, 2, 2, 2])
    np.testing.assert_array_equal(task, [0, 2, 1, 1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (3, 2, 8, 0),
            "3 clients with 2 tasks each make 6 slots, too few for 8 tasks; raise clients",
        ),
        ((3, 9, 8, 0), "tasks_per_client must be from 1 to num_tasks=8, got 9"),
        ((3, 0, 8, 0), "tasks_per_client"),
        ((0, 1, 8, 0), "num_clients must be at least 1"),
        ((8, 1, 8, -1), "seed must be at least 0"),
        ((2, 1, 2, 0, [[0, 1]]), "lists the tasks of 1 clients, but num_clients=2"),
        ((2, 1, 2, 0, [[0, 1], []]), "client 1 has no task"),
        ((2, 1, 2, 0, [[0, 1], [2]]), "client 1 holds task 2, but tasks are numbered 0 to 1"),
        ((2, 1, 2, 0, [[0, 1], [1, 1]]), "client 1 holds a task twice"),
        ((2, 1, 2, 0, [[0, 1], ["hue"]]), "a whole number, got 'hue'"),
        ((2, 1, 3, 0, [[0, 1], [1]]), "no client holds task 2"),
    ],
)
def test_assign_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        assign(*arguments)


@pytest.mark.parametrize("alpha", [None, float("inf"), 100.0, 0.5, 0.01])
@pytest.mark.parametrize("examples_per_slot", [None, 100, 200])
def test_partition_deals_no_example_twice(alpha, examples_per_slot):
    if alpha == 0.01 and examples_per_slot is None:
        pytest.skip("leaves slots empty, which is an error of its own")
    labels = _labels()
    client, task = assign(9, 1, 3, 0)
    dealt = partition(
        labels, client, task, examples_per_slot=examples_per_slot, alpha=alpha, seed=6
    )
    assert all(share.dtype == np.int64 for share in dealt)
    for number in range(3):
        of_task = [dealt[slot] for slot in np.flatnonzero(task == number)]
        together = np.concatenate(of_task)
        assert len(np.unique(together)) == len(together)
        assert 0 <= together.min() <= together.max() < 600
        if examples_per_slot is None:
            assert len(together) == 600
        else:
            assert [len(share) for share in of_task] == [examples_per_slot] * 3


def _skew(alpha: float | None, examples_per_slot: int | None) -> float:
    """Mean over slots of the total variation between the slot's classes and the task's."""
    labels = _labels(examples=3000)
    client, task = assign(15, 1, 3, 0)
    distances = []
    for seed in range(4):
        dealt = partition(
            labels, client, task, examples_per_slot=examples_per_slot, alpha=alpha, seed=seed
        )
        for share, number in zip(dealt, task, strict=True):
            shares = np.bincount(labels[number][share], minlength=10) / len(share)
            distances.append(np.abs(shares - 0.1).sum() / 2)
    return float(np.mean(distances))


@pytest.mark.parametrize("examples_per_slot", [100, None])
def test_label_skew_grows_as_alpha_falls(examples_per_slot):
    skews = [_skew(alpha, examples_per_slot) for alpha in (None, 10.0, 1.0, 0.2)]
    assert skews[0] < 0.13
    for weak, strong in itertools.pairwise(skews):
        assert strong > weak + 0.02
    assert skews[-1] > 0.45


def test_infinite_alpha_is_iid():
    client, task = assign(6, 1, 3, 0)
    one, other = (
        partition(_labels(), client, task, examples_per_slot=50, alpha=alpha, seed=1)
        for alpha in (None, float("inf"))
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_partition_follows_the_seed_and_not_the_order_of_slots(alpha):
    labels = _labels()
    client, task = assign(6, 2, 3, 0)

    def deal(order, seed):
        dealt = partition(
            labels, client[order], task[order], examples_per_slot=50, alpha=alpha, seed=seed
        )
        return {
            (client[slot], task[slot]): share.tolist()
            for slot, share in zip(order, dealt, strict=True)
        }

    straight = np.arange(12)
    shuffled = np.random.default_rng(0).permutation(12)
    assert deal(straight, 1) == deal(shuffled, 1)
    assert deal(straight, 1) != deal(straight, 2)


def test_partition_of_one_task_does_not_depend_on_the_others():
    labels = _labels()
    client, task = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    both = partition(labels, client, task, examples_per_slot=40, alpha=0.3, seed=1)
    alone = partition(
        labels, client[task == 1], task[task == 1], examples_per_slot=40, alpha=0.3, seed=1
    )
    np.testing.assert_array_equal([both[1], both[3]], alone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"examples_per_slot": 301},
            r"task 1 has 2 holders, who need 602 training examples \(301 each\), but only 600",
        ),
        ({"examples_per_slot": 0}, "examples_per_slot must be at least 1"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"alpha": float("nan")}, "alpha must be above 0"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"task": np.array([0, 1, 7])}, "task 7 is held, but labels are given of tasks 0 to 2"),
        ({"task": np.array([0, 1])}, r"client and task must both be \[slots\]"),
    ],
)
def test_partition_names_what_is_wrong(changes, message):
    arguments = {
        "labels_per_task": _labels(),
        "client": np.array([0, 1, 2]),
        "task": np.array([0, 1, 1]),
        "examples_per_slot": 50,
        "alpha": None,
        "seed": 0,
    }
    with pytest.raises(ValueError, match=message):
        partition(**(arguments | changes))


def test_partition_names_the_slot_left_without_examples():
    labels = [np.zeros(50, np.int32)]
    with pytest.raises(ValueError, match=r"client \d+ would hold no example of task 0 .* alpha"):
        partition(
            labels, np.arange(20), np.zeros(20, int), examples_per_slot=None, alpha=0.01, seed=0
        )


def test_vanishing_alpha_gives_each_slot_one_class():
    client, task = assign(3, 1, 3, 0)
    dealt = partition(_labels(), client, task, examples_per_slot=60, alpha=1e-9, seed=0)
    for share, number in zip(dealt, task, strict=True):
        assert len(np.unique(_labels()[number][share])) == 1
