"""Metrics per slot, per task and per site, over splits of any size.

What is called a slot's task here is which of the splits is its own: where data belongs to sites,
each slot has one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float64, Int, Int32, Int64, Shaped

from matu_jax.data import example_bytes, example_shapes, num_examples
from matu_jax.data.feed import BUDGET_BYTES, prefetched
from matu_jax.models import Metric, Model
from matu_jax.models.checks import check_sums, told
from matu_jax.models.contract import ContractError
from matu_jax.simulation import integers
from matu_jax.simulation.choices import SimulationConfig
from matu_jax.simulation.federation import Federation, measured
from matu_jax.simulation.measures import SCORE, main_metrics
from matu_jax.simulation.placement import (
    ROWS,
    WHOLE,
    collected,
    map_slots,
    on_each,
    padded_rows,
    placed,
    rows_by_process,
    slots_at_once,
)
from matu_jax.trees import PyTree

_DIVERGED = ""  # no metric of a model has this name
_STREAMED_SLOTS = 8  # at once, where examples are streamed: few tasks share a piece then


class Piece(NamedTuple):
    """Some slots, and the part of their tasks' examples that they are measured on next.

    Attributes:
      slots: int64 `[rows]`, the last one repeated as padding.
      rows: how many of them count.
      tasks: int64 `[tasks of the piece]`, theirs, the last one repeated as padding.
      local: int32 `[own rows]`, where the task of each slot that this process has, see
        `placement.own_rows`, stands in `tasks`.
      first: position of the first example.
    """

    slots: Int64[np.ndarray, "rows"]
    rows: int
    tasks: Int64[np.ndarray, "held"]
    local: Int32[np.ndarray, "own"]
    first: int


class EvaluationSet:
    """A split of every task, cut into pieces of one shape that fit a device.

    If everything fits, there is one piece, to be loaded once and kept.

    Args:
      splits: one per task, trees of one form, leaves `[examples, ...]`.
      slot_tasks: int `[slots]`, the task of each slot.
      mesh: the devices.
      batch_examples: examples per forward pass.
      max_examples: of each split at most, drawn from the seed; 0 = all.
      seed: for that.
      parallel_slots: as in `placement.map_slots`.
      budget_bytes: examples of a piece.

    Attributes:
      pieces: what `load` takes.
      examples: int64 `[slots]`, how many each slot is measured on.

    Raises:
      ValueError: if all splits are empty.
    """

    def __init__(
        self,
        splits: Sequence[PyTree],
        slot_tasks: Int[np.ndarray, "slots"],
        mesh: Mesh,
        *,
        batch_examples: int,
        max_examples: int = 0,
        seed: int = 0,
        parallel_slots: int = 0,
        budget_bytes: int = BUDGET_BYTES,
    ):
        if not any(map(num_examples, splits)):
            raise ValueError("evaluation: there is no example in this split.")
        self._splits = splits
        counts = [num_examples(split) for split in splits]
        self._order = [
            np.sort(np.random.default_rng((seed, i)).permutation(count)[:max_examples])
            if 0 < max_examples < count
            else np.arange(count)
            for i, count in enumerate(counts)
        ]
        lengths = np.array([len(order) for order in self._order])
        self.examples = lengths[slot_tasks]
        self._batch = min(batch_examples, int(lengths.max()))
        each = example_bytes(splits[0])
        batches = -(-int(lengths.max()) // self._batch)
        slots = np.arange(len(slot_tasks))
        if len(splits) * batches * self._batch * each <= budget_bytes:
            groups = [padded_rows(slots, mesh.size)]
            streamed = False
        else:
            per_device = -(-len(slots) // mesh.size)
            at_once = min(slots_at_once(mesh, per_device, parallel_slots), _STREAMED_SLOTS)
            slots = np.argsort(slot_tasks, kind="stable")
            groups = np.split(
                padded_rows(slots, mesh.size * at_once),
                range(mesh.size * at_once, len(slots), mesh.size * at_once),
            )
            streamed = True
        process, rows_of = jax.process_index(), rows_by_process(mesh, len(groups[0]))
        # A process loads the tasks of its own slots; the shapes are those of all processes.
        widest = max(
            len(np.unique(slot_tasks[group[rows]])) for group in groups for rows in rows_of.values()
        )
        if streamed:
            batches = max(1, budget_bytes // (widest * self._batch * each))
            batches = min(batches, -(-int(lengths.max()) // self._batch))
        self._batches = batches
        self.pieces: list[Piece] = []
        counted = 0
        for group in groups:
            rows = min(len(slots) - counted, len(group))
            counted += rows
            own = group[rows_of[process]]
            held, local = np.unique(slot_tasks[own], return_inverse=True)
            held = np.pad(held, (0, widest - len(held)), mode="edge")
            for first in range(0, int(lengths[slot_tasks[group]].max()), batches * self._batch):
                self.pieces.append(Piece(group, rows, held, local.astype(np.int32), first))

    @property
    def piece_bytes(self) -> int:
        """Bytes of a piece's examples."""
        tasks = len(self.pieces[0].tasks)
        return tasks * self._batches * self._batch * example_bytes(self._splits[0])

    def load(
        self, index: int
    ) -> tuple[
        PyTree[Shaped[np.ndarray, "tasks batches batch ..."]],
        Bool[np.ndarray, "tasks batches batch"],
    ]:
        """Gathers a piece's examples, padded; of the tasks of this process's slots.

        Returns:
          Examples in the form of the splits, leaves `[tasks, batches, batch, ...]`, and which of
          them are there and not padding, bool `[tasks, batches, batch]`.
        """
        piece, cut = self.pieces[index], (self._batches, self._batch)
        size, rows = self._batches * self._batch, len(piece.tasks)
        shapes = example_shapes(self._splits[0])
        examples = jax.tree.map(lambda x: np.zeros((rows, size, *x.shape), x.dtype), shapes)
        there = np.zeros((rows, size), np.bool_)
        for row, task in enumerate(piece.tasks):
            chosen = self._order[task][piece.first : piece.first + size]
            there[row, : len(chosen)] = True
            split = jax.tree.leaves(self._splits[task])
            for into, leaf in zip(jax.tree.leaves(examples), split, strict=True):
                into[row, : len(chosen)] = leaf[chosen]
        examples = jax.tree.map(lambda x: x.reshape(rows, *cut, *x.shape[2:]), examples)
        return examples, there.reshape(rows, *cut)


