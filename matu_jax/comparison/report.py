"""The report of a comparison: one HTML file, the same as Markdown, and their pictures.

Everything told is computed from `comparison.json` alone, and equal input gives equal files.
"""

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matu_jax.comparison import figures
from matu_jax.comparison.collect import FEWEST_SEEDS, LEVEL, TOO_FEW, verdict
from matu_jax.comparison.figures import mean_accuracy, number, total_traffic
from matu_jax.comparison.html import (
    Block,
    Bold,
    Bullets,
    Code,
    Details,
    Heading,
    Inline,
    Listing,
    Paragraph,
    Picture,
    Row,
    Table,
    to_html,
    to_markdown,
)
from matu_jax.json_files import replace_file
from matu_jax.runs.tables import human_bits, human_bytes

_NONE = "–"
_RESULT_HEADER = (
    "arm",
    "test accuracy",
    "of reference’s accuracy",
    "uplink, per client and round",
    "downlink, per client and round",
    "total traffic",
    "server state",
    "rounds to 95 % of reference",
    "points against ours (p-value)",
    "local training, s",
    "client unify, s",
    "server,\u00a0s",
)


def write(comparison: Mapping[str, Any], folder: str | os.PathLike) -> list[Path]:
    """Writes a comparison's report.html, report.md and pictures.

    The HTML needs no other file; the Markdown refers to the pictures beside it.

    Args:
      comparison: what comparison.json holds; a number or text that is None is shown as "–".
      folder: where to write; made if it is missing. Files of the same names are replaced.

    Returns:
      The files written: report.html, report.md, then the pictures in their order.

    Raises:
      ValueError: if a similarity matrix does not fit its setting's tasks.
    """
    folder = Path(folder)
    title = str(comparison.get("title") or comparison.get("name") or "Comparison")
    blocks = list(_document(comparison))
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "report.html", folder / "report.md"]
    replace_file(files[0], to_html(title, blocks).encode())
    replace_file(files[1], to_markdown(title, blocks).encode())
    for block in blocks:
        if isinstance(block, Picture):
            files.append(folder / block.file)
            replace_file(files[-1], block.png)
    return files


def _taken(comparison: Mapping[str, Any]) -> str:
    seconds = comparison.get("run_seconds")
    return f"; the runs took {seconds / 60:.0f} minutes in sum" if seconds else ""


def _document(comparison: Mapping[str, Any]) -> Iterator[Block]:
    settings = comparison.get("settings") or []
    ours, reference = str(comparison.get("ours")), str(comparison.get("reference"))
    seeds = comparison.get("seeds") or []
    yield from _lead(comparison)
    yield Heading(2, "In short")
    for setting in settings:
        if len(settings) > 1:
            yield Heading(3, f"Setting “{setting['name']}”")
        yield Bullets(list(_in_short(setting, ours, reference)))
    for setting, prefix in zip(settings, _prefixes(settings), strict=True):
        yield Heading(2, f"Setting “{setting['name']}”")
        yield from _about(setting)
        arms = _best_first(setting)
        yield Heading(3, "Results")
        yield _result_table(setting, ours, reference)
        yield from _result_notes(arms, ours, reference, len(seeds))
        yield Heading(3, "Pictures")
        yield Paragraph(["This setting’s table and pictures are made by:"])
        chosen = shlex.quote(f"--settings={setting['name']}")
        yield Listing(f"{comparison.get('command') or _NONE} {chosen}")
        yield from _pictures(setting, prefix, ours, reference)
        yield from _similarity_table(arms)
    yield from _significance(settings, ours)
    yield from _tuning(comparison.get("tuning"))
    yield from _conditions(comparison)
    yield from _commands(comparison)


