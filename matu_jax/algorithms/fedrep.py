"""FedRep (Collins et al. 2021, arXiv 2102.07078): FedPer, with personal and shared parts in turn.

In the first `fedrep_personal_fraction` of a round's steps a slot trains its personal part (the last
`personal_blocks` blocks and a trained head) on top of the downloaded representation, which stands
still; in the others it trains the representation below a personal part that stands still. The
representation alone is sent, and averaged as in FedAvg. The paper's personal part is the linear head;
with frozen zero-shot heads, the last blocks take its place.
"""

import jax
import jax.numpy as jnp

from matu_jax.algorithms.base import Algorithm, LocalRule, last_blocks, partly_shared
from matu_jax.config import Config


def fedrep(config: Config) -> Algorithm:
    """FedRep with `config.personal_blocks` and `config.fedrep_personal_fraction`."""
    cut = last_blocks(config.personal_blocks)

    def personal_phase(progress):
        return (progress < config.fedrep_personal_fraction).astype(jnp.float32)

    def trains(vector, progress):
        now = personal_phase(progress)

        def factor(leaf, rows):
            shared = (jnp.arange(leaf.shape[0]) < rows).astype(jnp.float32)
            factors = shared * (1 - now) + (1 - shared) * now
            return factors.reshape(-1, *([1] * (leaf.ndim - 1)))

        return jax.tree.map(factor, vector, cut(vector, 0))

    return partly_shared(cut)._replace(local=LocalRule(trains=trains, head_trains=personal_phase))
