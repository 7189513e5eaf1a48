"""A search with the same number of trials for every arm, one field after the other.

The first value of every field is the one to start from. The values of the first field are tried,
then those of the next with the best of the first, and so on; what is left of the trials halves (on
a logarithmic scale) the gaps beside the best value of the first field, which is the learning rate.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Tried(NamedTuple):
    """What a trial has shown: a value on validation, and its rank, the higher the better."""

    value: float | None
    rank: float


def search(
    fields: Mapping[str, Sequence[Any]],
    trials: int,
    tried: Callable[[dict[str, Any]], Tried],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Searches for the values of the highest rank.

    Args:
      fields: values to try by field; those of the first are positive numbers.
      trials: how many times `tried` is called; fewer only if nothing new is left to try.
      tried: values by field to what they have shown.

    Returns:
      The best trial, and all of them in order: {"fields": ..., "validation": ...}.
    """
    done: list[dict[str, Any]] = []
    ranks: list[float] = []

    def score(values: dict[str, Any]) -> float:
        for trial, rank in zip(done, ranks, strict=True):
            if trial["fields"] == values:
                return rank
        if len(done) >= trials:
            return -math.inf
        value, rank = tried(dict(values))
        done.append({"fields": dict(values), "validation": value})
        ranks.append(rank)
        return rank

    def best_trial() -> dict[str, Any]:
        return done[max(range(len(done)), key=lambda i: ranks[i])]

    best = {name: values[0] for name, values in fields.items()}
    for name, values in fields.items():
        best = max([best | {name: value} for value in values], key=score)
    first = next(iter(fields))
    while len(done) < trials:
        before = len(done)
        known = sorted({trial["fields"][first] for trial in done})
        place, value = known.index(best[first]), best[first]
        above = known[place + 1] / value if place + 1 < len(known) else 4.0
        below = known[place - 1] / value if place else 0.25
        for ratio in (above, below):
            score(best | {first: float(f"{value * math.sqrt(ratio):.2g}")})
        if len(done) == before:
            break
        best = best_trial()["fields"]
    return best_trial(), done
