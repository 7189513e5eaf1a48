"""One adapter per task, averaged among its holders: the upper reference, at k times the traffic.

FedAvg (McMahan et al. 2017, arXiv 1602.05629) within each task: a client with k tasks sends and
receives k full task vectors.
"""

import jax

from matu_jax.algorithms.base import Algorithm, Message, keep_where_absent, weighted_mean, zeros
from matu_jax.config import Config


def per_task(config: Config) -> Algorithm:
    """FedAvg per task; the state is one vector per task, leaves `[tasks, ...]`."""
    del config

    def download(state, slots):
        return jax.tree.map(lambda leaf: leaf[slots.task], state)

    def aggregate(state, uploads, slots):
        mean, total = weighted_mean(uploads, slots.weight, slots.task, slots.num_tasks)
        return keep_where_absent(mean, state, total > 0), {}

    return Algorithm(
        init=lambda base, slots: zeros(base, slots.num_tasks),
        download=download,
        upload=lambda vectors, slots: vectors,
        aggregate=aggregate,
        sent=lambda state, uploads: (Message(per_slot=uploads), Message(per_slot=uploads)),
    )
