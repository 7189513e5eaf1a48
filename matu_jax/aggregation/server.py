"""The server's round, eqs. 5 to 9."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, UInt8

from matu_jax.aggregation.choices import AggregationConfig
from matu_jax.aggregation.client import modulate_jit
from matu_jax.aggregation.directions import aggregated_similarity, cross_client_similarity
from matu_jax.aggregation.finish import finished
from matu_jax.aggregation.joining import joining
from matu_jax.aggregation.reports import reports_of
from matu_jax.aggregation.same_task import same_task
from matu_jax.aggregation.sharding import Axes, ParameterSharding, check_mesh
from matu_jax.aggregation.shrinkage import Evidence
from matu_jax.aggregation.storage import flat_leaf
from matu_jax.aggregation.transfer import mixing_of
from matu_jax.aggregation.types import (
    Aggregated,
    ServerState,
    Slots,
    Unified,
    check_slots,
    check_unified,
)
from matu_jax.trees import PyTree, as_floating, check_like, check_stacked, leaf_items


class _Flat(NamedTuple):
    """What has an axis of parameters, as lists of flat arrays.

    Attributes:
      vector: unified vectors of the uploads, `[clients, n]`.
      masks: packed masks of the uploads, `[slots, bytes]`.
      start: task vectors before the round, `[tasks, n]`; None: zeros.
    """

    vector: list[Float[Array, "clients _"]]
    masks: list[UInt8[Array, "slots _"]]
    start: list[Float[Array, "tasks _"]] | None


class _Whole(NamedTuple):
    """What has none: the uploads' scales `[slots]`, the slots, and what `ServerState` keeps."""

    scales: Float32[Array, "slots"]
    slots: Slots
    evidence: Evidence


def _server(
    flat: _Flat, whole: _Whole, config: AggregationConfig, size: int, axes: Axes
) -> tuple[Any, Any, Any]:
    """Eqs. 5 to 9 on flat arrays; `size` counts all parameters, `axes` see `ParameterSharding`.

    Returns:
      With parameters: task vectors, the server's own vector and the downloads'; masks of both; and
      what has no parameters: scales of both, similarity, accepted, and the evidence.
    """
    vector, masks, start = flat
    slots = whole.slots
    reports, signs = reports_of(vector, masks, whole.scales, slots, config, size, axes)

    # Eqs. 5 and 6. A task that nobody reported keeps what it has, or changes by nothing.
    changes = config.uploads == "change"
    kept = [None] * len(vector) if changes or start is None else start
    found = [
        same_task(leaf, mask, old, reports, config)
        for leaf, mask, old in zip(vector, masks, kept, strict=True)
    ]
    own = [leaf for leaf, *_ in found]
    energies = jnp.stack([squares for _, squares, _ in found]).sum(axis=0)
    largest = jnp.stack([top for *_, top in found]).max(axis=0)

    # Eq. 7.
    if config.similarity == "cross_client" and signs:
        similarity = cross_client_similarity(signs, reports.accepted, slots, size)
    else:
        similarity = aggregated_similarity(own, size, axes)

    # Eqs. 8 and 9.
    mixing, evidence = mixing_of(
        energies, largest, similarity, reports, whole.evidence, config, axes
    )
    before = start if changes else None
    mixed, one, down = finished(own, mixing, before, slots, config.magnitude, axes)
    (one_vector, one_masks, one_scales), (down_vector, down_masks, down_scales) = one, down
    return (
        (mixed, one_vector, down_vector),
        (one_masks, down_masks),
        (one_scales, down_scales, similarity.matrix, reports.accepted, evidence),
    )


@partial(jax.jit, static_argnames=("config", "mesh"))
def _aggregate(
    uploads: Unified,
    slots: Slots,
    config: AggregationConfig,
    previous: Unified | ServerState | None,
    mesh: Mesh | None,
) -> Aggregated:
    leaves, treedef = jax.tree.flatten(uploads.vector)
    vector, tasks = [flat_leaf(x) for x in leaves], slots.num_tasks
    if isinstance(previous, ServerState):
        start = [flat_leaf(leaf) for leaf in jax.tree.leaves(previous.task_vectors)]
        evidence = Evidence(previous.agreement, previous.energy)
    else:
        nothing = jnp.zeros((tasks, tasks), jnp.float32)
        evidence = Evidence(nothing, nothing)
        start = previous and [flat_leaf(x) for x in jax.tree.leaves(modulate_jit(previous, None))]
    join = joining(vector, start or vector)
    vector, start = join.vectors(vector), start and join.vectors(start)
    masks = join.masks(jax.tree.leaves(uploads.masks))
    sharding = ParameterSharding(mesh, [x.shape[1] for x in vector])
    vectors, masks, whole = sharding.run(
        lambda flat, whole: _server(flat, whole, config, join.size, sharding.axes),
        _Flat(
            sharding.pad_vectors(vector),
            sharding.pad_masks(masks),
            start and sharding.pad_vectors(start),
        ),
        _Whole(uploads.scales, slots, evidence),
        (True, True, False),
    )
    mixed, one_vector, down_vector = map(sharding.unpad_vectors, vectors)
    all_masks, down_masks = map(sharding.unpad_masks, masks)
    all_scales, down_scales, similarity, accepted, evidence = whole

    def shaped(flat, lead):
        pairs = zip(join.leaves(flat), leaves, strict=True)
        return treedef.unflatten([x.reshape(*lead, *leaf.shape[1:]) for x, leaf in pairs])

    def masked(masks):
        return treedef.unflatten(join.leaf_masks(masks))

    return Aggregated(
        similarity=similarity,
        unified=Unified(shaped(one_vector, ()), masked(all_masks), all_scales),
        downloads=Unified(
            shaped(down_vector, (slots.num_clients,)), masked(down_masks), down_scales
        ),
        accepted=accepted,
        state=ServerState(shaped(mixed, (tasks,)), *evidence),
    )


