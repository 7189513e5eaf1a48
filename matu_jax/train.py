"""The experiment program: `python -m matu_jax.train --config experiments/quickstart.py`.

    --config FILE             an experiment: a Python file with get_config()
    --config.FIELD=VALUE      changes a field, such as --config.rounds=3 or --config.local.steps=10;
                              --config.data=synthetic is short for --config.data.source=synthetic
    --workdir DIR             where results and checkpoints go; a directory of an interrupted run
                              is gone on with. Default: runs/<config>-<time>
    --distributed             joins the other processes of a run on a Cloud TPU pod or under Slurm,
                              where this very command is started once per host or task
    --coordinator HOST:PORT --processes N --process I
                              does so on other machines: process I of N, which meet at process 0,
                              at a port that is free there
    --profile                 traces one round, the second if there is one, into WORKDIR/profile,
                              for TensorBoard and https://ui.perfetto.dev

How far the run is goes to standard error: a bar on a terminal, elsewhere a line a round.

Compiled programs are kept in ~/.cache/matu_jax/compiled, and found there by the next run;
JAX_ENABLE_COMPILATION_CACHE=false turns that off.

Of several processes, each reads the data and trains the slots of its own devices; process 0 alone
prints, and reads and writes the workdir.

Exit codes: 0 done; 2 a mistake in the command, the config or the workdir, said in one message;
130 stopped with Ctrl-C, 143 with SIGTERM (preemption): the first one of either, at any process,
lets the round under way end and saves it.
"""

import collections
import contextlib
import dataclasses
import datetime
import importlib
import importlib.util
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from matu_jax import algorithms, attacks, hosts, models, privacy, report, rounds
from matu_jax.checkpoint import Checkpoints
from matu_jax.commandline import (
    Source,
    UserError,
    plain_console,
    read_config,
    run_program,
)
from matu_jax.config import Config
from matu_jax.data import Task, prepared, selection
from matu_jax.interruption import Stopped, StopRequest
from matu_jax.metrics import (
    SELECTION,
    MetricsLog,
    read_summary,
    relatedness_auc,
    selected,
    write_json,
)
from matu_jax.models.architectures import check_heads, transform_of
from matu_jax.models.checkpoint_config import architecture_of
from matu_jax.parallel import keep_programs, memory_there, own_devices, slot_mesh, use_cores
from matu_jax.progress import RoundProgress
from matu_jax.provenance import commit, machine, versions
from matu_jax.workdir import check_identity, opened

_FINISHING = "Stopping after this round, which is saved then; once more ends at once and loses it."
INTERRUPTED = "Interrupted. The same command with the same --workdir goes on."
_AUC = (
    "probability that a related pair of tasks (same label space) has a higher direction similarity "
    "than an unrelated pair, over all pairs of different tasks, ties counting one half; of the "
    "mean over all rounds of the similarity that the server measured (matrix)"
)
_OWN_PHASES = ("client_unify", "server_aggregation", "server_download")
_OVERHEAD = (
    f"the algorithm's own work ({', '.join(_OWN_PHASES)}) over all rounds, and its share of the "
    "seconds of the run without compilation"
)
_FRAMES = (
    "headers, task ids and checksums of messages (matu_jax.wire), which the other counts leave "
    "out; 0 for algorithms whose messages have no format"
)
_SIMULATION = (
    "predicted for the whole simulation on these devices: all clients, their data and the server"
)


def parse(argv: Sequence[str]) -> tuple[Config, Source, Path, dict[str, str]]:
    """Reads the command line: the checked config, its source, the workdir, and the options given.

    Raises:
      UserError: with what is wrong, and where.
    """
    config, source, options = read_config(
        argv, __doc__ or "", ["workdir", *hosts.OPTIONS], flags=["profile", "distributed"]
    )
    try:
        algorithms.build(config)
    except ValueError as error:
        raise UserError(str(error)) from None
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    workdir = options.get("workdir") or Path("runs") / f"{source.file.stem}-{stamp}"
    return config, source, Path(workdir), options


