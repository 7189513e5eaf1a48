"""One adapter per task, averaged among its holders: the upper reference, at k times the traffic.

FedAvg (McMahan et al. 2017, arXiv 1602.05629) within each task: a client with k tasks sends and
receives k full task vectors.
"""

import jax

from matu_jax.aggregation.choices import NO_DEFENCE, DefenceConfig
from matu_jax.algorithms.contract import Algorithm, Groups
from matu_jax.algorithms.means import defended_mean, sums_by_task, zeros
from matu_jax.messages.traffic import Message, Traffic


def per_task(defence: DefenceConfig) -> Algorithm:
    """FedAvg per task; the state is one vector per task, leaves `[tasks, ...]`."""

    def download(state, slots):
        return jax.tree.map(lambda leaf: leaf[slots.task], state)

    def aggregate(state, uploads, slots):
        groups = slots.weight, slots.task, slots.num_tasks
        return defended_mean(uploads, state, *groups, defence, slots)[0], {}

    return Algorithm(
        init=lambda base, slots: zeros(base, slots.num_tasks),
        download=download,
        upload=lambda vectors, slots: vectors,
        aggregate=aggregate,
        traffic=Traffic(
            lambda state, uploads: (Message(per_slot=uploads), Message(per_slot=uploads)),
        ),
        heads=defence,
        groups=Groups("whole", "slots", None if defence != NO_DEFENCE else sums_by_task()),
    )
