"""Runs or resumes an experiment, and writes everything about it into its workdir."""

import contextlib
import importlib.util
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from matu_jax import algorithms, models
from matu_jax.config import Config
from matu_jax.errors import UserError
from matu_jax.models.contract import ContractError
from matu_jax.runs.interruption import Stopped, StopRequest
from matu_jax.runs.log import read_summary
from matu_jax.runs.plan import print_plan
from matu_jax.runs.progress import RoundProgress
from matu_jax.runs.provenance import commit
from matu_jax.runs.recorder import Recorder
from matu_jax.runs.results import write_results
from matu_jax.runs.tables import result_table
from matu_jax.simulation import hosts, rounds
from matu_jax.simulation.federation import Federation, algorithm_for, federate, identity
from matu_jax.simulation.memory import fitted
from matu_jax.simulation.placement import slot_mesh

_FINISHING = "Stopping after this round, which is saved then; once more ends at once and loses it."


def train(
    config: Config,
    name: str,
    workdir: Path,
    console: Console,
    *,
    progress: RoundProgress | None = None,
    profile: bool = False,
) -> dict[str, Any]:
    """Runs or resumes an experiment and writes everything about it into the workdir.

    To be called by all processes of a run; process 0 alone touches the workdir.

    Args:
      config: the experiment.
      name: what it is called in titles.
      workdir: where everything goes.
      console: what the plan and the results are printed on.
      progress: what is told how far the run is; None = nothing is.
      profile: whether a round is traced into `workdir / "profile"`.

    Returns:
      The summary, as in summary.json; at other processes than process 0, nothing.

    Raises:
      UserError: for what the user has to mend.
    """
    progress = progress or RoundProgress(Console(quiet=True))
    commit()  # of what is running, whatever is committed while it runs
    first = hosts.is_first()
    if is_finished(workdir):
        with hosts.together():
            return _finished(workdir, console) if first else {}

    federation, model, algorithm, mesh, target, meta = _built(config)
    that_fits = fitted(config, model, algorithm, federation, mesh)
    print_plan(that_fits, algorithm, model, federation, mesh, workdir, console)

    # While it is imported, etils replaces Python's import, on which a bar drawn meanwhile fails.
    importlib.import_module("grain")
    if profile and first and not (workdir / "profile").is_dir() and (workdir / "profile").exists():
        raise UserError(f"--profile: {workdir / 'profile'} is no folder. Move it away.")
    with Recorder(workdir, config, meta, len(federation.tasks)) as recorder:
        start = recorder.restored(target)
        done = start[0] if start else 0
        if start:
            console.print(f"Going on after round {done} of {config.rounds}.")
        with (
            progress.begin(config.rounds, done),
            StopRequest(lambda: progress.say(_FINISHING)) as stop,
        ):
            try:
                results = rounds.run(
                    that_fits, algorithm, model, federation, mesh=mesh, start=start
                )
            except ValueError as error:
                raise UserError(str(error)) from None
            if profile and first:
                results = _profiled(results, min(2, config.rounds - done), workdir / "profile")
            for result in _told(results):
                signal = hosts.highest(stop.signal or 0)
                recorder.keep(result, stopping=bool(signal))
                progress.advance(result.record)
                for line in _left_out(result.record["dropped"]):
                    progress.say(f"round {result.round}: left out: {line}")
                if signal and result.round < config.rounds:
                    raise Stopped(_stopped(result.round, config.rounds, workdir), signal)
    with hosts.together():
        if not first:
            return {}
        summary = write_results(
            workdir, name, config, algorithm.traffic, federation, model, target, recorder
        )
        console.print(result_table(summary))
        console.print(f"Results: {workdir}")
        return summary


def _built(
    config: Config,
) -> tuple[Federation, models.Model, algorithms.Algorithm, Mesh, Any, dict[str, Any]]:
    """What runs: who holds what, the model, the algorithm, the devices, and the state's shapes.

    And what the run is of, as process 0 notes it in checkpoints; nothing at the others.
    """
    with hosts.together():
        try:
            federation = federate(config)
            model = models.build(config.model, federation.tasks, seed=config.seed)
            algorithm, mesh = algorithm_for(config, model), slot_mesh()
            target = jax.eval_shape(lambda: algorithm.init(model.base, federation.slots))
            meta = identity(config, federation, model) if hosts.is_first() else {}
            return federation, model, algorithm, mesh, target, meta
        except ValueError as error:
            raise UserError(str(error)) from None


def _told(results: Iterator[rounds.RoundResult]) -> Iterator[rounds.RoundResult]:
    """The same results; what a model of one's own does wrongly is the user's to mend."""
    try:
        yield from results
    except ContractError as error:
        raise UserError(str(error)) from None


def _stopped(done: int, rounds: int, workdir: Path) -> str:
    """What to say at the end of a run that was asked to stop."""
    how = f" Go on with the same command and --workdir {workdir}." if hosts.is_first() else ""
    return f"Stopped after round {done} of {rounds}, which is saved.{how}"


def is_finished(workdir: Path) -> bool:
    """Whether a run has its results already; all processes are told what the first finds."""
    return bool(hosts.highest(hosts.is_first() and os.path.lexists(workdir / "summary.json")))


def _finished(workdir: Path, console: Console) -> dict[str, Any]:
    """Shows the results of a run that is finished."""
    try:
        summary = read_summary(workdir / "summary.json")
    except ValueError as error:
        raise UserError(
            f"{error}. Remove it: the same command makes it again from the checkpoints."
        ) from None
    console.print(
        f"{workdir}: this run is finished; its results (data and model were not looked at again):"
    )
    console.print(result_table(summary))
    return summary


def _profiled(
    results: Iterator[rounds.RoundResult], number: int, folder: Path
) -> Iterator[rounds.RoundResult]:
    """Traces the making of one result; 1 is the first, which compiles."""
    for index in itertools.count(1):
        trace = (
            jax.profiler.trace(folder, create_perfetto_trace=True)
            if index == number
            else contextlib.nullcontext()
        )
        with trace:
            result = next(results, None)
        if result is None:
            return
        yield result


def _left_out(dropped: list[dict]) -> list[str]:
    """What to say about slots that were left out of a round, a line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for drop in dropped:
        slot = f"client {drop['client']}, task {drop['task']}"
        by_reason.setdefault(drop["reason"], []).append(slot)
    lines = []
    for reason, slots in by_reason.items():
        more = f"; and {len(slots) - 3} more" if len(slots) > 3 else ""
        lines.append(f"{'; '.join(slots[:3])}{more} ({reason})")
    return lines
