"""The batches of a round, stacked over slots: which examples, and then the examples themselves."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int, Int64, Shaped

from matu_jax.data import Task, check_alike, example_shapes, num_examples
from matu_jax.trees import PyTree

__all__ = ["gather", "round_indices"]


def round_indices(
    indices_per_slot: Sequence[Int[np.ndarray, "_"]],
    client: Int[np.ndarray, "slots"],
    task: Int[np.ndarray, "slots"],
    *,
    seed: int,
    round_index: int,
    steps: int,
    batch_size: int,
) -> Int64[np.ndarray, "slots {steps} {batch_size}"]:
    """Draws the training examples of one round.

    Each slot goes through its examples in random order, and in a new random order when it has seen
    them all, wherever in a batch that falls. The order depends on (seed, round, client, task) and
    on the slot's own examples only: not on the other slots, nor on which of them take part.

    Args:
        indices_per_slot: For each slot, indices into its task's train split, at least one.
        client: Integer `[slots]`.
        task: Integer `[slots]`.
        seed: 0 or more.
        round_index: 0 or more.
        steps: Local steps in the round.
        batch_size: Examples in a step.

    Returns:
        int64 `[slots, steps, batch_size]`, indices into the train splits.

    Raises:
        ValueError: If a slot has no example, the lengths differ, or a number is out of range.
    """
    for name, value, least in (
        ("seed", seed, 0),
        ("round_index", round_index, 0),
        ("steps", steps, 1),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not len(indices_per_slot) == len(client) == len(task):
        raise ValueError(
            "indices_per_slot, client and task must have one entry per slot, got "
            f"{len(indices_per_slot)}, {len(client)} and {len(task)}"
        )
    drawn = np.empty((len(task), steps, batch_size), np.int64)
    for slot, indices in enumerate(indices_per_slot):
        if not len(indices):
            raise ValueError(
                f"slot {slot} (client {client[slot]}, task {task[slot]}) has no training example; "
                "leave it out of the round, or give it examples"
            )
        key = (round_index, int(client[slot]), int(task[slot]))
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
        epochs = -(-steps * batch_size // len(indices))
        order = np.concatenate([rng.permutation(indices) for _ in range(epochs)])
        drawn[slot] = order[: steps * batch_size].reshape(steps, batch_size)
    return drawn


def gather(
    tasks: Sequence[Task],
    task_of_slot: Int[np.ndarray, "slots"],
    indices: Int[np.ndarray, "slots steps batch"],
) -> PyTree[Shaped[np.ndarray, "slots steps batch ..."]]:
    """Gathers training examples, stacked over slots.

    Args:
        tasks: All tasks of the run, with examples of one shape.
        task_of_slot: Integer `[slots]`, an index into `tasks`.
        indices: Integer `[slots, steps, batch]`, as from `round_indices`.

    Returns:
        Examples in the form of the tasks' splits, leaves `[slots, steps, batch, ...]`.

    Raises:
        ValueError: If tasks differ in what an example is, or an index is out of range.
    """
    check_alike(tasks)
    if len(task_of_slot) != len(indices):
        raise ValueError(
            f"task_of_slot has {len(task_of_slot)} slots, indices have {len(indices)}; both must "
            "have the same"
        )
    shapes = example_shapes(tasks[0].train)
    stacked = jax.tree.map(lambda x: np.empty((*indices.shape, *x.shape), x.dtype), shapes)
    for slot, (number, chosen) in enumerate(zip(task_of_slot, indices, strict=True)):
        held = tasks[number]
        examples = num_examples(held.train)
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < examples:
            raise ValueError(
                f"slot {slot}: indices run from {chosen.min()} to {chosen.max()}, but the train "
                f"split of task {held.name!r} has {examples} examples"
            )
        for into, rows in zip(jax.tree.leaves(stacked), jax.tree.leaves(held.train), strict=True):
            into[slot] = rows[chosen]
    return stacked
