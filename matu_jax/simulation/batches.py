"""A round's training examples, cut into pieces that fit the devices."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int32, Int64, Shaped

from matu_jax.aggregation import Slots
from matu_jax.data import example_bytes
from matu_jax.data.batching import gather, round_indices
from matu_jax.data.feed import Grid, grid, prefetched
from matu_jax.models import Model
from matu_jax.scenarios import attacks
from matu_jax.simulation.choices import SimulationConfig
from matu_jax.simulation.federation import Federation
from matu_jax.simulation.local import optimizer
from matu_jax.simulation.participation import participants, trained_slots
from matu_jax.simulation.placement import padded_rows, slots_at_once
from matu_jax.trees import PyTree, tree_bytes


def round_grid(config: SimulationConfig, federation: Federation, mesh: Mesh, model: Model) -> Grid:
    """How a round's training is cut into pieces that fit the devices.

    Groups hold whole clients, and of the vectors and the optimiser state of their slots at most
    `VECTORS_BYTES`, but at least a client and as many slots as train at once.
    """
    local, slots = config.local, federation.slots
    rows = trained_slots(config, slots, participants(config, slots, 0))
    held, trained = np.bincount(slots.client), len(rows)
    at_once = slots_at_once(mesh, -(-trained // mesh.size), local.parallel_slots) * mesh.size
    state = jax.eval_shape(optimizer(local).init, model.base)
    # Downloads, what training starts a piece with and what it ends with, and what is sent.
    slot_bytes = 4 * tree_bytes(model.base) + 2 * tree_bytes(state)
    cut = grid(
        trained,
        local.steps,
        local.batch_examples * example_bytes(federation.tasks[0].train),
        multiple=mesh.size,
        at_once=at_once,
        least=int(held.max()),
        slot_bytes=slot_bytes,
    )
    if cut.groups == 1:
        return cut
    if _as_dealt(config, slots):
        groups = len(_firsts(slots.client[rows], cut.slots)) - 1
    else:  # as many as there may be: but the last, each has too little room for one client more
        groups = -(-trained // (cut.slots - int(held.max()) + 1))
    return cut._replace(groups=groups)


class Group(NamedTuple):
    """Some clients of a round with all of their slots that train, filled up to one shape.

    Attributes:
      rows: int64 `[group]`, which slots; the last one again and again where there are no more.
      there: bool `[group]`, False for those that fill up.
      number: int32 `[group]`, whose client each is, counted within the group.
      clients: int32 `[clients]`, those clients, in order; as many as there are clients at all where
        the group has no more.
    """

    rows: Int64[np.ndarray, "group"]
    there: Bool[np.ndarray, "group"]
    number: Int32[np.ndarray, "group"]
    clients: Int32[np.ndarray, "clients"]


def round_groups(
    config: SimulationConfig, federation: Federation, cut: Grid
) -> Callable[[int], list[Group]]:
    """Makes `round -> groups`, of the slots that train in it: as many as `cut` has, or fewer."""
    slots = federation.slots

    def cut_up(index: int) -> list[np.ndarray]:
        rows = trained_slots(config, slots, participants(config, slots, index))
        rows = rows[np.argsort(slots.client[rows], kind="stable")]
        firsts = _firsts(slots.client[rows], cut.slots)
        return [rows[i:j] for i, j in itertools.pairwise(firsts)]

    most = min(cut.slots, slots.num_clients)
    if _as_dealt(config, slots):
        most = max(len(np.unique(slots.client[rows])) for rows in cut_up(0))

    @functools.lru_cache(maxsize=4)
    def groups(index: int) -> list[Group]:
        return [_group(slots, rows, cut.slots, most) for rows in cut_up(index)]

    return groups


def _group(slots: Slots, rows: np.ndarray, size: int, most: int) -> Group:
    """The group of these rows, filled up to so many rows and clients."""
    clients, number = np.unique(slots.client[rows], return_inverse=True)
    filled = np.pad(clients, (0, most - len(clients)), constant_values=slots.num_clients)
    return Group(
        padded_rows(rows, size),
        np.arange(size) < len(rows),
        padded_rows(number, size).astype(np.int32),
        filled.astype(np.int32),
    )


def _as_dealt(config: SimulationConfig, slots: Slots) -> bool:
    """Whether all rounds have as many groups, with as many clients, as the first."""
    held = np.bincount(slots.client)
    return not config.clients_per_round or bool((held == held.max()).all())


def _firsts(client: np.ndarray, size: int) -> list[int]:
    """Where groups of at most `size` rows start that hold whole clients, and where the last ends.

    Args:
      client: int `[rows]`, of each row, in order; of none more than `size`.
      size: rows of a group, at most.
    """
    ends = np.append(np.flatnonzero(np.diff(client)) + 1, len(client))  # of clients
    firsts = [0]
    while firsts[-1] < len(client):
        last = np.searchsorted(ends, firsts[-1] + size, side="right") - 1
        firsts.append(int(ends[last]))
    return firsts


def training_batches(
    config: SimulationConfig,
    federation: Federation,
    cut: Grid,
    groups: Callable[[int], list[Group]],
    own: Int64[np.ndarray, "own"],
    done: int,
) -> Iterator[PyTree[Shaped[np.ndarray, "own steps batch ..."]]]:
    """The examples of every piece of every round from `done` on, made ahead by threads.

    Of each group, from `round_groups`, the rows that are this process's `own`; nothing else is
    read.
    """
    slots, tasks, local = federation.slots, federation.tasks, config.local

    flips = config.attack.kind == "label_flip"
    liars = attacks.liars(config.attack, slots, config.seed)

    @functools.lru_cache(maxsize=4)
    def drawn(index: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        part = groups(index)[group].rows[own]
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

    def piece(number: int) -> PyTree | None:
        index, rest = divmod(number, cut.groups * cut.chunks)
        group, chunk = divmod(rest, cut.chunks)
        if group >= len(groups(index)):
            return None  # the feed passes it over
        part, task, indices = drawn(index, group)
        chunks = indices[:, chunk * cut.steps : (chunk + 1) * cut.steps]
        examples = gather(tasks, task, chunks)
        for slot in np.flatnonzero(flips & liars[slots.client[part]]):
            labels = examples.labels[slot]
            examples.labels[slot] = tasks[task[slot]].num_classes - 1 - labels
        return examples

    pieces = cut.groups * cut.chunks
    return prefetched(piece, done * pieces, config.rounds * pieces)