def _check_rows(uploads: PyTree, vectors: PyTree) -> None:
    """Checks that two stacked trees have rows of one shape."""
    rows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), vectors)
    name = "aggregate: uploads.vector [clients, ...] against previous.task_vectors [tasks, ...]"
    check_like(uploads, rows, name, leading=1)


_DEFAULT_CONFIG = AggregationConfig()


def aggregate(
    uploads: Unified,
    slots: Slots,
    config: AggregationConfig = _DEFAULT_CONFIG,
    previous: Unified | ServerState | None = None,
    *,
    mesh: Mesh | None = None,
) -> Aggregated:
    """One round of MaTU's server (eqs. 5 to 9), from the uploads and what it has kept.

    Args:
      uploads: `unify(vectors, slots)`: vector leaves `[clients, ...]`, masks `[slots, bytes]`,
        scales `[slots]`. An upload that holds a NaN or an infinity takes no part (see `accepted`
        in the result, and `nonfinite` for its name).
      slots: which client and task each slot is, and its weight (0 = absent).
      config: the choices in eqs. 5 to 9; `AggregationConfig.paper()` for those of the paper.
      previous: what a task keeps that nobody reported: `.unified` of the round before, or, where
        `config.uploads` is "change", its `.state`, to which the changes are added. None: the first
        round; zeros.
      mesh: devices over which the parameters are sharded, see `unify`; None = all on one.

    Returns:
      `Aggregated`: task vectors `[tasks, ...]`, similarity `[tasks, tasks]`, the unified vector of
      all tasks, the clients' downloads, and which slots were accepted.

    Raises:
      ValueError: if the uploads, the slots and `previous` do not fit each other, naming the leaf;
        for a mesh whose axes are not Auto.
    """
    slots = check_slots(slots, "aggregate")
    rows = slots.client.shape[0]
    uploads = check_unified(uploads, "aggregate: uploads", rows=rows, groups=slots.num_clients)
    changes = config.uploads == "change"
    if previous is not None and isinstance(previous, ServerState) != changes:
        raise ValueError(
            f"aggregate: previous: found {type(previous).__name__}, but config.uploads is "
            f"{config.uploads!r}: pass the last result's " + (".state." if changes else ".unified.")
        )
    if isinstance(previous, ServerState):
        vectors = as_floating(previous.task_vectors, "aggregate: previous.task_vectors")
        check_stacked(vectors, "aggregate: previous.task_vectors", rows=slots.num_tasks)
        _check_rows(uploads.vector, vectors)
        previous = previous._replace(task_vectors=vectors)
        for name in ("agreement", "energy"):
            found, tasks = jnp.shape(getattr(previous, name)), slots.num_tasks
            if found != (tasks, tasks):
                raise ValueError(
                    f"aggregate: previous.{name}: found {list(found)}, expected [{tasks}, {tasks}]."
                )
    elif previous is not None:
        previous = check_unified(previous, "aggregate: previous", rows=slots.num_tasks, groups=None)
        check_like(
            uploads.vector,
            previous.vector,
            "aggregate: uploads.vector [clients, ...] against previous.vector [...]",
            leading=1,
        )
    return _aggregate(uploads, slots, config, previous, check_mesh(mesh, "aggregate"))


def nonfinite(uploads: Unified, slots: Slots) -> list[str]:
    """Names every upload that `aggregate` refuses: client, task and leaf. Runs on the host.

    Args:
      uploads: vector leaves `[clients, ...]`, scales `[slots]`.
      slots: the slots; absent ones (weight 0) are passed over.

    Returns:
      One line per offender, empty if every present upload is finite.
    """
    slots = check_slots(slots, "nonfinite")
    client, task = np.asarray(slots.client), np.asarray(slots.task)
    present = np.asarray(slots.weight) > 0
    scales = np.asarray(uploads.scales)
    lines = [
        f"client {client[s]}, task {task[s]}: scale is {scales[s]}, expected a finite number >= 0"
        for s in np.flatnonzero(present & ~(np.isfinite(scales) & (scales >= 0)))
    ]
    for path, leaf in leaf_items(uploads.vector):
        flat = jnp.asarray(leaf).reshape(slots.num_clients, -1)
        bad = np.asarray((~jnp.isfinite(flat)).sum(axis=1))
        for c in np.flatnonzero(bad):
            held = sorted(task[(client == c) & present].tolist())
            if held:
                lines.append(
                    f"client {c}, task{'s' if len(held) > 1 else ''} "
                    f"{', '.join(map(str, held))}: leaf {path}: {bad[c]} of {flat.shape[1]} "
                    "numbers are not finite"
                )
    return lines
