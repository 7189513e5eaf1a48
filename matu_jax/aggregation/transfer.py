"""Eq. 8, transfer between tasks: who lends to whom, how much, and the mixed task vectors."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from matu_jax.aggregation.choices import AggregationConfig
from matu_jax.aggregation.directions import TaskSimilarity
from matu_jax.aggregation.reports import Reports
from matu_jax.aggregation.sharding import Axes, any_over
from matu_jax.aggregation.shrinkage import Evidence, gathered, independent_holders, shrinkage
from matu_jax.aggregation.storage import clip_to


def transferred(
    own: list[Float[Array, "tasks _"]],
    energies: Float32[Array, "tasks"],
    similarity: TaskSimilarity,
    reports: Reports,
    evidence: Evidence,
    config: AggregationConfig,
    axes: Axes,
) -> tuple[list[Float[Array, "tasks _"]], Evidence]:
    """Eq. 8: what the tasks take of each other's vectors.

    Args:
      own: tau_t of eq. 6, flat leaves `[tasks, n]`.
      energies: each task's sum of squares over its slots, float32 `[tasks]`, for shrinkage.
      similarity: eq. 7.
      reports: who took part.
      evidence: of all rounds before, for shrinkage.
      config: its `transfer`, `top_k` and `min_similarity`.
      axes: mesh axes over which parameters are sharded.

    Returns:
      tau_t, flat leaves `[tasks, n]` in the storage dtype, and the evidence with this round's.
    """
    learns = config.transfer == "shrinkage"
    nobody = config.top_k == 0 and not learns
    if config.transfer == "none" or nobody or reports.slots.num_tasks == 1:
        return own, evidence
    lenders = jnp.stack([(leaf != 0).any(axis=1) for leaf in own]).any(axis=0)
    lenders = any_over(lenders, axes)
    # A task that nobody reported keeps what it has; where nothing was compared, nobody lends.
    allowed = similarity.compared & lenders[None, :] & (reports.holders > 0)[:, None]
    if learns:
        evidence = gathered(evidence, energies, similarity, reports.holders, axes)
        mixing = shrinkage(*evidence, independent_holders(reports), allowed)
    else:
        mixing = _lending(similarity.matrix, allowed, config)
    return [_mixed(mixing, leaf) for leaf in own], evidence


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


def _mixed(
    mixing: Float32[Array, "tasks tasks"], vectors: Float[Array, "tasks n"]
) -> Float[Array, "tasks n"]:
    """Weights `[tasks, tasks]` times vectors `[tasks, n]`, in the vectors' dtype."""
    product = jnp.matmul(mixing, vectors.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return clip_to(product, vectors.dtype)