def evaluation(
    model: Model, metrics: Mapping[str, Metric], mesh: Mesh, *, parallel_slots: int = 0
) -> Callable[..., PyTree]:
    """Makes the function that measures slots on a piece of their own tasks' examples.

    Args:
      model: what is evaluated.
      metrics: what is measured of its outputs.
      mesh: the devices.
      parallel_slots: as in `placement.map_slots`.

    Returns:
      `((base, frozen, examples, there), vectors, local, task) -> sums`, to be jitted: examples and
      there from `EvaluationSet.load`, put `on_each` device, vectors leaves `[slots, ...]`, local
      (position in the piece) and task int32 `[slots]`; sums by metric, leaves float32 `[slots,
      ...]`, or int32 `[slots, 2, ...]`, see `integers.halved`.
    """

    def sums(shared, vector, local, task):
        base, frozen, examples, there = shared
        params = jax.tree.map(jnp.add, base, vector)

        def of_batch(index):
            batch = jax.tree.map(lambda x: x[local, index], examples)
            outputs = model.outputs(params, frozen, batch, task)
            counted = there[local, index]

            def total(x):
                padding = counted.reshape(-1, *[1] * (x.ndim - 1))
                x = jnp.where(padding, x, jnp.zeros((), x.dtype))
                if jnp.issubdtype(x.dtype, jnp.floating):
                    return x.astype(jnp.float32).sum(axis=0)
                return integers.halved(x).sum(axis=1)

            found = {name: metric.sums(outputs, batch) for name, metric in metrics.items()}
            for name, own in found.items():
                check_sums(own, counted.shape[0], f"model.metrics[{name!r}].sums")
            return jax.tree.map(total, found)

        found = jax.lax.map(of_batch, jnp.arange(there.shape[1]))
        return jax.tree.map(integers.over_batches, found)

    specs = (WHOLE, WHOLE, ROWS, ROWS)
    return map_slots(sums, mesh, parallel_slots=parallel_slots, shared_specs=specs)


