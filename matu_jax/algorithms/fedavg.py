"""FedAvg (McMahan et al. 2017, arXiv 1602.05629): one adapter for all clients and tasks.

A client with several tasks trains the adapter on each and sends their mean, weighted by examples;
the server's mean over clients is weighted by examples too: v = sum_s w_s tau_s / sum_s w_s.
"""

import jax
import jax.numpy as jnp

from matu_jax.aggregation.choices import NO_DEFENCE, DefenceConfig
from matu_jax.algorithms.contract import Algorithm, Groups
from matu_jax.algorithms.means import (
    mean_of_clients,
    mean_over_clients,
    sums_over_clients,
    zeros,
)
from matu_jax.messages.traffic import Message, Traffic


def fedavg(defence: DefenceConfig) -> Algorithm:
    """FedAvg; the state is one vector, leaves `[...]`."""

    def download(state, slots):
        rows = slots.client.shape[0]
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (rows, *leaf.shape)), state)

    return Algorithm(
        init=lambda base, slots: zeros(base),
        download=download,
        upload=mean_of_clients,
        aggregate=lambda state, uploads, slots: (
            mean_over_clients(uploads, slots, state, defence),
            {},
        ),
        traffic=Traffic(lambda state, uploads: (Message(uploads), Message(uploads))),
        heads=defence,
        groups=Groups("whole", "clients", None if defence != NO_DEFENCE else sums_over_clients()),
    )
