"""Makes the runs of a comparison, and those of the search before it."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from matu_jax.comparison import plan, report
from matu_jax.comparison.arms import number
from matu_jax.comparison.collect import collect
from matu_jax.comparison.inputs import check_measures, check_runs
from matu_jax.comparison.tuning import Tried, search
from matu_jax.comparison.whole import check_configs, is_finished, with_finished
from matu_jax.config import Config
from matu_jax.errors import UserError
from matu_jax.json_files import remove_unfinished, write_json
from matu_jax.runs.commandline import Source, plain_console
from matu_jax.runs.log import read_summary
from matu_jax.runs.progress import RoundProgress, draws_bars
from matu_jax.runs.provenance import machine, versions
from matu_jax.runs.training import train
from matu_jax.runs.workdir import disk_errors, keep_experiment, opened
from matu_jax.simulation.attendance import StoppedError
from matu_jax.simulation.measures import Measure, measure_of, measures_of


class Runner:
    """Makes runs, and says how far it is and how long each took.

    Args:
      total: how many runs there are.
    """

    def __init__(self, total: int):
        console = plain_console(stderr=True)
        self._bar = Progress(
            TextColumn("run"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False),
            console=console,
            disable=not draws_bars(console),
        )
        self._job = self._bar.add_task("", total=total)

    def __enter__(self) -> "Runner":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def run(self, config: Config, name: str, folder: Path) -> dict[str, Any]:
        """Makes one run, or goes on with it, or reads its result if it is finished.

        Raises:
          UserError: for what the user has to mend.
          StoppedError: if training fails in too many slots.
        """
        self._bar.update(self._job, description=name)
        quiet, progress = (
            Console(quiet=True),
            RoundProgress(self._bar.console, label=name, bar=False),
        )
        started = time.perf_counter()
        with opened(folder, config):
            fresh = not (folder / "summary.json").exists()
            try:
                summary = train(config, name, folder, quiet, progress=progress)
            finally:
                self._bar.advance(self._job)
        seconds = time.perf_counter() - started
        if fresh:
            jax.clear_caches()
            measure = measure_of(summary)
            reached = measure.text(summary[measure.name]["mean"])
            self.say(f"{name}: {measure.name} {reached} in {seconds:.0f} s")
        return summary

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._bar.console.print(line)


def tune(comparison: plan.Comparison, source: Source, workdir: Path, console: Console) -> Path:
    """Searches every arm's fields with the same number of trials, and writes the result.

    A trial is measured after its last round only.

    Returns:
      The file written.

    Raises:
      UserError: if the comparison names no file for the result, or no fields to search; or, after
        all arms were searched and the file was written, if no trial of an arm came to a number.
    """
    for name, what in (
        ("search", "the fields that are tried for every arm"),
        ("tuned", "the file for what is found"),
    ):
        if not getattr(comparison, name):
            raise UserError(f"--tune: {source.file} has no `{name}`: {what}. Give it one.")
    setting = comparison.tuning_setting or next(iter(comparison.settings))
    trials = [plan.Run(setting, label, comparison.tuning_seed) for label in comparison.arms]
    measures = check_runs(comparison, trials, source)
    target = source.file.parent / comparison.tuned
    with disk_errors(target.parent):
        remove_unfinished(target.parent, target.name)
    found: dict[str, Any] = {"arms": _searched_before(target)}
    lost = []
    with Runner(len(trials) * comparison.trials) as runner:
        for run in trials:
            fields = {**comparison.search, **comparison.own_search.get(run.arm, {})}
            tried = functools.partial(_tried, comparison, run, runner, workdir, measures)
            best, all_tried = search(fields, comparison.trials, tried)
            found["arms"].pop(run.arm, None)
            if best["validation"] is None:
                lost.append(f"{run.arm} ({'; '.join(_words(t['fields']) for t in all_tried)})")
                continue
            found["arms"][run.arm] = {
                "fields": plan.as_json(comparison.arms[run.arm]),
                "chosen": best["fields"],
                "validation": best["validation"],
                "measure": measures[run.setting, run.arm][0]._asdict(),
                "trials": all_tried,
            }
    found |= {
        "setting": setting,
        "seed": comparison.tuning_seed,
        "trials_per_algorithm": comparison.trials,
        "command": source.command("compare", ["--tune"]),
        "machine": machine(),
        "versions": versions(),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, found)
    if lost:
        raise UserError(
            f"--tune: no trial of {', '.join(lost)} came to a finite number on validation, so "
            f"{target} has no choice for what is named here. Give `search` or `own_search` other "
            "values, such as lower learning rates; trials that are done are not made again."
        )
    return target


def _searched_before(target: Path) -> dict[str, Any]:
    """By arm what a search has found before this one."""
    if not target.exists():
        return {}
    try:
        return dict(plan.read_tuned(target)["arms"])
    except ValueError as error:
        raise UserError(f"--tune: {error}. Remove it, and all arms are searched anew.") from None


def _tried(
    comparison: plan.Comparison,
    run: plan.Run,
    runner: Runner,
    workdir: Path,
    measures: dict[tuple[str, str], tuple[Measure, ...]],
    fields: dict[str, Any],
) -> Tried:
    """Makes a trial, or reads it; one in which training fails is the worst.

    Args:
      comparison: whose arm is tried.
      run: which arm, where, and with which seed.
      runner: what makes it.
      workdir: of the comparison.
      measures: by setting and arm what trials are measured by; an arm that is not there yet is put
        there with its first trial.
      fields: the values that are tried.

    Raises:
      UserError: for what the user has to mend, or if a trial that was there is measured by
        something else.
    """
    config = plan.run_config(comparison, run, fields)
    last = dataclasses.replace(config.evaluation, every_rounds=config.rounds)
    config = dataclasses.replace(config, evaluation=last)
    words = ",".join(f"{name}={value}" for name, value in fields.items())
    folder = workdir / "tuning" / plan.folder_name(run.arm) / plan.folder_name(words)
    name = f"{run.arm} {_words(fields)}"
    try:
        summary = runner.run(config, name, folder)
    except StoppedError as error:
        runner.say(f"{name}: {error}")
        return Tried(None, -math.inf)
    measure = measure_of(summary)
    expected = measures.setdefault((run.setting, run.arm), measures_of(summary))
    check_measures((measure,), expected[:1], folder)  # by others nothing is chosen
    value = number(summary[measure.name]["validation_mean"])
    return Tried(value, measure.rank(value))


def _words(fields: plan.Fields) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items())


def compare(
    comparison: plan.Comparison,
    source: Source,
    workdir: Path,
    console: Console,
    *,
    whole: plan.Comparison,
) -> dict[str, Any]:
    """Makes all runs that are not there yet, and the report after each setting and seed.

    Args:
      comparison: the part whose runs are made.
      source: where it is from.
      workdir: where runs and report go.
      console: for what is printed.
      whole: the comparison, of which everything that is finished in the workdir is told.

    Returns:
      What comparison.json holds.

    Raises:
      UserError: for what the user has to mend.
    """
    try:
        told, told_source = with_finished(comparison, whole, source, workdir)
        comparison, tuning = plan.with_tuned(comparison, source)
        told, _ = plan.with_tuned(told, told_source)
    except ValueError as error:
        raise UserError(str(error)) from None
    runs = list(plan.runs(comparison))
    measures = check_runs(comparison, runs, source)
    _check_tuned(tuning or {"arms": {}}, measures)
    check_configs(told, workdir)
    for run in plan.runs(told):
        _check_finished(run.folder(workdir), measures.get((run.setting, run.arm)))
    _print_plan(comparison, runs, workdir, console)
    news = False
    with disk_errors(workdir):
        remove_unfinished(workdir)
        if changed := keep_experiment(workdir, source.file):
            console.print(f"note: {changed}")
    with Runner(len(runs)) as runner:
        for run in runs:
            config, folder = plan.run_config(comparison, run), run.folder(workdir)
            news = news or not (folder / "summary.json").exists()
            name = f"{run.setting} / {run.arm} / seed {run.seed}"
            try:
                runner.run(config, name, folder)
            except StoppedError as error:
                raise UserError(f"{name}: {error}") from None
            complete = run.arm == plan.arms_of(comparison, run.setting)[-1]
            if (news and complete) or run is runs[-1]:
                news = False
                with disk_errors(workdir):
                    try:
                        found = collect(told, workdir, told_source, tuning=tuning)
                    except ValueError as error:
                        raise UserError(str(error)) from None
                    write_json(workdir / "comparison.json", found)
                    report.write(found, workdir)
    console.print(f"Report: {workdir / 'report.html'}")
    return found


def _check_tuned(
    tuning: Mapping[str, Any], measures: Mapping[tuple[str, str], tuple[Measure, ...]]
) -> None:
    """Checks that arms were searched by what they are measured by."""
    for label, arm in tuning["arms"].items():
        now = measures.get((tuning.get("setting", ""), label))
        # Older versions do not say.
        if now and arm.get("measure") and measure_of(arm) != now[0]:
            raise UserError(
                f"tuned: the fields of {label!r} were chosen by {measure_of(arm).name}, and it is "
                f"measured by {now[0].name} now. Search it again with --tune, or bring the metrics "
                "back."
            )


def _check_finished(folder: Path, expected: Sequence[Measure] | None) -> None:
    """Checks that a run, if it is finished, was measured as is expected, if that is known."""
    if expected and (folder / "summary.json").exists():
        with contextlib.suppress(ValueError):  # it is damaged, of which `collect` says what to do
            check_measures(measures_of(read_summary(folder / "summary.json")), expected, folder)


def _print_plan(
    comparison: plan.Comparison, runs: Sequence[plan.Run], workdir: Path, console: Console
) -> None:
    left = [run for run in runs if not is_finished(run, workdir)]
    console.print(
        f"Runs: {len(runs)}, done: {len(runs) - len(left)} (settings: {len(comparison.settings)}, "
        f"arms: {len(comparison.arms)}, seeds: {len(comparison.seeds)})."
    )
    known = [comparison.settings[run.setting].seconds for run in left]
    if left and all(known):
        console.print(
            f"What is left takes about {sum(known) / 60:.0f} min on two CPU cores, as "
            "measured when the comparison was made. Interrupted, the same command goes on."
        )
