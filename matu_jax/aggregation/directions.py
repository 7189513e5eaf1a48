"""Direction similarity, eq. 7."""

import jax
import jax.numpy as jnp

from matu_jax.aggregation.fold import flat_leaf, loop_zeros, pack, total
from matu_jax.aggregation.joining import joining
from matu_jax.aggregation.types import Slots
from matu_jax.trees import PyTree, as_floating, check_stacked

_BLOCK = 1 << 16  # parameters per matmul when correlating directions


def gram(flat: list[jax.Array], size: int, *, signs: bool) -> jax.Array:
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
def _direction_similarity(vectors: PyTree) -> jax.Array:
    flat = [flat_leaf(leaf) for leaf in jax.tree.leaves(vectors)]
    join = joining(flat)
    products = gram(join.vectors(flat), join.size, signs=True)
    return jnp.clip((1 + products) / 2, 0.0, 1.0)


def direction_similarity(vectors: PyTree) -> jax.Array:
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


def same_client_gram(
    vector: list[jax.Array],
    masks: list[jax.Array],
    size: int,
    scales: jax.Array,
    slots: Slots,
    ok: jax.Array,
) -> jax.Array:
    """`sum sgn(tau_s) sgn(tau_s') / size` over slot pairs of one client, added up per task pair.

    Two slots of one client share the signs of u wherever both masks are set, so the product of
    their signs is a count of common mask bits. Work is linear in the pairs that share a client.
    """
    order = jnp.argsort(slots.client)
    client, task = slots.client[order], slots.task[order]
    first = jnp.searchsorted(client, client).astype(jnp.int32)
    live = ((scales > 0) & ok)[order].astype(jnp.float32)

    def add_slot(sums, position):
        slot = order[position]
        own = [
            mask[slot] & pack(leaf[slots.client[slot]] != 0)
            for leaf, mask in zip(vector, masks, strict=True)
        ]

        def add_pair(other, sums):
            common = sum(
                total(jax.lax.population_count(bits & mask[order[other]]).astype(jnp.float32))
                for bits, mask in zip(own, masks, strict=True)
            )
            common = common / size * live[position] * live[other]
            sums = sums.at[task[position], task[other]].add(common)
            return jnp.where(
                other == position, sums, sums.at[task[other], task[position]].add(common)
            )

        return jax.lax.fori_loop(first[position], position + 1, add_pair, sums), None

    inputs = (*vector, *masks, scales, slots.client, slots.task, ok)
    zero = loop_zeros((slots.num_tasks, slots.num_tasks), jnp.float32, *inputs)
    positions = jnp.arange(order.shape[0], dtype=jnp.int32)
    return jax.lax.scan(add_slot, zero, positions)[0]
