"""Direction similarity, eq. 7."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from matu_jax.aggregation.blocks import loop_zeros
from matu_jax.aggregation.joining import joining
from matu_jax.aggregation.sharding import Axes, total_over
from matu_jax.aggregation.signs import Signs
from matu_jax.aggregation.storage import flat_leaf, whole_tiles
from matu_jax.aggregation.types import Slots
from matu_jax.trees import Leaf, PyTree, as_floating, check_stacked

_BLOCK = 1 << 16  # parameters per matmul when correlating directions


def gram(
    flat: list[Float[Array, "rows _"]], size: int, *, signs: bool
) -> Float32[Array, "rows rows"]:
    """`sum x x^T / size` over all leaves, or of the signs of x: float32 `[rows, rows]`.

    Blocks of parameters are small enough for a sum of signs to be exact in float32.
    """
    rows = flat[0].shape[0]

    def product(block):
        x = jnp.sign(block).astype(jnp.float32) if signs else block.astype(jnp.float32)
        return jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST) / size

    total = loop_zeros((rows, rows), jnp.float32, *flat)
    for leaf in flat:
        blocks = leaf.shape[1] // _BLOCK
        if blocks:
            total = jax.lax.fori_loop(
                0,
                blocks,
                lambda i, acc, leaf=leaf: (
                    acc + product(jax.lax.dynamic_slice_in_dim(leaf, i * _BLOCK, _BLOCK, axis=1))
                ),
                total,
            )
        if leaf.shape[1] % _BLOCK:
            total = total + product(leaf[:, blocks * _BLOCK :])
    return total


@jax.jit
def _direction_similarity(
    vectors: PyTree[Float[Array, "slots ..."]],
) -> Float32[Array, "slots slots"]:
    flat = [flat_leaf(leaf) for leaf in jax.tree.leaves(vectors)]
    join = joining(flat)
    return _similarity(gram(whole_tiles(join.vectors(flat)), join.size, signs=True))


def direction_similarity(
    vectors: PyTree[Float[Leaf, "slots ..."]],
) -> Float32[Array, "slots slots"]:
    """How far the signs of task vectors agree (eq. 7): 1 the same, 1/2 unrelated, 0 opposite.

    Args:
      vectors: leaves `[slots, ...]`. An exact zero agrees and disagrees with nothing: it counts
        one half.

    Returns:
      float32 `[slots, slots]`, symmetric, in [0, 1].

    Raises:
      ValueError: if a leaf is not floating, or the leading axes differ.
    """
    vectors = as_floating(vectors, "direction_similarity: vectors")
    check_stacked(vectors, "direction_similarity: vectors")
    return _direction_similarity(vectors)


class TaskSimilarity(NamedTuple):
    """Eq. 7 for all pairs of tasks.

    Attributes:
      matrix: A, float32 `[tasks, tasks]`, in [0, 1].
      product: the mean product of signs that A is made of, float32 `[tasks, tasks]`.
      compared: bool `[tasks, tasks]`, for which pairs there was something to compare; A is 1/2 for
        others.
    """

    matrix: Float32[Array, "tasks tasks"]
    product: Float32[Array, "tasks tasks"]
    compared: Bool[Array, "tasks tasks"]


def aggregated_similarity(
    own: list[Float[Array, "tasks _"]], size: int, axes: Axes
) -> TaskSimilarity:
    """Eq. 7 of the tasks' aggregated vectors: A_tt' = (1 + (1/d) sum sgn(tau_t) sgn(tau_t')) / 2.

    Args:
      own: tau_t of eq. 6, flat leaves `[tasks, n]`, of which whole tiles count.
      size: d, number of all parameters.
      axes: mesh axes over which parameters are sharded.
    """
    product = total_over(gram(whole_tiles(own), size, signs=True), axes)
    return TaskSimilarity(_similarity(product), product, jnp.ones(product.shape, jnp.bool_))


def cross_client_similarity(
    signs: Signs, accepted: Bool[Array, "slots"], slots: Slots, size: int
) -> TaskSimilarity:
    """Eq. 7 of slots of different clients, averaged over their pairs; A_tt is 1.

    All pairs' products of signs are those of the tasks' sums of signs; pairs of one client are
    taken off.

    Args:
      signs: what was found of the uploads' signs.
      accepted: bool `[slots]`, who takes part.
      slots: which client and task each is.
      size: d, number of all parameters.
    """
    tasks = slots.num_tasks
    present = jnp.zeros((slots.num_clients, tasks), jnp.float32)
    present = present.at[slots.client, slots.task].add(accepted.astype(jnp.float32))
    held = present.sum(axis=0)
    pairs = held[:, None] * held[None, :] - present.T @ present
    compared = pairs > 0
    products = (signs.products - signs.same_client) / size
    product = jnp.where(compared, products / jnp.maximum(pairs, 1.0), 0.0)
    matrix = jnp.where(jnp.eye(tasks, dtype=jnp.bool_), 1.0, _similarity(product))
    return TaskSimilarity(matrix, product, compared)


def _similarity(product: Float32[Array, "rows rows"]) -> Float32[Array, "rows rows"]:
    """Mean products of signs, in [-1, 1] but for rounding, to similarities in [0, 1]."""
    return jnp.clip((1 + product) / 2, 0.0, 1.0)
