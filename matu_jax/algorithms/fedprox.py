"""FedProx (Li et al. 2020, arXiv 1812.06127): FedAvg with a proximal term in the local loss.

The local loss gains (mu / 2) ||w - w_download||^2; task vectors differ as parameters do.
"""

import dataclasses

import jax
import jax.numpy as jnp

from matu_jax.aggregation.choices import DefenceConfig
from matu_jax.algorithms.contract import Algorithm, LocalRule
from matu_jax.algorithms.fedavg import fedavg
from matu_jax.fields import field


@dataclasses.dataclass(frozen=True)
class FedProxConfig:
    """FedProx's choices.

    Attributes:
      mu: weight of the proximal term.
    """

    mu: float = field(0.01, at_least=0)


def fedprox(choices: FedProxConfig, defence: DefenceConfig) -> Algorithm:
    """FedAvg with `LocalRule.penalty` = (mu / 2) squared distance from the download."""

    def penalty(vector, download):
        squares = jax.tree.map(lambda v, d: jnp.sum(jnp.square(v - d)), vector, download)
        return choices.mu / 2 * jnp.stack(jax.tree.leaves(squares)).sum()

    return fedavg(defence)._replace(local=LocalRule(penalty=penalty))
