"""Federated algorithms by name. A new one is one file here and one line in `ALGORITHMS`."""

from collections.abc import Callable

from matu_jax.algorithms.base import Algorithm, LocalRule, Message, message_bits, with_heads
from matu_jax.algorithms.fedavg import fedavg
from matu_jax.algorithms.fedprox import fedprox
from matu_jax.algorithms.individual import individual
from matu_jax.algorithms.matu import matu
from matu_jax.algorithms.per_task import per_task
from matu_jax.config import Config, did_you_mean

ALGORITHMS: dict[str, Callable[[Config], Algorithm]] = {
    "fedavg": fedavg,
    "fedprox": fedprox,
    "individual": individual,
    "matu": matu,
    "per_task": per_task,
}

__all__ = ["ALGORITHMS", "Algorithm", "LocalRule", "Message", "build", "message_bits", "with_heads"]


def build(config: Config) -> Algorithm:
    """Builds the algorithm that the config names.

    Raises:
      ValueError: for an unknown name (with "did you mean"), or choices the algorithm refuses.
    """
    if config.algorithm not in ALGORITHMS:
        raise ValueError(
            f"config.algorithm: found {config.algorithm!r}, no such algorithm."
            + did_you_mean(config.algorithm, ALGORITHMS)
        )
    algorithm = ALGORITHMS[config.algorithm](config)
    return with_heads(algorithm) if config.model.trains_heads else algorithm
