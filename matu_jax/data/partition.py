"""Who holds which task, and which training examples: pure numpy, seeded.

A *slot* is one (client, task) pair. `assign` makes the slots, `partition` deals the training
examples of each task out to the slots that hold it.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int64

__all__ = ["assign", "partition"]


def assign(
    num_clients: int,
    tasks_per_client: int,
    num_tasks: int,
    seed: int,
    given: Sequence[Sequence[int]] | None = None,
) -> tuple[Int[np.ndarray, "slots"], Int[np.ndarray, "slots"]]:
    """Assigns tasks to clients.

    Every client holds `tasks_per_client` distinct tasks; the numbers of holders of any two tasks
    differ by at most one; which tasks meet at a client is random.

    Args:
        num_clients: Number of clients.
        tasks_per_client: Tasks each client holds. Not used with `given`.
        num_tasks: Number of tasks, each of which somebody must hold.
        seed: Of the random pairing. Not used with `given`.
        given: Instead of all that, the list of tasks of each client, as long as it likes.

    Returns:
        `client` and `task`, int32 `[slots]`, sorted by client, then by task.

    Raises:
        ValueError: If a number is below 1, a task would be held by nobody, or `given` does not
            fit, with the setting to change.
    """
    for name, value, least in (
        ("num_clients", num_clients, 1),
        ("num_tasks", num_tasks, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if given is not None:
        lists = _check_given(given, num_clients, num_tasks)
    else:
        if not 1 <= tasks_per_client <= num_tasks:
            raise ValueError(
                f"tasks_per_client must be from 1 to num_tasks={num_tasks}, got {tasks_per_client}"
            )
        if num_clients * tasks_per_client < num_tasks:
            raise ValueError(
                f"{num_clients} clients with {tasks_per_client} tasks each make "
                f"{num_clients * tasks_per_client} slots, too few for {num_tasks} tasks; raise "
                "clients or tasks_per_client, or choose fewer tasks"
            )
        lists = _deal(num_clients, tasks_per_client, num_tasks, np.random.default_rng(seed))
    client = np.repeat(np.arange(num_clients, dtype=np.int32), [len(held) for held in lists])
    task = np.array([t for held in lists for t in sorted(held)], np.int32)
    return client, task


def _deal(clients: int, hands: int, tasks: int, rng: np.random.Generator) -> list[list[int]]:
    """Deals tasks out at random, each equally often, and to no client one task twice.

    Each client takes the tasks of which most are left, ties broken at random. That keeps what is
    left of any two tasks within one of each other, so there are always enough different ones.
    """
    left = np.full(tasks, clients * hands // tasks)
    left[rng.permutation(tasks)[: clients * hands % tasks]] += 1
    lists = []
    for _ in range(clients):
        order = rng.permutation(tasks)
        held = order[np.argsort(-left[order], kind="stable")[:hands]]
        left[held] -= 1
        lists.append(held.tolist())
    return lists


def _check_given(
    given: Sequence[Sequence[int]], num_clients: int, num_tasks: int
) -> list[list[int]]:
    if len(given) != num_clients:
        raise ValueError(
            f"given lists the tasks of {len(given)} clients, but num_clients={num_clients}"
        )
    lists = []
    for client, held in enumerate(given):
        if not len(held):
            raise ValueError(f"given[{client}]: client {client} has no task; give it one or more")
        for task in held:
            if isinstance(task, bool) or not isinstance(task, int | np.integer):
                raise ValueError(
                    f"given[{client}]: tasks are given by their index, a whole number, got {task!r}"
                )
            if not 0 <= task < num_tasks:
                raise ValueError(
                    f"given[{client}]: client {client} holds task {task}, but tasks are numbered "
                    f"0 to {num_tasks - 1} (num_tasks={num_tasks})"
                )
        if len(set(held)) < len(held):
            raise ValueError(f"given[{client}]: client {client} holds a task twice: {list(held)}")
        lists.append([int(task) for task in held])
    idle = sorted(set(range(num_tasks)) - {task for held in lists for task in held})
    if idle:
        raise ValueError(
            f"given: no client holds task {', '.join(map(str, idle))}; give every task to a "
            "client, or leave it out of the tasks"
        )
    return lists


def partition(
    labels_per_task: Sequence[Int[np.ndarray, "_"]],
    client: Int[np.ndarray, "slots"],
    task: Int[np.ndarray, "slots"],
    *,
    examples_per_slot: int | None,
    alpha: float | None,
    seed: int,
) -> list[Int64[np.ndarray, "_"]]:
    """Deals the training examples of each task out to its holders, none to two of them.

    With `alpha`, each slot draws its own mixture of classes from Dirichlet(alpha), as in Hsu et
    al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification" (arXiv 1909.06335): a slot takes `examples_per_slot` examples by its mixture,
    from the remaining classes where one has run out. Without a fixed number, each class is dealt
    among the holders by a draw of Dirichlet(alpha) over *them*, so that sizes differ as well.

    Each task has a random stream of its own, keyed by the seed and the task.

    Args:
        labels_per_task: For each task the labels of its train split, whole numbers `[examples]`.
        client: Integer `[slots]`.
        task: Integer `[slots]`, an index into `labels_per_task`.
        examples_per_slot: Of every slot; None deals out everything.
        alpha: Label skew: small is strong. None or infinity is IID.
        seed: Of everything random here.

    Returns:
        For each slot, int64 indices into its task's train split, in random order.

    Raises:
        ValueError: If a task has too few examples for its holders, or a slot would be left with
            none, with the task, the client and the setting to change.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha must be above 0 (or None for IID), got {alpha}")
    if examples_per_slot is not None and examples_per_slot < 1:
        raise ValueError(
            f"examples_per_slot must be at least 1 (or None for all), got {examples_per_slot}"
        )
    client, task = np.asarray(client), np.asarray(task)
    if client.shape != task.shape or client.ndim != 1:
        raise ValueError(
            f"client and task must both be [slots], got {list(client.shape)} and {list(task.shape)}"
        )
    outside = sorted(set(task.tolist()) - set(range(len(labels_per_task))))
    if outside:
        raise ValueError(
            f"task {outside[0]} is held, but labels are given of tasks 0 to "
            f"{len(labels_per_task) - 1}"
        )
    skew = None if alpha is None or math.isinf(alpha) else float(alpha)
    dealt: list[np.ndarray] = [np.empty(0, np.int64)] * len(task)
    for index in sorted(set(task.tolist())):
        slots = np.flatnonzero(task == index)
        slots = slots[np.argsort(client[slots], kind="stable")]
        labels = np.asarray(labels_per_task[index])
        _check_enough(index, len(slots), len(labels), examples_per_slot)
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))
        if skew is None:
            order = rng.permutation(len(labels))
            if examples_per_slot is not None:
                order = order[: examples_per_slot * len(slots)]
            parts = np.array_split(order, len(slots))
        elif examples_per_slot is None:
            parts = _dirichlet_over_holders(rng, labels, len(slots), skew)
        else:
            parts = _dirichlet_over_classes(rng, labels, len(slots), examples_per_slot, skew)
        for slot, part in zip(slots, parts, strict=True):
            if not len(part):
                raise ValueError(
                    f"client {client[slot]} would hold no example of task {index} at "
                    f"alpha={alpha}; set examples_per_slot, raise alpha, or change the seed"
                )
            dealt[slot] = rng.permutation(part).astype(np.int64)
    return dealt


