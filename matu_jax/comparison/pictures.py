"""The pictures of a setting, with what is said of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matu_jax.comparison import figures
from matu_jax.comparison.arms import (
    best_first,
    mean_result,
    number,
    shared_label_spaces,
    total_traffic,
)
from matu_jax.comparison.drawing import Drawing
from matu_jax.comparison.html import Block, Bold, Inline, Paragraph, Picture
from matu_jax.comparison.words import left_out_words, lower_words, result_words
from matu_jax.simulation.measures import ACCURACY, measure_of

_Arms = Sequence[Mapping[str, Any]]


def pictures(
    setting: Mapping[str, Any], prefix: str, ours: str, reference: str, *, draw: bool = True
) -> Iterator[Block]:
    """The pictures of a setting, and a note in the place of each that has nothing to show.

    Args:
      setting: one of comparison.json's.
      prefix: the beginning of the pictures' file names.
      ours: label of the arm to stress.
      reference: label of the arm to be measured by.
      draw: False for the words alone: each picture is blank, and taken to have something to show.

    Raises:
      ValueError: if a similarity matrix does not fit the setting's tasks.
    """
    arms, drawn = best_first(setting), figures if draw else _Blank
    yield _of_traffic(drawn, setting, arms, prefix, ours, reference)
    yield _of_rounds(drawn, setting, arms, prefix, ours, reference)
    yield _of_tasks(drawn, setting, arms, prefix, ours, reference)
    yield _of_similarity(drawn, setting, arms, prefix, ours)


class _Blank:
    """What `figures` has, without drawing."""

    traffic = curves = per_task = similarity = staticmethod(lambda *_, **__: Drawing(b"", 0, 0))


def _picture(file: str, drawing: Drawing | None, alt: str, caption: Inline, lacking: str) -> Block:
    if drawing is None:
        return Paragraph([lacking], "note")
    return Picture(f"{file}.png", *drawing, alt=alt, caption=caption)


def _of_traffic(
    drawn: Any, setting: Mapping[str, Any], arms: _Arms, prefix: str, ours: str, reference: str
) -> Block:
    measure = measure_of(setting)
    better = "more accurate" if measure == ACCURACY else "better"
    turned = f" (the axis is turned round: lower {measure.name} is better, and stands higher)"
    turned = "" if measure.higher_is_better else turned
    summary = "; ".join(f"{arm['label']} {result_words(arm)}" for arm in arms)
    return _picture(
        f"{prefix}_traffic",
        drawn.traffic(arms, ours=ours, reference=reference),
        f"Scatter plot for setting {setting['name']}: test {measure.name} over total traffic. "
        f"{summary}.",
        [
            Bold(f"{_first(measure.name)} against traffic."),
            f" Each point is an arm: the higher the {better}{turned}, the further to the left the "
            "less is sent. Arms on the pale line (the Pareto front) are the ones to choose from: "
            "no other arm is better without sending more. Bars are ± std over seeds.",
            left_out_words(arms, lambda arm: None in (total_traffic(arm), mean_result(arm))),
        ],
        f"No arm has both {measure.name} and traffic to draw.",
    )


def _of_rounds(
    drawn: Any, setting: Mapping[str, Any], arms: _Arms, prefix: str, ours: str, reference: str
) -> Block:
    chance = number(setting.get("chance"))
    measure = measure_of(setting)
    repeated = (
        f"{ours} is repeated" if ours == reference else f"{ours} and {reference} are repeated"
    )
    return _picture(
        f"{prefix}_rounds",
        drawn.curves(arms, chance=chance, ours=ours, reference=reference),
        f"A panel per arm of setting {setting['name']}: {measure.name} over rounds.",
        [
            Bold(f"{_first(measure.name)} over rounds{lower_words(measure)}."),
            " One panel per arm, all on the same scale: the thick line is that arm, its band is "
            f"± std over seeds. {repeated} in each panel for comparison."
            + _of_chance(arms, chance),
            left_out_words(
                arms,
                lambda arm: all(v is None for v in (arm.get("curve") or {}).get("mean") or []),
            ),
        ],
        f"No {measure.name} over rounds was recorded.",
    )


def _of_chance(arms: _Arms, chance: float | None) -> str:
    """What the picture of rounds says of guessing."""
    if chance is None or not arms:
        return ""
    reached = measure_of(arms[0]).text(chance)
    if figures.is_far(arms, chance):
        return f" Chance, guessing, is {reached}, too far away for the picture."
    return f" The dotted line is chance: guessing ({reached})."


def _of_tasks(
    drawn: Any, setting: Mapping[str, Any], arms: _Arms, prefix: str, ours: str, reference: str
) -> Block:
    measure = measure_of(setting)
    better = "more accurate" if measure == ACCURACY else "higher"
    measured = any(arm["label"] == reference and mean_result(arm) is not None for arm in arms)
    return _picture(
        f"{prefix}_tasks",
        drawn.per_task(arms, _tasks(setting), ours=ours, reference=reference),
        f"Table in colours for setting {setting['name']}: {measure.name} of each arm (columns) on "
        "each task (rows).",
        [
            Bold(f"{_first(measure.name)} per task{lower_words(measure)}."),
            f" The number is the test {measure.name}{' in %' * measure.percent}, the mean over "
            "seeds. ",
            f"The colour compares with {reference} on the same task: blue is better, red is "
            "worse, white is equal; the darkest colours stand for all differences from there on. "
            if measured
            else f"The darker the blue, the {better} ({reference} was not measured here). ",
            "Arms stand in the order of the table above.",
        ],
        f"No {measure.name} per task was recorded.",
    )


def _of_similarity(
    drawn: Any, setting: Mapping[str, Any], arms: _Arms, prefix: str, ours: str
) -> Block:
    """The similarity that ours measured, or else the best arm that has one."""
    found = [arm for arm in arms if (arm.get("similarity") or {}).get("matrix")]
    if not found:
        return Paragraph(["No arm of this setting has a similarity of tasks to show."], "note")
    chosen = next((arm for arm in found if arm["label"] == ours), found[0])
    spaces = shared_label_spaces(setting)
    return _picture(
        f"{prefix}_similarity",
        drawn.similarity(chosen["similarity"]["matrix"], _tasks(setting), spaces),
        f"Matrix of similarities between the tasks of setting {setting['name']}, measured by "
        f"{chosen['label']}"
        + (", and the matrix of pairs that share a label space." if spaces else "."),
        [
            Bold(f"Which tasks {chosen['label']} holds to be related."),
            " Rows and columns are the tasks in the same order. Red cells are pairs whose updates "
            "point the same way.",
            " The server is told nothing of the truth; if it finds it, the same blocks are red in "
            "both matrices."
            if spaces
            else "",
        ],
        "The similarity of tasks has no pair with a number.",
    )


def _tasks(setting: Mapping[str, Any]) -> list[str]:
    return [str(task) for task in setting.get("tasks") or []]


def _first(name: str) -> str:
    """A metric's name at the beginning of a sentence."""
    return name[:1].upper() + name[1:]
