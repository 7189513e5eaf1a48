"""Pictures of a comparison: each function draws one and returns it as a PNG.

Every picture is narrow, so that a telephone shows its words large enough to read. The arm called
ours is blue, the reference is black and the others are grey, in each of them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from matu_jax.comparison.arms import mean_result, number, rank, results_of, total_traffic
from matu_jax.comparison.drawing import (
    FAINT,
    GRID,
    REFERENCE,
    SHADES,
    WIDTH,
    Drawing,
    accuracy_limits,
    color_of,
    new_figure,
    percent_axis,
    short_name,
    to_array,
    to_drawing,
    words_width,
)
from matu_jax.comparison.labels import place_labels
from matu_jax.comparison.words import lower_words
from matu_jax.runs import figures
from matu_jax.runs.tables import human_bits
from matu_jax.simulation.measures import measure_of

_SIDE_BY_SIDE = 10  # so many tasks have room for two matrices in one row


def traffic(arms: Sequence[Mapping[str, Any]], *, ours: str, reference: str) -> Drawing | None:
    """Draws what arms reach over total traffic, with the Pareto front; None if no arm has both.

    The axis of traffic is logarithmic. Arms that send nothing stand at its left, behind a line.

    Args:
      arms: `comparison["settings"][i]["arms"]`.
      ours: label of the arm to stress.
      reference: label of the arm to be measured by.
    """
    found = [(total_traffic(arm), mean_result(arm), arm) for arm in arms]
    points = [(b, mean, arm) for b, mean, arm in found if b is not None and mean is not None]
    if not points:
        return None
    figure = new_figure(WIDTH, 4.8)
    axes = figure.add_subplot()
    places = _traffic_axis(axes, [bits for bits, _, _ in points])
    measure, best, front = measure_of(points[0][2]), -math.inf, []
    for x, (_, y, arm) in sorted(
        zip(places, points, strict=True), key=lambda pair: (pair[0], -rank(pair[1][2]))
    ):
        if rank(arm) > best:
            front.append((x, y))
            best = rank(arm)
    x, y = zip(*front, strict=True)
    style: Any = {"color": "#9db8cf", "linewidth": 4, "alpha": 0.55, "zorder": 1}
    label = "Pareto front: nothing is better with as little traffic"
    axes.plot([*x, axes.get_xlim()[1]], [*y, y[-1]], drawstyle="steps-post", label=label, **style)
    labels = []
    for place, (_, mean, arm) in zip(places, points, strict=True):
        color = color_of(arm["label"], ours, reference)
        spread = number(results_of(arm).get("std"))
        error: Any = {"color": color, "elinewidth": 0.9, "alpha": 0.7, "zorder": 2}
        if spread:
            axes.errorbar([place], [mean], yerr=[spread], fmt="none", **error)
        stressed = arm["label"] in (ours, reference)
        style = {"marker": "D" if arm["label"] == reference else "o", "color": color, "zorder": 3}
        axes.plot([place], [mean], markersize=7 if stressed else 5.5, **style)
        labels.append((place, mean, short_name(arm["label"]), color, stressed))
    if measure.percent:
        percent_axis(axes.yaxis)
    if not measure.higher_is_better:
        axes.yaxis.set_inverted(True)
    axes.margins(y=0.12)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    axes.set_ylabel(figures.literal(f"test {measure.name}{lower_words(measure)}"), fontsize=9)
    axes.set_xlabel("total traffic of a run (log scale), less is better", fontsize=9)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    place_labels(figure, axes, labels)
    return to_drawing(figure)


def curves(
    arms: Sequence[Mapping[str, Any]], *, ours: str, reference: str, chance: float | None = None
) -> Drawing | None:
    """Draws what arms reach over rounds, a panel per arm; None if no arm has a curve.

    Args:
      arms: `comparison["settings"][i]["arms"]`.
      ours: label of the arm to show in every panel.
      reference: label of the other arm to show in every panel.
      chance: what guessing reaches, in the mean over tasks; None = no line, nor where it would
        leave no room for the curves, see `is_far`.
    """
    from matplotlib.ticker import MaxNLocator

    chance = None if chance is not None and is_far(arms, chance) else chance
    lines = {}
    for arm in arms:
        curve = arm.get("curve") or {}
        rounds, mean = curve.get("rounds") or [], to_array(curve.get("mean") or [])
        if np.isfinite(mean).any():
            std = to_array(curve.get("std") or [None] * len(rounds))
            lines[arm["label"]] = (rounds, mean, std)
    if not lines:
        return None
    columns = min(len(lines), 2 if len(lines) <= 4 else 3)
    rows = -(-len(lines) // columns)
    figure = new_figure(WIDTH, 0.75 + rows * (1.75 if columns < 3 else 1.35))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    shown: dict[str, Any] = {}
    for panel, label in zip(panels.flat, lines, strict=False):
        shown |= _panel(panel, lines, label, ours=ours, reference=reference)
        if chance is not None:
            style: Any = {"color": REFERENCE, "linewidth": 0.8, "linestyle": ":", "zorder": 1}
            shown["chance"] = panel.axhline(chance, **style)
    for i, panel in enumerate(panels.flat):
        panel.set_visible(i < len(lines))
        if i + columns >= len(lines):
            panel.tick_params(labelbottom=True)
    first = panels[0, 0]
    first.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    edges = [
        mean + np.nan_to_num(side * std) for _, mean, std in lines.values() for side in (-1, 1)
    ]
    guessed = [] if chance is None else [chance]
    values = [*guessed, *(value for edge in edges for value in edge)]
    measure = measure_of(arms[0])
    if measure.percent:
        first.set_ylim(*accuracy_limits(values))
        percent_axis(first.yaxis)
    figure.supxlabel("round", fontsize=9)
    words = f"test {measure.name}, mean over tasks"
    words += "" if measure.higher_is_better else "\nlower is better"
    figure.supylabel(figures.literal(words), fontsize=9)
    names = {ours: f"{short_name(ours)} (ours)", reference: f"{short_name(reference)} (reference)"}
    order = [
        key for key in dict.fromkeys(("± std", ours, reference, "others", "chance")) if key in shown
    ]
    if order:
        figure.legend(
            [shown[key] for key in order],
            [names.get(key, key) for key in order],
            loc="outside upper center",
            ncols=2 if sum(len(names.get(key, key)) for key in order) > 48 else len(order),
            frameon=False,
            fontsize=8,
        )
    return to_drawing(figure)


def is_far(arms: Sequence[Mapping[str, Any]], value: float) -> bool:
    """Whether a value is so far from all curves that these would be flat beside it.

    Parts of 1 have their own scale, and nothing is far on it.
    """
    curves = [to_array((arm.get("curve") or {}).get("mean") or []) for arm in arms]
    points = np.concatenate([*curves, np.zeros(0)])
    points = points[np.isfinite(points)]
    if not points.size or measure_of(arms[0]).percent:
        return False
    low, high = points.min(), points.max()
    return bool(max(low - value, value - high) > 2 * (high - low))


def _panel(
    panel: Any, lines: Mapping[str, tuple], label: str, *, ours: str, reference: str
) -> dict[str, Any]:
    """Draws one arm's curve over those of the others; returns what the legend is to explain.

    Args:
      panel: matplotlib's axes.
      lines: by label: rounds, mean and std.
      label: of the arm.
      ours: label of the arm to show in every panel.
      reference: label of the other arm to show in every panel.
    """
    shown: dict[str, Any] = {}
    rounds, mean, std = lines[label]
    for other, (x, y, _) in lines.items():
        if other not in (label, ours, reference):
            shown["others"] = panel.plot(x, y, color=FAINT, linewidth=0.7, zorder=1)[0]
    for other, line in ((reference, "--"), (ours, "-")):
        if other in lines and other != label:
            color = color_of(other, ours, reference)
            style: Any = {"color": color, "linewidth": 1.1, "zorder": 2}
            (shown[other],) = panel.plot(*lines[other][:2], line, **style)
    color = color_of(label, ours, reference)
    band = panel.fill_between(
        rounds, mean - std, mean + std, color=color, alpha=0.22, linewidth=0, zorder=2
    )
    marker = "o" if len(rounds) <= 12 else ""
    style = {"color": color, "linewidth": 2, "marker": marker, "markersize": 3, "zorder": 3}
    panel.plot(rounds, mean, **style)
    bold = label in (ours, reference)
    panel.set_title(
        short_name(label, 20 if bold else 24),
        fontsize=8.5,
        loc="left",
        pad=3,
        color=color,
        weight="bold" if bold else "normal",
    )
    panel.grid(color=GRID, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
    if np.isfinite(std).any():
        shown["± std"] = band
    return shown


def per_task(
    arms: Sequence[Mapping[str, Any]], tasks: Sequence[str], *, ours: str, reference: str
) -> Drawing | None:
    """Draws what each arm reaches on each task, in colours; None if there is no number.

    A cell's number is the result, in percent where its measure is read so. Its colour is by how
    much it is better than the reference on the same task, or the result itself where the reference
    was not measured.

    Args:
      arms: `comparison["settings"][i]["arms"]`, from left to right.
      tasks: the tasks' names, from top to bottom; the mean over them follows.
      ours: label of the arm to stress.
      reference: label of the arm that the colours compare with.
    """
    from matplotlib import colormaps

    labels = [arm["label"] for arm in arms]
    cells = np.full((len(tasks) + 1, len(arms)), np.nan)
    for column, arm in enumerate(arms):
        measured = results_of(arm).get("per_task") or {}
        cells[:-1, column] = to_array([(measured.get(task) or {}).get("mean") for task in tasks])
        cells[-1, column] = np.nan if (mean := mean_result(arm)) is None else mean
    if not np.isfinite(cells).any():
        return None
    against = cells[:, labels.index(reference)] if reference in labels else np.nan
    difference = cells - np.reshape(against, (-1, 1))
    compared = bool(np.isfinite(difference).any())
    measure = measure_of(arms[0])
    factor = 100 if measure.percent else 1
    sign = 1 if measure.higher_is_better else -1
    paint = factor * (sign * difference if compared else cells)
    spread = np.abs(paint[np.isfinite(paint) & (paint != 0)])
    # A quarter of the cells may be off the scale, so that bad arms leave the others a colour.
    limit = _colour_limit(spread, compared=compared, percent=measure.percent)
    colours = colormaps["RdBu" if compared else "Blues"].resampled(SHADES)
    colours = colours.with_extremes(bad="#f1f1f1")

    names, columns = (
        [short_name(task) for task in tasks],
        [short_name(label, 24) for label in labels],
    )
    left, top = words_width(names), words_width(columns)
    width = max(left + 0.33 * len(arms), 3.6)
    figure = new_figure(width, 0.205 * (len(tasks) + 1) + top + 0.75)
    axes = figure.add_subplot()
    image = axes.imshow(
        paint, cmap=colours, vmin=-limit if compared else 0, vmax=limit, aspect="auto"
    )
    for (row, column), value in np.ndenumerate(cells):
        shade = image.cmap(image.norm(paint[row, column]))
        dark = np.isfinite(paint[row, column]) and np.dot(shade[:3], (0.299, 0.587, 0.114)) < 0.5
        text = _cell(value, percent=measure.percent)
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else "black",
            weight="bold" if row == len(tasks) else "normal",
        )
    axes.set_xticks(range(len(arms)), columns, rotation=90)
    axes.set_yticks(range(len(tasks) + 1), [*names, "mean"])
    axes.tick_params(
        length=0, labelsize=8, top=True, bottom=False, labeltop=True, labelbottom=False
    )
    for label, tick in zip(labels, axes.get_xticklabels(), strict=True):
        if label in (ours, reference):
            tick.set(weight="bold", color=color_of(label, ours, reference))
    axes.get_yticklabels()[-1].set_weight("bold")
    axes.axhline(len(tasks) - 0.5, color="black", linewidth=1)
    axes.spines[:].set_visible(False)
    extend = "both" if compared and spread.max(initial=0) > limit else "neither"
    style: Any = {"location": "bottom", "shrink": 0.8, "aspect": 28, "pad": 0.02}
    bar = figure.colorbar(image, ax=axes, extend=extend, **style)
    words = f"test {measure.name}" + ", %" * measure.percent
    if compared:
        unit = "points" if measure.percent else measure.name
        words = f"{unit} {'above or below' if sign > 0 else 'better or worse than'} "
        words += short_name(reference)
    bar.set_label(words, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return to_drawing(figure)


def _colour_limit(spread: np.ndarray, *, compared: bool, percent: bool) -> float:
    """Where the scale of colours ends."""
    if compared and spread.size:
        return max(float(np.quantile(spread, 0.75)), 2.0 if percent else 1e-3)
    return 100.0 if percent or not spread.size else float(spread.max())


def _cell(value: float, *, percent: bool) -> str:
    """A result in a cell of the table in colours."""
    if not np.isfinite(value):
        return "–"
    if percent:
        return f"{100 * value:.0f}"
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3g}"


def similarity(
    matrix: Any, tasks: Sequence[str], label_spaces: Sequence[str] | None
) -> Drawing | None:
    """Draws a similarity of tasks beside the ground truth; None if no pair has a number.

    Tasks with the same label space stand together. The diagonal is blank.

    Args:
      matrix: `[tasks, tasks]`, fractions or None.
      tasks: the tasks' names.
      label_spaces: of each task; without them the ground truth is left out.

    Raises:
      ValueError: if the matrix is not `[tasks, tasks]`, or the label spaces are not one per task.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    cells = np.array([to_array(row) for row in matrix], np.float64)
    families = list(label_spaces or tasks)
    if cells.shape != (len(tasks), len(tasks)) or len(families) != len(tasks):
        raise ValueError(
            f"similarity: found a matrix {cells.shape}, {len(tasks)} tasks and {len(families)} "
            "label spaces; expected [tasks, tasks] and one label space per task."
        )
    order, blocks = figures.by_family(families)
    cells = cells[np.ix_(order, order)]
    np.fill_diagonal(cells, np.nan)
    if not np.isfinite(cells).any():
        return None
    spread = max(float(np.nanmax(np.abs(cells - 0.5))), figures.LEAST_SPREAD)
    related = np.equal.outer([families[i] for i in order], [families[i] for i in order])
    truth = np.where(np.eye(len(tasks), dtype=bool), np.nan, related.astype(float))

    names = [short_name(tasks[i]) for i in order]
    left = words_width(names)
    beside = len(tasks) <= _SIDE_BY_SIDE
    panels = 2 if label_spaces else 1
    across = panels if beside else 1
    side = min((WIDTH - left - 0.1) / across, 3.7)
    tall = side + 0.3
    figure = new_figure(WIDTH, (tall + 0.55) if beside else panels * tall + 0.55)
    shape = (1, panels) if beside else (panels, 1)
    drawn = figure.subplots(*shape, squeeze=False).ravel()
    colours = colormaps["RdBu_r"].resampled(SHADES).with_extremes(bad="#d9d9d9")
    image = drawn[0].imshow(cells, cmap=colours, vmin=0.5 - spread, vmax=0.5 + spread)
    drawn[0].set_title("measured similarity", fontsize=9, loc="left")
    if label_spaces:
        two = ListedColormap(["#eef1f4", "#8c1c2b"]).with_extremes(bad="#d9d9d9")
        drawn[1].imshow(truth, cmap=two, vmin=0, vmax=1)
        drawn[1].set_title("truth: same label space", fontsize=9, loc="left")
    for i, axes in enumerate(drawn):
        axes.set_xticks([])
        named = not beside or i == 0
        axes.set_yticks(range(len(tasks)), names if named else [""] * len(tasks))
        axes.tick_params(length=0, labelsize=8 if len(tasks) <= 24 else 7)
        axes.spines[:].set_visible(False)
        for start, _, _ in blocks[1:] if label_spaces else ():
            axes.axhline(start - 0.5, color="#6d7982", linewidth=0.8)
            axes.axvline(start - 0.5, color="#6d7982", linewidth=0.8)
    bar = figure.colorbar(
        image, ax=list(drawn), location="bottom", shrink=0.7, aspect=32, pad=0.03, fraction=0.06
    )
    bar.set_label("direction similarity, 0.5 = unrelated", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return to_drawing(figure)


def _traffic_axis(axes: Any, traffic: Sequence[float]) -> list[float]:
    """Sets ticks and limits of a logarithmic axis with a place for zero; returns the places."""
    sent = [math.log10(bits) for bits in traffic if bits > 0]
    low, high = (min(sent), max(sent)) if sent else (0.0, 0.0)
    if high - low < 0.5:
        low, high = low - 0.25, high + 0.25
    span = high - low
    ticks: dict[float, str] = {}
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        values = [
            step * 10.0**power
            for power in range(math.floor(low), math.ceil(high) + 1)
            for step in steps
        ]
        places = [p for p in map(math.log10, values) if low <= p <= high]
        # Their labels need a sixth of the axis each.
        apart = np.diff(places).min(initial=span) > 0.22 * span
        if sent and places and (apart or not ticks):
            ticks = {place: _round_bits(10**place) for place in places}
    if len(ticks) > 6:
        ticks = dict(list(ticks.items())[:: -(-len(ticks) // 5)])
    nothing = low - 0.2 * span if sent else 0.0
    if len(sent) < len(traffic):
        ticks[nothing] = "nothing"
        if sent:
            line: Any = {"color": "#8f9aa3", "linewidth": 1, "linestyle": (0, (2, 2))}
            axes.axvline(low - 0.09 * span, **line)
        low = nothing
    axes.set_xlim(low - 0.09 * span, high + 0.14 * span)
    axes.set_xticks(list(ticks), list(ticks.values()))
    return [math.log10(bits) if bits > 0 else nothing for bits in traffic]


def _round_bits(bits: float) -> str:
    """`human_bits` without the zeros that a round number does not need."""
    value, unit = human_bits(bits).split(" ")
    return f"{value.rstrip('0').rstrip('.') if '.' in value else value} {unit}"
