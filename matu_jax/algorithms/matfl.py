"""MaT-FL (Cai et al. 2023, "Many-Task Federated Learning"): a mean per client, by similarity.

The server keeps a vector v_i for every client of the paper, that is, every slot here. With the
deviations from the mean, delta_i = v_i - mean_j v_j, over the slots present,

    w_ij = max(cos(delta_i, delta_j) + threshold, 0), rows divided by their sums;  v_i <- sum_j w_ij v_j

("soft"). "hard" groups slots instead: those joined by a chain of positive w_ij take their plain mean.
The paper fixes the grouping less than this; a chain of links is our choice. Nothing is folded: a
client with k tasks sends k vectors, and the server's state grows with the number of clients.
"""

import jax
import jax.numpy as jnp

from matu_jax.aggregation.directions import gram
from matu_jax.algorithms.base import Algorithm, Message, keep_where_absent, zeros
from matu_jax.config import Config


def matfl(config: Config) -> Algorithm:
    """MaT-FL with `config.matfl_grouping` and `config.matfl_threshold`; state `[slots, ...]`."""

    def aggregate(state, uploads, slots):
        present, count = slots.weight > 0, slots.weight.shape[0]
        leaves, structure = jax.tree.flatten(uploads)
        flat = [leaf.reshape(count, -1).astype(jnp.float32) for leaf in leaves]
        flat = [jnp.where(present[:, None], leaf, 0.0) for leaf in flat]
        number = jnp.maximum(present.sum(), 1).astype(jnp.float32)
        deviations = [
            jnp.where(present[:, None], leaf - leaf.sum(axis=0, keepdims=True) / number, 0.0)
            for leaf in flat
        ]
        products = gram(deviations, signs=False)
        norm = jnp.sqrt(jnp.diagonal(products))
        lengths = norm[:, None] * norm[None, :]
        cosine = jnp.where(lengths > 0, products / jnp.where(lengths > 0, lengths, 1.0), 0.0)
        same = jnp.eye(count, dtype=jnp.bool_)
        weights = jnp.maximum(jnp.where(same, 1.0, cosine) + config.matfl_threshold, 0.0)
        weights = jnp.where(present[:, None] & present[None, :], weights, 0.0)
        if config.matfl_grouping == "hard":
            linked = (weights > 0) | same

            def closure(_, linked):
                steps = linked.astype(jnp.float32)
                return jnp.matmul(steps, steps) > 0

            linked = jax.lax.fori_loop(0, count.bit_length(), closure, linked)
            weights = (linked & present[None, :]).astype(jnp.float32)
        total = weights.sum(axis=1, keepdims=True)
        weights = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), same)
        mixed = [
            jnp.matmul(weights, leaf, precision=jax.lax.Precision.HIGHEST)
            .reshape(old.shape)
            .astype(old.dtype)
            for leaf, old in zip(flat, leaves, strict=True)
        ]
        return keep_where_absent(structure.unflatten(mixed), state, present), {}

    return Algorithm(
        init=lambda base, slots: zeros(base, slots.client.shape[0]),
        download=lambda state, slots: state,
        upload=lambda vectors, slots: vectors,
        aggregate=aggregate,
        sent=lambda state, uploads: (Message(per_slot=uploads), Message(per_slot=uploads)),
        kept_per_client=True,
    )