def _lead(comparison: Mapping[str, Any]) -> Iterator[Block]:
    settings = comparison.get("settings") or []
    arms = {arm["label"] for setting in settings for arm in setting.get("arms") or []}
    seeds = comparison.get("seeds") or []
    machine = comparison.get("machine") or {}
    named = _listed([f"“{setting['name']}”" for setting in settings])
    where = ", ".join(
        str(part)
        for part in (
            machine.get("processor"),
            _count(machine["cores"], "core") if machine.get("cores") else None,
            f"devices {machine['devices']}" if machine.get("devices") else None,
        )
        if part
    )
    commit = comparison.get("commit")
    yield Paragraph(
        [
            f"{_count(len(arms), 'arm')} compared in {_count(len(settings), 'setting')} ",
            f"({named}), each run with {_count(len(seeds), 'seed')} ({_listed(map(str, seeds))}). ",
            f"Measured on {comparison.get('date') or _NONE} at commit ",
            Code(str(commit)) if commit else _NONE,
            f" on this machine: {where or _NONE}{_taken(comparison)}. Ours is ",
            Bold(str(comparison.get("ours"))),
            "; the reference, which all are measured by, is ",
            Bold(str(comparison.get("reference"))),
            ".",
        ],
        "lead",
    )
    yield Paragraph(
        [
            "An arm is one algorithm with its own values of the fields. The arms of a setting "
            "share its tasks, clients and rounds unless an arm’s own fields, listed with the "
            "commands at the end, say otherwise. The accuracy of a task is the share of its test "
            "images that is labelled correctly after the run’s best round, chosen by the mean "
            "accuracy on validation images; an arm’s accuracy is the mean over tasks and seeds, "
            "and ± is the standard deviation over seeds."
        ]
    )


def _in_short(setting: Mapping[str, Any], ours: str, reference: str) -> Iterator[Inline]:
    arms = _best_first(setting)
    if missing := _missing(setting):
        yield [Bold("Not complete."), f" Missing: {missing}"]
    best = [arm for arm in arms if _is_best(arm, arms)]
    if not best:
        yield ["No arm has a result yet."]
        return
    seeds = min(_seeds(arm) for arm in arms if mean_accuracy(arm) is not None)
    word = "Best" if seeds >= FEWEST_SEEDS else "Highest accuracy"
    for arm in best:
        yield [f"{word}: ", Bold(arm["label"]), " with ", Bold(_accuracy(arm)), "."]
    by_label = {arm["label"]: arm for arm in arms}
    our, their = by_label.get(ours) or {}, by_label.get(reference) or {}
    if mean_accuracy(our) is None:
        yield [Bold(ours), " (ours) has no result here."]
        return
    if ours != reference and mean_accuracy(their):
        up, down = (
            _share(*(_of(arm, "communication", key) for arm in (our, their)))
            for key in ("uplink_bits_per_client_round", "downlink_bits_per_client_round")
        )
        differs = down not in (up, _NONE)
        sent = f"{up} of its uplink" + (f" and {down} of its downlink" if differs else "")
        yield [
            Bold(ours),
            f" (ours) reaches {_accuracy(our)}: ",
            f"{_share(mean_accuracy(our), mean_accuracy(their))} of the accuracy of ",
            Bold(reference),
            " (reference)",
            f" with {sent} per client and round." if up != _NONE else ".",
        ]
    verdicts: dict[str, list[str]] = {}
    for arm in arms:
        if arm["label"] != ours:
            verdicts.setdefault(_verdict(arm), []).append(arm["label"])
    for said, words in (
        ("beats", f"{ours} beats (p < {LEVEL}): "),
        ("ties", f"{ours} cannot be told from (p ≥ {LEVEL}): "),
        ("loses", f"{ours} loses to (p < {LEVEL}): "),
        (
            "mixed",
            f"{ours} is ahead on most tasks or in the mean, but not both, of (p < {LEVEL}): ",
        ),
        (TOO_FEW, f"Too few seeds to tell (fewer than {FEWEST_SEEDS}) whether {ours} beats: "),
        ("untested", f"Not tested against {ours}: "),
    ):
        if found := verdicts.get(said):
            yield [words, "; ".join(found), "."]  # a label may hold a comma


