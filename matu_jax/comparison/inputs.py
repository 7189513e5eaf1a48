"""Whether all that the runs of a comparison need is there, and by what they are measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from matu_jax import models
from matu_jax.comparison.plan import Comparison, Run, run_config
from matu_jax.config import Config
from matu_jax.data import Task
from matu_jax.errors import UserError
from matu_jax.models import MODELS, Model
from matu_jax.runs.commandline import Source
from matu_jax.runs.plan import check_inputs
from matu_jax.simulation import rounds
from matu_jax.simulation.federation import algorithm_for, dealt_out, load_tasks
from matu_jax.simulation.measures import Measure, main_measure, measure_named


def check_runs(
    comparison: Comparison, runs: Sequence[Run], source: Source
) -> dict[tuple[str, str], tuple[Measure, ...]]:
    """Checks that what runs need is there, before the first of hours; see `runs.plan`.

    A model of one's own is built, with the first seed of its setting and arm, and its algorithm is
    tried on its shapes.

    Args:
      comparison: with the searched fields in its arms.
      runs: those to be made.
      source: where the comparison is from, for the commands in messages.

    Returns:
      What runs are measured by, the main measure first, by setting and arm; of models of one's own
      alone.

    Raises:
      UserError: one message with everything that is wrong, with the first setting and arm of each.
    """
    first = {(run.setting, run.arm): run for run in reversed(runs)}
    built: dict[Any, tuple[Sequence[Task], Model]] = {}
    measures, messages = {}, {}
    for key in dict.fromkeys((run.setting, run.arm) for run in runs):
        try:
            config = run_config(comparison, first[key])
            check_inputs(config, source)
            if config.model.architecture in MODELS:
                measures[key] = _tried(config, built)
        except (UserError, ValueError) as error:
            messages.setdefault(str(error), " / ".join(key))
    if messages:
        raise UserError("\n".join(f"{where}: {text}" for text, where in messages.items()))
    return measures


def _tried(config: Config, built: dict[Any, tuple[Sequence[Task], Model]]) -> tuple[Measure, ...]:
    """What a run of a model of one's own is measured by, the main measure first.

    Args:
      config: the run's.
      built: tasks and model of the run before, which are kept where this one has the same.

    Raises:
      ValueError: for what would stop the run before its first round.
    """
    same = config.data, config.model, config.seed
    if same not in built:
        built.clear()
        tasks = load_tasks(config)
        built[same] = tasks, models.build(config.model, tasks, seed=config.seed)
    tasks, model = built[same]
    federation, algorithm = dealt_out(config, tasks), algorithm_for(config, model)
    jax.eval_shape(lambda: algorithm.init(model.base, federation.slots))
    rounds.run(config, algorithm, model, federation)  # no round is run until it is asked for
    main = main_measure(model.metrics, federation.tasks)
    metrics = (measure_named(name, metric) for name, metric in model.metrics.items())
    return main, *(measure for measure in metrics if measure.name != main.name)


def check_measures(found: Sequence[Measure], expected: Sequence[Measure], folder: Path) -> None:
    """Checks that a run is measured as its like are now; one of before may have been otherwise.

    Args:
      found: what it was measured by, the main measure first.
      expected: what its like are measured by.
      folder: where the run is.

    Raises:
      UserError: if it is measured by something else.
    """
    if found[0] != expected[0] or {*found} != {*expected}:
        raise UserError(
            f"{folder}: this run was measured by {_described(found)}, and its like are now by "
            f"{_described(expected)}, which cannot be compared. Bring model.metrics and the tasks' "
            "metrics back as they were, or remove that folder: the same command makes the run "
            "again."
        )


def _described(measures: Sequence[Measure]) -> str:
    better = {True: "higher is better", False: "lower is better"}
    return ", ".join(f"{each.name} ({better[each.higher_is_better]})" for each in measures)
