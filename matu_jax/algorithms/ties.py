"""TIES-Merging (Yadav et al. 2023, arXiv 2306.01708) as the rule of a server.

Every slot sends its task vector, and one merged vector comes back to all:

    trim      x_s = v_s where |v_s| is among its ceil(`keep` d) largest, over all its leaves
              together (as many as are equal to the smallest of them), else 0
    elect     gamma = sgn( sum_s x_s )
    merge     v = mean of the x_s whose sign is gamma, entry by entry; 0 where gamma is 0

Nothing is weighted by examples. Unlike the paper, which merges models once, after fine-tuning, and
scales the result by a constant: the merge is made every round, training goes on from it, and the
constant is 1. What is merged are adapters, factor by factor. A client with k tasks sends k vectors
and receives one; trained heads are averaged among a task's holders.
"""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp

from matu_jax.aggregation.choices import NO_DEFENCE
from matu_jax.aggregation.storage import clip_to
from matu_jax.algorithms.contract import Algorithm, Groups
from matu_jax.algorithms.fedavg import fedavg
from matu_jax.algorithms.means import headroom
from matu_jax.fields import field
from matu_jax.messages.traffic import Message, Traffic


@dataclasses.dataclass(frozen=True)
class TiesConfig:
    """TIES's choices.

    Attributes:
      keep: part of a vector's entries, the largest, that is kept.
    """

    keep: float = field(0.2, above=0, at_most=1)


def ties(choices: TiesConfig) -> Algorithm:
    """TIES; the state is one vector, leaves `[...]`."""

    def aggregate(state, uploads, slots):
        present = slots.weight > 0
        leaves = jax.tree.leaves(uploads)
        size = sum(leaf[0].size for leaf in leaves)
        room = headroom(present.shape[0])
        kept = math.ceil(Fraction(str(choices.keep)) * size)

        def threshold(row):
            magnitudes = jnp.concatenate([jnp.abs(x).astype(jnp.float32).ravel() for x in row])
            return jnp.sort(magnitudes)[size - kept]

        least = jax.lax.map(threshold, leaves)  # a slot at a time: sorting takes memory

        def merge(leaf, old):
            x = leaf.astype(jnp.float32)
            across = (-1, *([1] * (leaf.ndim - 1)))
            large = jnp.abs(x) >= least.reshape(across)
            x = jnp.where(large & present.reshape(across), x, 0.0)
            x = x * room
            sign = jnp.sign(x.sum(axis=0))
            agrees = jnp.sign(x) * sign[None] > 0
            count = jnp.maximum(agrees.sum(axis=0), 1).astype(jnp.float32)
            mean = jnp.where(agrees, x, 0.0).sum(axis=0) / count / room
            return jnp.where(present.any(), clip_to(mean, old.dtype), old)

        return jax.tree.map(merge, uploads, state), {}

    return fedavg(NO_DEFENCE)._replace(
        upload=lambda vectors, slots: vectors,
        aggregate=aggregate,
        traffic=Traffic(lambda state, uploads: (Message(per_slot=uploads), Message(uploads))),
        groups=Groups("whole", "slots"),
    )