def _verdict(arm: Mapping[str, Any]) -> str:
    """What ours does to the arm; see `collect.verdict`."""
    tested = arm.get("against_ours") or {}
    known = {key: number(tested.get(key)) for key in ("difference", "p_value", "rank_correlation")}
    seeds = tested.get("seeds")  # those that both have; older files do not count them
    return verdict(known, seeds if type(seeds) is int else 0)


def _seeds(arm: Mapping[str, Any]) -> int:
    """How many seeds an arm has a result of."""
    measured = (arm.get("accuracy") or {}).get("per_seed") or []
    return sum(value is not None for value in measured)


def _about(setting: Mapping[str, Any]) -> Iterator[Block]:
    tasks = setting.get("tasks") or []
    if setting.get("description"):
        yield Paragraph([str(setting["description"])])
    counts = [
        (len(tasks), "task"),
        (setting.get("clients"), "client"),
        (setting.get("rounds"), "round"),
    ]
    parts: list[str] = [
        ", ".join(f"{_NONE} {word}s" if n is None else _count(n, word) for n, word in counts),
        ".",
    ]
    if overrides := setting.get("overrides"):
        parts += [" Fields of this setting: ", *_fields(overrides), "."]
    yield Paragraph(parts)
    if missing := _missing(setting):
        yield Paragraph(
            [
                Bold("Not complete."),
                f" Missing: {missing} The numbers below are of the runs that are done, and may "
                "change.",
            ],
            "notice",
        )
    spaces = setting.get("label_spaces")
    if tasks and len(spaces or tasks) == len(tasks):
        rows = [
            Row([[Code(t)], [s]])
            for t, s in zip(tasks, spaces or [_NONE] * len(tasks), strict=True)
        ]
        caption = "Tasks with the same label space ask the same question of other images."
        yield Details(
            f"The {_count(len(tasks), 'task')}",
            [Table([caption], ["task", "label space"], rows, left=2)],
        )


def _missing(setting: Mapping[str, Any]) -> str:
    """The runs that are not done, by arm: `"3 runs (a: seeds 0 and 1; b: seed 2)."`, or `""`."""
    missing = setting.get("missing") or []
    seeds: dict[str, list[str]] = {}
    for run in missing:
        seeds.setdefault(str(run["label"]), []).append(str(run["seed"]))
    if not seeds:
        return ""
    of_arms = (f"{k}: seed{'s' * (len(v) > 1)} {_listed(v)}" for k, v in seeds.items())
    return f"{_count(len(missing), 'run')} ({'; '.join(of_arms)})."


def _result_table(setting: Mapping[str, Any], ours: str, reference: str) -> Table:
    arms = _best_first(setting)
    by_label = {arm["label"]: arm for arm in arms}
    goal = mean_accuracy(by_label[reference]) if reference in by_label else None
    rows = []
    for arm in arms:
        label, accuracy = arm["label"], _accuracy(arm)
        role = {reference: "reference", ours: "ours"}.get(label, "")
        best = _is_best(arm, arms)
        marked = _human(human_bytes, arm.get("server_state_bytes"))
        if arm.get("server_state_per_client") and marked != _NONE:
            marked += " †"
        rows.append(
            Row(
                [
                    [Bold(label) if best else label, f" ({role})" if role else ""],
                    [Bold(accuracy) if best else accuracy],
                    [_share(mean_accuracy(arm), goal)],
                    [_human(human_bits, _of(arm, "communication", "uplink_bits_per_client_round"))],
                    [
                        _human(
                            human_bits, _of(arm, "communication", "downlink_bits_per_client_round")
                        )
                    ],
                    [_human(human_bits, total_traffic(arm))],
                    [marked],
                    [_rounds(arm.get("rounds_to_95"))],
                    [_NONE if label == ours else _against(arm)],
                    [_seconds(_of(arm, "seconds", "local_training"))],
                    [_seconds(_of(arm, "seconds", "client_unify"))],
                    [_seconds(_of(arm, "seconds", "server_aggregation"))],
                ],
                role,
            )
        )
    return Table(
        [f"Every arm of “{setting['name']}”, best first. The best accuracy is in bold."],
        _RESULT_HEADER,
        rows,
    )


