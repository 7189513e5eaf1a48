"""By what a run is measured: the metric that tasks share, or each task's own."""

import numpy as np
import pytest

from matu_jax.data import Task
from matu_jax.models import metrics
from matu_jax.simulation.measures import ACCURACY, Measure, main_measure, measure_of


def pair(outputs, batch):
    return outputs, batch["y"]


METRICS = {
    "error": metrics.mean_squared_error(pair),
    "r2": metrics.r2(pair),
    "iou": metrics.mean_iou(pair, 3),
}


def task(name, *measured_by):
    split = {"y": np.zeros(2, np.float32)}
    return Task(name, split, split, split, metrics=measured_by)


@pytest.mark.parametrize(
    ("measured_by", "expected"),
    [
        ([(), ()], Measure("error", False, False)),
        ([("iou", "r2"), ("iou",)], Measure("iou", True, True)),
        ([("iou",), ("r2", "error")], Measure("score", True, False)),
    ],
)
def test_the_metric_that_all_tasks_share_or_their_score(measured_by, expected):
    tasks = [task(str(i), *names) for i, names in enumerate(measured_by)]
    assert main_measure(METRICS, tasks) == expected
    assert measure_of({"measure": expected._asdict()}) == expected


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([task("a", "r3")], "task 'a': metrics: found 'r3', which the model lacks. Choices: err"),
        (
            [task("a", "iou"), task("b", "error")],
            "task 'b': is measured by 'error', of which lower",
        ),
    ],
)
def test_what_has_no_mean_is_refused(tasks, words):
    with pytest.raises(ValueError, match=words):
        main_measure(METRICS, tasks)


def test_what_older_versions_wrote_is_accuracy():
    assert measure_of({"accuracy": {"mean": 0.5}}) == ACCURACY


@pytest.mark.parametrize(
    ("measure", "better", "worse", "text"),
    [
        (ACCURACY, 0.8412, 0.5, "84.1 %"),
        (Measure("r2"), 0.4521, -12.0, "0.452"),
        (Measure("perplexity", False), 12.34, 300.0, "12.3"),
    ],
)
def test_values_are_ranked_and_written(measure, better, worse, text):
    assert measure.rank(better) > measure.rank(worse) > measure.rank(None)
    assert measure.rank(None) == measure.rank(float("nan"))
    assert measure.text(better) == text
    assert measure.text(None) == "–"