def check_inputs(config: Config, source: Source) -> None:
    """Checks that the datasets and the checkpoint are there, fetching the latter if need be.

    Args:
      config: the experiment.
      source: where it is from, for the commands in messages.

    Raises:
      UserError: one message with everything that is missing, and how to get it.
    """
    problems = []
    if config.privacy.clip_norm and config.privacy.seed < 0:
        absent = [name for name in privacy.PACKAGES if not importlib.util.find_spec(name)]
        if absent:
            problems.append(
                f"config.privacy: not installed, of what draws noise and computes epsilon: "
                f"{' and '.join(absent)}. Install with\n    pip install 'matu_jax[privacy]'"
            )
    try:
        names = rounds.task_names(config)
        data = config.data
        generated = selection.is_generated(data.tasks, data.folders)
        if not generated:
            check_heads(config.model, names)
        if not generated and data.source == "prepared":
            transform = transform_of(config.model)
            absent = prepared.missing(names, transform=transform, folders=data.folders)
            if absent:
                problems.append(
                    f"data: {len(absent)} of {len(names)} datasets are not prepared "
                    f"({', '.join(absent)}). Prepare them with\n"
                    f"    {source.command('prepare')}\n"
                    "  or try the experiment with stand-ins: --config.data=synthetic"
                )
        if config.model.architecture != "embedded" and config.model.checkpoint != "random":
            architecture_of(config.model)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


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
    if _is_finished(workdir):
        with hosts.together():
            return _finished(workdir, console) if first else {}

    with hosts.together():
        try:
            federation = rounds.federate(config)
            model = models.build(config.model, federation.tasks, seed=config.seed)
            algorithm, mesh = algorithms.build(config), slot_mesh()
            target = jax.eval_shape(lambda: algorithm.init(model.base, federation.slots))
            meta = rounds.identity(config, federation) if first else {}
        except ValueError as error:
            raise UserError(str(error)) from None
    fitted = rounds.fitted(config, model, algorithm, federation, mesh)
    _print_plan(fitted, algorithm, model, federation, mesh, workdir, console)

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
                results = rounds.run(fitted, algorithm, model, federation, mesh=mesh, start=start)
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
        summary, similarity = _results(config, algorithm, federation, target, log, similarity_sum)
        names = [task.name for task in federation.tasks]
        title = f"{name}: {config.algorithm}"
        file, chance = workdir / "accuracy.png", summary["chance"]
        report.plot_accuracy(log.records(), file, title=title, chance=chance)
        if summary["similarity"]:
            report.plot_similarity(
                similarity,
                names,
                summary["label_spaces"],
                workdir / "similarity.png",
                title=f"{title}, mean over rounds",
            )
        write_json(workdir / "summary.json", summary)
        console.print(report.result_table(summary))
        console.print(f"Results: {workdir}")
        return summary


def _results(config, algorithm, federation, target, log, similarity_sum) -> tuple[dict, np.ndarray]:
    """The summary of a run, and the mean of its similarities."""
    try:
        records = log.first(config.rounds)
    except ValueError as error:  # of another program, while this one ran
        raise UserError(f"{error}. The same command says how to go on.") from None
    similarity = similarity_sum / max(sum(r["aggregated"] for r in records), 1)
    summary = _summary(config, federation, records, similarity)
    summary["metrics"] = log.fingerprint  # so that results are read beside no other records
    summary["config"] = dataclasses.asdict(config)
    summary["chance"] = {task.name: 1 / task.num_classes for task in federation.tasks}
    summary["label_spaces"] = [task.label_space for task in federation.tasks]
    if config.privacy.clip_norm:
        summary["privacy"] = _privacy(config, records)
    if config.attack.kind != "none":
        summary["liars"] = _liars(config, federation)
    kept = jax.eval_shape(algorithm.kept, target)
    summary["server"] = {
        "kept_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept)),
        "kept_per_client": algorithm.kept_per_client,
    }
    return summary, similarity


