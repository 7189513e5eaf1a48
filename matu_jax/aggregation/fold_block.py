"""Eqs. 1 to 4 for a block of parameters, beside the paper's notation; see `matu_jax.aggregation`.

Slot s has the task vector tau_s; a group of slots (a client's, or all of them) has the elected
signs sigma, the magnitudes mu and the unified vector u = sigma * mu; a slot has the mask m_s and
the scale lambda_s. Whatever drives this from block to block (a scan, a kernel on GPU or TPU) says
where a block's numbers come from and go to.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from matu_jax.aggregation.choices import Magnitude
from matu_jax.aggregation.storage import clip_to

FAR = 2.0**-64
"""By which sums of magnitudes are made smaller that would overflow."""


class Grouped(NamedTuple):
    """Slots in the order of their groups.

    Attributes:
      order: int32 `[slots]`, the slots of group 0 first.
      starts: int32 `[groups + 1]`, where in `order` a group begins, and where the last one ends.
    """

    order: Int[Array | np.ndarray, "slots"]
    starts: Int[Array | np.ndarray, "groups+1"]


def grouped(groups: Int[Array, "slots"] | None, slots: int, num_groups: int) -> Grouped:
    """Sorts slots by their groups; slots of one group stay in order. None: all are in one."""
    if groups is None:  # NumPy's arrays are constants of a program: nothing is computed for them
        return Grouped(np.arange(slots, dtype=np.int32), np.array([0, slots], np.int32))
    edges = jnp.arange(num_groups + 1, dtype=groups.dtype)
    starts = (groups[None, :] < edges[:, None]).sum(axis=1, dtype=jnp.int32)
    return Grouped(jnp.argsort(groups, stable=True).astype(jnp.int32), starts)


class Running(NamedTuple):
    """What eqs. 1 and 2 need of the slots of a group so far; float32 blocks.

    Attributes:
      sums: sum of tau_s.
      high: of the positive numbers the largest, or for the mean their sum.
      low: of the negative numbers the smallest, or for the mean their sum.
      highs: for the mean, how many are positive; else None.
      lows: for the mean, how many are negative; else None.
    """

    sums: jax.Array
    high: jax.Array
    low: jax.Array
    highs: jax.Array | None
    lows: jax.Array | None


def grown(running: Running, x: jax.Array, part: float) -> Running:
    """With one more task vector; for the mean, sums of magnitudes are of this part of them."""
    sums, high, low, highs, lows = running
    if highs is None or lows is None:
        return Running(sums + x, jnp.maximum(high, x), jnp.minimum(low, x), None, None)
    return Running(
        sums + x,
        high + jnp.maximum(x, 0.0) * part,
        low + jnp.minimum(x, 0.0) * part,
        highs + (x > 0).astype(jnp.float32),
        lows + (x < 0).astype(jnp.float32),
    )


def unified_block(running: Running, part: float, dtype: Any) -> jax.Array:
    """Eqs. 1 and 2: u = sigma * mu, in the storage dtype.

    Of the elected sign and the largest magnitude is the largest number, or the smallest. An
    infinity that came in stays, and so does a NaN, for the server to refuse; a mean that overflows
    is clipped.
    """
    sums, high, low, highs, lows = running
    chosen = jnp.where(sums > 0, high, jnp.where(sums < 0, low, 0.0 * sums))
    if highs is None or lows is None:
        return chosen.astype(dtype)
    many = jnp.where(sums > 0, highs, lows)
    mean = chosen / jnp.maximum(many, 1.0) * (1 / part)
    return jnp.where(jnp.isinf(chosen), chosen.astype(dtype), clip_to(mean, dtype))


def agreeing(x: jax.Array, u: jax.Array) -> jax.Array:
    """Eq. 3, m_s = [tau_s * u > 0], of signs, since the product may vanish in float32."""
    return ((x > 0) & (u > 0)) | ((x < 0) & (u < 0))


class FoldMemory(NamedTuple):
    """Where a block's task vectors come from, and where goes what is made of them.

    Attributes:
      task_vector: `slot -> tau_s`, zeros where the slot is absent, float32 `[..., 8, columns]`.
      put_vector: `(carry, group, u) -> carry`; u is in the storage dtype.
      put_slot: `(carry, slot, mask, magnitudes) -> carry`: m_s, bool, and |tau_s| and |m_s * u|, to
        be added up.
      zeros: a block of zeros.
      dtype: the storage dtype.
    """

    task_vector: Callable[[Any], jax.Array]
    put_vector: Callable[[Any, Any, jax.Array], Any]
    put_slot: Callable[[Any, Any, jax.Array, tuple[jax.Array, jax.Array]], Any]
    zeros: jax.Array
    dtype: Any


def fold_block(
    memory: FoldMemory,
    slots: Grouped,
    magnitude: Magnitude,
    carry: Any,
    groups: tuple[Any, Any] | None = None,
) -> Any:
    """Eqs. 1 to 4 for a block of parameters, one group of slots after the other.

    Args:
      memory: what is read and written.
      slots: which slots each group has.
      magnitude: eq. 2's, "max" or "mean".
      carry: what `memory` carries on.
      groups: the first of them and the one behind the last; None: all.
    """
    count = slots.order.shape[0]
    # With it, a sum of finite numbers near the largest float32 stays finite.
    part = 1 / float(2 ** (count - 1).bit_length())
    zeros = memory.zeros
    many = zeros if magnitude == "mean" else None

    def fold_group(group, carry):
        first, last = slots.starts[group], slots.starts[group + 1]

        def grow(place, running):
            return grown(running, memory.task_vector(slots.order[place]), part)

        start = Running(zeros, zeros, zeros, many, many)
        running = jax.lax.fori_loop(first, last, grow, start)
        u = unified_block(running, part, memory.dtype)
        carry = memory.put_vector(carry, group, u)
        u = u.astype(jnp.float32)

        def mark(place, carry):
            slot = slots.order[place]
            x = memory.task_vector(slot)
            mask = agreeing(x, u)
            kept = jnp.where(mask, jnp.abs(u), 0.0)
            return memory.put_slot(carry, slot, mask, (jnp.abs(x), kept))

        return jax.lax.fori_loop(first, last, mark, carry)

    first, last = (0, slots.starts.shape[0] - 1) if groups is None else groups
    return jax.lax.fori_loop(first, last, fold_group, carry)
