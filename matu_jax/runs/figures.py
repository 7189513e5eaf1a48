"""Pictures of a run, for people.

Pictures are drawn on figures of their own, never through pyplot, so that nothing global changes.
"""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matu_jax.json_files import replace_file
from matu_jax.runs.log import measured_in
from matu_jax.runs.tables import number
from matu_jax.simulation.measures import measure_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_TEST, _VALIDATION, _FAINT = "#0b5394", "#d9730d", "#a9c0d6"


_NAME = "#4a6478"


LEAST_SPREAD = 0.05  # around 1/2, of the colours of a similarity


_FEW_TASKS = 10  # so many have room for a number in each cell, or a name beside each line


def plot_rounds(
    records: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    title: str,
    chance: Mapping[str, float] | None = None,
) -> None:
    """Draws a run's measure over rounds to a PNG: means on test and validation, every task's faint.

    A dotted line is what guessing would reach, in the mean over the tasks.

    Args:
      records: a run's records, with "round" and, by the name of their measure, {"validation_mean",
        "test_mean", "test_per_task": {name: value}}, or None where nothing was evaluated.
      path: the file to write.
      title: stands above the picture.
      chance: by task, what a guess reaches, such as 1 / classes; unless it is known of all tasks,
        no line.

    Raises:
      ValueError: if no round was evaluated.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    measured = [record for record in records if measured_in(record)]
    if not measured:
        raise ValueError("plot_rounds: found no round that was measured; evaluate at least one.")
    rounds, measure = [record["round"] for record in measured], measure_of(measured[-1])
    found = [record[measure.name] for record in measured]
    figure = blank_figure(8, 5)
    axes = figure.add_subplot()
    tasks = list(found[-1]["test_per_task"])
    per_task = np.array([[number(a["test_per_task"].get(t)) for t in tasks] for a in found])
    marker = "o" if len(rounds) <= 30 else ""
    style = {"color": _FAINT, "linewidth": 0.9, "marker": marker, "markersize": 2}
    for i in range(len(tasks)):
        axes.plot(rounds, per_task[:, i], label="test, each task" if not i else None, **style)
    if chance and chance.keys() >= {*tasks}:
        style = {"color": _NAME, "linewidth": 1.4, "linestyle": ":"}
        guessed = float(np.mean([chance[task] for task in tasks]))
        axes.axhline(guessed, label="chance, mean", **style)
    for key, label, color, line in (
        ("validation_mean", "validation, mean", _VALIDATION, "--"),
        ("test_mean", "test, mean", _TEST, "-"),
    ):
        values = [number(a.get(key)) for a in found]
        style = {"color": color, "linewidth": 2.2, "marker": marker, "markersize": 4}
        axes.plot(rounds, values, line, label=label, **style)
    if len(rounds) == 1:
        axes.set_xlim(rounds[0] - 1, rounds[0] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if measure.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02), min(max(high, low + 0.1), 1.02))
    if len(tasks) <= _FEW_TASKS:
        _name_ends(axes, rounds[-1], dict(zip(tasks, per_task[-1], strict=True)))
    axes.set_xlabel("round")
    better = "" if measure.higher_is_better else ", lower is better"
    axes.set_ylabel(literal(measure.name + better))
    axes.set_title(literal(title), loc="left")
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside lower center", ncols=len(labels), frameon=False
    )
    _write(figure, path)


def plot_similarity(
    similarity: Any,
    names: Sequence[str],
    families: Sequence[str],
    path: str | os.PathLike[str],
    *,
    title: str,
) -> None:
    """Draws the similarity of tasks to a PNG, as a heat map with the tasks grouped by family.

    Colours are symmetric around 1/2, which is white, and span the values off the diagonal; never
    less than 0.45 to 0.55, so that noise stays pale. The diagonal is blank.

    Args:
      similarity: `[tasks, tasks]`; cells that are not finite stay blank.
      names: the tasks' names.
      families: the family of each task; families keep the order of their first task.
      path: the file to write.
      title: stands above the picture.

    Raises:
      ValueError: if the lengths differ, or there is no task.
    """
    from matplotlib import colormaps

    similarity = np.asarray(similarity, np.float64)
    tasks = len(names)
    if not tasks or similarity.shape != (tasks, tasks) or len(families) != tasks:
        raise ValueError(
            f"plot_similarity: found similarity {similarity.shape}, {tasks} names and "
            f"{len(families)} families; expected [tasks, tasks] and one name and family per task."
        )
    order, blocks = by_family(families)
    cells = similarity[np.ix_(order, order)]
    np.fill_diagonal(cells, np.nan)
    cells[~np.isfinite(cells)] = np.nan
    spread = max(float(np.nanmax(np.abs(cells - 0.5), initial=0.0)), LEAST_SPREAD)

    numbered = tasks <= _FEW_TASKS
    side = tasks * (0.62 if numbered else 0.27) + 3.2
    figure = blank_figure(max(side + 1.2, 7), max(side - 0.4, 5))
    axes = figure.add_subplot()
    colours = colormaps["RdBu_r"].with_extremes(bad="#d9d9d9")
    image = axes.imshow(cells, cmap=colours, vmin=0.5 - spread, vmax=0.5 + spread)
    label = "direction similarity, 0.5 = unrelated"
    figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, label=label)
    if numbered:
        for (row, column), value in np.ndenumerate(cells):
            if np.isfinite(value):
                color = "white" if abs(value - 0.5) > 0.7 * spread else "black"
                style = {"ha": "center", "va": "center", "fontsize": 8.5, "color": color}
                axes.text(column, row, f"{value:.2f}", **style)
    ordered = [literal(names[i]) for i in order]
    axes.set_xticks(range(tasks), ordered, rotation=90)
    axes.set_yticks(range(tasks), ordered)
    axes.tick_params(length=0, labelsize=9 if numbered else 8)
    axes.spines[:].set_visible(False)
    for start, end, family in blocks:
        if start:
            axes.axhline(start - 0.5, color="black", linewidth=1.2)
            axes.axvline(start - 0.5, color="black", linewidth=1.2)
        place: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        # Beside the rows, because a row is always as high as a line of text.
        axes.annotate(
            literal(family),
            (1, (start + end - 1) / 2),
            xytext=(6, 0),
            va="center",
            weight="bold",
            **place,
        )
    axes.set_title(literal(title), loc="left", pad=10)
    _write(figure, path)


def literal(text: str) -> str:
    """What matplotlib shows as this text: a dollar sign does not begin mathematics."""
    return text.replace("$", r"\$")


def by_family(families: Sequence[str]) -> tuple[list[int], list[tuple[int, int, str]]]:
    """An order of tasks in which families are contiguous, and each one's (start, end, name)."""
    first = {family: families.index(family) for family in families}
    order = sorted(range(len(families)), key=lambda i: (first[families[i]], i))
    blocks, start = [], 0
    for family in first:
        end = start + sum(other == family for other in families)
        blocks.append((start, end, family))
        start = end
    return order, blocks


def _name_ends(axes: Any, x: float, ends: Mapping[str, float]) -> None:
    """Writes each name to the right of its line's end, to which a thin line leads."""
    low, high = axes.get_ylim()
    gap = 0.045 * (high - low)
    named = sorted((end, name) for name, end in ends.items() if np.isfinite(end))
    places = [end for end, _ in named]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], high - gap * (len(places) - 1 - i))
    style: Any = {"va": "center", "fontsize": 8.5, "color": _NAME, "annotation_clip": False}
    leader = {"arrowstyle": "-", "color": _FAINT, "linewidth": 0.6, "relpos": (0, 0.5)}
    for y, (end, name) in zip(places, named, strict=True):
        target: Any = {"xytext": (1.02, y), "textcoords": ("axes fraction", "data")}
        axes.annotate(literal(name), (x, end), arrowprops=leader, **target, **style)


def blank_figure(width: float, height: float) -> "Figure":
    """A figure of its own, in inches, that draws to PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: "Figure", path: str | os.PathLike[str]) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", bbox_inches="tight", pad_inches=0.15)
    replace_file(Path(path), drawn.getvalue())
