"""Eqs. 5 and 6 on flat leaves, driven as the program's platform does best."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from matu_jax.aggregation.blocks import add_row, in_lanes, loop_zeros, over_blocks
from matu_jax.aggregation.choices import AggregationConfig
from matu_jax.aggregation.fold_block import Grouped, grouped
from matu_jax.aggregation.modulation import modulated_block
from matu_jax.aggregation.platforms import where_lowered
from matu_jax.aggregation.reports import Reports
from matu_jax.aggregation.same_task_block import Holders, TaskMemory, same_task_block
from matu_jax.aggregation.storage import TILE, as_bits, clip_to, from_bits


def same_task(
    vector: Float[Array, "clients n"],
    masks: UInt8[Array, "slots bytes"],
    old: Float[Array, "tasks n"] | None,
    reports: Reports,
    config: AggregationConfig,
) -> tuple[Float[Array, "tasks n"], Float32[Array, "tasks"], Float32[Array, "tasks"]]:
    """Eqs. 5 and 6 for the whole tiles of one flat leaf.

    Args:
      vector: u of every client, `[clients, n]` in the storage dtype.
      masks: m_s, packed, `[slots, bytes]`.
      old: `[tasks, n]`, what a task keeps that nobody reported; None: zeros.
      reports: who takes part, with what weight.
      config: its `agreement_threshold` and `trim`.

    Returns:
      tau_t, `[tasks, n]` in the storage dtype; each task's sum of squares over its slots, and its
      largest magnitude, float32 `[tasks]`.
    """
    slots = reports.slots
    holders = Holders(
        grouped(slots.task, slots.task.shape[0], slots.num_tasks),
        slots.client,
        reports.accepted.astype(jnp.int32),
        reports.scales,
        reports.fraction,
        reports.holders,
    )
    kept = [] if old is None else [clip_to(old.astype(jnp.float32), vector.dtype)]
    vectors, energies, largest = _same_task_flat(
        vector,
        masks,
        *jax.tree.leaves(holders),
        *kept,
        threshold=config.agreement_threshold,
        trim=config.trim,
    )
    return vectors, energies, largest


def by_scan(
    vector: Float[Array, "clients n"],
    masks: UInt8[Array, "slots bytes"],
    holders: Holders,
    old: Float[Array, "tasks n"] | None,
    *,
    threshold: float,
    trim: int,
) -> tuple[Float[Array, "tasks n"], Float32[Array, "tasks"], Float32[Array, "tasks"]]:
    """`same_task_block` driven over a flat leaf by a scan. Args and result as for `same_task`."""
    dtype, (tasks,) = vector.dtype, holders.held.shape
    bits, inputs = as_bits(vector), (vector, masks, *jax.tree.leaves(holders))

    def visit(block, carry):
        def task_vector(slot):
            u = from_bits(block.take(bits, holders.client[slot]), dtype)
            taken = holders.accepted[slot] > 0
            scale = jnp.where(taken, holders.scales[slot], 0.0)
            x = modulated_block(u, block.take_bytes(masks, slot), scale)
            return jnp.where(taken, x, 0.0)

        def put_task(carry, task, value, reported, squares):
            vectors, energies, largest = carry
            value = jnp.where(reported, as_bits(clip_to(value, dtype)), block.take(vectors, task))
            top = jnp.abs(from_bits(value, dtype).astype(jnp.float32)).max()
            vectors = block.put(vectors, task, value)
            energies = add_row(energies, task, in_lanes(squares))
            return vectors, energies, largest.at[task].max(top)

        memory = TaskMemory(task_vector, put_task, block.zeros(*inputs))
        return same_task_block(memory, holders, threshold, trim, carry)

    shape = (tasks, vector.shape[1])
    vectors = as_bits(loop_zeros(shape, dtype, *inputs) if old is None else old)
    vectors = vectors + loop_zeros(shape, vectors.dtype, *inputs)
    energies = loop_zeros((tasks, TILE), jnp.float32, *inputs)
    largest = loop_zeros((tasks,), jnp.float32, *inputs)
    vectors, energies, largest = over_blocks(shape[1], visit, (vectors, energies, largest))
    return from_bits(vectors, dtype), energies.sum(axis=1), largest


def _unflattened(arrays):
    order, starts, client, accepted, scales, fraction, held, *old = arrays
    holders = Holders(Grouped(order, starts), client, accepted, scales, fraction, held)
    return holders, old[0] if old else None


def _by_scan(vector, masks, *rest, threshold, trim):
    return by_scan(vector, masks, *_unflattened(rest), threshold=threshold, trim=trim)


def _by_kernel(platform):
    def form(vector, masks, *rest, threshold, trim):
        from matu_jax.aggregation import server_kernels  # Pallas is heavy, and no one else's

        kernel = {
            "cuda": server_kernels.same_task_on_gpu,
            "tpu": server_kernels.same_task_on_tpu,
        }[platform]
        holders, old = _unflattened(rest)
        slots, tasks = holders.client.shape[0], holders.held.shape[0]
        fits = server_kernels.fits(vector, vector.shape[0], slots, tasks, platform)
        way = kernel if fits else by_scan
        return way(vector, masks, holders, old, threshold=threshold, trim=trim)

    return form


def _shapes(vector, masks, *rest, threshold, trim):
    (tasks,) = _unflattened(rest)[0].held.shape
    row = jax.ShapeDtypeStruct((tasks,), jnp.float32)
    return [jax.ShapeDtypeStruct((tasks, vector.shape[1]), vector.dtype), row, row]


_same_task_flat = where_lowered(
    "matu_same_task", _shapes, _by_scan, cuda=_by_kernel("cuda"), tpu=_by_kernel("tpu")
)
