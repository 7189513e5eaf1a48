"""Federated algorithms by name. A new one is one file here and one line in `ALGORITHMS`."""

from collections.abc import Callable

from matu_jax.aggregation.choices import NO_DEFENCE, DefenceConfig
from matu_jax.algorithms.contract import Algorithm, LocalRule
from matu_jax.algorithms.emr_one_shot import emr_one_shot
from matu_jax.algorithms.fed_lora_b import fed_lora_b
from matu_jax.algorithms.fedavg import fedavg
from matu_jax.algorithms.fedper import fedper
from matu_jax.algorithms.fedprox import fedprox
from matu_jax.algorithms.fedrep import fedrep
from matu_jax.algorithms.individual import individual
from matu_jax.algorithms.matfl import matfl
from matu_jax.algorithms.matu import matu
from matu_jax.algorithms.ntk_fedavg import ntk_fedavg
from matu_jax.algorithms.parts import with_heads
from matu_jax.algorithms.per_task import per_task
from matu_jax.algorithms.ties import ties
from matu_jax.config import Config
from matu_jax.errors import did_you_mean
from matu_jax.messages.traffic import Message, Traffic, frame_bits, message_bits

ALGORITHMS: dict[str, Callable[[Config], Algorithm]] = {
    "emr_one_shot": emr_one_shot,
    "fed_lora_b": fed_lora_b,
    "fedavg": fedavg,
    "fedper": fedper,
    "fedprox": fedprox,
    "fedrep": fedrep,
    "individual": individual,
    "matfl": matfl,
    "matu": matu,
    "ntk_fedavg": ntk_fedavg,
    "per_task": per_task,
    "ties": ties,
}

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "LocalRule",
    "Message",
    "Traffic",
    "build",
    "frame_bits",
    "message_bits",
    "with_heads",
]


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
    if algorithm.defence is None and config.defence not in (DefenceConfig(), NO_DEFENCE):
        raise ValueError(
            f"config.defence: found {config.defence}, but {config.algorithm!r} has no defences; "
            "leave config.defence as it is, or choose another algorithm."
        )
    return with_heads(algorithm) if config.model.trains_heads else algorithm
