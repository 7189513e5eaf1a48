"""Eqs. 5 and 6 on flat leaves: the weighted mean of a task's holders, gated by their agreement."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Shaped, UInt8

from matu_jax.aggregation.blocks import (
    Block,
    loop_zeros,
    over_blocks,
    over_groups,
    put_row,
)
from matu_jax.aggregation.choices import AggregationConfig
from matu_jax.aggregation.directions import gram
from matu_jax.aggregation.modulation import UploadedLeaf
from matu_jax.aggregation.reports import Reports
from matu_jax.aggregation.robust import counted, within_trim
from matu_jax.aggregation.storage import as_bits, clip_to, from_bits, joined_eighths


class _Running(NamedTuple):
    """What goes from slot to slot within a block, those of one task after the other.

    Attributes:
      vectors: tau_t of eq. 6 as bits, `[tasks, n]`.
      signs: each task's sum of signs, float32 `[tasks, length]`; `[tasks, 0]` if not asked for.
      energies: each task's sum of squares over its slots, float32 `[tasks]`, if asked for.
      mean: the task's weighted sum of the slots so far, float32 `[1, length]`.
      sign: the task's sum of signs of the slots so far, float32 `[1, length]`.
      unpacked: task vectors of this slot and of the one before, float32 `[2, bytes, 8]`.
      extremes: see `within_trim`, float32 `[2, trim, length]`.
    """

    vectors: Shaped[Array, "tasks n"]
    signs: Float32[Array, "tasks length"]
    energies: Float32[Array, "tasks"]
    mean: Float32[Array, "1 length"]
    sign: Float32[Array, "1 length"]
    unpacked: Float32[Array, "2 bytes 8"]
    extremes: Float32[Array, "2 trim length"]


def same_task(
    vector: Float[Array, "clients n"],
    masks: UInt8[Array, "slots bytes"],
    old: Float[Array, "tasks n"],
    reports: Reports,
    config: AggregationConfig,
) -> tuple[Float[Array, "tasks n"], Float32[Array, "tasks tasks"], Float32[Array, "tasks"]]:
    """Eqs. 5 and 6 for one flat leaf: tau_t = g_t * sum (w_s / sum w) tau_s.

    Args:
      vector: u of every client, `[clients, n]` in the storage dtype.
      masks: m_s, packed, `[slots, bytes]`.
      old: `[tasks, n]`, what a task keeps that nobody reported.
      reports: who takes part, with what weight.
      config: its `agreement_threshold` and `trim`; `similarity` and `transfer` say what else is
        asked for.

    Returns:
      tau_t, `[tasks, n]` in the storage dtype; products of the tasks' sums of signs, `[tasks,
      tasks]`, if slots of different clients are to be compared (eq. 7); and sums of squares
      `[tasks]`, if transfer is by shrinkage (eq. 8). Zeros where not asked for.
    """
    slots, dtype = reports.slots, vector.dtype
    tasks, compares = slots.num_tasks, config.similarity == "cross_client"
    old = as_bits(clip_to(old.astype(jnp.float32), dtype))
    uploads = UploadedLeaf(
        as_bits(vector), dtype, masks, reports.scales, reports.accepted, slots.client
    )

    def zeros(*shape, dtype=jnp.float32):
        accepted, scales, fraction = reports.accepted, reports.scales, reports.fraction
        inputs = vector, masks, scales, fraction, accepted, slots.client, slots.task
        return loop_zeros(shape, dtype, *inputs)

    def visit(block, carry):
        vectors, products, energies = carry
        running = _Running(
            vectors,
            zeros(tasks, block.length if compares else 0),
            energies,
            zeros(1, block.length),
            zeros(1, block.length),
            zeros(2, block.mask_bytes, 8),
            zeros(2, config.trim, block.length),
        )

        def add(running, slot, task, first):
            return _add_slot(running, slot, task, first, uploads, reports, config, block)

        running = over_groups(slots.task, add, running)
        if compares:
            products = products + gram([running.signs], 1, signs=False)
        return running.vectors, products, running.energies

    carry = old + zeros(*old.shape, dtype=old.dtype), zeros(tasks, tasks), zeros(tasks)
    vectors, products, energies = over_blocks(old.shape[1], visit, carry)
    return from_bits(vectors, dtype), products, energies


def _add_slot(
    running: _Running,
    slot: jax.Array,
    task: jax.Array,
    first: jax.Array,
    uploads: UploadedLeaf,
    reports: Reports,
    config: AggregationConfig,
    block: Block,
) -> _Running:
    """Takes in one block of one slot; `first` says whether it is the first slot of its task."""
    vectors, signs, energies, mean, sign, unpacked, extremes = running
    # Put down and taken up again, or XLA on CPU would unpack the mask for every use.
    place = (slot % 2, 0, 0)
    unpacked = jax.lax.dynamic_update_slice(unpacked, uploads.task_vector(slot, block), place)
    x = jax.lax.dynamic_slice(unpacked, place, (1, *unpacked.shape[1:]))
    x = joined_eighths(x, block.length)
    sign = jnp.where(first, 0.0, sign) + jnp.sign(x)
    held = reports.holders[task]
    gate = _gate(sign, held, config.agreement_threshold)
    fraction, energy = reports.fraction[slot], 1.0
    if config.trim:
        absent = jnp.where(first, -jnp.inf, extremes)
        grown, passed = within_trim(absent, x[0], held)
        extremes = jnp.where(reports.accepted[slot], grown, absent)
        x = jnp.where(reports.accepted[slot], passed, 0.0)[None]
        fraction = 1 / counted(config.trim, held)
        energy = held.astype(jnp.float32) * fraction
    mean = jnp.where(first, 0.0, mean) + fraction * x
    value = as_bits(clip_to(gate * mean, uploads.dtype))
    vectors = block.put(vectors, task, jnp.where(held > 0, value, block.take(vectors, task)))
    if config.similarity == "cross_client":
        signs = put_row(signs, task, sign)
    if config.transfer == "shrinkage":
        energies = energies.at[task].add(energy * jnp.square(x).sum())
    return _Running(vectors, signs, energies, mean, sign, unpacked, extremes)


def _gate(
    signs: Float32[Array, "1 length"], holders: Int[Array, ""], threshold: float
) -> Float32[Array, "1 length"]:
    """Eq. 5, g = 1 where alpha = |mean sgn(tau_s)| >= rho, else alpha.

    Args:
      signs: sum sgn(tau_s), float32 `[1, length]`.
      holders: of how many slots, int32 scalar.
      threshold: rho.

    Returns:
      float32 `[1, length]`, in [0, 1].
    """
    agreement = jnp.abs(signs) / jnp.maximum(holders, 1).astype(jnp.float32)
    return jnp.where(agreement >= threshold, 1.0, agreement)
