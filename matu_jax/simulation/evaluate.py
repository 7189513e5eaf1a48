"""Accuracy per slot and per task, over splits of any size."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float64, Int, Int32, Int64, UInt8

from matu_jax.data import Split
from matu_jax.data.feed import BUDGET_BYTES, prefetched
from matu_jax.models import Model
from matu_jax.simulation.choices import SimulationConfig
from matu_jax.simulation.federation import Federation
from matu_jax.simulation.local import class_mask
from matu_jax.simulation.placement import (
    ROWS,
    WHOLE,
    collected,
    map_slots,
    on_each,
    padded_rows,
    placed,
    rows_by_process,
    slot_mesh,
    slots_at_once,
)
from matu_jax.trees import PyTree

_STREAMED_SLOTS = 8  # at once, where images are streamed: few tasks share a piece then


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
      splits: one per task.
      slot_tasks: int `[slots]`, the task of each slot.
      mesh: the devices.
      batch_examples: examples per forward pass.
      max_examples: of each split at most, drawn from the seed; 0 = all.
      seed: for that.
      parallel_slots: as in `placement.map_slots`.
      budget_bytes: images of a piece.

    Attributes:
      pieces: what `load` takes.

    Raises:
      ValueError: if a split is empty.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        slot_tasks: Int[np.ndarray, "slots"],
        mesh: Mesh,
        *,
        batch_examples: int,
        max_examples: int = 0,
        seed: int = 0,
        parallel_slots: int = 0,
        budget_bytes: int = BUDGET_BYTES,
    ):
        empty = [i for i, split in enumerate(splits) if not len(split.labels)]
        if empty:
            raise ValueError(f"evaluation: task {empty[0]} has no examples in this split.")
        self._splits = splits
        self._order = [
            np.sort(np.random.default_rng((seed, i)).permutation(len(s.labels))[:max_examples])
            if 0 < max_examples < len(s.labels)
            else np.arange(len(s.labels))
            for i, s in enumerate(splits)
        ]
        lengths = np.array([len(order) for order in self._order])
        self._batch = min(batch_examples, int(lengths.max()))
        image_bytes = int(np.prod(splits[0].images.shape[1:]))
        batches = -(-int(lengths.max()) // self._batch)
        slots = np.arange(len(slot_tasks))
        if len(splits) * batches * self._batch * image_bytes <= budget_bytes:
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
            batches = max(1, budget_bytes // (widest * self._batch * image_bytes))
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
    def image_bytes(self) -> int:
        """Bytes of a piece's images."""
        tasks = len(self.pieces[0].tasks)
        pixels = int(np.prod(self._splits[0].images.shape[1:]))
        return tasks * self._batches * self._batch * pixels

    def load(
        self, index: int
    ) -> tuple[
        UInt8[np.ndarray, "tasks batches batch height width channels"],
        Int32[np.ndarray, "tasks batches batch"],
    ]:
        """Gathers a piece's examples, padded; of the tasks of this process's slots.

        Returns:
          Images, uint8 `[tasks, batches, batch, height, width, channels]`, and labels, int32
          `[tasks, batches, batch]`, -1 where padded.
        """
        piece, size = self.pieces[index], self._batches * self._batch
        shape = self._splits[0].images.shape[1:]
        images = np.zeros((len(piece.tasks), size, *shape), np.uint8)
        labels = np.full((len(piece.tasks), size), -1, np.int32)
        for row, task in enumerate(piece.tasks):
            chosen = self._order[task][piece.first : piece.first + size]
            images[row, : len(chosen)] = self._splits[task].images[chosen]
            labels[row, : len(chosen)] = self._splits[task].labels[chosen]
        cut = (len(piece.tasks), self._batches, self._batch)
        return images.reshape(*cut, *shape), labels.reshape(cut)