def _check_enough(task: int, holders: int, available: int, examples_per_slot: int | None) -> None:
    needed = holders * (examples_per_slot or 1)
    if needed > available:
        raise ValueError(
            f"task {task} has {holders} holders, who need {needed} training examples "
            f"({examples_per_slot or 'at least 1'} each), but only {available} are available; "
            f"lower {'examples_per_slot, ' * bool(examples_per_slot)}clients or tasks_per_client"
        )


def _dirichlet_over_holders(
    rng: np.random.Generator, labels: np.ndarray, holders: int, alpha: float
) -> list[np.ndarray]:
    held: list[list[np.ndarray]] = [[] for _ in range(holders)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(_mixture(rng, holders, alpha))[:-1]
        for own, part in zip(
            held, np.split(members, np.rint(cuts * len(members)).astype(int)), strict=True
        ):
            own.append(part)
    return [np.concatenate(own) for own in held]


def _dirichlet_over_classes(
    rng: np.random.Generator, labels: np.ndarray, holders: int, examples: int, alpha: float
) -> list[np.ndarray]:
    classes, label_of = np.unique(labels, return_inverse=True)
    stock = [rng.permutation(np.flatnonzero(label_of == label)) for label in range(len(classes))]
    mixtures = [_mixture(rng, len(classes), alpha) for _ in range(holders)]
    held: list[list[np.ndarray]] = [[] for _ in range(holders)]
    # Class by class in turn, so that the last holder is not left with what nobody wanted.
    wanted = np.array([rng.multinomial(examples, mixture) for mixture in mixtures])
    for label in range(len(classes)):
        for holder in rng.permutation(holders):
            taken, stock[label] = np.split(stock[label], [wanted[holder, label]])
            held[holder].append(taken)
    for holder in rng.permutation(holders):
        missing = examples - sum(map(len, held[holder]))
        while missing:
            left = np.array([len(members) for members in stock])
            odds = mixtures[holder] * (left > 0)
            odds = odds / odds.sum() if odds.sum() > 0 else left / left.sum()
            count = np.minimum(rng.multinomial(missing, odds), left)
            for label in np.flatnonzero(count):
                taken, stock[label] = np.split(stock[label], [count[label]])
                held[holder].append(taken)
            missing -= count.sum()
    return [np.concatenate(own) for own in held]


def _mixture(rng: np.random.Generator, size: int, alpha: float) -> np.ndarray:
    """Draws from Dirichlet(alpha); a tiny alpha, which would give 0/0, puts all on one."""
    mixture = rng.dirichlet(np.full(size, alpha))
    if not np.isfinite(mixture).all() or mixture.sum() < 0.5:
        mixture = np.zeros(size)
        mixture[rng.integers(size)] = 1
    return mixture
