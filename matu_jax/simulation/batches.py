"""A round's training examples, cut into pieces that fit the devices."""

import functools
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int64, Shaped

from matu_jax.data import example_bytes
from matu_jax.data.batching import gather, round_indices
from matu_jax.data.feed import Grid, grid, prefetched
from matu_jax.scenarios import attacks
from matu_jax.simulation.choices import SimulationConfig
from matu_jax.simulation.federation import Federation
from matu_jax.simulation.participation import participants, trained_slots
from matu_jax.simulation.placement import padded_rows, slots_at_once
from matu_jax.trees import PyTree


def round_grid(config: SimulationConfig, federation: Federation, mesh: Mesh) -> Grid:
    """How a round's training is cut into pieces that fit the devices."""
    local, slots = config.local, federation.slots
    trained = len(trained_slots(config, slots, participants(config, slots, 0)))
    per_device = slots_at_once(mesh, -(-trained // mesh.size), local.parallel_slots)
    return grid(
        trained,
        local.steps,
        local.batch_examples * example_bytes(federation.tasks[0].train),
        multiple=mesh.size,
        at_once=per_device * mesh.size,
    )


def training_batches(
    config: SimulationConfig,
    federation: Federation,
    cut: Grid,
    own: Int64[np.ndarray, "own"],
    done: int,
) -> Iterator[PyTree[Shaped[np.ndarray, "own steps batch ..."]]]:
    """The examples of every piece of every round from `done` on, made ahead by threads.

    Of the rows that are this process's `own`; nothing else is read.
    """
    slots, tasks, local = federation.slots, federation.tasks, config.local

    flips = config.attack.kind == "label_flip"
    liars = attacks.liars(config.attack, slots, config.seed)

    @functools.lru_cache(maxsize=4)
    def drawn(index: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = trained_slots(config, slots, participants(config, slots, index))
        part = padded_rows(rows, cut.slots).reshape(cut.groups, cut.slots)[group][own]
        return (
            part,
            slots.task[part],
            round_indices(
                [federation.indices[row] for row in part],
                slots.client[part],
                slots.task[part],
                seed=config.seed,
                round_index=index,
                steps=local.steps,
                batch_size=local.batch_examples,
            ),
        )

    def piece(number: int) -> PyTree:
        index, rest = divmod(number, cut.groups * cut.chunks)
        group, chunk = divmod(rest, cut.chunks)
        part, task, indices = drawn(index, group)
        chunks = indices[:, chunk * cut.steps : (chunk + 1) * cut.steps]
        examples = gather(tasks, task, chunks)
        for slot in np.flatnonzero(flips & liars[slots.client[part]]):
            labels = examples.labels[slot]
            examples.labels[slot] = tasks[task[slot]].num_classes - 1 - labels
        return examples

    pieces = cut.groups * cut.chunks
    return prefetched(piece, done * pieces, config.rounds * pieces)
