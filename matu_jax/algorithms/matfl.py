"""MaT-FL (Cai et al. 2023, "Many-Task Federated Learning"): a mean per client, by similarity.

The server keeps a vector v_i for every client of the paper, that is, every slot here. With the
deviations from the mean, delta_i = v_i - mean_j v_j, over the slots present,

    soft    w_ij = max(cos(delta_i, delta_j) + threshold, 0),    v_i <- sum_j w_ij v_j / sum_j w_ij
    hard    w_ij = 1 if i and j are of one group, else 0

Nothing is weighted by examples. Hard groups are clusters by average linkage over the cosines, as in
the authors' code (VITA-Group/MaT-FL), which is given their number; here the two groups that are
most alike merge as long as their average cosine + threshold is above 0.

Unlike the paper, where a client has one task: nothing is folded, a client with k tasks sends and
receives k vectors, and the server's state grows with the number of slots. A slot without weights,
such as one alone, keeps its vector. As in that code decoders, here trained heads, stay with their
slot.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32

from matu_jax.aggregation.directions import gram
from matu_jax.aggregation.storage import clip_to
from matu_jax.algorithms.contract import Algorithm, Groups
from matu_jax.algorithms.means import headroom, keep_where_absent, zeros
from matu_jax.fields import field
from matu_jax.messages.traffic import Message, Traffic


def linked(
    cosine: Float32[Array, "slots slots"],
    present: Bool[Array | np.ndarray, "slots"],
    threshold: float,
) -> Float32[Array, "slots slots"]:
    """Average-linkage clusters: float32 `[slots, slots]`, 1 where two present slots share one."""
    same = jnp.eye(len(present), dtype=jnp.bool_)

    def merge(_, carry):
        members, sums = carry  # float32 [groups, slots]; sums of cosines [groups, groups]
        size = members.sum(axis=1)
        pairs = size[:, None] * size[None]
        mean = jnp.where(~same & (pairs > 0), sums / jnp.maximum(pairs, 1.0), -jnp.inf)
        i, j = jnp.unravel_index(jnp.argmax(mean), mean.shape)
        take = (mean[i, j] + threshold > 0).astype(jnp.float32)

        def into_one(x):
            return x.at[i].add(take * x[j]).at[j].multiply(1 - take)

        return into_one(members), into_one(into_one(sums).T).T

    alone = (same & present[:, None]).astype(jnp.float32)
    members, _ = jax.lax.fori_loop(0, len(present) - 1, merge, (alone, cosine))
    return members.T @ members


@dataclasses.dataclass(frozen=True)
class MatFLConfig:
    """MaT-FL's choices.

    Attributes:
      grouping: its weights: "soft" (by similarity) or "hard" (by groups).
      threshold: added to the cosine of two deviations; a sum above 0 makes them share.
    """

    grouping: Literal["soft", "hard"] = "soft"
    threshold: float = field(0.0, at_least=-1, at_most=1)


def matfl(choices: MatFLConfig) -> Algorithm:
    """MaT-FL; the state is every slot's vector, leaves `[slots, ...]`."""

    def aggregate(state, uploads, slots):
        present, count = slots.weight > 0, slots.weight.shape[0]
        leaves, structure = jax.tree.flatten(uploads)
        flat = [leaf.reshape(count, -1).astype(jnp.float32) for leaf in leaves]
        flat = [jnp.where(present[:, None], leaf, 0.0) for leaf in flat]
        number = jnp.maximum(present.sum(), 1).astype(jnp.float32)
        small = [leaf * headroom(count + 1) for leaf in flat]  # cosines are of directions alone
        deviations = [
            jnp.where(present[:, None], x - x.sum(axis=0, keepdims=True) / number, 0.0)
            for x in small
        ]
        largest = jnp.stack([jnp.abs(x).max(axis=1) for x in deviations]).max(axis=0)
        unit = jnp.where(largest > 0, largest, 1.0)[:, None]  # so that no square overflows
        products = gram([x / unit for x in deviations], 1, signs=False)
        norm = jnp.sqrt(jnp.diagonal(products))
        lengths = norm[:, None] * norm[None, :]
        cosine = jnp.where(lengths > 0, products / jnp.where(lengths > 0, lengths, 1.0), 0.0)
        if choices.grouping == "hard":
            weights = linked(cosine, present, choices.threshold)
        else:
            weights = jnp.maximum(cosine + choices.threshold, 0.0)
            weights = jnp.where(present[:, None] & present[None, :], weights, 0.0)
        total = weights.sum(axis=1, keepdims=True)
        alone = jnp.eye(count, dtype=jnp.float32)  # where no weight is left
        weights = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), alone)
        mixed = [
            clip_to(
                jnp.matmul(weights, leaf, precision=jax.lax.Precision.HIGHEST).reshape(old.shape),
                old.dtype,
            )
            for leaf, old in zip(flat, leaves, strict=True)
        ]
        return keep_where_absent(structure.unflatten(mixed), state, present), {}

    return Algorithm(
        init=lambda base, slots: zeros(base, slots.client.shape[0]),
        download=lambda state, slots: state,
        upload=lambda vectors, slots: vectors,
        aggregate=aggregate,
        traffic=Traffic(
            lambda state, uploads: (Message(per_slot=uploads), Message(per_slot=uploads)),
            kept_per_client=True,
        ),
        heads=None,
        groups=Groups("slots", "slots"),
    )