def summed(
    program: Callable[..., PyTree],
    parameters: tuple[Any, ...],
    whole: EvaluationSet,
    vectors_of: Callable[[np.ndarray], PyTree],
    task: Int[np.ndarray, "slots"],
    mesh: Mesh,
    *,
    resident: tuple[PyTree, jax.Array] | None = None,
) -> PyTree[Shaped[np.ndarray, "slots ..."]]:
    """The sums of `evaluation` of every slot, over all pieces of a split.

    Args:
      program: from `evaluation`, jitted.
      parameters: (base, frozen), placed on all devices.
      whole: the split.
      vectors_of: `slots -> vectors`, leaves `[slots, ...]`, in `ROWS`.
      task: int `[slots]`, the task of each slot.
      mesh: the devices.
      resident: the examples of a split of one piece, where they are on the devices already.

    Returns:
      By metric, leaves int64 or float64 `[slots, ...]`.
    """
    found: list[tuple[Piece, PyTree]] = []

    def collect(piece: Piece, measured: PyTree) -> None:
        found.append((piece, jax.tree.map(np.asarray, collected(measured, mesh))))

    loaded = iter([resident]) if resident else prefetched(whole.load, 0, len(whole.pieces))
    waiting: tuple[Piece, PyTree] | None = None
    group, vectors = None, None
    for piece, examples in zip(whole.pieces, loaded, strict=True):
        there = examples if resident else on_each(examples, mesh)
        if waiting:  # the piece before: two are there at most
            collect(*waiting)
        if piece.slots is not group:  # the pieces of one group of slots share its array
            group, vectors = piece.slots, None  # the group before makes room first
            vectors = vectors_of(piece.slots)
        measured = program(
            (*parameters, *there),
            vectors,
            placed(piece.local, mesh, ROWS),
            task[piece.slots].astype(np.int32),
        )
        waiting = piece, measured
    if waiting:
        collect(*waiting)

    def total(*parts):
        parts = [integers.joined(part) for part in parts]
        wide = np.float64 if np.issubdtype(parts[0].dtype, np.floating) else np.int64
        sums = np.zeros((len(task), *parts[0].shape[1:]), wide)
        for (piece, _), part in zip(found, parts, strict=True):
            sums[piece.slots[: piece.rows]] += part[: piece.rows]
        return sums

    return jax.tree.map(total, *(measured for _, measured in found))


def per_task(
    per_slot: Float[np.ndarray, "slots"], task: Int[np.ndarray, "slots"], num_tasks: int
) -> Float64[np.ndarray, "{num_tasks}"]:
    """Mean over each task's slots that have a number: float64 `[tasks]`; NaN where none has."""
    there = ~np.isnan(per_slot)
    total = np.bincount(task[there], weights=per_slot[there], minlength=num_tasks)
    count = np.bincount(task[there], minlength=num_tasks)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def evaluation_sets(
    config: SimulationConfig, federation: Federation, mesh: Mesh
) -> dict[str, EvaluationSet]:
    """The validation and the test splits of all tasks, cut into pieces."""
    return {
        split: EvaluationSet(
            *measured(federation, split),
            mesh,
            batch_examples=config.evaluation.batch_examples,
            max_examples=config.evaluation.max_examples,
            seed=config.seed,
            parallel_slots=config.local.parallel_slots,
        )
        for split in ("validation", "test")
    }


