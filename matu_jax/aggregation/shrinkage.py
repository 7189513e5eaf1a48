"""Transfer by shrinkage: how much of each task's change a task takes, from the round's evidence.

This rule is this project's own; the plain rules of eq. 8 borrow the same amount however precise a
task's own estimate is. Model: the change that slot s of task t reports is x_s = g_t + e_s, with
what the task really asks for, g_t, and noise e_s, independent between clients. Then for slots of
*different* clients E<x_s, x_s'> = <g_t, g_t'>, whether or not t = t': the noise cancels. In units
of a change's own energy, that mean over pairs is a correlation C_tt', and

    C_tt      is the part of a task's change that is signal (it takes two holders to tell),
    1 - C_tt  the part that is noise, of which averaging over h_t holders leaves (1 - C_tt) / h_t,
    C_tt'     what two tasks have in common.

The correlation is taken of directions (signs), as in eq. 7, so that nobody's scale counts, and
summed over rounds, weighted by energy: O(tasks^2) numbers. All tasks have a common direction,
since they start from one model; it says nothing about relatedness, so the median over pairs of
different tasks is removed: K = max(C - median, 0). The weights of the best linear estimate of g_t
from all tasks' changes, none of them negative (Wiener's filter, Henderson's BLUP), solve

    min_w  w^T (K + diag((1 - C_tt) / h_t)) w - 2 w^T K_t,    w >= 0,

here by multiplicative updates (Lee and Seung 2001); each row is then divided by its sum, so that
nothing shrinks towards zero. Little noise or many holders: a task keeps to itself. Much noise and a
task like it: both are pooled. A task whose C_tt cannot be known because it has one holder takes
the mean of those known; where no task has two holders, the largest C_tt' of its row, which borrows
more.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from matu_jax.aggregation.directions import TaskSimilarity
from matu_jax.aggregation.reports import Reports
from matu_jax.aggregation.sharding import Axes, total_over

_ITERATIONS = 100


class Evidence(NamedTuple):
    """What all rounds so far say of the tasks, as `ServerState` keeps it.

    Attributes:
      agreement: float32 `[tasks, tasks]`, sums over rounds of the correlation of directions between
        slots of different clients, times the energy of that round.
      energy: float32 `[tasks, tasks]`, sums over rounds of the energies; 0 where never compared.
    """

    agreement: Float32[Array, "tasks tasks"]
    energy: Float32[Array, "tasks tasks"]


def gathered(
    evidence: Evidence,
    energies: Float32[Array, "tasks"],
    similarity: TaskSimilarity,
    holders: Int32[Array, "tasks"],
    axes: Axes,
) -> Evidence:
    """The evidence with this round's.

    Args:
      evidence: of all rounds before.
      energies: each task's sum of squares over its slots' changes, float32 `[tasks]`; on each
        device that of its own parameters.
      similarity: eq. 7, of slots of different clients.
      holders: int32 `[tasks]`, of how many slots.
      axes: mesh axes over which parameters are sharded.
    """
    # Bounded, so that no upload makes the sum over rounds infinite.
    energies = jnp.minimum(total_over(energies, axes), 1e30)
    length = jnp.sqrt(energies / jnp.maximum(holders, 1).astype(jnp.float32))
    pair = jnp.where(similarity.compared, length[:, None] * length[None, :], 0.0)
    return Evidence(evidence.agreement + similarity.product * pair, evidence.energy + pair)


def independent_holders(reports: Reports) -> Float32[Array, "tasks"]:
    """How many equal holders a task's weighted mean is worth: float32 `[tasks]`; 1 for none.

    The variance of a mean with weights p_s that sum to 1 is that of one slot times sum p_s^2.
    """
    task, tasks = reports.slots.task, reports.holders.shape[0]
    spread = jnp.zeros(tasks, jnp.float32).at[task].add(jnp.square(reports.fraction))
    return 1 / jnp.where(spread > 0, spread, 1.0)


def shrinkage(
    agreement: Float32[Array, "tasks tasks"],
    energy: Float32[Array, "tasks tasks"],
    holders: Float32[Array, "tasks"],
    allowed: Bool[Array, "tasks tasks"],
) -> Float32[Array, "tasks tasks"]:
    """Weights with which the tasks' changes are mixed.

    Args:
      agreement: float32 `[tasks, tasks]`, see `Evidence`.
      energy: float32 `[tasks, tasks]`, see `Evidence`.
      holders: float32 `[tasks]`, how many equal holders a task's mean is worth this round.
      allowed: bool `[tasks, tasks]`, who may lend (second axis) to whom (first axis).

    Returns:
      float32 `[tasks, tasks]`, rows sum to 1, nothing negative; the identity row for a task that
      nothing may be lent to.
    """
    same = jnp.eye(agreement.shape[0], dtype=jnp.bool_)
    compared = energy > 0
    correlation = jnp.where(compared, agreement / jnp.where(compared, energy, 1.0), 0.0)
    others = compared & ~same
    common = jnp.nanmedian(jnp.where(others, correlation, jnp.nan))
    common = jnp.where(jnp.isfinite(common), jnp.maximum(common, 0.0), 0.0)

    own, known = jnp.diagonal(correlation), jnp.diagonal(compared)
    nearest = jnp.where(others, correlation, 0.0).max(axis=1)
    pooled = jnp.where(known, own, 0.0).sum() / jnp.maximum(known.sum(), 1).astype(jnp.float32)
    signal = jnp.where(known, own, jnp.where(known.any(), pooled, nearest))
    signal = jnp.clip(jnp.maximum(signal, nearest), 1e-3, 1.0)

    related = jnp.where(others, jnp.maximum(correlation - common, 0.0), 0.0)
    covariance = jnp.where(same, jnp.maximum(signal - common, 1e-3)[:, None], related)
    noise = (1 - signal) / jnp.maximum(holders, 1.0)
    total = covariance + jnp.where(same, noise[:, None], 0.0)
    # Who may not lend starts at 0 and stays there; what the others have in common still counts.
    lent = jnp.where(same | allowed, covariance, 0.0)

    def update(_, weights):
        met = jnp.matmul(weights, total, precision=jax.lax.Precision.HIGHEST)
        return weights * lent / jnp.maximum(met, 1e-12)

    weights = jax.lax.fori_loop(0, _ITERATIONS, update, lent)
    return weights / weights.sum(axis=1, keepdims=True)
