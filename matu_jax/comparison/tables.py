"""The tables of a setting: its results, and how well related tasks were found."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matu_jax.comparison.arms import (
    best_first,
    is_best,
    mean_result,
    number,
    number_at,
    results_of,
    total_traffic,
    verdict_of,
)
from matu_jax.comparison.collect import FEWEST_SEEDS, TOO_FEW
from matu_jax.comparison.html import Block, Bold, Paragraph, Row, Table
from matu_jax.comparison.words import (
    NONE,
    against_words,
    decimals,
    difference_word,
    lower_words,
    percent_of,
    result_words,
    rounds_words,
    seconds_words,
    spread_words,
    with_unit,
)
from matu_jax.runs.tables import human_bits, human_bytes
from matu_jax.simulation.measures import Measure, measure_of


def _result_header(measure: Measure) -> tuple[str, ...]:
    return (
        "arm",
        f"test {measure.name}",
        f"of reference’s {measure.name}",
        "uplink, per client and round",
        "downlink, per client and round",
        "total traffic",
        "server state",
        "rounds to 95 % of reference",
        f"{difference_word(measure)} against ours (p-value)",
        "local training, s",
        "client unify, s",
        "server,\u00a0s",
    )


def result_table(setting: Mapping[str, Any], ours: str, reference: str) -> Table:
    """The arms of a setting with what they reach, their traffic, state and time, best first."""
    arms = best_first(setting)
    by_label = {arm["label"]: arm for arm in arms}
    goal = mean_result(by_label[reference]) if reference in by_label else None
    goal = goal if (goal or 0) > 0 else None  # of a negative number there are no parts
    measure = measure_of(setting)
    rows = []
    for arm in arms:
        label, reached = arm["label"], result_words(arm)
        role = {reference: "reference", ours: "ours"}.get(label, "")
        best = is_best(arm, arms)
        up, down = (
            number_at(arm, "communication", f"{way}_bits_per_client_round")
            for way in ("uplink", "downlink")
        )
        marked = with_unit(human_bytes, arm.get("server_state_bytes"))
        if arm.get("server_state_per_client") and marked != NONE:
            marked += " †"
        rows.append(
            Row(
                [
                    [Bold(label) if best else label, f" ({role})" if role else ""],
                    [Bold(reached) if best else reached],
                    [percent_of(mean_result(arm), goal)],
                    *([with_unit(human_bits, sent)] for sent in (up, down, total_traffic(arm))),
                    [marked],
                    [rounds_words(arm.get("rounds_to_95"))],
                    [NONE if label == ours else against_words(arm)],
                    [seconds_words(number_at(arm, "seconds", "local_training"))],
                    [seconds_words(number_at(arm, "seconds", "client_unify"))],
                    [seconds_words(number_at(arm, "seconds", "server_aggregation"))],
                ],
                role,
            )
        )
    return Table(
        [f"Every arm of “{setting['name']}”, best first. The best {measure.name} is in bold."],
        _result_header(measure),
        rows,
    )


def result_notes(
    arms: Sequence[Mapping[str, Any]], ours: str, reference: str, seeds: int
) -> Iterator[Block]:
    """Says what the columns and marks of the result table mean."""
    tested = any(verdict_of(arm) not in (TOO_FEW, "untested") for arm in arms)
    explained = "; p-values are explained below" if tested else ""
    measure = measure_of(arms[0] if arms else {})
    name, word = measure.name, difference_word(measure).capitalize()
    minus = f"the arm’s {name} minus that of {ours}"
    near = f"with 95 % of the {name} of {reference}"
    if not measure.higher_is_better:
        minus = f"the {name} of {ours} minus that of the arm"
        near = f"with a {name} of at most that of {reference} divided by 0.95"
    notes = [
        f"{word} against ours: {minus}, so that a negative "
        f"number means that {ours} is better{explained}. Total traffic: up and "
        f"down, all clients and rounds of one run. Rounds to 95 %: the first round {near}, "
        "the mean over the seeds that got there, and in brackets how "
        "many did if not all. Seconds (s) are those of one run."
    ]
    if any(arm.get("server_state_per_client") for arm in arms):
        notes.append(" † This state grows with the number of clients.")
    if any(verdict_of(arm) == TOO_FEW for arm in arms):
        notes.append(f" Without a p-value: from fewer than {FEWEST_SEEDS} seeds, {TOO_FEW}.")
    if any(verdict_of(arm) == "mixed" for arm in arms):
        notes.append(
            " ‡ One of the two arms is ahead on most tasks and the other in the mean: many small "
            "differences against a few large ones."
        )
    for arm in arms:
        if lost := arm.get("diverged"):
            notes.append(
                f" {arm['label']} diverged with seed {', '.join(map(str, lost))}: outputs were no "
                "longer finite numbers. No mean is made of its other seeds, and it is not tested."
            )
    if seeds == 1:
        notes.append(" There is one seed, so no ± can be given.")
    yield Paragraph(notes, "note")


def also_table(setting: Mapping[str, Any]) -> Iterator[Block]:
    """What else the arms were measured by; nothing where there is one metric alone."""
    arms = best_first(setting)
    names = list(dict.fromkeys(also["name"] for arm in arms for also in arm.get("also") or []))
    rows, header = [], ["arm"]
    for arm in arms:
        found = {also["name"]: also for also in arm.get("also") or []}
        row = [[arm["label"]]]
        for name in names:
            also = found.get(name, {})
            about = {key: also[key] for key in Measure._fields if key in also}
            measure = Measure(**(about or {"name": name}))
            row.append([spread_words(measure, number(also.get("mean")), number(also.get("std")))])
            title = f"test {name}{lower_words(measure)}"
            if also and title not in header:
                header.append(title)
        rows.append(Row(row))
    if names:
        caption = "Other metrics, each the mean over the tasks that are measured by it."
        yield Table([caption], header, rows)


def site_table(setting: Mapping[str, Any]) -> Iterator[Block]:
    """What the arms reach at each site; nothing where data belongs to none."""
    arms, measure = best_first(setting), measure_of(setting)
    found = [results_of(arm).get("per_site") or {} for arm in arms]
    rows = []
    for site in dict.fromkeys(site for of_arm in found for site in of_arm):
        reached = [of_arm.get(site) or {} for of_arm in found]
        words = (
            spread_words(measure, number(at.get("mean")), number(at.get("std"))) for at in reached
        )
        rows.append(Row([[site], *([word] for word in words)]))
    if rows:
        caption = (
            f"Test {measure.name} at each site{lower_words(measure)}: on its own examples, the "
            "mean over its tasks and over seeds. Arms stand in the order of the results."
        )
        yield Table([caption], ["site", *(arm["label"] for arm in arms)], rows)


def similarity_table(arms: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    """How well each arm's similarity tells related tasks; nothing where no tasks are."""
    keys = ("auc_mean", "auc_first_round", "auc_last_round")
    rows = [
        Row([[arm["label"]], *([decimals(number_at(arm, "similarity", key), 2)] for key in keys)])
        for arm in arms
        if number_at(arm, "similarity", "auc_mean") is not None
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
