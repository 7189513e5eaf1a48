"""Eqs. 8 and 9 on flat leaves: task vectors mixed, and folded into what is kept and handed out."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8

from matu_jax.aggregation.choices import Magnitude
from matu_jax.aggregation.fold import scales_of, scanned
from matu_jax.aggregation.fold_block import Grouped, grouped
from matu_jax.aggregation.platforms import where_lowered
from matu_jax.aggregation.sharding import Axes, total_over
from matu_jax.aggregation.storage import clip_to, mask_bytes
from matu_jax.aggregation.types import Slots

Finished = tuple[
    Float[Array, "tasks n"],
    Float[Array, "1 n"],
    UInt8[Array, "tasks bytes"],
    Float32[Array, "tasks 4"],
    Float[Array, "clients n"],
    UInt8[Array, "slots bytes"],
    Float32[Array, "slots 4"],
]
"""What becomes of a leaf's tasks: their vectors; all folded into one; each client's into one."""

Folds = tuple[list[Float[Array, "_ _"]], list[UInt8[Array, "_ _"]], Float32[Array, "_"]]
"""Flat vectors, packed masks and scales, as `fold` gives them."""


def finished(
    own: list[Float[Array, "tasks _"]],
    mixing: Float32[Array, "tasks tasks"],
    start: list[Float[Array, "tasks _"]] | None,
    slots: Slots,
    magnitude: Magnitude,
    axes: Axes,
) -> tuple[list[Float[Array, "tasks _"]], Folds, Folds]:
    """Eq. 8's tau_t, and eq. 9's folds of them.

    Args:
      own: tau_t of eq. 6, flat leaves `[tasks, n]`, of which whole tiles count.
      mixing: eq. 8's weights, whose rows say of which vectors a task's is made.
      start: what is added to the mixed vectors, where these are changes; else None.
      slots: which client and task each is; all of them are folded, absent ones too.
      magnitude: "max" or "mean".
      axes: mesh axes over which parameters are sharded.

    Returns:
      tau_t, flat leaves `[tasks, n]`; all of them folded into one; and for each client, its tasks'
      into one.
    """
    count, tasks = slots.client.shape[0], slots.num_tasks
    by_client = grouped(slots.client, count, slots.num_clients)
    parts = [
        _finish_flat(
            leaf,
            mixing,
            *by_client,
            slots.task,
            *([] if start is None else [start[i]]),
            magnitude=magnitude,
        )
        for i, leaf in enumerate(own)
    ]
    mixed, one, one_masks, one_sums, down, down_masks, down_sums = zip(*parts, strict=True)

    def scales(sums, groups, rows):
        return scales_of(
            total_over(jnp.stack(sums).sum(axis=0), axes), groups, jnp.ones(rows, jnp.bool_)
        )

    return (
        list(mixed),
        (list(one), list(one_masks), scales(one_sums, None, tasks)),
        (list(down), list(down_masks), scales(down_sums, slots.client, count)),
    )


def by_scan(
    own: Float[Array, "tasks n"],
    mixing: Float32[Array, "tasks tasks"],
    start: Float[Array, "tasks n"] | None,
    by_client: Grouped,
    task: Int[Array, "slots"],
    *,
    magnitude: Magnitude,
) -> Finished:
    """Of one flat leaf: a matrix product, and two scans.

    Args:
      own: tau_t of eq. 6.
      mixing: eq. 8's weights.
      start: what is added to the mixed vectors; None: nothing.
      by_client: slots in the order of their clients.
      task: int32, which task each slot is of.
      magnitude: "max" or "mean".

    Returns:
      tau_t; u, masks and sums (see `fold.scanned`) of all tasks in one; and of every client's.
    """
    tasks, dtype = own.shape[0], own.dtype
    product = jnp.matmul(mixing, own.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    mixed = clip_to(product, dtype)
    if start is not None:
        mixed = clip_to(start.astype(jnp.float32) + mixed.astype(jnp.float32), dtype)
    rows, listed = np.arange(tasks, dtype=np.int32), np.ones(task.shape[0], np.bool_)
    everybody = grouped(None, tasks, 1)
    one = scanned(mixed, rows, everybody, np.ones(tasks, np.bool_), magnitude)
    return mixed, *one, *scanned(mixed, task, by_client, listed, magnitude)


def _by_scan(own, mixing, order, starts, task, *start, magnitude):
    before = start[0] if start else None
    return by_scan(own, mixing, before, Grouped(order, starts), task, magnitude=magnitude)


def _by_kernel(platform):
    def form(own, mixing, order, starts, task, *start, magnitude):
        from matu_jax.aggregation import server_kernels  # Pallas is heavy, and no one else's

        kernel = {
            "cuda": server_kernels.finish_on_gpu,
            "tpu": server_kernels.finish_on_tpu,
        }[platform]
        clients, slots, tasks = starts.shape[0] - 1, task.shape[0], own.shape[0]
        fits = server_kernels.fits(own, clients, slots, tasks, platform)
        before, by_client = start[0] if start else None, Grouped(order, starts)
        return (kernel if fits else by_scan)(
            own, mixing, before, by_client, task, magnitude=magnitude
        )

    return form


def _shapes(own, mixing, order, starts, task, *start, magnitude):
    (tasks, size), slots, clients = own.shape, task.shape[0], starts.shape[0] - 1

    def folds(groups, rows):
        return [
            jax.ShapeDtypeStruct((groups, size), own.dtype),
            jax.ShapeDtypeStruct((rows, mask_bytes(size)), jnp.uint8),
            jax.ShapeDtypeStruct((rows, 4), jnp.float32),
        ]

    mixed = jax.ShapeDtypeStruct((tasks, size), own.dtype)
    return [mixed, *folds(1, tasks), *folds(clients, slots)]


_finish_flat = where_lowered(
    "matu_finish", _shapes, _by_scan, cuda=_by_kernel("cuda"), tpu=_by_kernel("tpu")
)
