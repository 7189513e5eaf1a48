"""Makes the runs of a comparison, and those of the search before it."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from matu_jax.comparison import plan, report
from matu_jax.comparison.collect import collect
from matu_jax.comparison.tuning import Tried, search
from matu_jax.config import Config
from matu_jax.errors import UserError
from matu_jax.json_files import remove_unfinished, write_json
from matu_jax.runs.commandline import Source, plain_console
from matu_jax.runs.plan import check_inputs
from matu_jax.runs.progress import RoundProgress, draws_bars
from matu_jax.runs.provenance import machine, versions
from matu_jax.runs.training import train
from matu_jax.runs.workdir import disk_errors, keep_experiment, opened
from matu_jax.simulation.attendance import StoppedError
from matu_jax.simulation.measures import measure_of


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
            except StoppedError as error:
                raise UserError(f"{name}: {error}") from None
        seconds = time.perf_counter() - started
        if fresh:
            jax.clear_caches()
            measure = measure_of(summary)
            reached = measure.text(summary[measure.name]["mean"])
            self._bar.console.print(f"{name}: {measure.name} {reached} in {seconds:.0f} s")
        self._bar.advance(self._job)
        return summary


def tune(comparison: plan.Comparison, source: Source, workdir: Path, console: Console) -> Path:
    """Searches every arm's fields with the same number of trials, and writes the result.

    A trial is measured after its last round only.

    Returns:
      The file written.

    Raises:
      UserError: if the comparison names no file for the result, or no fields to search.
    """
    for name, what in (
        ("search", "the fields that are tried for every arm"),
        ("tuned", "the file for what is found"),
    ):
        if not getattr(comparison, name):
            raise UserError(f"--tune: {source.file} has no `{name}`: {what}. Give it one.")
    setting = comparison.tuning_setting or next(iter(comparison.settings))
    trials = [plan.Run(setting, label, comparison.tuning_seed) for label in comparison.arms]
    _check_inputs(comparison, trials, source)
    target = source.file.parent / comparison.tuned
    found = {"arms": {}}
    with disk_errors(target.parent):
        remove_unfinished(target.parent, target.name)
    if target.exists():
        try:
            found["arms"] |= plan.read_tuned(target)["arms"]
        except ValueError as error:
            raise UserError(
                f"--tune: {error}. Remove it, and all arms are searched anew."
            ) from None
    with Runner(len(comparison.arms) * comparison.trials) as runner:
        for label in comparison.arms:
            run = plan.Run(setting, label, comparison.tuning_seed)

            def tried(fields: dict[str, Any], run: plan.Run = run) -> Tried:
                config = plan.run_config(comparison, run, fields)
                last = dataclasses.replace(config.evaluation, every_rounds=config.rounds)
                config = dataclasses.replace(config, evaluation=last)
                words = [f"{name}={value}" for name, value in fields.items()]
                name = plan.folder_name(",".join(words))
                folder = workdir / "tuning" / plan.folder_name(run.arm) / name
                summary = runner.run(config, f"{run.arm} {' '.join(words)}", folder)
                measure = measure_of(summary)
                value = summary[measure.name]["validation_mean"]
                return Tried(value, measure.rank(value))

            fields = {**comparison.search, **comparison.own_search.get(label, {})}
            best, trials = search(fields, comparison.trials, tried)
            found["arms"][label] = {
                "chosen": best["fields"],
                "validation": best["validation"],
                "trials": trials,
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
    return target


def compare(
    comparison: plan.Comparison, source: Source, workdir: Path, console: Console
) -> dict[str, Any]:
    """Makes all runs that are not there yet, and the report after each setting and seed.

    Returns:
      What comparison.json holds.

    Raises:
      UserError: for what the user has to mend.
    """
    try:
        comparison, tuning = plan.with_tuned(comparison, source)
    except ValueError as error:
        raise UserError(str(error)) from None
    runs = list(plan.runs(comparison))
    _check_inputs(comparison, runs, source)
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
            runner.run(config, f"{run.setting} / {run.arm} / seed {run.seed}", folder)
            complete = run.arm == plan.arms_of(comparison, run.setting)[-1]
            if (news and complete) or run is runs[-1]:
                news = False
                with disk_errors(workdir):
                    try:
                        found = collect(comparison, workdir, source, tuning=tuning)
                    except ValueError as error:
                        raise UserError(str(error)) from None
                    write_json(workdir / "comparison.json", found)
                    report.write(found, workdir)
    console.print(f"Report: {workdir / 'report.html'}")
    return found


def _check_inputs(comparison: plan.Comparison, runs: Sequence[plan.Run], source: Source) -> None:
    """Checks that what runs need is there, before the first of hours; see `runs.plan`."""
    messages = {}
    for setting, arm in dict.fromkeys((run.setting, run.arm) for run in runs):
        try:
            config = plan.run_config(comparison, plan.Run(setting, arm, 0))
            check_inputs(config, source)
        except UserError as error:
            messages.setdefault(str(error), f"{setting} / {arm}")
    if messages:
        raise UserError("\n".join(f"{where}: {text}" for text, where in messages.items()))


def _print_plan(
    comparison: plan.Comparison, runs: Sequence[plan.Run], workdir: Path, console: Console
) -> None:
    left = [run for run in runs if not (run.folder(workdir) / "summary.json").exists()]
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
