"""FedPer (Arivazhagan et al. 2019, arXiv 1912.00818): the last layers and the head are personal.

What comes before the last `personal_blocks` transformer blocks is averaged as in FedAvg,
v = sum_s w_s tau_s / sum_s w_s; those blocks, what follows them, and a trained head stay with their
slot, are trained with the rest, and are never sent.

Unlike the paper, where a client has one task and its personal part ends in a classifier: each of a
client's tasks has a personal part of its own, and frozen zero-shot heads, which have nothing to
learn, are the same for all, so that the last blocks (with LoRA: their adapters) take their place. A
slot that never took part has the base's.
"""

import dataclasses

from matu_jax.aggregation.choices import DefenceConfig
from matu_jax.algorithms.contract import Algorithm
from matu_jax.algorithms.parts import last_blocks, partly_shared
from matu_jax.fields import field


@dataclasses.dataclass(frozen=True)
class FedPerConfig:
    """FedPer's choices.

    Attributes:
      personal_blocks: how many of the last transformer blocks' parameters stay at their slot.
    """

    personal_blocks: int = field(1, at_least=1)


def fedper(choices: FedPerConfig, defence: DefenceConfig) -> Algorithm:
    """FedPer; see `parts.partly_shared` for the state."""
    cut = last_blocks(choices.personal_blocks, "config.fedper.personal_blocks")
    return partly_shared(cut, defence)
