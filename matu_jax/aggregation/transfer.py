"""Eq. 8, transfer between tasks: who lends to whom, and how much."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from matu_jax.aggregation.choices import AggregationConfig
from matu_jax.aggregation.directions import TaskSimilarity
from matu_jax.aggregation.reports import Reports
from matu_jax.aggregation.sharding import Axes, largest_over
from matu_jax.aggregation.shrinkage import Evidence, gathered, independent_holders, shrinkage


def mixing_of(
    energies: Float32[Array, "tasks"],
    largest: Float32[Array, "tasks"],
    similarity: TaskSimilarity,
    reports: Reports,
    evidence: Evidence,
    config: AggregationConfig,
    axes: Axes,
) -> tuple[Float32[Array, "tasks tasks"], Evidence]:
    """Eq. 8's weights: what the tasks take of each other's vectors.

    Args:
      energies: each task's sum of squares over its slots, float32 `[tasks]`, for shrinkage; as the
        next, of this device's parameters.
      largest: each task's largest magnitude after eq. 6, float32 `[tasks]`: where it is 0, there is
        nothing to lend.
      similarity: eq. 7.
      reports: who took part.
      evidence: of all rounds before, for shrinkage.
      config: its `transfer`, `top_k` and `min_similarity`.
      axes: mesh axes over which parameters are sharded.

    Returns:
      Of which vectors (second axis) a task's (first axis) is made, float32 `[tasks, tasks]`; and
      the evidence with this round's.
    """
    learns, tasks = config.transfer == "shrinkage", reports.slots.num_tasks
    if config.transfer == "none" or (config.top_k == 0 and not learns) or tasks == 1:
        return jnp.eye(tasks, dtype=jnp.float32), evidence
    lenders = largest_over(largest, axes) > 0
    # A task that nobody reported keeps what it has; where nothing was compared, nobody lends.
    allowed = similarity.compared & lenders[None, :] & (reports.holders > 0)[:, None]
    if not learns:
        return _lending(similarity.matrix, allowed, config), evidence
    evidence = gathered(evidence, energies, similarity, reports.holders, axes)
    return shrinkage(*evidence, independent_holders(reports), allowed), evidence


def _lending(
    similarity: Float32[Array, "tasks tasks"],
    allowed: Bool[Array, "tasks tasks"],
    config: AggregationConfig,
) -> Float32[Array, "tasks tasks"]:
    """Eq. 8's weights by similarity: 1 for t itself, A_tt' for the lenders t' in Z(t), else 0.

    Args:
      similarity: A, float32 `[tasks, tasks]`.
      allowed: bool `[tasks, tasks]`, who may lend (second axis) to whom (first axis).
      config: its `top_k` (kappa), `min_similarity` (epsilon) and `transfer`: for "mean" each row
        is divided by its sum.
    """
    tasks = similarity.shape[0]
    allowed = allowed & ~jnp.eye(tasks, dtype=jnp.bool_)
    ranked = jnp.where(allowed, similarity, -1.0)
    values, index = jax.lax.top_k(ranked, min(config.top_k, tasks))
    values = jnp.where(values >= max(config.min_similarity, 0.0), values, 0.0)
    lent = jnp.zeros_like(similarity).at[jnp.arange(tasks)[:, None], index].set(values)
    mixing = jnp.eye(tasks, dtype=jnp.float32) + lent
    return mixing / mixing.sum(axis=1, keepdims=True) if config.transfer == "mean" else mixing
