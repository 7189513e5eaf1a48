"""Federated algorithms by name, and the choices of those that have some.

A new one is one file here, and one line in `ALGORITHMS`; where it has choices, which are a frozen
dataclass beside it, also one line in `AlgorithmConfig`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from matu_jax.aggregation.choices import NO_DEFENCE, DefenceConfig
from matu_jax.algorithms.contract import Algorithm, LocalRule
from matu_jax.algorithms.emr_one_shot import emr_one_shot
from matu_jax.algorithms.fed_lora_b import FedLoraBConfig, fed_lora_b
from matu_jax.algorithms.fedavg import fedavg
from matu_jax.algorithms.fedper import FedPerConfig, fedper
from matu_jax.algorithms.fedprox import FedProxConfig, fedprox
from matu_jax.algorithms.fedrep import FedRepConfig, fedrep
from matu_jax.algorithms.individual import individual
from matu_jax.algorithms.matfl import MatFLConfig, matfl
from matu_jax.algorithms.matu import MatuConfig, matu
from matu_jax.algorithms.ntk_fedavg import ntk_fedavg
from matu_jax.algorithms.parts import with_heads
from matu_jax.algorithms.per_task import per_task
from matu_jax.algorithms.ties import TiesConfig, ties
from matu_jax.algorithms.untrained import untrained
from matu_jax.errors import did_you_mean

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AlgorithmConfig",
    "LocalRule",
    "build",
    "with_heads",
]


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
    """What algorithms may choose: the defences that they share, and a block of each one's own.

    Attributes:
      defence: see DefenceConfig.
      fed_lora_b: see FedLoraBConfig.
      fedper: see FedPerConfig.
      fedprox: see FedProxConfig.
      fedrep: see FedRepConfig.
      matfl: see MatFLConfig.
      matu: see MatuConfig.
      ties: see TiesConfig.
    """

    defence: DefenceConfig = dataclasses.field(default_factory=DefenceConfig)
    fed_lora_b: FedLoraBConfig = dataclasses.field(default_factory=FedLoraBConfig)
    fedper: FedPerConfig = dataclasses.field(default_factory=FedPerConfig)
    fedprox: FedProxConfig = dataclasses.field(default_factory=FedProxConfig)
    fedrep: FedRepConfig = dataclasses.field(default_factory=FedRepConfig)
    matfl: MatFLConfig = dataclasses.field(default_factory=MatFLConfig)
    matu: MatuConfig = dataclasses.field(default_factory=MatuConfig)
    ties: TiesConfig = dataclasses.field(default_factory=TiesConfig)


def undefended(make: Callable[[Any], Algorithm]) -> Callable[[Any], Algorithm]:
    """Of an algorithm without defences: refuses a config that asks for some."""

    def checked(config):
        if config.defence not in (DefenceConfig(), NO_DEFENCE):
            raise ValueError(
                f"config.defence: found {config.defence}, but {config.algorithm!r} has no "
                "defences; leave config.defence as it is, or choose another algorithm."
            )
        return make(config)

    return checked


# How each is made, of what it needs of a `matu_jax.config.Config`.
ALGORITHMS: dict[str, Callable[[Any], Algorithm]] = {
    "emr_one_shot": undefended(lambda config: emr_one_shot()),
    "fed_lora_b": lambda config: fed_lora_b(
        config.fed_lora_b, config.defence, config.model.trainable
    ),
    "fedavg": lambda config: fedavg(config.defence),
    "fedper": lambda config: fedper(config.fedper, config.defence),
    "fedprox": lambda config: fedprox(config.fedprox, config.defence),
    "fedrep": lambda config: fedrep(config.fedrep, config.defence, config.local.steps),
    "individual": undefended(lambda config: individual()),
    "matfl": undefended(lambda config: matfl(config.matfl)),
    "matu": lambda config: matu(config.matu, config.defence),
    "ntk_fedavg": lambda config: ntk_fedavg(config.defence),
    "per_task": lambda config: per_task(config.defence),
    "ties": undefended(lambda config: ties(config.ties)),
    "untrained": undefended(lambda config: untrained()),
}


def build(config: Any) -> Algorithm:
    """Builds the algorithm that a config names.

    Args:
      config: a `matu_jax.config.Config`.

    Raises:
      ValueError: for an unknown name (with "did you mean"), or choices the algorithm refuses.
    """
    if config.algorithm not in ALGORITHMS:
        raise ValueError(
            f"config.algorithm: found {config.algorithm!r}, no such algorithm."
            + did_you_mean(config.algorithm, ALGORITHMS)
        )
    algorithm = ALGORITHMS[config.algorithm](config)
    where = f"config.algorithm {config.algorithm!r}"
    if not isinstance(algorithm, Algorithm):
        raise ValueError(
            f"{where}: its function in ALGORITHMS returned {type(algorithm).__name__}, expected an "
            "Algorithm made of what it needs of the config: lambda config: mine(config.defence)."
        )
    if not isinstance(algorithm.heads, DefenceConfig | None):
        raise ValueError(
            f"{where}: heads: found {algorithm.heads!r}, expected the DefenceConfig by which heads "
            "are averaged among a task's holders, such as NO_DEFENCE, or None where each keeps its "
            "own."
        )
    return with_heads(algorithm) if config.model.trains_heads else algorithm
