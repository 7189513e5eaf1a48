"""Eqs. 5 and 6: the weighted mean of a task's holders, gated by their agreement."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from matu_jax.aggregation.fold_block import Grouped
from matu_jax.aggregation.robust import counted, no_extremes, within_trim
from matu_jax.aggregation.storage import sign_of


class Holders(NamedTuple):
    """Of a round's slots, what eqs. 5 and 6 read one by one.

    Attributes:
      by_task: slots in the order of their tasks.
      client: int32 `[slots]`.
      accepted: int32 `[slots]`, 1 for those that take part.
      scales: lambda_s, float32 `[slots]`.
      fraction: w_s / sum w, float32 `[slots]`.
      held: int32 `[tasks]`, how many accepted slots a task has.
    """

    by_task: Grouped
    client: Int[Array, "slots"]
    accepted: Int[Array, "slots"]
    scales: Float32[Array, "slots"]
    fraction: Float32[Array, "slots"]
    held: Int[Array, "tasks"]


class TaskMemory(NamedTuple):
    """Where a block of the uploads comes from, and where goes what is made of it.

    Attributes:
      task_vector: `slot -> tau_s`, zeros where it takes no part, float32 `[..., 8, columns]`.
      put_task: `(carry, task, tau_t, reported, squares) -> carry`: tau_t of eq. 6 in float32, which
        counts where somebody has reported the task; and the squares of its slots' numbers, to be
        added up.
      zeros: a block of zeros.
    """

    task_vector: Callable[[Any], jax.Array]
    put_task: Callable[[Any, Any, jax.Array, jax.Array, jax.Array], Any]
    zeros: jax.Array


def same_task_block(
    memory: TaskMemory,
    holders: Holders,
    threshold: float,
    trim: int,
    carry: Any,
    tasks: tuple[Any, Any] | None = None,
) -> Any:
    """Eqs. 5 and 6 for a block of parameters: tau_t = g_t * sum (w_s / sum w) tau_s.

    Args:
      memory: what is read and written.
      holders: who takes part, with what weight.
      threshold: rho of eq. 5.
      trim: how many numbers are left out on either side, see `DefenceConfig`.
      carry: what `memory` carries on.
      tasks: the first of them and the one behind the last; None: all.
    """
    zeros, starts = memory.zeros, holders.by_task.starts

    def of_task(task, carry):
        held = holders.held[task]

        def add(place, running):
            signs, mean, squares, extremes = running
            slot = holders.by_task.order[place]
            x, fraction, energy = memory.task_vector(slot), holders.fraction[slot], 1.0
            signs = signs + sign_of(x)
            if trim:
                taken = holders.accepted[slot] > 0
                grown, passed = within_trim(extremes, x, held)
                extremes = jax.tree.map(
                    lambda new, old: jnp.where(taken, new, old), grown, extremes
                )
                x = jnp.where(taken, passed, 0.0)
                fraction = 1 / counted(trim, held)
                energy = held.astype(jnp.float32) * fraction
            return signs, mean + fraction * x, squares + energy * (x * x), extremes

        start = (zeros, zeros, zeros, no_extremes(trim, zeros))
        signs, mean, squares, _ = jax.lax.fori_loop(starts[task], starts[task + 1], add, start)
        return memory.put_task(carry, task, _gate(signs, held, threshold) * mean, held > 0, squares)

    first, last = (0, starts.shape[0] - 1) if tasks is None else tasks
    return jax.lax.fori_loop(first, last, of_task, carry)


def _gate(signs: jax.Array, holders: Int[Array, ""], threshold: float) -> jax.Array:
    """Eq. 5, g = 1 where alpha = |mean sgn(tau_s)| >= rho, else alpha.

    Args:
      signs: sum sgn(tau_s), a float32 block.
      holders: of how many slots, int32 scalar.
      threshold: rho.

    Returns:
      A float32 block, in [0, 1].
    """
    agreement = jnp.abs(signs) / jnp.maximum(holders, 1).astype(jnp.float32)
    return jnp.where(agreement >= threshold, 1.0, agreement)
