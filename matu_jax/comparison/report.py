"""The report of a comparison: one HTML file, the same as Markdown, and their pictures.

Everything told is computed from `comparison.json` alone, and equal input gives equal files.
"""

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matu_jax.comparison.appendix import commands, conditions, significance, tuning
from matu_jax.comparison.arms import (
    best_first,
    is_best,
    mean_result,
    number_at,
    seeds_measured,
    shared_label_spaces,
    verdict_of,
)
from matu_jax.comparison.collect import FEWEST_SEEDS, LEVEL, TOO_FEW
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
from matu_jax.comparison.pictures import pictures
from matu_jax.comparison.tables import (
    also_table,
    result_notes,
    result_table,
    similarity_table,
    site_table,
)
from matu_jax.comparison.words import (
    NONE,
    counted,
    fields_words,
    listed,
    lower_words,
    missing_words,
    percent_of,
    result_words,
)
from matu_jax.json_files import replace_file
from matu_jax.simulation.measures import ACCURACY, SCORE, Measure, measure_of


def write(comparison: Mapping[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
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
    title, blocks = _title(comparison), list(_document(comparison))
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "report.html", folder / "report.md"]
    replace_file(files[0], to_html(title, blocks).encode())
    replace_file(files[1], to_markdown(title, blocks).encode())
    for block in blocks:
        if isinstance(block, Picture):
            files.append(folder / block.file)
            replace_file(files[-1], block.png)
    return files


def markdown(comparison: Mapping[str, Any]) -> str:
    """What `write` writes into report.md, without drawing the pictures, which takes long.

    Args:
      comparison: what comparison.json holds; each setting has something to show in every picture.
    """
    return to_markdown(_title(comparison), _document(comparison, draw=False))


def _title(comparison: Mapping[str, Any]) -> str:
    return str(comparison.get("title") or comparison.get("name") or "Comparison")


def _taken(comparison: Mapping[str, Any]) -> str:
    seconds = comparison.get("run_seconds")
    if not seconds:
        return ""
    minutes, few = round(seconds / 60), "less than 30 seconds"
    return f"; the runs took {counted(minutes, 'minute') if minutes else few} in sum"


def _document(comparison: Mapping[str, Any], *, draw: bool = True) -> Iterator[Block]:
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
        arms = best_first(setting)
        yield Heading(3, "Results")
        yield result_table(setting, ours, reference)
        yield from result_notes(arms, ours, reference, len(seeds))
        yield Heading(3, "Pictures")
        yield Paragraph(["This setting’s table and pictures are made by:"])
        chosen = shlex.quote(f"--settings={setting['name']}")
        yield Listing(f"{comparison.get('command') or NONE} {chosen}")
        yield from pictures(setting, prefix, ours, reference, draw=draw)
        yield from also_table(setting)
        yield from site_table(setting)
        yield from similarity_table(arms)
    yield from significance(settings, ours)
    yield from tuning(comparison.get("tuning"), settings)
    yield from conditions(comparison)
    yield from commands(comparison)


def _lead(comparison: Mapping[str, Any]) -> Iterator[Block]:
    settings = comparison.get("settings") or []
    arms = {arm["label"] for setting in settings for arm in setting.get("arms") or []}
    seeds = comparison.get("seeds") or []
    machine = comparison.get("machine") or {}
    named = listed([f"“{setting['name']}”" for setting in settings])
    where = ", ".join(
        str(part)
        for part in (
            machine.get("processor"),
            counted(machine["cores"], "core") if machine.get("cores") else None,
            f"devices {machine['devices']}" if machine.get("devices") else None,
        )
        if part
    )
    commit = comparison.get("commit")
    names = listed(measure.name for measure in _measures(settings))
    yield Paragraph(
        [
            f"{counted(len(arms), 'arm')} compared in {counted(len(settings), 'setting')} ",
            f"({named}), each run with {counted(len(seeds), 'seed')} ({listed(map(str, seeds))}). ",
            f"Measured on {comparison.get('date') or NONE} at commit ",
            Code(str(commit)) if commit else NONE,
            f" on this machine: {where or NONE}{_taken(comparison)}. Ours is ",
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
            f"commands at the end, say otherwise. {_measured_by(settings)}; an arm’s {names} is "
            "the mean over tasks and seeds, and ± is the standard deviation over seeds."
        ]
    )


def _measured_by(settings: Sequence[Mapping[str, Any]]) -> str:
    """Says what the arms of all settings are measured by."""
    measures = _measures(settings)
    if measures == [ACCURACY]:
        return (
            "The accuracy of a task is the share of its test images that is labelled correctly "
            "after the run’s best round, chosen by the mean accuracy on validation images"
        )
    names = listed(measure.name + lower_words(measure) for measure in measures)
    own = " (of each task its own first metric)" if SCORE in [m.name for m in measures] else ""
    return (
        f"Tasks are measured by {names}{own}, on their test examples after the run’s best round, "
        "chosen by the mean over tasks on validation examples"
    )


def _measures(settings: Sequence[Mapping[str, Any]]) -> list[Measure]:
    return list(dict.fromkeys(map(measure_of, settings))) or [ACCURACY]


def _in_short(setting: Mapping[str, Any], ours: str, reference: str) -> Iterator[Inline]:
    arms = best_first(setting)
    if missing := missing_words(setting):
        yield [Bold("Not complete."), f" Missing: {missing}"]
    best = [arm for arm in arms if is_best(arm, arms)]
    if not best:
        yield ["No arm has a result yet."]
        return
    seeds = min(seeds_measured(arm) for arm in arms if mean_result(arm) is not None)
    measure = measure_of(best[0])
    extreme = "Highest" if measure.higher_is_better else "Lowest"
    word = "Best" if seeds >= FEWEST_SEEDS else f"{extreme} {measure.name}"
    for arm in best:
        yield [f"{word}: ", Bold(arm["label"]), " with ", Bold(result_words(arm)), "."]
    by_label = {arm["label"]: arm for arm in arms}
    our, their = by_label.get(ours) or {}, by_label.get(reference) or {}
    if mean_result(our) is None:
        yield [Bold(ours), " (ours) has no result here."]
        return
    if ours != reference and (mean_result(their) or 0) > 0:
        up, down = (
            percent_of(*(number_at(arm, "communication", key) for arm in (our, their)))
            for key in ("uplink_bits_per_client_round", "downlink_bits_per_client_round")
        )
        differs = down not in (up, NONE)
        sent = f"{up} of its uplink" + (f" and {down} of its downlink" if differs else "")
        share = percent_of(mean_result(our), mean_result(their))
        yield [
            Bold(ours),
            f" (ours) reaches {result_words(our)}: ",
            f"{share} of the {measure.name} of ",
            Bold(reference),
            " (reference)",
            f" with {sent} per client and round." if up != NONE else ".",
        ]
    verdicts: dict[str, list[str]] = {}
    for arm in arms:
        if arm["label"] != ours:
            verdicts.setdefault(verdict_of(arm), []).append(arm["label"])
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
        ", ".join(f"{NONE} {word}s" if n is None else counted(n, word) for n, word in counts),
        ".",
    ]
    if overrides := setting.get("overrides"):
        parts += [" Fields of this setting: ", *fields_words(overrides), "."]
    yield Paragraph(parts)
    if missing := missing_words(setting):
        yield Paragraph(
            [
                Bold("Not complete."),
                f" Missing: {missing} The numbers below are of the runs that are done, and may "
                "change.",
            ],
            "notice",
        )
    spaces = shared_label_spaces(setting)
    if tasks and len(setting.get("label_spaces") or tasks) == len(tasks):
        table = Table(["Their names."], ["task"], [Row([[Code(task)]]) for task in tasks], left=1)
        if spaces:
            rows = [Row([[Code(t)], [s]]) for t, s in zip(tasks, spaces, strict=True)]
            others = "images" if measure_of(setting) == ACCURACY else "examples"
            caption = f"Tasks with the same label space ask the same question of other {others}."
            table = Table([caption], ["task", "label space"], rows, left=2)
        yield Details(f"The {counted(len(tasks), 'task')}", [table])


def _prefixes(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """A beginning for the names of each setting's files; each is another."""
    prefixes: list[str] = []
    for i, setting in enumerate(settings, start=1):
        plain = re.sub(r"[^a-z0-9]+", "-", str(setting["name"]).lower()).strip("-")[:40]
        taken = not plain or plain in prefixes
        prefixes.append(f"setting-{i}" + (f"-{plain}" if plain else "") if taken else plain)
    return prefixes
