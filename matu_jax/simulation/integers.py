"""Sums of integers on devices without 64 bits: as two halves, whose sums int32 holds."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Shaped


def halved(x: Shaped[Array, "..."]) -> Int32[Array, "2 ..."]:
    """Integers or bools of at most 32 bits as `high * 2**16 + low`, low from 0 to 2**16 - 1."""
    if x.dtype != jnp.uint32:
        x = x.astype(jnp.int32)
    # Of unsigned numbers, unlike of others, zeros come in from above.
    unsigned = jnp.issubdtype(x.dtype, jnp.unsignedinteger)
    shift = jax.lax.shift_right_logical if unsigned else jax.lax.shift_right_arithmetic
    high, low = shift(x, x.dtype.type(16)), jnp.bitwise_and(x, x.dtype.type(0xFFFF))
    return jnp.stack([high.astype(jnp.int32), low.astype(jnp.int32)])


def over_batches(x: Shaped[Array, "batches ..."]) -> Shaped[Array, "..."]:
    """The sum over batches: of floats, or of sums of halves, whose low ones are carried first.

    Args:
      x: float32, or int32 `[batches, 2, ...]`, sums over at most 2**15 examples each.

    Returns:
      float32 or int32 `[2, ...]`, of up to 2**15 batches.
    """
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x.sum(axis=0)
    carried = jax.lax.shift_right_logical(x[:, 1], jnp.int32(16))
    low = jnp.bitwise_and(x[:, 1], jnp.int32(0xFFFF))
    return jnp.stack([(x[:, 0] + carried).sum(axis=0), low.sum(axis=0)])


def joined(x: Shaped[np.ndarray, "slots ..."]) -> Shaped[np.ndarray, "slots ..."]:
    """Floats as they are; halves int32 `[slots, 2, ...]` as int64 `[slots, ...]`."""
    if np.issubdtype(x.dtype, np.floating):
        return x
    return x[:, 0].astype(np.int64) * 2**16 + x[:, 1]
