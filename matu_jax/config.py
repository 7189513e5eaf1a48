"""The schema of an experiment: the frozen choices of all rooms, with units in the names.

An experiment file's `get_config()` returns a `Config`, which says only what differs from the
defaults: `Config(rounds=10, data=DataConfig(clients=12), local=LocalConfig(steps=20))`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from matu_jax import fields
from matu_jax.aggregation.choices import NO_DEFENCE, DefenceConfig
from matu_jax.algorithms.fed_lora_b import FedLoraBConfig
from matu_jax.algorithms.fedper import FedPerConfig
from matu_jax.algorithms.fedprox import FedProxConfig
from matu_jax.algorithms.fedrep import FedRepConfig
from matu_jax.algorithms.matfl import MatFLConfig
from matu_jax.algorithms.matu import MatuConfig
from matu_jax.algorithms.ties import TiesConfig
from matu_jax.data.choices import DataConfig
from matu_jax.fields import field
from matu_jax.models.choices import ModelConfig
from matu_jax.scenarios.attacks import AttackConfig
from matu_jax.scenarios.failures import FailureConfig
from matu_jax.scenarios.privacy import PrivacyConfig
from matu_jax.simulation.choices import EvaluationConfig, LocalConfig, SimulationConfig

__all__ = [
    "NO_DEFENCE",
    "RENAMED",
    "AttackConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DefenceConfig",
    "EvaluationConfig",
    "FailureConfig",
    "FedLoraBConfig",
    "FedPerConfig",
    "FedProxConfig",
    "FedRepConfig",
    "LocalConfig",
    "MatFLConfig",
    "MatuConfig",
    "ModelConfig",
    "PrivacyConfig",
    "SimulationConfig",
    "TiesConfig",
    "renamed",
    "renaming",
    "upgraded",
]

# Fields that earlier versions did not have, by block; they are as by default.
ADDED = {"data": ("sites", "manifest")}

# Fields of earlier versions, and what they are now.
RENAMED = {
    "fedprox_mu": ("fedprox.mu",),
    "personal_blocks": ("fedper.personal_blocks", "fedrep.personal_blocks"),
    "fedrep_personal_fraction": ("fedrep.personal_fraction",),
    "matfl_grouping": ("matfl.grouping",),
    "matfl_threshold": ("matfl.threshold",),
    "ties_keep": ("ties.keep",),
    "lora_b_trains_a": ("fed_lora_b.trains_a",),
}


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved.

    Attributes:
      every_rounds: rounds between checkpoints; the last round is always saved, and so is one that
        is better on validation than all before, of which the run's results and exports speak.
      keep: how many checkpoints stay on disk, the newest; besides them, that of the best round.
    """

    every_rounds: int = field(1, at_least=1)
    keep: int = field(2, at_least=1)


@dataclasses.dataclass(frozen=True)
class Config(SimulationConfig):
    """One experiment: a simulated federation (see `SimulationConfig`), and when it is saved.

    Attributes:
      checkpoint: see CheckpointConfig.
    """

    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

    def check(self) -> "Config":
        """Checks every field; returns the config with floats and tuples where they belong.

        Raises:
          ValueError: one message that lists every wrong type and value out of range.
        """
        return fields.checked(self, "config")

    @classmethod
    def from_json(cls, found: Any) -> "Config":
        """The checked config that JSON has kept, as `dataclasses.asdict` made it.

        What an earlier version kept is taken by the names of now, see `upgraded`.

        Raises:
          ValueError: one message that lists every unknown field (with "did you mean"), missing
            field, wrong type and value out of range.
        """
        return fields.from_json(cls, upgraded(found), "config")

    def with_fields(self, values: Mapping[str, Any]) -> "Config":
        """The config with other values in some fields; `check` says whether they are in range.

        Args:
          values: by path, such as {"rounds": 3, "local.steps": 10}.

        Raises:
          ValueError: for unknown fields (with "did you mean") and values of the wrong type.
        """
        _refuse_renamed(values)
        return fields.with_fields(self, values, "config")

    def override(self, path: str, text: str) -> "Config":
        """The config with another value in one field, as it is written on the command line.

        Args:
          path: of the field, such as "local.steps"; "data" is short for "data.source".
          text: its value: a number, a string, or a tuple such as (1, 2) or ("query", "value").

        Raises:
          ValueError: for an unknown field (with "did you mean"), or a value of the wrong type.
        """
        _refuse_renamed([path])
        path = "data.source" if path == "data" else path
        return fields.with_text(self, path, text, "config")


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by path whose paths of earlier versions are replaced by those of now."""
    return {now: value for path, value in values.items() for now in RENAMED.get(path, (path,))}


def upgraded(found: Any) -> Any:
    """What JSON has kept of a config, with the fields of earlier versions where they are now."""
    if not isinstance(found, dict):
        return found
    for block, names in ADDED.items():
        held = found.get(block)
        if isinstance(held, Mapping):
            default = getattr(Config(), block)
            added = {name: getattr(default, name) for name in names}
            found = {**found, block: {**added, **held}}
    if not found.keys() & RENAMED.keys():
        return found
    upgraded = {name: value for name, value in found.items() if name not in RENAMED}
    for old in [name for name in RENAMED if name in found]:
        for path in RENAMED[old]:
            block, name = path.split(".")
            value, held = found[old], upgraded.get(block, {})
            if len(RENAMED[old]) > 1 and block != found.get("algorithm"):
                # One field for several algorithms: of those that the run was not, it said nothing.
                value = getattr(getattr(Config(), block), name)
            if isinstance(held, Mapping):
                upgraded[block] = {**held, name: value}
    return upgraded


def renaming(path: str) -> str:
    """What to say of a field of an earlier version, such as "config.a: is config.b.c now."."""
    return f"config.{path}: is {' and '.join(f'config.{now}' for now in RENAMED[path])} now."


def _refuse_renamed(paths: Iterable[str]) -> None:
    problems = [renaming(path) for path in paths if path in RENAMED]
    if problems:
        raise ValueError("\n".join(problems))
