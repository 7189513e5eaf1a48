"""From the results of runs to comparison.json."""

import dataclasses
import functools
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from matu_jax.comparison.plan import Comparison, Run, arms_of, as_json, runs
from matu_jax.runs.commandline import Source
from matu_jax.runs.log import MetricsLog, read_summary
from matu_jax.simulation.measures import ACCURACY, Measure, measure_of

FEWEST_SEEDS = 5  # from which a difference can be told from the luck of the draw
LEVEL = 0.05  # of significance
TOO_FEW = "too few seeds to tell"
_NEAR = 0.95  # of what the reference reaches; of what it goes down to, 1 / 0.95


def collect(
    comparison: Comparison,
    workdir: Path,
    source: Source,
    *,
    tuning: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Gathers what comparison.json holds, from the runs that are finished.

    Args:
      comparison: with the searched fields in its arms.
      workdir: where the runs are.
      source: where it is from, for the commands.
      tuning: what the search's file holds.

    Returns:
      Plain values; see `comparison.report` for their use. What an arm is measured by, its
      "measure", is held under that metric's name: of the test split, at the round that is best on
      validation; std is the sample's, over seeds.

    Raises:
      ValueError: if a run's files are damaged, or arms of a setting are measured by different
        metrics or on different tasks, have different numbers of clients, or were run on different
        data with the same seed; with what to do.
    """
    results = {run: _result(run.folder(workdir)) for run in runs(comparison)}
    return {
        "name": source.file.stem,
        "title": comparison.title,
        **_made([result["summary"] for result in results.values() if result]),
        "command": source.command("compare"),
        "seeds": list(comparison.seeds),
        "reference": comparison.reference,
        "ours": comparison.ours,
        "experiment": dataclasses.asdict(comparison.experiment),
        "tuning": tuning,
        "settings": [
            _setting(comparison, name, results, workdir, source) for name in comparison.settings
        ],
    }


def _made(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """When, from which source and on what runs were made: from their summaries.

    Where runs differ, the values are joined by commas; the date is that of the newest.
    "run_seconds" is the sum over all runs.
    """
    kinds = {
        kind: [summary.get(kind) or {} for summary in summaries] for kind in ("machine", "versions")
    }
    dates = [summary["date"] for summary in summaries if "date" in summary]
    return {
        "date": max(dates, default=None),
        "run_seconds": sum(summary["seconds"]["total"] for summary in summaries),
        "commit": _joined(summary.get("commit") for summary in summaries),
        **{
            kind: {
                key: _joined(each.get(key) for each in values)
                for key in dict.fromkeys(key for each in values for key in each)
            }
            for kind, values in kinds.items()
        },
    }


def _joined(values: Iterable[Any]) -> Any:
    """The one value that all have, or the different ones with commas between."""
    different = list(dict.fromkeys(values))
    if len(different) < 2:
        return different[0] if different else None
    return ", ".join("unknown" if value is None else str(value) for value in different)


def _setting(
    comparison: Comparison,
    name: str,
    by_run: Mapping[Run, dict[str, Any] | None],
    workdir: Path,
    source: Source,
) -> dict[str, Any]:
    setting = comparison.settings[name]
    labels = arms_of(comparison, name)
    results = {
        (arm, seed): by_run[Run(name, arm, seed)] for arm in labels for seed in comparison.seeds
    }
    there = [result for result in results.values() if result]
    measure = _measure(name, results)
    _check_alike(name, results)
    for seed in comparison.seeds:
        _check_data(
            {
                Run(name, arm, seed).folder(workdir): result["summary"]
                for arm in labels
                if (result := results[arm, seed])
            }
        )
    tasks = list(there[0]["summary"][measure.name]["per_task"]) if there else []
    arms = []
    for label in labels:
        found = {seed: results[label, seed] for seed in comparison.seeds}
        if any(found.values()):
            arms.append(_arm(comparison, name, label, found, results, source))
    return {
        "name": name,
        "description": setting.description,
        "overrides": as_json(setting.fields),
        "measure": measure._asdict(),
        "tasks": tasks,
        "chance": _chance(there[0]["summary"], tasks) if there else None,
        "label_spaces": there[0]["summary"]["label_spaces"] if there else [],
        "clients": there[0]["summary"]["config"]["data"]["clients"] if there else None,
        "rounds": there[0]["summary"]["rounds"] if there else None,
        "missing": [
            {"label": arm, "seed": seed} for (arm, seed), result in results.items() if not result
        ],
        "arms": arms,
    }


def _chance(summary: Mapping[str, Any], tasks: Sequence[str]) -> float | None:
    """What guessing reaches in the mean over tasks, where that is known of all of them."""
    known = summary.get("chance") or {}
    return _mean([known[task] for task in tasks]) if known.keys() >= {*tasks} else None


def _measure(setting: str, results: Mapping[tuple[str, int], dict[str, Any] | None]) -> Measure:
    """What all runs of a setting are measured by."""
    found = {run: measure_of(result["summary"]) for run, result in results.items() if result}
    for (arm, seed), measure in found.items():
        first = next(iter(found.values()))
        if measure != first:
            raise ValueError(
                f"settings[{setting!r}]: arm {arm!r}, seed {seed}, is measured by {measure.name}, "
                f"others by {first.name}, which cannot be compared. Give all arms of a setting one "
                "model.metrics, and tasks with the same first metric."
            )
    return next(iter(found.values()), ACCURACY)


def _check_alike(setting: str, results: Mapping[tuple[str, int], dict[str, Any] | None]) -> None:
    """Checks that runs have the tasks and clients of their setting, the metrics of their arm."""
    first, by_arm = None, {}
    for (arm, seed), result in results.items():
        if not result:
            continue
        summary = result["summary"]
        tasks = list(summary[measure_of(summary).name]["per_task"])
        found = tasks, summary["config"]["data"]["clients"]
        first = first or found
        if found != first:
            mine, others = (
                f"{clients} clients and the tasks {', '.join(tasks)}"
                for tasks, clients in (found, first)
            )
            raise ValueError(
                f"settings[{setting!r}]: arm {arm!r}, seed {seed}, has {mine}; others have "
                f"{others}, which cannot be compared. Give all arms of a setting the same data, "
                "and other data to a setting of its own."
            )
        names = [also["name"] for also in summary.get("also", [])]
        if names != by_arm.setdefault(arm, names):
            raise ValueError(
                f"settings[{setting!r}]: arm {arm!r}, seed {seed}, is also measured by "
                f"{', '.join(names) or 'nothing'}, with another seed by "
                f"{', '.join(by_arm[arm]) or 'nothing'}, of which no mean can be made. Remove the "
                "folders of the runs that are not measured as the arm is now: the same command "
                "makes them again."
            )


def _check_data(summaries: Mapping[Path, Mapping[str, Any]]) -> None:
    """Checks that runs of a setting with one seed, by folder, were made of the same data."""
    by_data: dict[str, list[Path]] = {}
    for folder, summary in summaries.items():
        if held := summary.get("data_fingerprint"):  # older versions do not say
            by_data.setdefault(json.dumps(held, sort_keys=True), []).append(folder)
    if len(by_data) > 1:
        groups = ["\n  ".join(map(str, folders)) for folders in by_data.values()]
        raise ValueError(
            "these runs were made of different data, which has changed between them, and cannot "
            "be compared:\n  " + "\nwith others than:\n  ".join(groups) + "\nRemove those that "
            "are not of the data of now: the same command makes them again. Or bring the data "
            "back, or give another --workdir."
        )


def _result(folder: Path) -> dict[str, Any] | None:
    if not (folder / "summary.json").exists():
        return None
    try:
        summary = read_summary(folder / "summary.json")
        log = MetricsLog(folder / "metrics.jsonl")
        log.check(summary["rounds"], summary.get("metrics"))
        records = log.first(summary["rounds"])
    except ValueError as error:
        raise ValueError(
            f"{error}. Bring the file back from a copy, or remove {folder}: the same command makes "
            "that run again."
        ) from None
    return {"summary": summary, "records": records}


def _arm(
    comparison: Comparison,
    setting: str,
    label: str,
    found: Mapping[int, dict[str, Any] | None],
    results: Mapping[tuple[str, int], dict[str, Any] | None],
    source: Source,
) -> dict[str, Any]:
    there = [result for result in found.values() if result]
    summaries = [result["summary"] for result in there]
    measure = measure_of(summaries[0])
    per_seed = [r["summary"][measure.name]["mean"] if r else None for r in found.values()]
    diverged = _diverged(found)
    lost = [r["summary"] for seed, r in found.items() if r and seed in diverged]
    tasks = summaries[0][measure.name]["per_task"]
    sites = summaries[0][measure.name].get("per_site")

    def over_seeds(*path: str) -> dict[str, float | None]:
        """Mean and sample's std of a number; none where a seed that diverged has none."""
        values = [functools.reduce(operator.getitem, path, summary) for summary in summaries]
        if any(functools.reduce(operator.getitem, path, summary) is None for summary in lost):
            values = []
        return {"mean": _mean(values), "std": _std(values)}

    curves = {
        seed: {
            r["round"]: r[measure.name]["test_mean"]
            for r in result["records"]
            if r[measure.name] and r[measure.name]["test_mean"] is not None
        }
        for seed, result in found.items()
        if result
    }
    common = sorted(set.intersection(*map(set, curves.values())))
    points = [[curve[round_index] for curve in curves.values()] for round_index in common]
    reached = []
    references = {seed: results.get((comparison.reference, seed)) for seed in found}
    for seed, curve in {} if diverged or _diverged(references) else curves.items():
        reference = references[seed]
        best = reference["summary"][measure.name]["mean"] if reference else None
        if best is not None and best > 0:
            goal = _NEAR * best if measure.higher_is_better else best / _NEAR
            near = (at for at, mean in curve.items() if measure.rank(mean) >= measure.rank(goal))
            reached.append(next(near, None))
    rounds = [r for r in reached if r is not None]
    kinds = ("local_training", "client_unify", "server_aggregation", "total")
    bits = summaries[0]["communication"]
    return {
        "label": label,
        "algorithm": summaries[0]["algorithm"],
        "overrides": as_json(comparison.arms[label]),
        "commands": [
            source.command("compare", settings=setting, arms=label, seeds=str(seed))
            for seed in comparison.seeds
        ],
        "measure": measure._asdict(),
        measure.name: {
            **over_seeds(measure.name, "mean"),
            "per_seed": per_seed,
            "validation_mean": over_seeds(measure.name, "validation_mean")["mean"],
            "per_task": {task: over_seeds(measure.name, "per_task", task) for task in tasks},
            **(
                {"per_site": {site: over_seeds(measure.name, "per_site", site) for site in sites}}
                if sites
                else {}
            ),
        },
        "diverged": diverged,
        "also": [also | over_seeds(also["name"], "mean") for also in summaries[0].get("also", [])],
        "curve": {
            "rounds": common,
            "mean": [_mean(values) for values in points],
            "std": [_std(values) for values in points],
        },
        "communication": {
            key: _mean([s["communication"][key] for s in summaries])
            for key in bits
            if key.startswith(("uplink", "downlink"))
        },
        "server_state_bytes": summaries[0]["server"]["kept_bytes"],
        "server_state_per_client": summaries[0]["server"]["kept_per_client"],
        "seconds": {
            kind: _mean([s["seconds"].get(kind, 0.0) for s in summaries]) for kind in kinds
        },
        "rounds_to_95": {"mean": _mean(rounds), "reached": len(rounds), "of": len(reached)},
        "similarity": _similarity([s["similarity"] for s in summaries if s["similarity"]]),
        "against_ours": _against_ours(comparison, label, found, results),
    }


def _diverged(found: Mapping[int, dict[str, Any] | None]) -> list[int]:
    """The seeds with which an arm has no result, since some model's outputs are not finite."""
    return [
        seed
        for seed, result in found.items()
        if result and result["summary"][measure_of(result["summary"]).name]["mean"] is None
    ]


def _similarity(found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not found:
        return None
    return {
        "auc_mean": _mean([s["auc"] for s in found]),
        "auc_first_round": _mean([s["auc_first_round"] for s in found]),
        "auc_last_round": _mean([s["auc_last_round"] for s in found]),
        "matrix": np.mean([s["matrix"] for s in found], axis=0).tolist(),
    }


def _against_ours(comparison, label, found, results) -> dict[str, Any] | None:
    """Wilcoxon's signed-rank test over all pairs of a task and a seed (Wilcoxon 1945).

    None where one of the two has diverged with some seed, of which nothing makes up. A difference
    is positive where the arm is better than ours.

    The rank correlation (matched pairs, Kerby 2014) is 1 where the arm is better in all pairs and
    -1 where ours is; its sign is the one that the p-value speaks of, which may differ from that of
    the mean difference.
    """
    ours_by_seed = {seed: results.get((comparison.ours, seed)) for seed in found}
    if label == comparison.ours or _diverged(found) or _diverged(ours_by_seed):
        return None
    differences, seeds = [], 0
    for seed, result in found.items():
        ours = ours_by_seed[seed]
        if result and ours:
            measure = measure_of(ours["summary"])
            mine, theirs = (r["summary"][measure.name]["per_task"] for r in (ours, result))
            pairs = [
                measure.rank(theirs[task]) - measure.rank(mine[task])
                for task in mine
                if None not in (mine[task], theirs.get(task))
            ]
            seeds += bool(pairs)
            differences += pairs
    if not differences:
        return None
    p_value, correlation = 1.0, 0.0
    if np.any(differences):
        tested: Any = stats.wilcoxon(differences, zero_method="zsplit")
        p_value = float(tested.pvalue)
        above: Any = stats.wilcoxon(differences, zero_method="zsplit", alternative="greater")
        ranks = len(differences) * (len(differences) + 1) / 2
        correlation = float(2 * above.statistic / ranks - 1)
    tested = {
        "difference": float(np.mean(differences)),
        "p_value": p_value,
        "rank_correlation": correlation,
        "pairs": len(differences),
        "seeds": seeds,
    }
    return tested | {"verdict": verdict(tested, seeds)}


def verdict(tested: Mapping[str, Any] | None, seeds: int) -> str:
    """What ours does to an arm, in a word.

    Args:
      tested: with "difference" (by which the arm is better than ours) and "p_value";
        "rank_correlation", where it is known.
      seeds: from how many.

    Returns:
      "beats", "ties" or "loses"; "mixed" where the mean and the ranks of the differences disagree
      whose the advantage is; "too few seeds to tell"; or "untested".
    """
    difference, p_value, ranks = (
        (tested or {}).get(key) for key in ("difference", "p_value", "rank_correlation")
    )
    if difference is None or p_value is None:
        return "untested"
    if seeds < FEWEST_SEEDS:
        return TOO_FEW
    if p_value >= LEVEL or difference == 0:
        return "ties"
    if ranks is not None and difference * ranks < 0:
        return "mixed"
    return "beats" if difference < 0 else "loses"


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else None


def _std(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
