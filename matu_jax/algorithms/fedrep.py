"""FedRep (Collins et al. 2021, arXiv 2102.07078): FedPer, with personal and shared parts in turn.

In the first `personal_fraction` of a round's steps a slot trains its personal part (the last
`personal_blocks` blocks and a trained head) on top of the downloaded representation, which stands
still; in the others it trains the representation below a personal part that stands still (rounded
to whole steps, at least one of each). The representation alone is sent, and averaged as in FedAvg:

    first   phi_s   <- phi_s - eta grad_phi L_s(theta, phi_s)
    then    theta_s <- theta_s - eta grad_theta L_s(theta_s, phi_s);    theta = mean_s theta_s

Unlike the paper, where a client has one task and the personal part is its linear head: each of a
client's tasks has a personal part of its own, and with frozen zero-shot heads the last blocks take
the head's place. One optimiser runs through both parts of a round; where nothing trains it sees
zeros, which Adam's averages remember.
"""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp

from matu_jax.aggregation.choices import DefenceConfig
from matu_jax.algorithms.contract import Algorithm, LocalRule
from matu_jax.algorithms.parts import last_blocks, partly_shared
from matu_jax.fields import field


@dataclasses.dataclass(frozen=True)
class FedRepConfig:
    """FedRep's choices.

    Attributes:
      personal_blocks: how many of the last transformer blocks' parameters stay at their slot.
      personal_fraction: part of a round's steps in which what is personal trains; in the others, at
        least one, what is shared does. Its authors' scripts give the head 10 of 15 epochs on most
        of their datasets.
    """

    personal_blocks: int = field(1, at_least=1)
    personal_fraction: float = field(2 / 3, above=0, at_most=1)


def fedrep(choices: FedRepConfig, defence: DefenceConfig, steps: int) -> Algorithm:
    """FedRep; see `parts.partly_shared` for the state.

    Args:
      choices: its own.
      defence: of the mean of what is shared.
      steps: of a slot in a round.

    Raises:
      ValueError: if a round has fewer than two steps.
    """
    cut = last_blocks(choices.personal_blocks, "config.fedrep.personal_blocks")
    if steps < 2:
        raise ValueError(
            f"config.local.steps: found {steps}, but FedRep trains what is personal in some steps "
            "and what is shared in others. Set at least 2."
        )
    personal_steps = math.floor(Fraction(str(choices.personal_fraction)) * steps + Fraction(1, 2))
    personal_steps = min(max(personal_steps, 1), steps - 1)
    limit = (personal_steps - 0.5) / steps  # between two steps: progress is rounded

    def personal_phase(progress):
        return (progress < limit).astype(jnp.float32)

    def trains(vector, progress):
        now = personal_phase(progress)

        def factor(leaf, rows):
            shared = (jnp.arange(leaf.shape[0]) < rows).astype(jnp.float32)
            factors = shared * (1 - now) + (1 - shared) * now
            return factors.reshape(-1, *([1] * (leaf.ndim - 1)))

        return jax.tree.map(factor, vector, cut(vector, 0))

    return partly_shared(cut, defence)._replace(
        local=LocalRule(trains=trains, head_trains=personal_phase)
    )
