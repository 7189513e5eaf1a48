"""The tables of a setting: its results, and how well related tasks were found."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matu_jax.comparison.arms import (
    best_first,
    is_best,
    mean_accuracy,
    number_at,
    total_traffic,
    verdict_of,
)
from matu_jax.comparison.collect import FEWEST_SEEDS, TOO_FEW
from matu_jax.comparison.html import Block, Bold, Paragraph, Row, Table
from matu_jax.comparison.words import (
    NONE,
    accuracy_words,
    against_words,
    decimals,
    percent_of,
    rounds_words,
    seconds_words,
    with_unit,
)
from matu_jax.runs.tables import human_bits, human_bytes

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


def result_table(setting: Mapping[str, Any], ours: str, reference: str) -> Table:
    """The arms of a setting with their accuracy, traffic, state and time, best first."""
    arms = best_first(setting)
    by_label = {arm["label"]: arm for arm in arms}
    goal = mean_accuracy(by_label[reference]) if reference in by_label else None
    rows = []
    for arm in arms:
        label, accuracy = arm["label"], accuracy_words(arm)
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
                    [Bold(accuracy) if best else accuracy],
                    [percent_of(mean_accuracy(arm), goal)],
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
        [f"Every arm of “{setting['name']}”, best first. The best accuracy is in bold."],
        _RESULT_HEADER,
        rows,
    )


def result_notes(
    arms: Sequence[Mapping[str, Any]], ours: str, reference: str, seeds: int
) -> Iterator[Block]:
    """Says what the columns and marks of the result table mean."""
    tested = any(verdict_of(arm) not in (TOO_FEW, "untested") for arm in arms)
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
    if any(verdict_of(arm) == TOO_FEW for arm in arms):
        notes.append(f" Without a p-value: from fewer than {FEWEST_SEEDS} seeds, {TOO_FEW}.")
    if any(verdict_of(arm) == "mixed" for arm in arms):
        notes.append(
            " ‡ One of the two arms is ahead on most tasks and the other in the mean: many small "
            "differences against a few large ones."
        )
    if seeds == 1:
        notes.append(" There is one seed, so no ± can be given.")
    yield Paragraph(notes, "note")


def similarity_table(arms: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    """How well each arm's similarity tells related tasks; nothing where no arm has one."""
    keys = ("auc_mean", "auc_first_round", "auc_last_round")
    rows = [
        Row([[arm["label"]], *([decimals(number_at(arm, "similarity", key), 2)] for key in keys)])
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
