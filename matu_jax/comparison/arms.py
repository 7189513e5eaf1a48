"""What is read of an arm of comparison.json, and the order in which arms are shown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matu_jax.comparison.collect import verdict
from matu_jax.simulation.measures import measure_of


def number(value: Any) -> float | None:
    """The value, or None where there is none or it is not finite."""
    return None if value is None or not math.isfinite(value) else float(value)


def total_traffic(arm: Mapping[str, Any]) -> float | None:
    """Bits up and down of all clients in all rounds of one run."""
    communication = arm.get("communication") or {}
    up = number(communication.get("uplink_bits_total"))
    down = number(communication.get("downlink_bits_total"))
    return None if up is None or down is None else up + down


def results_of(arm: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an arm holds under the name of its measure; nothing where it has no result."""
    return arm.get(measure_of(arm).name) or {}


def mean_result(arm: Mapping[str, Any]) -> float | None:
    """What an arm reaches on the test split, by its measure; the mean over tasks and seeds."""
    return number(results_of(arm).get("mean"))


def verdict_of(arm: Mapping[str, Any]) -> str:
    """What ours does to the arm; see `collect.verdict`."""
    tested = arm.get("against_ours") or {}
    known = {key: number(tested.get(key)) for key in ("difference", "p_value", "rank_correlation")}
    seeds = tested.get("seeds")  # those that both have; older files do not count them
    return verdict(known, seeds if type(seeds) is int else 0)


def seeds_measured(arm: Mapping[str, Any]) -> int:
    """How many seeds an arm has a result of."""
    measured = results_of(arm).get("per_seed") or []
    return sum(value is not None for value in measured)


def best_first(setting: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The arms from the best to the worst; those without a result last."""
    return sorted(setting.get("arms") or [], key=lambda arm: -rank(arm))


def rank(arm: Mapping[str, Any]) -> float:
    """A number that is the higher, the better an arm is; the lowest without a result."""
    return measure_of(arm).rank(mean_result(arm))


def is_best(arm: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no arm is better; False for an arm without a result."""
    return mean_result(arm) is not None and rank(arm) == max(map(rank, arms))


def number_at(mapping: Mapping[str, Any], block: str, key: str) -> float | None:
    """The number at `mapping[block][key]`, or None where there is none."""
    return number((mapping.get(block) or {}).get(key))


def shared_label_spaces(setting: Mapping[str, Any]) -> list[str]:
    """The label space of each task; none where no two tasks share one, so that none are related."""
    spaces = list(setting.get("label_spaces") or [])
    known = [space for space in spaces if space]
    return spaces if len(set(known)) < len(known) else []
