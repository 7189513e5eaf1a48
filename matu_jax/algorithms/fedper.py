"""FedPer (Arivazhagan et al. 2019, arXiv 1912.00818): the last layers and the head are personal.

What comes before the last `personal_blocks` transformer blocks is averaged as in FedAvg,
v = sum_s w_s tau_s / sum_s w_s; those blocks, what follows them, and a trained head stay with their
slot, are trained with the rest, and are never sent.

Unlike the paper, where a client has one task and its personal part ends in a classifier: each of a
client's tasks has a personal part of its own, and frozen zero-shot heads, which have nothing to
learn, are the same for all, so that the last blocks (with LoRA: their adapters) take their place. A
slot that never took part has the base's.
"""

from matu_jax.algorithms.contract import Algorithm
from matu_jax.algorithms.parts import last_blocks, partly_shared
from matu_jax.config import Config


def fedper(config: Config) -> Algorithm:
    """FedPer with `config.personal_blocks`; see `base.partly_shared` for the state."""
    return partly_shared(last_blocks(config.personal_blocks), config.defence)
