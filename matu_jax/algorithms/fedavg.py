"""FedAvg (McMahan et al. 2017, arXiv 1602.05629): one adapter for all clients and tasks.

A client with several tasks trains the adapter on each and sends their mean, weighted by examples;
the server's mean over clients is weighted by examples too: v = sum_s w_s tau_s / sum_s w_s.
"""

import jax
import jax.numpy as jnp

from matu_jax.algorithms.base import Algorithm, Message, weighted_mean, zeros
from matu_jax.config import Config


def fedavg(config: Config) -> Algorithm:
    """FedAvg; the state is one vector, leaves `[...]`."""
    del config

    def download(state, slots):
        rows = slots.client.shape[0]
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (rows, *leaf.shape)), state)

    def upload(vectors, slots):
        return weighted_mean(vectors, slots.weight, slots.client, slots.num_clients)[0]

    def aggregate(state, uploads, slots):
        weight = jax.ops.segment_sum(slots.weight, slots.client, slots.num_clients)
        one_group = jnp.zeros(slots.num_clients, jnp.int32)
        mean, total = weighted_mean(uploads, weight, one_group, 1)
        return jax.tree.map(lambda new, old: jnp.where(total[0] > 0, new[0], old), mean, state), {}

    return Algorithm(
        init=lambda base, slots: zeros(base),
        download=download,
        upload=upload,
        aggregate=aggregate,
        sent=lambda state, uploads: (Message(per_client=uploads), Message(per_client=uploads)),
    )
