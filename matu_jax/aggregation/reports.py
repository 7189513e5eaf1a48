"""Who takes part in a round of the server, and with what scale and weight: eq. 6's w_s / sum w."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

from matu_jax.aggregation.choices import AggregationConfig
from matu_jax.aggregation.robust import (
    agreement_weights,
    clip_factors,
    sign_sums,
    smallest_length,
    vector_lengths,
)
from matu_jax.aggregation.sharding import Axes, all_over
from matu_jax.aggregation.types import Slots


class Reports(NamedTuple):
    """What counts of the slots' uploads.

    Attributes:
      slots: which client and task each is.
      accepted: bool `[slots]`, which are present, finite, and so take part.
      scales: lambda_s, float32 `[slots]`, after clipping.
      fraction: w_s / sum w over the accepted slots of its task, float32 `[slots]`; 0 for others.
      holders: int32 `[tasks]`, how many accepted slots a task has.
    """

    slots: Slots
    accepted: Bool[Array, "slots"]
    scales: Float32[Array, "slots"]
    fraction: Float32[Array, "slots"]
    holders: Int32[Array, "tasks"]


def reports_of(
    vector: list[Float[Array, "clients _"]],
    masks: list[UInt8[Array, "slots _"]],
    scales: Float32[Array, "slots"],
    slots: Slots,
    config: AggregationConfig,
    size: int,
    axes: Axes,
) -> Reports:
    """Takes in the uploads, with the defences that `config` names.

    Args:
      vector: u of every client, flat leaves `[clients, n]`.
      masks: m_s, packed, `[slots, bytes]`.
      scales: lambda_s, float32 `[slots]`.
      slots: which client and task each is, and its weight.
      config: its `clip`, `trim` and `weighting`.
      size: number of all parameters.
      axes: mesh axes over which parameters are sharded.
    """
    tasks = slots.num_tasks
    accepted = _accepted(vector, scales, slots, axes)
    weight = jnp.where(accepted, slots.weight, 0.0)
    weight = weight / jnp.maximum(weight.max(), jnp.finfo(jnp.float32).tiny)
    if config.clip:
        scales = _clipped(vector, scales, accepted, slots, config.clip, size, axes)
    if config.trim:
        weight = accepted.astype(jnp.float32)
    elif config.weighting == "agreement":
        common, nonzero = sign_sums(vector, masks, scales, accepted, slots, axes)
        weight = agreement_weights(common, nonzero, weight, slots.task, tasks)
    weight_sum = jnp.zeros(tasks, jnp.float32).at[slots.task].add(weight)
    holders = jnp.zeros(tasks, jnp.int32).at[slots.task].add(accepted.astype(jnp.int32))
    fraction = weight / jnp.where(weight_sum > 0, weight_sum, 1.0)[slots.task]
    return Reports(slots, accepted, scales, fraction, holders)


def _accepted(
    vector: list[Float[Array, "clients _"]],
    scales: Float32[Array, "slots"],
    slots: Slots,
    axes: Axes,
) -> Bool[Array, "slots"]:
    """Which slots are present and have finite uploads: bool `[slots]`."""
    finite = jnp.stack([jnp.isfinite(leaf).all(axis=1) for leaf in vector]).all(axis=0)
    finite = all_over(finite, axes)
    scale_ok = jnp.isfinite(scales) & (scales >= 0)
    return (slots.weight > 0) & scale_ok & finite[slots.client]


def _clipped(
    vector: list[Float[Array, "clients _"]],
    scales: Float32[Array, "slots"],
    accepted: Bool[Array, "slots"],
    slots: Slots,
    limit: float,
    size: int,
    axes: Axes,
) -> Float32[Array, "slots"]:
    """Scales, float32 `[slots]`, of which none makes its client's vector too long.

    `limit` counts medians over slots of scale times length of the client's unified vector, see
    `clip_factors`.
    """
    unit, length = (part[slots.client] for part in vector_lengths(vector, axes))
    lengths = jnp.where(accepted, scales * unit * length, 0.0)
    unseen = jnp.where(accepted, scales * smallest_length(size), 0.0)
    return scales * clip_factors(lengths, accepted, limit, slots.client, slots.num_clients, unseen)
