"""The base as it is, measured like any other: training is worth what it adds to that."""

import jax

from matu_jax.algorithms.contract import Algorithm, LocalRule
from matu_jax.algorithms.individual import individual


def untrained() -> Algorithm:
    """No parameter trains, heads among them; one round of one step is enough."""
    return individual()._replace(
        local=LocalRule(
            trains=lambda vector, progress: jax.tree.map(lambda _: 0.0, vector),
            head_trains=lambda progress: 0.0 * progress,
        )
    )