def measuring(
    config: SimulationConfig,
    model: Model,
    federation: Federation,
    mesh: Mesh,
    parameters: Any,
) -> Callable[[Callable[[np.ndarray], PyTree]], dict[str, Any]]:
    """Makes the function that evaluates: (slots -> vectors, in `ROWS`) to what a record holds.

    That is, by metric, and for `measures.SCORE` where tasks are measured by several:
    "validation_mean" and "test_mean", the means over the tasks that are measured by it;
    "..._per_task", by name; "..._per_slot", a list; and, where data belongs to sites,
    "..._per_site", by name, the mean over a site's tasks.

    Args:
      config: says which examples are measured, and how many at once.
      model: what is evaluated.
      federation: its tasks, and the slots that are measured.
      mesh: the devices.
      parameters: (base, frozen), placed on all of them.
    """
    tasks, slots = federation.tasks, federation.slots
    metrics = {**model.metrics, _DIVERGED: Metric(_diverged, int)}
    program = jax.jit(evaluation(model, metrics, mesh, parallel_slots=config.local.parallel_slots))
    sets = evaluation_sets(config, federation, mesh)
    resident = {
        split: on_each(whole.load(0), mesh)
        for split, whole in sets.items()
        if len(whole.pieces) == 1
    }

    main = main_metrics(model.metrics, tasks)
    measured_by = [set(task.metrics or model.metrics) for task in tasks]

    def of_metric(name: str, sums: PyTree, examples: np.ndarray) -> np.ndarray:
        metric = model.metrics[name]
        asked = np.array([name in measured_by[task] for task in slots.task])
        asked = np.flatnonzero(asked & (examples > 0))
        own = jax.tree.map(lambda x: x[asked], sums[name])
        finite = _finite(own) & (sums[_DIVERGED][asked] == 0)
        worst = -np.inf if metric.higher_is_better else np.inf
        found = np.full(len(slots.task), np.nan)
        found[asked] = np.where(finite, values(metric, own, name), worst)
        return found

    def measure(vectors_of: Callable[[np.ndarray], PyTree]) -> dict[str, Any]:
        found_by: dict[str, dict[str, Any]] = {}
        for split, whole in sets.items():
            sums = summed(
                program,
                parameters,
                whole,
                vectors_of,
                slots.task,
                mesh,
                resident=resident.get(split),
            )
            found = {name: of_metric(name, sums, whole.examples) for name in model.metrics}
            if len(set(main)) > 1:
                own = [found[main[task]][slot] for slot, task in enumerate(slots.task)]
                found[SCORE] = np.array(own)
            for name, per_slot in found.items():
                part = _of_split(split, per_slot, federation)
                found_by[name] = found_by.get(name, {}) | part
        return found_by

    return measure


def _diverged(outputs: PyTree, batch: PyTree) -> Bool[Array, "examples"]:
    """Of which examples an output is NaN or +inf; -inf is the logit of what is left out."""

    def of_leaf(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(len(x), jnp.bool_)
        return (jnp.isnan(x) | jnp.isposinf(x)).reshape(len(x), -1).any(axis=1)

    return jnp.stack([of_leaf(x) for x in jax.tree.leaves(outputs)]).any(axis=0)


def _finite(sums: PyTree[Shaped[np.ndarray, "slots ..."]]) -> Bool[np.ndarray, "slots"]:
    """Of which slots all sums are finite: those of others are what a diverged model outputs."""
    leaves = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(sums)]
    return np.all([np.isfinite(leaf).all(axis=1) for leaf in leaves], axis=0)


def _of_split(split: str, per_slot: np.ndarray, federation: Federation) -> dict[str, Any]:
    """What a record holds of a metric on a split; NaN where nothing was measured.

    What a slot reaches whose outputs are not finite is infinitely bad, and so are its means.
    """
    slots, names = federation.slots, [task.name for task in federation.tasks]
    by_task = per_task(per_slot, slots.task, len(names))
    there = by_task[~np.isnan(by_task)]
    found = {
        f"{split}_mean": float(there.mean()) if there.size else float("nan"),
        f"{split}_per_task": dict(zip(names, by_task.tolist(), strict=True)),
        f"{split}_per_slot": per_slot.tolist(),
    }
    if federation.sites:
        by_site = per_task(per_slot, slots.client, len(federation.sites)).tolist()
        found[f"{split}_per_site"] = dict(zip(federation.sites, by_site, strict=True))
    return found


def values(
    metric: Metric, sums: PyTree[Shaped[np.ndarray, "slots ..."]], name: str = ""
) -> Float64[np.ndarray, "slots"]:
    """A metric's value of each slot, of its sums.

    Raises:
      ContractError: if it is no number.
    """

    def of_slot(row: int) -> float:
        one = jax.tree.map(lambda x: x[row], sums)
        try:
            return float(metric.value(one))
        except Exception as error:  # of a function of the user's
            raise ContractError(
                f"{told(f'model.metrics[{name!r}].value', error)}; expected a number, NaN where "
                f"nothing was measured, of the sums {one}."
            ) from error

    slots = len(jax.tree.leaves(sums)[0])
    return np.array([of_slot(row) for row in range(slots)], np.float64)