def _is_finished(workdir: Path) -> bool:
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
    console.print(report.result_table(summary))
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


def _print_plan(config, algorithm, model, federation, mesh, workdir, console) -> None:
    slots = federation.slots
    state = jax.eval_shape(algorithm.init, model.base, slots)
    stacked = jax.eval_shape(algorithm.download, state, slots)
    uplink, downlink = jax.eval_shape(
        algorithm.sent, state, jax.eval_shape(algorithm.upload, stacked, slots)
    )
    memory = rounds.predicted_bytes(config, model, algorithm, federation, mesh)
    trained = sum(leaf.size for leaf in jax.tree.leaves(model.base))
    frozen = sum(leaf.size for leaf in jax.tree.leaves(model.frozen))
    device, processes = own_devices(mesh)[0], jax.process_count()
    bits = [algorithms.message_bits(message, slots).mean() for message in (uplink, downlink)]
    plan = {
        "devices": f"{mesh.size} x {device.device_kind} ({device.platform})"
        + (f" of {processes} processes" if processes > 1 else ""),
        "algorithm": config.algorithm,
        "clients": f"{slots.num_clients}, {config.clients_per_round or slots.num_clients} a round",
        "tasks": len(federation.tasks),
        "slots (client, task)": f"{len(slots.client)}, {int(slots.weight.sum())} examples",
        "parameters trained": f"{trained:,} of {trained + frozen:,}",
        "rounds": f"{config.rounds} of {config.local.steps} steps of "
        f"{config.local.batch_examples} examples",
        "uplink per client and round": report.human_bits(float(bits[0])),
        "downlink per client and round": report.human_bits(float(bits[1])),
        "memory": f"{report.human_bytes(sum(memory.values()))} ({_SIMULATION})",
        "workdir": str(workdir),
    }
    console.print(report.plan_table(plan))
    for line in data_notes(federation.tasks):
        console.print(line)
    there, needed = memory_there(device), sum(memory.values()) // mesh.size
    if there and needed > there:
        console.print(
            f"warning: about {report.human_bytes(needed)} of memory are needed per device, and "
            f"{report.human_bytes(there)} are there. Most go into "
            f"{max(memory, key=lambda part: memory[part])}. Lower config.local.parallel_slots, or "
            "set config.model.remat=True or config.model.compute_dtype=bfloat16."
        )


def data_notes(tasks: Sequence[Task]) -> Iterator[str]:
    """What people should know of the data, a line for each note, with the tasks that share it."""
    named: dict[str, list[str]] = {}
    for task in tasks:
        for note in task.notes:
            named.setdefault(note, []).append(task.name)
    for note, names in named.items():
        yield f"data: {', '.join(names)}: {note}"


def _privacy(config: Config, records: list[dict]) -> dict:
    """What the clients' noise has bought; of the client that took part most often."""
    times = collections.Counter(client for r in records for client in r["clients"])
    releases = max(times.values(), default=0)
    secret = config.privacy.seed < 0
    return {
        "private": secret,
        "epsilon": privacy.epsilon(config.privacy, releases) if secret else None,
        "delta": config.privacy.delta if secret else None,
        "releases": releases,
        "noise": "discrete Gaussian, from the operating system's entropy"
        if secret
        else f"from config.privacy.seed = {config.privacy.seed}: not private",
        "definition": "client-level, zero-out adjacency, towards the server; see matu_jax.privacy; "
        "a round that was run again after a crash, or after going back to an older checkpoint, has "
        "released once more, which is not counted",
    }


