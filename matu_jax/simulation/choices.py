"""What of a simulation may be chosen, with the choices of the rooms that it brings together."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from matu_jax.algorithms import AlgorithmConfig
from matu_jax.data.choices import DataConfig
from matu_jax.fields import field
from matu_jax.models.choices import ModelConfig
from matu_jax.scenarios.attacks import AttackConfig
from matu_jax.scenarios.failures import FailureConfig
from matu_jax.scenarios.privacy import PrivacyConfig


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """A client's training in one round.

    Attributes:
      steps: optimiser steps per slot and round.
      batch_examples: examples per step.
      optimizer: "adam", "adamw" or "sgd"; its state starts afresh every round.
      learning_rate: step size.
      momentum: of sgd.
      weight_decay: of adamw; task vectors decay, that is, parameters towards the base.
      parallel_slots: slots trained at once on a device; 0 = by platform: 1 on CPU, where one slot
        after the other is faster; on accelerators as many as memory is predicted to allow.
    """

    steps: int = field(20, at_least=1)
    batch_examples: int = field(16, at_least=1)
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = field(3e-3, above=0)
    momentum: float = field(0.9, at_least=0, at_most=1)
    weight_decay: float = field(0.0, at_least=0)
    parallel_slots: int = field(0, at_least=0)

    def conflicts(self, where: str) -> Iterator[str]:
        """Yields what is wrong where a field is without effect for the optimiser."""
        for name, optimizer in (("momentum", "sgd"), ("weight_decay", "adamw")):
            found, default = getattr(self, name), getattr(LocalConfig, name)
            if self.optimizer != optimizer and found != default:
                yield (
                    f"{where}.{name}: found {found}, but {where}.optimizer is {self.optimizer!r}, "
                    f"which has none: set it to {optimizer!r}, or leave {name} at {default}."
                )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """When metrics are measured.

    Attributes:
      every_rounds: rounds between evaluations; the last round is always evaluated.
      batch_examples: examples per forward pass.
      max_examples: of each task's validation and test split, drawn from the seed; 0 = all.
    """

    every_rounds: int = field(1, at_least=1)
    batch_examples: int = field(128, at_least=1)
    max_examples: int = field(0, at_least=0)


@dataclasses.dataclass(frozen=True)
class SimulationConfig(AlgorithmConfig):
    """One simulated federation; what it may choose of algorithms is in `AlgorithmConfig`.

    Attributes:
      algorithm: a name in `matu_jax.algorithms.ALGORITHMS`.
      seed: everything random in training is drawn from it.
      rounds: communication rounds.
      clients_per_round: clients that take part in a round, drawn anew each time; 0 = all.
      data: see DataConfig.
      model: see ModelConfig.
      local: see LocalConfig.
      failures: see FailureConfig.
      attack: see AttackConfig.
      privacy: see PrivacyConfig.
      evaluation: see EvaluationConfig.
    """

    algorithm: str = "matu"
    seed: int = field(0, at_least=0, at_most=2**31 - 1)
    rounds: int = field(10, at_least=1)
    clients_per_round: int = field(0, at_least=0)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    local: LocalConfig = dataclasses.field(default_factory=LocalConfig)
    failures: FailureConfig = dataclasses.field(default_factory=FailureConfig)
    attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)

    def conflicts(self, where: str) -> Iterator[str]:
        """Yields what is wrong where fields of different blocks exclude each other."""
        if self.clients_per_round > self.data.clients:
            yield (
                f"{where}.clients_per_round: found {self.clients_per_round}, expected at most "
                f"{where}.data.clients = {self.data.clients} (0 = all)."
            )
