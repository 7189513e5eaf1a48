"""What a run has shown, as summary.json holds it."""

import collections
import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from matu_jax.config import Config
from matu_jax.errors import UserError
from matu_jax.json_files import write_json
from matu_jax.messages.traffic import Traffic
from matu_jax.models import Model
from matu_jax.runs import figures
from matu_jax.runs.log import selected, selection
from matu_jax.runs.provenance import commit, machine, versions
from matu_jax.runs.recorder import Recorder
from matu_jax.scenarios import attacks, privacy
from matu_jax.simulation.federation import Federation, fingerprints
from matu_jax.simulation.measures import main_measure, main_metrics, measure_named
from matu_jax.simulation.relatedness import related, relatedness_auc

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
    "headers, task ids and checksums of messages (matu_jax.messages.wire), which the other "
    "counts leave out; 0 for algorithms whose messages have no format"
)


def write_results(
    workdir: Path,
    name: str,
    config: Config,
    traffic: Traffic,
    federation: Federation,
    model: Model,
    target: Any,
    recorder: Recorder,
) -> dict[str, Any]:
    """Writes a finished run's pictures and its summary, and returns the latter.

    Args:
      workdir: where they go.
      name: of the experiment, for titles.
      config: the experiment.
      traffic: the algorithm's.
      federation: who held what.
      model: what was measured.
      target: shapes of the algorithm's state.
      recorder: what the rounds have left.

    Raises:
      UserError: if records are missing.
    """
    try:
        records = recorder.log.first(config.rounds)
    except ValueError as error:  # of another program, while this one ran
        raise UserError(f"{error}. The same command says how to go on.") from None
    similarity = recorder.similarity_sum / max(sum(r["aggregated"] for r in records), 1)
    summary = _summary(config, federation, model, records, similarity)
    summary["metrics"] = recorder.log.fingerprint  # so that results are read beside no others
    summary["config"] = dataclasses.asdict(config)
    summary["chance"] = _chance(federation, model)
    summary["label_spaces"] = [task.label_space for task in federation.tasks]
    if config.privacy.clip_norm:
        summary["privacy"] = _privacy(config, records)
    if config.attack.kind != "none":
        summary["liars"] = _liars(config, federation)
    kept = jax.eval_shape(traffic.kept, target)
    summary["server"] = {
        "kept_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept)),
        "kept_per_client": traffic.kept_per_client,
    }
    title = f"{name}: {config.algorithm}"
    picture = workdir / f"{_file_name(summary['measure']['name'])}.png"
    figures.plot_rounds(records, picture, title=title, chance=summary["chance"])
    if summary["similarity"]:
        figures.plot_similarity(
            similarity,
            [task.name for task in federation.tasks],
            summary["label_spaces"],
            workdir / "similarity.png",
            title=f"{title}, mean over rounds",
        )
    write_json(workdir / "summary.json", summary)
    return summary


def _chance(federation: Federation, model: Model) -> dict[str, float]:
    """By task what guessing would reach, in its own main metric, where the task says so."""
    main = main_metrics(model.metrics, federation.tasks)
    return {
        task.name: task.chance[name]
        for task, name in zip(federation.tasks, main, strict=True)
        if name in task.chance
    }


def _file_name(name: str) -> str:
    """A metric's name as that of a file."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)


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
        "definition": "client-level, zero-out adjacency, towards the server; see "
        "matu_jax.scenarios.privacy; a round that was run again after a crash, or after going "
        "back to an older checkpoint, has released once more, which is not counted",
    }


def _liars(config: Config, federation: Federation) -> dict:
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


def _summary(
    config: Config,
    federation: Federation,
    model: Model,
    records: list[dict[str, Any]],
    similarity: np.ndarray,
) -> dict[str, Any]:
    best = selected(records)
    if best is None:
        raise UserError("metrics.jsonl: found no round that was measured, as the last one is.")
    by = main_measure(model.metrics, federation.tasks)
    also = [measure_named(name, m) for name, m in model.metrics.items() if name != by.name]
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
        "selection": selection(best),
        "measure": by._asdict(),
        "also": [measure._asdict() for measure in also],
        **{measure.name: _results(measure.name, best, records) for measure in (by, *also)},
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
            "auc": relatedness_auc(similarity, related(federation.tasks)),
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
        "data_fingerprint": fingerprints(federation),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
    }


def _results(name: str, best: Mapping[str, Any], records: list[dict]) -> dict[str, Any]:
    """What a metric has reached in the run's best round."""
    found = best[name]
    return {
        "mean": found["test_mean"],
        "per_task": found["test_per_task"],
        "per_slot": found["test_per_slot"],
        **({"per_site": found["test_per_site"]} if "test_per_site" in found else {}),
        "validation_mean": found["validation_mean"],
        "last_round_mean": [r[name] for r in records if r[name]][-1]["test_mean"],
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
