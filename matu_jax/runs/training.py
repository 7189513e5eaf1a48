"""Runs or resumes an experiment, and writes everything about it into its workdir."""

import contextlib
import importlib.util
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from matu_jax import algorithms, models
from matu_jax.config import Config
from matu_jax.errors import UserError
from matu_jax.json_files import write_json
from matu_jax.runs import figures
from matu_jax.runs.checkpoints import Checkpoints
from matu_jax.runs.interruption import Stopped, StopRequest
from matu_jax.runs.log import MetricsLog, read_summary, selected
from matu_jax.runs.plan import print_plan
from matu_jax.runs.progress import RoundProgress
from matu_jax.runs.provenance import commit
from matu_jax.runs.results import run_results
from matu_jax.runs.tables import result_table
from matu_jax.runs.workdir import check_identity
from matu_jax.simulation import hosts, rounds
from matu_jax.simulation.federation import federate, identity
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
) -> dict:
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

    with hosts.together():
        try:
            federation = federate(config)
            model = models.build(config.model, federation.tasks, seed=config.seed)
            algorithm, mesh = algorithms.build(config), slot_mesh()
            target = jax.eval_shape(lambda: algorithm.init(model.base, federation.slots))
            meta = identity(config, federation) if first else {}
        except ValueError as error:
            raise UserError(str(error)) from None
    that_fits = fitted(config, model, algorithm, federation, mesh)
    print_plan(that_fits, algorithm, model, federation, mesh, workdir, console)

    # While it is imported, etils replaces Python's import, on which a bar drawn meanwhile fails.
    importlib.import_module("grain")
    log = MetricsLog(workdir / "metrics.jsonl")
    if profile and first and not (workdir / "profile").is_dir() and (workdir / "profile").exists():
        raise UserError(f"--profile: {workdir / 'profile'} is no folder. Move it away.")
    saving = 0.0  # seconds of the round before, since a round's line is written before it is saved
    with contextlib.ExitStack() as stack:
        zero = np.zeros((len(federation.tasks),) * 2, np.float32)
        checkpoints = None
        with hosts.together():
            if first:
                folder = workdir / "checkpoints"
                checkpoints = stack.enter_context(Checkpoints(folder, keep=config.checkpoint.keep))
        start, similarity_sum = _restored(checkpoints, log, config, meta, target, zero)
        best = selected(log.records()) if first else None
        if start:
            console.print(f"Going on after round {start[0]} of {config.rounds}.")
        done = start[0] if start else 0
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
            for last in results:
                if last.similarity is not None:
                    similarity_sum = similarity_sum + last.similarity
                signal = hosts.highest(stop.signal or 0)
                best = selected([*([best] if best else []), last.record])
                due = last.round % config.checkpoint.every_rounds == 0
                due = due or (first and best is last.record)  # results speak of it, exports read it
                due = bool(hosts.highest(due or last.round == config.rounds or bool(signal)))
                clock = time.perf_counter()
                state = last.state if due else None
                with hosts.together():
                    if checkpoints:
                        # The line first: a kill in between leaves a line too many, which resuming
                        # drops.
                        last.record["seconds"]["checkpoint"] = saving
                        log.append(last.record)
                        if due:
                            kept = {"state": state, "similarity_sum": similarity_sum}
                            notes = meta | {"metrics": log.fingerprint}
                            spare = best["round"] if best else None
                            checkpoints.save(last.round, kept, notes, spare=spare)
                        saving = time.perf_counter() - clock
                del state  # it may be a copy
                progress.advance(last.record)
                for line in _left_out(last.record["dropped"]):
                    progress.say(f"round {last.round}: left out: {line}")
                if signal and last.round < config.rounds:
                    raise Stopped(
                        f"Stopped after round {last.round} of {config.rounds}, which is saved."
                        + (
                            f" Go on with the same command and --workdir {workdir}."
                            if first
                            else ""
                        ),
                        signal,
                    )
    with hosts.together():
        if not first:
            return {}
        summary, similarity = run_results(
            config, algorithm, federation, target, log, similarity_sum
        )
        names = [task.name for task in federation.tasks]
        title = f"{name}: {config.algorithm}"
        file, chance = workdir / "accuracy.png", summary["chance"]
        figures.plot_accuracy(log.records(), file, title=title, chance=chance)
        if summary["similarity"]:
            figures.plot_similarity(
                similarity,
                names,
                summary["label_spaces"],
                workdir / "similarity.png",
                title=f"{title}, mean over rounds",
            )
        write_json(workdir / "summary.json", summary)
        console.print(result_table(summary))
        console.print(f"Results: {workdir}")
        return summary


def is_finished(workdir: Path) -> bool:
    """Whether a run has its results already; all processes are told what the first finds."""
    return bool(hosts.highest(hosts.is_first() and os.path.lexists(workdir / "summary.json")))


def _finished(workdir: Path, console: Console) -> dict:
    """Shows the results of a run that is finished."""
    try:
        summary = read_summary(workdir / "summary.json")
    except ValueError as error:
        raise UserError(
            f"{error}. Remove it: the same command makes it again from the checkpoints."
        ) from None
    console.print(f"{workdir}: this run is finished; its results:")
    console.print(result_table(summary))
    return summary


def _restored(
    checkpoints: Checkpoints | None,
    log: MetricsLog,
    config: Config,
    meta: dict[str, Any],
    target: Any,
    zero: np.ndarray,
) -> tuple[tuple[int, Any] | None, np.ndarray]:
    """Where a run goes on, and the sum of similarities so far, as process 0 finds it on disk."""
    target, found = {"state": target, "similarity_sum": zero}, None
    with hosts.together():
        try:
            if checkpoints:
                found = checkpoints.restore(target)
                if found:
                    check_identity(checkpoints.directory, found[2], config, meta)
                _keep_records(log, checkpoints, found)
        except ValueError as error:
            raise UserError(str(error)) from None
    done = hosts.highest(found[0] if found else 0)
    if not done:
        return None, zero
    state = found[1] if found else jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), target)
    state = hosts.agreed(state)
    return (done, state["state"]), np.asarray(state["similarity_sum"])


def _keep_records(log: MetricsLog, checkpoints: Checkpoints, found: tuple | None) -> None:
    """Drops records of rounds after the checkpoint's; those up to it have to be there as written.

    Everything that is summed up over rounds, such as epsilon, comes from them.

    Raises:
      ValueError: says what is wrong with them, and where the run can go on.
    """
    done, meta = (found[0], found[2]) if found else (0, {})
    try:
        log.truncate_after(done, meta.get("metrics"))
    except ValueError as error:
        if not done:
            raise ValueError(f"{error}. Remove it: nothing of it is needed.") from None
        ways = ["Bring the file back from a copy"]
        for number in reversed(checkpoints.complete()):
            with contextlib.suppress(ValueError):
                if number < done:
                    log.check(number, checkpoints.meta(number).get("metrics"))
                    ways.append(
                        f"or, to go on after round {number}, remove the newer ones in "
                        f"{checkpoints.directory}"
                    )
                    break
        raise ValueError(
            f"{error}. What is summed up over rounds, such as epsilon, would be wrong. "
            f"{'; '.join(ways)}; or, to start from round 0, remove {checkpoints.directory}, or "
            "give another --workdir."
        ) from None


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
