"""What is read of an arm of comparison.json, and the order in which arms are shown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matu_jax.comparison.collect import verdict


def number(value: Any) -> float | None:
    """The value, or None where there is none or it is not finite."""
    return None if value is None or not math.isfinite(value) else float(value)


def total_traffic(arm: Mapping[str, Any]) -> float | None:
    """Bits up and down of all clients in all rounds of one run."""
    communication = arm.get("communication") or {}
    up = number(communication.get("uplink_bits_total"))
    down = number(communication.get("downlink_bits_total"))
    return None if up is None or down is None else up + down


def mean_accuracy(arm: Mapping[str, Any]) -> float | None:
    """The arm's test accuracy, a fraction; the mean over tasks and seeds."""
    return number((arm.get("accuracy") or {}).get("mean"))


def verdict_of(arm: Mapping[str, Any]) -> str:
    """What ours does to the arm; see `collect.verdict`."""
    tested = arm.get("against_ours") or {}
    known = {key: number(tested.get(key)) for key in ("difference", "p_value", "rank_correlation")}
    seeds = tested.get("seeds")  # those that both have; older files do not count them
    return verdict(known, seeds if type(seeds) is int else 0)


def seeds_measured(arm: Mapping[str, Any]) -> int:
    """How many seeds an arm has a result of."""
    measured = (arm.get("accuracy") or {}).get("per_seed") or []
    return sum(value is not None for value in measured)


def best_first(setting: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The arms by falling accuracy; those without one last."""

    def place(arm: Mapping[str, Any]) -> tuple[bool, float]:
        mean = mean_accuracy(arm)
        return (mean is None, -(mean or 0.0))

    return sorted(setting.get("arms") or [], key=place)


def is_best(arm: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no arm is more accurate; False for an arm without an accuracy."""
    means = [mean for mean in map(mean_accuracy, arms) if mean is not None]
    return bool(means) and mean_accuracy(arm) == max(means)


def number_at(mapping: Mapping[str, Any], block: str, key: str) -> float | None:
    """The number at `mapping[block][key]`, or None where there is none."""
    return number((mapping.get(block) or {}).get(key))