def _liars(config: Config, federation: rounds.Federation) -> dict:
    """Which clients lied, and by task the share of its holders that they are."""
    slots = federation.slots
    lies = attacks.liars(config.attack, slots, config.seed)
    return {
        "clients": np.flatnonzero(lies).tolist(),
        "share_of_holders": {
            task.name: lies[slots.client[slots.task == index]].mean()
            for index, task in enumerate(federation.tasks)
        },
    }


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


def _summary(config, federation, records, similarity) -> dict:
    measured = [r for r in records if r["accuracy"] is not None]
    best = selected(records)
    if best is None:
        raise UserError("metrics.jsonl: found no round with an accuracy, which the last one has.")
    accuracy = best["accuracy"]
    clients = sum(len(r["clients"]) for r in records)
    phases = sorted({phase for r in records for phase in r["seconds"]})
    by_round = [r["similarity_auc"] for r in records]
    seconds = {phase: sum(r["seconds"].get(phase, 0.0) for r in records) for phase in phases}
    total = sum(seconds.values())
    own = sum(seconds.get(phase, 0.0) for phase in _OWN_PHASES)
    running = total - seconds.get("compile", 0.0)
    return {
        "algorithm": config.algorithm,
        "seed": config.seed,
        "rounds": config.rounds,
        "selected_round": best["round"],
        "selection": SELECTION,
        "accuracy": {
            "mean": accuracy["test_mean"],
            "per_task": accuracy["test_per_task"],
            "per_slot": accuracy["test_per_slot"],
            "validation_mean": accuracy["validation_mean"],
            "last_round_mean": measured[-1]["accuracy"]["test_mean"],
        },
        "communication": {
            "uplink_bits_per_client_round": sum(r["uplink_bits"] for r in records) / clients,
            "downlink_bits_per_client_round": sum(r["downlink_bits"] for r in records) / clients,
            "uplink_bits_total": sum(r["uplink_bits"] for r in records),
            "downlink_bits_total": sum(r["downlink_bits"] for r in records),
            "frames": _frames(records),
        },
        "seconds": {"total": total} | seconds,
        "overhead": {
            "seconds": own,
            "share": own / running if running else None,
            "definition": _OVERHEAD,
        },
        "similarity": None
        if not similarity.any()
        else {
            "auc": relatedness_auc(similarity, rounds.related(federation.tasks)),
            "auc_first_round": by_round[0],
            "auc_last_round": by_round[-1],
            "definition": _AUC,
            "tasks": [task.name for task in federation.tasks],
            "matrix": similarity.tolist(),
        },
        "slots": {
            "client": federation.slots.client.tolist(),
            "task": federation.slots.task.tolist(),
            "examples": federation.slots.weight.tolist(),
        },
        "data_fingerprint": rounds.fingerprints(federation),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
    }


def _frames(records: list[dict]) -> dict | None:
    """What messages hold besides vectors, masks and scales."""
    directions = ("uplink", "downlink")
    if not all(f"{direction}_frame_bits" in r for r in records for direction in directions):
        return None  # rounds of an older version
    return {
        f"{direction}_bits_total": sum(r[f"{direction}_frame_bits"] for r in records)
        for direction in directions
    } | {"definition": _FRAMES}


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns the exit code."""

    def work(console: Console) -> None:
        config, source, workdir, options = parse(argv)
        use_cores()
        keep_programs()
        hosts.join(options)
        if not hosts.is_first():
            console = Console(quiet=True)
        if not _is_finished(workdir):
            with hosts.together():
                check_inputs(config, source)
        with contextlib.ExitStack() as stack:
            with hosts.together():
                if hosts.is_first():
                    stack.enter_context(opened(workdir, config))
            progress = RoundProgress(plain_console(stderr=True)) if hosts.is_first() else None
            profile = "profile" in options
            train(config, source.file.stem, workdir, console, progress=progress, profile=profile)

    mistakes = (UserError, rounds.StoppedError)
    return run_program(work, interrupted=INTERRUPTED, mistakes=mistakes)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