def _result_notes(
    arms: Sequence[Mapping[str, Any]], ours: str, reference: str, seeds: int
) -> Iterator[Block]:
    tested = any(_verdict(arm) not in (TOO_FEW, "untested") for arm in arms)
    explained = "; p-values are explained below" if tested else ""
    notes = [
        f"Points against ours: the arm’s accuracy minus that of {ours}, so that a negative "
        f"number means that {ours} is better{explained}. Total traffic: up and "
        "down, all clients and rounds of one run. Rounds to 95 %: the first round with 95 % of "
        f"the accuracy of {reference}, the mean over the seeds that got there, and in brackets how "
        "many did if not all. Seconds (s) are those of one run."
    ]
    if any(arm.get("server_state_per_client") for arm in arms):
        notes.append(" † This state grows with the number of clients.")
    if any(_verdict(arm) == TOO_FEW for arm in arms):
        notes.append(f" Without a p-value: from fewer than {FEWEST_SEEDS} seeds, {TOO_FEW}.")
    if any(_verdict(arm) == "mixed" for arm in arms):
        notes.append(
            " ‡ One of the two arms is ahead on most tasks and the other in the mean: many small "
            "differences against a few large ones."
        )
    if seeds == 1:
        notes.append(" There is one seed, so no ± can be given.")
    yield Paragraph(notes, "note")


def _pictures(
    setting: Mapping[str, Any], prefix: str, ours: str, reference: str
) -> Iterator[Block]:
    arms, tasks = _best_first(setting), [str(task) for task in setting.get("tasks") or []]
    name = setting["name"]
    labels = {"ours": ours, "reference": reference}
    summary = "; ".join(f"{arm['label']} {_accuracy(arm)}" for arm in arms)

    def picture(
        what: str, drawing: figures.Drawing | None, alt: str, caption: Inline, lacking: str
    ) -> Block:
        if drawing is None:
            return Paragraph([lacking], "note")
        return Picture(f"{prefix}_{what}.png", *drawing, alt=alt, caption=caption)

    hidden = _without(arms, lambda arm: None in (total_traffic(arm), mean_accuracy(arm)))
    yield picture(
        "traffic",
        figures.traffic(arms, **labels),
        f"Scatter plot for setting {name}: test accuracy over total traffic. {summary}.",
        [
            Bold("Accuracy against traffic."),
            " Each point is an arm: the higher the more accurate, the further to the left the less "
            "is sent. Arms on the pale line (the Pareto front) are the ones to choose from: no "
            "other arm is better without sending more. Bars are ± std over seeds.",
            hidden,
        ],
        "No arm has both an accuracy and a traffic to draw.",
    )
    hidden = _without(
        arms, lambda arm: not any(v is not None for v in (arm.get("curve") or {}).get("mean") or [])
    )
    repeated = (
        f"{ours} is repeated" if ours == reference else f"{ours} and {reference} are repeated"
    )
    yield picture(
        "rounds",
        figures.curves(arms, chance=number(setting.get("chance")), **labels),
        f"A panel per arm of setting {name}: accuracy over rounds.",
        [
            Bold("Accuracy over rounds."),
            " One panel per arm, all on the same scale: the thick line is that arm, its band is "
            f"± std over seeds. {repeated} in each panel for comparison."
            + (" The dotted line is chance: guessing." if setting.get("chance") else ""),
            hidden,
        ],
        "No accuracy over rounds was recorded.",
    )
    yield picture(
        "tasks",
        figures.per_task(arms, tasks, **labels),
        f"Table in colours for setting {name}: accuracy of each arm (columns) on each task (rows).",
        [
            Bold("Accuracy per task."),
            " The number is the test accuracy in %, the mean over seeds. ",
            f"The colour compares with {reference} on the same task: blue is better, red is "
            "worse, white is equal; the darkest colours stand for all differences from there on. "
            if any(arm["label"] == reference and mean_accuracy(arm) is not None for arm in arms)
            else f"The darker the blue, the more accurate ({reference} was not measured here). ",
            "Arms stand in the order of the table above.",
        ],
        "No accuracy per task was recorded.",
    )
    chosen = _with_matrix(arms, ours)
    if chosen is None:
        yield Paragraph(["No arm of this setting has a similarity of tasks to show."], "note")
        return
    drawing = figures.similarity(chosen["similarity"]["matrix"], tasks, setting.get("label_spaces"))
    yield picture(
        "similarity",
        drawing,
        f"Matrix of similarities between the tasks of setting {name}, measured by "
        f"{chosen['label']}, and the matrix of pairs that share a label space.",
        [
            Bold(f"Which tasks {chosen['label']} holds to be related."),
            " Rows and columns are the tasks in the same order. Red cells are pairs whose updates "
            "point the same way.",
            " The server is told nothing of the truth; if it finds it, the same blocks are red in "
            "both matrices."
            if setting.get("label_spaces")
            else "",
        ],
        "The similarity of tasks has no pair with a number.",
    )


