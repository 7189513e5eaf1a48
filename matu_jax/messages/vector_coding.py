"""A message's vector: its numbers as they are written, and what the other side makes of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int8, Shaped, UInt

from matu_jax.messages.layout import Precision, WireError, parameters
from matu_jax.messages.quantisation import BLOCK, Blocks, rounded
from matu_jax.trees import PyTree, leaf_items

# Overflows, infinities of both signs and signalling NaNs are refused, not warned of as well.
quietly: np.errstate = np.errstate(over="ignore", invalid="ignore")

_round = jax.jit(rounded, static_argnames="precision")


@quietly
def written(
    vector: PyTree, precision: Precision
) -> tuple[list[np.ndarray], list[tuple[str, np.ndarray]]]:
    """The arrays that are written of a vector, and the leaves that the other side makes of them."""
    items = [(path, np.asarray(leaf)) for path, leaf in leaf_items(vector)]
    if precision == "float32":
        return [leaf for _, leaf in items], items
    arrays, leaves = [], []
    for path, leaf in items:
        part = _round(leaf[None], precision=precision)
        if isinstance(part, Blocks):
            arrays += [np.asarray(part.values)[0], np.asarray(part.scales)[0]]
            flat = _product(*arrays[-2:])
        else:
            arrays.append(np.asarray(part)[0])
            flat = arrays[-1]
        leaves.append((path, _cast(flat, leaf)))
    return arrays, leaves


def _product(
    values: Int8[np.ndarray, "parameters"], scales: Float32[np.ndarray, "blocks"]
) -> Float32[np.ndarray, "parameters"]:
    """Numbers from int8 `[parameters]` and float32 `[ceil(parameters / 256)]`, in float32."""
    numbers = values.astype(np.float32)
    whole = numbers.size - numbers.size % BLOCK
    numbers[:whole].reshape(-1, BLOCK)[:] *= scales[: whole // BLOCK, None]
    numbers[whole:] *= scales[whole // BLOCK :]
    return numbers


def _cast(flat: np.ndarray, like: Any) -> np.ndarray:
    """Numbers in a leaf's own shape and dtype."""
    return flat.astype(like.dtype, copy=False).reshape(like.shape)


def words(leaf: Shaped[np.ndarray, "..."]) -> UInt[np.ndarray, "{leaf.size}"]:
    """A leaf's numbers as unsigned integers in little-endian order."""
    bits = np.dtype(f"u{leaf.dtype.itemsize}")
    return np.ascontiguousarray(leaf).reshape(-1).view(bits).astype(bits.newbyteorder("<"))


def read_leaf(
    path: str, like: Any, precision: Precision, take: Callable[[str, int], np.ndarray]
) -> np.ndarray:
    """Reads a leaf of the vector, in the leaf's own shape and dtype.

    Args:
      path: of the leaf, for messages.
      like: has its shape and dtype.
      precision: how it was written.
      take: gives the next so many numbers of a dtype.

    Raises:
      WireError: for numbers that `written` does not make.
    """
    count = parameters(like)
    if precision == "int8":
        values, scales = take("i1", count), take("<f4", -(-count // BLOCK)).astype(np.float32)
        if count and values.min() < -127:
            raise WireError(f"leaf {path}: found -128, expected numbers from -127 to 127.")
        wrong = np.flatnonzero(~(np.isfinite(scales) & (scales >= 0)))
        if wrong.size:
            raise WireError(
                f"leaf {path}: the scale of block {wrong[0]} is {scales[wrong[0]]}, expected a "
                "finite number, 0 or more."
            )
        return _cast(_product(values, scales), like)
    dtype = jnp.dtype(jnp.bfloat16 if precision == "bfloat16" else like.dtype)
    words = take(f"<u{dtype.itemsize}", count).astype(f"u{dtype.itemsize}", copy=False)
    return _cast(words.view(dtype), like)
