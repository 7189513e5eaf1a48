"""Who takes part in a round of the server, and with what scale and weight: eq. 6's w_s / sum w."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

from matu_jax.aggregation.choices import AggregationConfig
from matu_jax.aggregation.robust import (
    Lengths,
    agreement_weights,
    clip_factors,
    smallest_length,
    vector_lengths,
)
from matu_jax.aggregation.sharding import Axes
from matu_jax.aggregation.signs import Signs, compared_signs
from matu_jax.aggregation.storage import whole_tiles
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
) -> tuple[Reports, Signs | None]:
    """Takes in the uploads, with the defences that `config` names, and compares their signs.

    Args:
      vector: u of every client, flat leaves `[clients, n]`.
      masks: m_s, packed, `[slots, bytes]`.
      scales: lambda_s, float32 `[slots]`.
      slots: which client and task each is, and its weight.
      config: its `clip`, `trim`, `weighting` and `similarity`.
      size: number of all parameters.
      axes: mesh axes over which parameters are sharded.

    Returns:
      The reports; and what was found of their signs, or None where nobody asks for it.
    """
    tasks = slots.num_tasks
    lengths = vector_lengths(whole_tiles(vector), axes)
    accepted = (slots.weight > 0) & jnp.isfinite(scales) & (scales >= 0)
    accepted = accepted & lengths.finite[slots.client]
    weight = jnp.where(accepted, slots.weight, 0.0)
    weight = weight / jnp.maximum(weight.max(), jnp.finfo(jnp.float32).tiny)
    if config.clip:
        scales = _clipped(lengths, scales, accepted, slots, config.clip, size)
    weighs = config.weighting == "agreement" and not config.trim
    signs = None
    if weighs or config.similarity == "cross_client":
        signs = compared_signs(vector, masks, accepted & (scales > 0), slots, axes)
    if config.trim:
        weight = accepted.astype(jnp.float32)
    elif weighs and signs:
        weight = agreement_weights(signs.common, signs.nonzero, weight, slots.task, tasks)
    weight_sum = jnp.zeros(tasks, jnp.float32).at[slots.task].add(weight)
    holders = jnp.zeros(tasks, jnp.int32).at[slots.task].add(accepted.astype(jnp.int32))
    fraction = weight / jnp.where(weight_sum > 0, weight_sum, 1.0)[slots.task]
    return Reports(slots, accepted, scales, fraction, holders), signs


def _clipped(
    lengths: Lengths,
    scales: Float32[Array, "slots"],
    accepted: Bool[Array, "slots"],
    slots: Slots,
    limit: float,
    size: int,
) -> Float32[Array, "slots"]:
    """Scales, float32 `[slots]`, of which none makes its client's vector too long.

    `lengths` are those of the clients' unified vectors; `limit` counts medians over slots of scale
    times length, see `clip_factors`.
    """
    unit, length = lengths.unit[slots.client], lengths.length[slots.client]
    longest = jnp.where(accepted, scales * unit * length, 0.0)
    unseen = jnp.where(accepted, scales * smallest_length(size), 0.0)
    return scales * clip_factors(longest, accepted, limit, slots.client, slots.num_clients, unseen)
