"""A search with the same number of trials for every arm, one field after the other.

The first value of every field is the one to start from. The values of the first field are tried,
then those of the next with the best of the first, and so on; what is left of the trials halves (on
a logarithmic scale) the gaps beside the best value of the first field, which is the learning rate.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any


def search(
    fields: Mapping[str, tuple[Any, ...]], trials: int, measure: Callable[[dict[str, Any]], float]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Searches for the values with the highest measure.

    Args:
      fields: values to try by field; those of the first are positive numbers.
      trials: how many times `measure` is called; fewer only if nothing new is left to try.
      measure: values by field to a validation accuracy; NaN counts as the worst.

    Returns:
      The best values, and all trials in order: {"fields": ..., "validation": ...}.
    """
    done: list[dict[str, Any]] = []

    def score(values: dict[str, Any]) -> float:
        for trial in done:
            if trial["fields"] == values:
                return _rank(trial["validation"])
        if len(done) >= trials:
            return -math.inf
        done.append({"fields": dict(values), "validation": measure(dict(values))})
        return _rank(done[-1]["validation"])

    best = {name: values[0] for name, values in fields.items()}
    for name, values in fields.items():
        best = max([best | {name: value} for value in values], key=score)
    first = next(iter(fields))
    while len(done) < trials:
        before = len(done)
        tried = sorted({trial["fields"][first] for trial in done})
        place, value = tried.index(best[first]), best[first]
        above = tried[place + 1] / value if place + 1 < len(tried) else 4.0
        below = tried[place - 1] / value if place else 0.25
        for ratio in (above, below):
            score(best | {first: float(f"{value * math.sqrt(ratio):.2g}")})
        if len(done) == before:
            break
        best = max((trial["fields"] for trial in done), key=score)
    return dict(max((trial["fields"] for trial in done), key=score)), done


def _rank(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value
