"""What stands behind the settings: p-values, tuning, configuration, and commands."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matu_jax.comparison.arms import number, number_at, verdict_of
from matu_jax.comparison.collect import FEWEST_SEEDS, LEVEL, TOO_FEW
from matu_jax.comparison.html import (
    Block,
    Bold,
    Code,
    Details,
    Heading,
    Listing,
    Paragraph,
    Row,
    Table,
)
from matu_jax.comparison.words import NONE, counted, fields_words, listed, or_none
from matu_jax.config import upgraded
from matu_jax.simulation.measures import ACCURACY, measure_of


def significance(settings: Sequence[Mapping[str, Any]], ours: str) -> Iterator[Block]:
    """Says what the p-values mean, and why there are none where seeds are too few."""
    arms = [arm for setting in settings for arm in setting.get("arms") or []]
    if any(verdict_of(arm) == TOO_FEW for arm in arms):
        yield Heading(2, "Why no verdict is given")
        yield Paragraph(
            [
                f"Where fewer than {FEWEST_SEEDS} seeds were run, the report does not say which of "
                "two arms is better: that takes the spread over seeds, which so few do not show. "
                "Many tasks do not replace seeds, since those of one run share its clients, its "
                "split and its luck. More of them: the seeds in the comparison’s file, or --seeds."
            ]
        )
    if all(verdict_of(arm) in (TOO_FEW, "untested") for arm in arms):
        return
    yield Heading(2, "What the p-values mean")
    pairs = {
        setting["name"]: sorted(
            {
                int(arm["against_ours"]["pairs"])
                for arm in setting.get("arms") or []
                if number_at(arm, "against_ours", "pairs") is not None
            }
        )
        for setting in settings
    }
    used = "; ".join(
        f"“{name}”: {listed(map(str, counts))} pairs" for name, counts in pairs.items() if counts
    )
    names = listed(dict.fromkeys(measure_of(setting).name for setting in settings))
    yield Paragraph(
        [
            f"Each arm is compared with {ours} by the Wilcoxon signed-rank test. A pair is one "
            f"task with one seed: the arm’s {names} there, and that of {ours}. The test ranks the "
            "differences by size and asks how often they would be as one-sided as they are if the "
            "two arms were equally good: that is p. Below "
            f"{LEVEL} is called a difference, the rest a tie.",
            f" Pairs used: {used}." if used else "",
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


def tuning(
    found: Mapping[str, Any] | None, settings: Sequence[Mapping[str, Any]]
) -> Iterator[Block]:
    """Tells how fields were chosen, and every trial.

    Args:
      found: comparison.json's "tuning".
      settings: its "settings", which say by what the trials were measured.
    """
    yield Heading(2, "Tuning")
    if not found:
        yield Paragraph(["No arm was tuned for this comparison: fields are as configured."])
        return
    trials = found.get("trials_per_algorithm")
    there = [s for s in settings if s.get("name") == found.get("setting")] or [*settings, {}]
    measure = measure_of(there[0])
    validation = f"validation {measure.name}"
    tested = "test images" if measure == ACCURACY else "test examples"
    yield Paragraph(
        [
            f"Fields were chosen in setting “{found.get('setting') or NONE}” with seed "
            f"{or_none(found.get('seed'))}, by {validation} alone; {tested} had no "
            f"part in it. Trials per algorithm: {or_none(trials)}, the same for all."
        ]
    )
    arms = found.get("arms") or {}
    yield Table(
        ["What tuning chose for each arm."],
        ["arm", "chosen", validation, "trials"],
        [
            Row(
                [
                    [str(label)],
                    list(fields_words(arm.get("chosen"))),
                    [measure.text(number(arm.get("validation")))],
                    [str(len(arm.get("trials") or []))],
                ]
            )
            for label, arm in arms.items()
        ],
        left=2,
    )
    rows = [
        Row(
            [
                [str(label)],
                list(fields_words(trial.get("fields"))),
                [measure.text(number(trial.get("validation")))],
            ]
        )
        for label, arm in arms.items()
        for trial in arm.get("trials") or []
    ]
    if rows:
        header = ["arm", "fields", validation]
        yield Details(
            f"All {counted(len(rows), 'trial')}",
            [
                Table(
                    [f"Every trial; “–” is one that gave no {measure.name}."], header, rows, left=2
                )
            ],
        )


def conditions(comparison: Mapping[str, Any]) -> Iterator[Block]:
    """Lists the experiment's fields, the machine and the versions."""
    yield Heading(2, "Configuration and versions")
    experiment = "\n".join(
        f"{path} = {json.dumps(value, ensure_ascii=False)}"
        for path, value in _flat(upgraded(comparison.get("experiment") or {}))
    )
    if experiment:
        yield Details("The experiment’s fields", [Listing(experiment)])
    rows = [
        Row([[kind], [str(key)], [str(or_none(value))]])
        for kind in ("machine", "versions")
        for key, value in (comparison.get(kind) or {}).items()
    ]
    if rows:
        yield Table(["Machine and versions."], ["of", "what", "value"], rows, left=3)


def commands(comparison: Mapping[str, Any]) -> Iterator[Block]:
    """Lists the commands that make the comparison, and each of its runs."""
    yield Heading(2, "To do it again")
    yield Paragraph(["This runs everything, and draws every table and picture of this report:"])
    yield Listing(str(comparison.get("command") or NONE))
    yield Paragraph(["Each row of a table of results is the mean of these runs, one per seed:"])
    for setting in comparison.get("settings") or []:
        inner: list[Block] = []
        for arm in setting.get("arms") or []:
            own = list(fields_words(arm.get("overrides")))
            algorithm = [" (algorithm ", Code(str(arm.get("algorithm"))), ")"]
            inner.append(Paragraph([Bold(arm["label"]), *algorithm, "; own fields: ", *own]))
            inner.append(Listing("\n".join(arm.get("commands") or [NONE])))
        if inner:
            yield Details(f"Commands of setting “{setting['name']}”", inner)


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