def evaluation(
    model: Model, mesh: Mesh, *, parallel_slots: int = 0, rounding: float | None = None
) -> Callable[..., jax.Array]:
    """Makes the function that measures slots on a piece of their own tasks' examples.

    Args:
      model: what is evaluated.
      mesh: the devices.
      parallel_slots: as in `placement.map_slots`.
      rounding: with it, near ties are counted as well, see `near_ties`.

    Returns:
      `((base, frozen, images, labels), vectors, local, task, num_classes) -> counts`, to be jitted:
      images and labels from `EvaluationSet.load`, put `on_each` device, vectors leaves `[slots,
      ...]`, local (position in the piece), task and num_classes int32 `[slots]`; counts int32
      `[slots, 2]`, or `[slots, 3]`: examples classified rightly, all, and near ties.
    """

    def counts(shared, vector, local, task, num_classes):
        base, frozen, images, labels = shared
        params = jax.tree.map(jnp.add, base, vector)

        def hits(batch):
            targets = labels[local, batch]
            logits = model.logits(params, frozen, images[local, batch], task)
            logits = logits + class_mask(num_classes, logits.shape[-1])[None]
            right = logits.argmax(axis=-1).astype(jnp.int32) == targets
            there = targets >= 0
            found = [right.sum(), there.sum()]
            if rounding is not None:
                near = near_ties(logits, targets, num_classes, rounding)
                found.append((near & there).sum())
            return jnp.stack(found)

        return jax.lax.map(hits, jnp.arange(images.shape[1])).sum(axis=0)

    specs = (WHOLE, WHOLE, ROWS, ROWS)
    return map_slots(counts, mesh, parallel_slots=parallel_slots, shared_specs=specs)


def near_ties(
    logits: Float[Array, "examples width"],
    targets: Int32[Array, "examples"],
    num_classes: Int32[Array, ""],
    rounding: float,
) -> Bool[Array, "examples"]:
    """Examples that another order of the same sums may put on the other side: bool `[examples]`.

    Those whose own class's logit is less than `rounding` times the example's largest magnitude away
    from the best of the other classes; logits less their mean, since what all classes have in
    common decides nothing.

    Args:
      logits: `[examples, width]`, of which the first num_classes count.
      targets: int32 `[examples]`.
      num_classes: int32 `[]`.
      rounding: as in `ROUNDING`.
    """
    column = jnp.arange(logits.shape[-1])[None]
    own, there = column == targets[:, None], column < num_classes
    mean = jnp.where(there, logits, 0).sum(axis=-1, keepdims=True)
    logits = logits - mean / num_classes.astype(logits.dtype)
    target = jnp.where(own, logits, 0).sum(axis=-1)
    best = jnp.where(own | ~there, -jnp.inf, logits).max(axis=-1)
    largest = jnp.where(there, jnp.abs(logits), 0).max(axis=-1)
    return jnp.abs(target - best) < rounding * largest


ROUNDING = {"float32": 2.0**-10, "bfloat16": 2.0**-7}
"""How far apart logits of the same parameters may be, by the dtype they are computed in, as a part
of an example's largest: the spacing of bfloat16, and of the numbers (TF32) that accelerators
multiply float32 as. CPUs are a thousand times nearer in float32."""


class Counts(NamedTuple):
    """Of one split: examples classified rightly, all that were measured, and near ties."""

    right: int
    examples: int
    near: int


def count_slot(
    config: SimulationConfig,
    model: Model,
    splits: Sequence[Split],
    task: int,
    classes: int,
    params: PyTree,
    *,
    rounding: float,
) -> Counts:
    """Measures one slot's parameters as a round does: the same examples in the same batches.

    Args:
      config: says which examples are measured, and how many at once.
      model: what is evaluated; its base does not matter.
      splits: one per task of the run.
      task: the slot's.
      classes: how many that task has.
      params: of the slot, base and task vector added.
      rounding: as in `ROUNDING`.
    """
    mesh = slot_mesh(jax.local_devices()[:1])
    whole = EvaluationSet(
        splits,
        np.array([task]),
        mesh,
        batch_examples=config.evaluation.batch_examples,
        max_examples=config.evaluation.max_examples,
        seed=config.seed,
    )
    program = jax.jit(evaluation(model, mesh, rounding=rounding))
    nothing = jax.tree.map(np.zeros_like, params)  # to which the whole parameters are added
    shared: tuple[Any, ...] = placed((nothing, model.frozen), mesh, WHOLE)
    vectors = placed(jax.tree.map(lambda x: np.asarray(x)[None], params), mesh, ROWS)
    (counts,) = _counts(
        program, shared, whole, lambda _: vectors, np.array([task]), np.array([classes]), mesh
    )
    return Counts(*counts.tolist())


