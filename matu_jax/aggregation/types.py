"""What the aggregator takes and gives, and the checks behind its error messages."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from matu_jax.trees import PyTree, as_floating, check_like, check_stacked, leaf_items


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("client", "task", "weight"),
    meta_fields=("num_clients", "num_tasks"),
)
@dataclasses.dataclass(frozen=True)
class Slots:
    """Which (client, task) pair each row of a stacked tree belongs to.

    Attributes:
      client: int32 `[slots]`, in `[0, num_clients)`.
      task: int32 `[slots]`, in `[0, num_tasks)`.
      weight: float32 `[slots]`, number of training examples; 0 = absent this round. What the rows
        of an absent slot hold changes nothing.
      num_clients: number of clients (static).
      num_tasks: number of tasks (static).
    """

    client: Int[Any, "slots"]
    task: Int[Any, "slots"]
    weight: Float[Any, "slots"]
    num_clients: int
    num_tasks: int


class Unified(NamedTuple):
    """Task vectors folded into one vector per group, with one bit per slot and parameter.

    Attributes:
      vector: leaves `[clients, ...]`, or `[...]` for a single group, in the storage dtype.
      masks: the same tree, uint8 leaves `[slots, ceil(size / 8)]`. The leaf's parameters,
        row-major, are taken in tiles of 1024, and a mask's bytes in 128 for each: bit i // 128 (0
        the least significant) of byte i % 128 belongs to the i-th parameter of the tile. The last r
        parameters, fewer than a tile, have w = ceil(r / 8) bytes: bit i // w of byte i % w.
        `matu_jax.aggregation.storage.unpack` makes bools of them, of NumPy's arrays or JAX's.
      scales: float32 `[slots]`.
    """

    vector: PyTree[Float[Array, "..."]]
    masks: PyTree[UInt8[Array, "slots _"]]
    scales: Float32[Array, "slots"]


class ServerState(NamedTuple):
    """What a server keeps from round to round where uploads are changes.

    Attributes:
      task_vectors: leaves `[tasks, ...]` in the storage dtype.
      agreement: float32 `[tasks, tasks]`, the evidence of `transfer = "shrinkage"`; else zeros.
      energy: float32 `[tasks, tasks]`, the same.
    """

    task_vectors: PyTree[Float[Array, "tasks ..."]]
    agreement: Float32[Array, "tasks tasks"]
    energy: Float32[Array, "tasks tasks"]


class Aggregated(NamedTuple):
    """What one server round yields.

    Attributes:
      similarity: float32 `[tasks, tasks]` (eq. 7), computed before eq. 8.
      unified: all tasks folded into one: vector leaves `[...]`, masks `[tasks, bytes]`, scales
        `[tasks]`. Where uploads are vectors, hand it to the next round as `previous`; it is all the
        state that a server keeps then.
      downloads: what each client receives: vector leaves `[clients, ...]`, masks `[slots, bytes]`,
        scales `[slots]`. Covers every listed slot, so that a client absent now can start later.
      accepted: bool `[slots]`: present, and every number of its upload finite, its scale not
        negative.
      state: what the next round needs as `previous` where uploads are changes.
    """

    similarity: Float32[Array, "tasks tasks"]
    unified: Unified
    downloads: Unified
    accepted: Bool[Array, "slots"]
    state: ServerState

    @property
    def task_vectors(self) -> PyTree[Float[Array, "tasks ..."]]:
        """Leaves `[tasks, ...]` in the storage dtype (after eq. 8), the state's own."""
        return self.state.task_vectors


def check_slots(slots: Slots, name: str) -> Slots:
    """Returns the slots as arrays of the right dtype; checks values where they are concrete."""
    columns: dict[str, Any] = {}
    for field, kind, dtype in (
        ("client", jnp.integer, jnp.int32),
        ("task", jnp.integer, jnp.int32),
        ("weight", jnp.floating, jnp.float32),
    ):
        column = jnp.asarray(getattr(slots, field))
        if column.ndim != 1 or not jnp.issubdtype(column.dtype, kind):
            raise ValueError(
                f"{name}: slots.{field}: found {column.dtype}{list(column.shape)}, expected "
                f"{'integers' if kind is jnp.integer else 'floats'} [slots]."
            )
        columns[field] = column.astype(dtype)
    lengths = {field: column.shape[0] for field, column in columns.items()}
    if len(set(lengths.values())) != 1 or lengths["client"] == 0:
        raise ValueError(
            f"{name}: slots: client, task and weight must have one length of at least 1; found "
            + ", ".join(f"{field} {length}" for field, length in lengths.items())
            + "."
        )
    for field, column, limit, limit_name in (
        ("client", slots.client, slots.num_clients, "num_clients"),
        ("task", slots.task, slots.num_tasks, "num_tasks"),
    ):
        if isinstance(column, Tracer):
            continue
        values = np.asarray(column)
        outside = np.flatnonzero((values < 0) | (values >= limit))
        if outside.size:
            raise ValueError(
                f"{name}: slots.{field}[{outside[0]}] = {values[outside[0]]}, expected 0 to "
                f"{limit - 1} (slots.{limit_name} is {limit})."
            )
    if not isinstance(slots.weight, Tracer):
        weight = np.asarray(slots.weight)
        wrong = np.flatnonzero(~(np.isfinite(weight) & (weight >= 0)))
        if wrong.size:
            raise ValueError(
                f"{name}: slots.weight[{wrong[0]}] = {weight[wrong[0]]} (client "
                f"{np.asarray(slots.client)[wrong[0]]}, task {np.asarray(slots.task)[wrong[0]]}), "
                "expected a finite number of examples, 0 or more (0 = absent)."
            )
    return dataclasses.replace(slots, **columns)


def check_unified(unified: Unified, name: str, *, rows: int, groups: int | None) -> Unified:
    """Checks a unified's tree, mask bytes and scales; `groups` None means a single group."""
    vector = as_floating(unified.vector, f"{name}.vector")
    if groups is None and not jax.tree.leaves(vector):
        raise ValueError(f"{name}.vector: found a tree without leaves.")
    if groups is not None:
        check_stacked(vector, f"{name}.vector", rows=groups, axis="clients")
    if jax.tree.structure(unified.masks) != jax.tree.structure(vector):
        check_like(unified.masks, vector, f"{name}.masks against {name}.vector", leading=0)
    masks = dict(leaf_items(unified.masks))
    for path, leaf in leaf_items(vector):
        size = leaf.size if groups is None else leaf.size // groups
        mask = jnp.asarray(masks[path])
        expected = (rows, -(-size // 8))
        if mask.shape != expected or mask.dtype != jnp.uint8:
            raise ValueError(
                f"{name}.masks: leaf {path}: found {mask.dtype}{list(mask.shape)}, expected "
                f"uint8{list(expected)} ([slots, ceil(parameters / 8)], as unify makes them)."
            )
    scales = jnp.asarray(unified.scales)
    if scales.shape != (rows,) or not jnp.issubdtype(scales.dtype, jnp.floating):
        raise ValueError(
            f"{name}.scales: found {scales.dtype}{list(scales.shape)}, expected float32[{rows}], "
            "one per slot."
        )
    return Unified(vector, jax.tree.map(jnp.asarray, unified.masks), scales.astype(jnp.float32))
