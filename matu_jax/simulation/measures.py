"""By what rounds are chosen and methods compared: the main metric, as records name it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matu_jax.data import ImageTask, Task
from matu_jax.errors import did_you_mean
from matu_jax.models import Metric

SCORE = "score"
"""What a run is measured by where its tasks are not all measured by one metric: each by its own."""


class Measure(NamedTuple):
    """A metric by its name, and how its values are read.

    Attributes:
      name: under which records and summaries hold it; `SCORE` for each task's own main metric.
      higher_is_better: as in `Metric`.
      percent: as in `Metric`.
    """

    name: str
    higher_is_better: bool = True
    percent: bool = False

    def rank(self, value: float | None) -> float:
        """A number that is the higher, the better a value is; the lowest for none, or no finite."""
        if value is None or not math.isfinite(value):
            return -float("inf")
        return value if self.higher_is_better else -value

    def text(self, value: float | None) -> str:
        """A value for people: `"84.1 %"`, `"0.452"`, `"12.3"`; "–" for none, or no finite one."""
        if value is None or not math.isfinite(value):
            return "–"
        return f"{self.number(value)} %" if self.percent else self.number(value)

    def number(self, value: float) -> str:
        """A value without its unit: in percent `"84.1"`."""
        if self.percent:
            text = f"{100 * value:.1f}"
        else:
            text = f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
        return text.replace("-", "−")


ACCURACY = Measure("accuracy", True, True)


def main_metrics(metrics: Mapping[str, Metric], tasks: Sequence[Task]) -> list[str]:
    """Of each task the metric that it is measured by above all others.

    Raises:
      ValueError: for a task that names a metric, or the chance of one, which the model lacks.
    """
    for task in tasks:
        for name in task.metrics:
            if name not in metrics:
                raise ValueError(
                    f"task {task.name!r}: metrics: found {name!r}, which the model lacks."
                    f"{did_you_mean(name, metrics)}"
                )
        own = {} if isinstance(task, ImageTask) else task.chance  # theirs is of accuracy, always
        for name in own:
            if name not in metrics:
                raise ValueError(
                    f"task {task.name!r}: chance: found {name!r}, no metric of the model."
                    f"{did_you_mean(name, metrics)}"
                )
    return [task.metrics[0] if task.metrics else next(iter(metrics)) for task in tasks]


def main_measure(metrics: Mapping[str, Metric], tasks: Sequence[Task]) -> Measure:
    """What a run is measured by: the metric that all tasks have in common, or their score.

    Raises:
      ValueError: as `main_metrics`, or if some tasks are measured by a metric of which higher
        values are better and others by one of which lower ones are.
    """
    names = main_metrics(metrics, tasks)
    first = metrics[names[0]]
    if len(set(names)) == 1:
        return measure_named(names[0], first)
    for task, name in zip(tasks, names, strict=True):
        if not metrics[name].higher_is_better:
            raise ValueError(
                f"task {task.name!r}: is measured by {name!r}, of which lower values are better, "
                f"and other tasks by {', '.join(sorted({*names} - {name}))}. Their mean says "
                "nothing: name first in each task's metrics one of which higher values are better, "
                "such as r2 for an error."
            )
    return Measure(SCORE, True, all(metrics[name].percent for name in names))


def measure_named(name: str, metric: Metric) -> Measure:
    """A metric by its name."""
    return Measure(name, metric.higher_is_better, metric.percent)


def measure_of(found: Mapping[str, Any]) -> Measure:
    """What a record, a summary, or an arm of a comparison is measured by.

    Args:
      found: as JSON holds it; that of older versions does not say, and is measured by accuracy.
    """
    said = found.get("measure")
    return Measure(**said) if said else ACCURACY


def measures_of(summary: Mapping[str, Any]) -> tuple[Measure, ...]:
    """What a run was measured by, as its summary says, the main measure first."""
    return measure_of(summary), *(Measure(**also) for also in summary.get("also", []))
