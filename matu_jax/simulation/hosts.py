"""Several processes that make one run: how they find each other, agree, and fail together.

Each has devices of its own, on one machine or on many, and all run the same program. Process 0
alone prints, and reads and writes the workdir; what the others need of it, it sends them. In a run
of one process nothing here does anything.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from matu_jax.errors import UserError
from matu_jax.trees import PyTree

_PIECE_BYTES = 1 << 26


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def agreed(tree: PyTree) -> PyTree:
    """What process 0 has, on all processes, bit for bit.

    Args:
      tree: arrays, of the same shapes and dtypes on all processes.

    Returns:
      The tree itself in a run of one process; else numpy arrays, but arrays that are parted over
      processes as they are: of them each has what no other has.
    """
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    leaves, treedef = jax.tree.flatten(tree)
    whole = [i for i, leaf in enumerate(leaves) if not _parted(leaf)]
    arrays = [np.asarray(leaves[i]) for i in whole]
    # As bytes, since what crosses is a sum with zeros: -0.0 would lose its sign.
    found = multihost_utils.broadcast_one_to_all([x.reshape(-1).view(np.uint8) for x in arrays])
    for i, x, a in zip(whole, found, arrays, strict=True):
        leaves[i] = x.view(a.dtype).reshape(a.shape)
    return treedef.unflatten(leaves)


def gathered(tree: PyTree) -> PyTree | None:
    """A tree with arrays that are parted over processes, at process 0; all processes call this.

    Args:
      tree: arrays `[rows, ...]`; a device needs room for 64 MiB, or one row, of one of them.

    Returns:
      The tree itself in a run of one process. Else numpy arrays, and None at other processes.
    """
    if jax.process_count() == 1:
        return tree

    def whole(leaf):
        if not _parted(leaf):
            return np.asarray(leaf) if is_first() else None
        rows = min(max(_PIECE_BYTES * leaf.shape[0] // max(leaf.nbytes, 1), 1), leaf.shape[0])
        piece = jax.jit(
            _rows,
            static_argnums=2,
            out_shardings=NamedSharding(leaf.sharding.mesh, PartitionSpec()),
        )
        found = np.empty(leaf.shape, leaf.dtype) if is_first() else None
        for first in range(0, leaf.shape[0], rows):
            start = min(first, leaf.shape[0] - rows)
            values = jax.block_until_ready(piece(leaf, start, rows))
            if found is not None:
                found[start : start + rows] = values
        return found

    found = jax.tree.map(whole, tree)
    return found if is_first() else None


def _rows(leaf: jax.Array, start: int, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(leaf, start, count)


def _parted(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    )


def highest(number: int) -> int:
    """The highest number of all processes."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(number)).max())


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is done inside succeeds on all processes, or fails on all; none waits for ever.

    Raises:
      UserError: where it has succeeded here, but not on another process, which says why.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        anywhere = highest(failed)
    if anywhere:
        raise UserError(
            "another process of this run has ended with an error; its message says why."
        )