def _counts(
    program: Callable[..., jax.Array],
    parameters: tuple[Any, ...],
    whole: EvaluationSet,
    vectors_of: Callable[[np.ndarray], PyTree],
    task: np.ndarray,
    num_classes: np.ndarray,
    mesh: Mesh,
    *,
    resident: tuple[jax.Array, jax.Array] | None = None,
) -> np.ndarray:
    """Counts what `evaluation` counts of every slot, over all pieces of a split.

    Args:
      program: from `evaluation`, jitted.
      parameters: (base, frozen), placed on all devices.
      whole: the split.
      vectors_of: `slots -> vectors`, leaves `[slots, ...]`, in `ROWS`.
      task: int `[slots]`, the task of each slot.
      num_classes: int `[slots]`, how many that task has.
      mesh: the devices.
      resident: the examples of a split of one piece, where they are on the devices already.

    Returns:
      int64 `[slots, counts]`.
    """
    found: list[tuple[Piece, np.ndarray]] = []

    def collect(piece: Piece, counted: jax.Array) -> None:
        found.append((piece, np.asarray(collected(counted, mesh))))

    loaded = iter([resident]) if resident else prefetched(whole.load, 0, len(whole.pieces))
    waiting: tuple[Piece, jax.Array] | None = None
    group, vectors = None, None
    for piece, examples in zip(whole.pieces, loaded, strict=True):
        there = examples if resident else on_each(examples, mesh)
        if waiting:  # the piece before: two are there at most
            collect(*waiting)
        if piece.slots is not group:  # the pieces of one group of slots share its array
            group, vectors = piece.slots, None  # the group before makes room first
            vectors = vectors_of(piece.slots)
        counted = program(
            (*parameters, *there),
            vectors,
            placed(piece.local, mesh, ROWS),
            task[piece.slots].astype(np.int32),
            num_classes[piece.slots].astype(np.int32),
        )
        waiting = piece, counted
    if waiting:
        collect(*waiting)
    counts = np.zeros((len(task), found[0][1].shape[1]), np.int64)
    for piece, counted in found:
        counts[piece.slots[: piece.rows]] += counted[: piece.rows]
    return counts


def per_task(
    per_slot: Float[np.ndarray, "slots"], task: Int[np.ndarray, "slots"], num_tasks: int
) -> Float64[np.ndarray, "{num_tasks}"]:
    """Mean over the slots of each task: float64 `[tasks]`; NaN for a task without a slot."""
    total = np.bincount(task, weights=per_slot, minlength=num_tasks)
    count = np.bincount(task, minlength=num_tasks)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def evaluation_sets(
    config: SimulationConfig, federation: Federation, mesh: Mesh
) -> dict[str, EvaluationSet]:
    """The validation and the test splits of all tasks, cut into pieces."""
    return {
        split: EvaluationSet(
            [getattr(task, split) for task in federation.tasks],
            federation.slots.task,
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

    Args:
      config: says which examples are measured, and how many at once.
      model: what is evaluated.
      federation: its tasks, and the slots that are measured.
      mesh: the devices.
      parameters: (base, frozen), placed on all of them.
    """
    tasks, slots = federation.tasks, federation.slots
    num_classes = np.array([tasks[t].num_classes for t in slots.task], np.int32)
    program = jax.jit(evaluation(model, mesh, parallel_slots=config.local.parallel_slots))
    sets = evaluation_sets(config, federation, mesh)
    resident = {
        split: on_each(whole.load(0), mesh)
        for split, whole in sets.items()
        if len(whole.pieces) == 1
    }

    def measure(vectors_of: Callable[[np.ndarray], PyTree]) -> dict[str, Any]:
        accuracy: dict[str, Any] = {}
        for split, whole in sets.items():
            counts = _counts(
                program,
                parameters,
                whole,
                vectors_of,
                slots.task,
                num_classes,
                mesh,
                resident=resident.get(split),
            )
            per_slot = counts[:, 0] / counts[:, 1]
            by_task = per_task(per_slot, slots.task, len(tasks))
            accuracy[f"{split}_mean"] = float(np.nanmean(by_task))
            accuracy[f"{split}_per_task"] = {
                task.name: float(a) for task, a in zip(tasks, by_task, strict=True)
            }
            accuracy[f"{split}_per_slot"] = per_slot.tolist()
        return accuracy

    return measure