def _similarity_table(arms: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    rows = [
        Row([[arm["label"]], *([_decimals(_of(arm, "similarity", key), 2)] for key in keys)])
        for keys in [("auc_mean", "auc_first_round", "auc_last_round")]
        for arm in arms
        if arm.get("similarity")
    ]
    if rows:
        yield Table(
            [
                "How well the similarity finds the pairs that share a label space (AUC): the "
                "chance that a related pair is ranked above an unrelated one. 1 is perfect, 0.5 "
                "is guessing."
            ],
            ["arm", "AUC, mean over rounds", "AUC, first round", "AUC, last round"],
            rows,
        )


def _significance(settings: Sequence[Mapping[str, Any]], ours: str) -> Iterator[Block]:
    arms = [arm for setting in settings for arm in setting.get("arms") or []]
    if any(_verdict(arm) == TOO_FEW for arm in arms):
        yield Heading(2, "Why no verdict is given")
        yield Paragraph(
            [
                f"Where fewer than {FEWEST_SEEDS} seeds were run, the report does not say which of "
                "two arms is better: that takes the spread over seeds, which so few do not show. "
                "Many tasks do not replace seeds, since those of one run share its clients, its "
                "split and its luck. More of them: the seeds in the comparison’s file, or --seeds."
            ]
        )
    if all(_verdict(arm) in (TOO_FEW, "untested") for arm in arms):
        return
    yield Heading(2, "What the p-values mean")
    pairs = {
        setting["name"]: sorted(
            {
                int(arm["against_ours"]["pairs"])
                for arm in setting.get("arms") or []
                if _of(arm, "against_ours", "pairs") is not None
            }
        )
        for setting in settings
    }
    counted = "; ".join(
        f"“{name}”: {_listed(map(str, counts))} pairs" for name, counts in pairs.items() if counts
    )
    yield Paragraph(
        [
            f"Each arm is compared with {ours} by the Wilcoxon signed-rank test. A pair is one "
            f"task with one seed: the arm’s accuracy there, and that of {ours}. The test ranks the "
            "differences by size and asks how often they would be as one-sided as they are if the "
            "two arms were equally good: that is p. Below "
            f"{LEVEL} is called a difference, the rest a tie.",
            f" Pairs used: {counted}." if counted else "",
        ]
    )
    yield Paragraph(
        [
            "Take p as a guide, not as proof. The pairs of one task are not independent (an arm "
            "good at a task is good at it with every seed), and neither are the tasks of one run, "
            "so p comes out too small. Many arms are tested at once and nothing is corrected for "
            "that: of twenty arms that are equal to ours, about one will look different. A tie "
            "means that no difference was shown, not that there is none."
        ]
    )


def _tuning(tuning: Mapping[str, Any] | None) -> Iterator[Block]:
    yield Heading(2, "Tuning")
    if not tuning:
        yield Paragraph(["No arm was tuned for this comparison: fields are as configured."])
        return
    trials = tuning.get("trials_per_algorithm")
    yield Paragraph(
        [
            f"Fields were chosen in setting “{tuning.get('setting') or _NONE}” with seed "
            f"{_or_none(tuning.get('seed'))}, by validation accuracy alone; test images had no "
            f"part in it. Trials per algorithm: {_or_none(trials)}, the same for all."
        ]
    )
    arms = tuning.get("arms") or {}
    yield Table(
        ["What tuning chose for each arm."],
        ["arm", "chosen", "validation accuracy", "trials"],
        [
            Row(
                [
                    [str(label)],
                    list(_fields(arm.get("chosen"))),
                    [_percent(arm.get("validation"))],
                    [str(len(arm.get("trials") or []))],
                ]
            )
            for label, arm in arms.items()
        ],
        left=2,
    )
    rows = [
        Row([[str(label)], list(_fields(trial.get("fields"))), [_percent(trial.get("validation"))]])
        for label, arm in arms.items()
        for trial in arm.get("trials") or []
    ]
    if rows:
        header = ["arm", "fields", "validation accuracy"]
        yield Details(
            f"All {_count(len(rows), 'trial')}",
            [Table(["Every trial; “–” is one that gave no accuracy."], header, rows, left=2)],
        )


def _conditions(comparison: Mapping[str, Any]) -> Iterator[Block]:
    yield Heading(2, "Configuration and versions")
    experiment = "\n".join(
        f"{path} = {json.dumps(value, ensure_ascii=False)}"
        for path, value in _flat(comparison.get("experiment") or {})
    )
    if experiment:
        yield Details("The experiment’s fields", [Listing(experiment)])
    rows = [
        Row([[kind], [str(key)], [str(_or_none(value))]])
        for kind in ("machine", "versions")
        for key, value in (comparison.get(kind) or {}).items()
    ]
    if rows:
        yield Table(["Machine and versions."], ["of", "what", "value"], rows, left=3)


def _commands(comparison: Mapping[str, Any]) -> Iterator[Block]:
    yield Heading(2, "To do it again")
    yield Paragraph(["This runs everything, and draws every table and picture of this report:"])
    yield Listing(str(comparison.get("command") or _NONE))
    yield Paragraph(["Each row of a table of results is the mean of these runs, one per seed:"])
    for setting in comparison.get("settings") or []:
        inner: list[Block] = []
        for arm in setting.get("arms") or []:
            own = list(_fields(arm.get("overrides")))
            algorithm = [" (algorithm ", Code(str(arm.get("algorithm"))), ")"]
            inner.append(Paragraph([Bold(arm["label"]), *algorithm, "; own fields: ", *own]))
            inner.append(Listing("\n".join(arm.get("commands") or [_NONE])))
        if inner:
            yield Details(f"Commands of setting “{setting['name']}”", inner)


def _best_first(setting: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The arms by falling accuracy; those without one last."""

    def place(arm: Mapping[str, Any]) -> tuple[bool, float]:
        mean = mean_accuracy(arm)
        return (mean is None, -(mean or 0.0))

    return sorted(setting.get("arms") or [], key=place)


def _is_best(arm: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> bool:
    means = [mean for mean in map(mean_accuracy, arms) if mean is not None]
    return bool(means) and mean_accuracy(arm) == max(means)


def _with_matrix(arms: Sequence[Mapping[str, Any]], ours: str) -> Mapping[str, Any] | None:
    """The arm whose similarity is drawn: ours, or else the best that has one."""
    found = [arm for arm in arms if (arm.get("similarity") or {}).get("matrix")]
    return next((arm for arm in found if arm["label"] == ours), found[0] if found else None)


def _without(arms: Iterable[Mapping[str, Any]], lacks: Any) -> str:
    labels = [arm["label"] for arm in arms if lacks(arm)]
    return f" Not measured, so not shown: {_listed(labels)}." if labels else ""


def _prefixes(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """A beginning for the names of each setting's files; each is another."""
    prefixes: list[str] = []
    for i, setting in enumerate(settings, start=1):
        plain = re.sub(r"[^a-z0-9]+", "-", str(setting["name"]).lower()).strip("-")[:40]
        taken = not plain or plain in prefixes
        prefixes.append(f"setting-{i}" + (f"-{plain}" if plain else "") if taken else plain)
    return prefixes


def _of(mapping: Mapping[str, Any], block: str, key: str) -> float | None:
    """The number at `mapping[block][key]`, or None where there is none."""
    return number((mapping.get(block) or {}).get(key))


def _accuracy(arm: Mapping[str, Any]) -> str:
    mean, std = mean_accuracy(arm), _of(arm, "accuracy", "std")
    if mean is None:
        return _NONE
    return f"{100 * mean:.1f} %" if std is None else f"{100 * mean:.1f} ± {100 * std:.1f} %"


def _percent(value: Any) -> str:
    return _NONE if (found := number(value)) is None else f"{100 * found:.1f} %"


def _share(part: float | None, whole: float | None) -> str:
    """What percentage the part is of the whole; "–" where the whole is nothing or not known."""
    return f"{100 * part / whole:.1f} %" if part is not None and whole else _NONE


def _against(arm: Mapping[str, Any]) -> str:
    difference, p = _of(arm, "against_ours", "difference"), _of(arm, "against_ours", "p_value")
    if difference is None:
        return _NONE
    points = (
        f"{100 * difference:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")
    )
    said = _verdict(arm)
    if p is None or said == TOO_FEW:
        return points
    mark = " ‡" if said == "mixed" else ""
    return f"{points} (p < 0.001){mark}" if p < 0.001 else f"{points} (p = {p:.3f}){mark}"


def _rounds(found: Mapping[str, Any] | None) -> str:
    """How many rounds it took, and how many of the seeds got there if not all did."""
    if not found:
        return _NONE
    mean, reached, of = number(found.get("mean")), found.get("reached"), found.get("of")
    if mean is None:
        return "never" if reached == 0 and of else _NONE
    part = f" ({reached} of {of})" if reached != of else ""
    return f"{mean:.1f}".removesuffix(".0") + part


def _seconds(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:.{1 if value >= 1 else 3}f}"


def _decimals(value: float | None, places: int) -> str:
    return _NONE if value is None else f"{value:.{places}f}"


def _human(unit: Any, value: Any) -> str:
    return _NONE if (found := number(value)) is None else unit(found)


def _or_none(value: Any) -> Any:
    return _NONE if value is None else value


def _fields(fields: Mapping[str, Any] | None) -> Iterator[str]:
    """Fields and their values as words: `data.clients = 12, data.tasks = "eight"`."""
    if not fields:
        yield "none"
    for i, (path, value) in enumerate((fields or {}).items()):
        if i:
            yield ", "
        yield Code(f"{path} = {json.dumps(value, ensure_ascii=False)}")


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _count(count: float, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _listed(words: Iterable[str]) -> str:
    """The words as an English list: `"a, b and c"`."""
    *most, last = list(words) or [_NONE]
    return f"{', '.join(most)} and {last}" if most else last
