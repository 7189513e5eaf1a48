"""Federated algorithms by name. A new one is one file here and one line in `_NAMES`."""

from collections.abc import Callable
from importlib import import_module

from matu_jax.algorithms.base import (
    Algorithm,
    LocalRule,
    Message,
    frame_bits,
    message_bits,
    with_heads,
)
from matu_jax.config import NO_DEFENCE, Config, DefenceConfig, did_you_mean

_NAMES = (  # of a module here and of its function `Config -> Algorithm`
    "emr_one_shot",
    "fed_lora_b",
    "fedavg",
    "fedper",
    "fedprox",
    "fedrep",
    "individual",
    "matfl",
    "matu",
    "ntk_fedavg",
    "per_task",
    "ties",
)

ALGORITHMS: dict[str, Callable[[Config], Algorithm]] = {
    name: getattr(import_module(f"{__name__}.{name}"), name) for name in _NAMES
}

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "LocalRule",
    "Message",
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
