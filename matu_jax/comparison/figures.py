"""Pictures of a comparison: each function draws one and returns it as a PNG.

Every picture is narrow, so that a telephone shows its words large enough to read. The arm called
ours is blue, the reference is black and the others are grey, in each of them.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from matu_jax.runs import figures
from matu_jax.runs.tables import human_bits

_WIDTH = 5.2  # inches
_RESOLUTION, _MOST_DOTS = 220, 1.6e6  # dots per inch, and in all, to keep the files small
_ON_SCREEN = 110  # CSS pixels per inch
_OURS, _REFERENCE, _OTHER, _FAINT, _GRID = "#0b5394", "#222222", "#8a5a2b", "#c4ccd2", "#e4e4e4"
_SHADES = 25  # of a scale of colours; so few survive the packing of the PNG as they are
_SIDE_BY_SIDE = 10  # so many tasks have room for two matrices in one row


class Drawing(NamedTuple):
    """A PNG and the size at which to show it, in CSS pixels."""

    png: bytes
    width: int
    height: int


def number(value: Any) -> float | None:
    """The value, or None where there is none or it is not finite."""
    return None if value is None or not math.isfinite(value) else float(value)


def total_traffic(arm: Mapping[str, Any]) -> float | None:
    """Bits up and down of all clients in all rounds of one run."""
    communication = arm.get("communication") or {}
    up = number(communication.get("uplink_bits_total"))
    down = number(communication.get("downlink_bits_total"))
    return None if up is None or down is None else up + down


def mean_accuracy(arm: Mapping[str, Any]) -> float | None:
    """The arm's test accuracy, a fraction; the mean over tasks and seeds."""
    return number((arm.get("accuracy") or {}).get("mean"))


def traffic(arms: Sequence[Mapping[str, Any]], *, ours: str, reference: str) -> Drawing | None:
    """Draws accuracy over total traffic, with the Pareto front; None if no arm has both.

    The axis of traffic is logarithmic. Arms that send nothing stand at its left, behind a line.

    Args:
      arms: `comparison["settings"][i]["arms"]`.
      ours: label of the arm to stress.
      reference: label of the arm to be measured by.
    """
    found = [(total_traffic(arm), mean_accuracy(arm), arm) for arm in arms]
    points = [(b, mean, arm) for b, mean, arm in found if b is not None and mean is not None]
    if not points:
        return None
    figure = _figure(_WIDTH, 4.8)
    axes = figure.add_subplot()
    places = _traffic_axis(axes, [bits for bits, _, _ in points])
    lowest_of_row, front = -math.inf, []
    for x, (_, y, _) in sorted(
        zip(places, points, strict=True), key=lambda pair: (pair[0], -pair[1][1])
    ):
        if y > lowest_of_row:
            front.append((x, y))
            lowest_of_row = y
    x, y = zip(*front, strict=True)
    style: Any = {"color": "#9db8cf", "linewidth": 4, "alpha": 0.55, "zorder": 1}
    label = "Pareto front: nothing is better with as little traffic"
    axes.plot([*x, axes.get_xlim()[1]], [*y, y[-1]], drawstyle="steps-post", label=label, **style)
    labels = []
    for place, (_, mean, arm) in zip(places, points, strict=True):
        color = _color(arm["label"], ours, reference)
        spread = number(arm["accuracy"].get("std"))
        error: Any = {"color": color, "elinewidth": 0.9, "alpha": 0.7, "zorder": 2}
        if spread:
            axes.errorbar([place], [mean], yerr=[spread], fmt="none", **error)
        stressed = arm["label"] in (ours, reference)
        style = {"marker": "D" if arm["label"] == reference else "o", "color": color, "zorder": 3}
        axes.plot([place], [mean], markersize=7 if stressed else 5.5, **style)
        labels.append((place, mean, _name(arm["label"]), color, stressed))
    _percent_axis(axes.yaxis)
    axes.margins(y=0.12)
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    axes.set_ylabel("test accuracy", fontsize=9)
    axes.set_xlabel("total traffic of a run (log scale), less is better", fontsize=9)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    _place_labels(figure, axes, labels)
    return _drawing(figure)


def curves(
    arms: Sequence[Mapping[str, Any]], *, ours: str, reference: str, chance: float | None = None
) -> Drawing | None:
    """Draws accuracy over rounds, a panel per arm; None if no arm has a curve.

    Args:
      arms: `comparison["settings"][i]["arms"]`.
      ours: label of the arm to show in every panel.
      reference: label of the other arm to show in every panel.
      chance: the accuracy of guessing, in the mean over tasks; None = no line.
    """
    from matplotlib.ticker import MaxNLocator

    lines = {}
    for arm in arms:
        curve = arm.get("curve") or {}
        rounds, mean = curve.get("rounds") or [], _array(curve.get("mean") or [])
        if np.isfinite(mean).any():
            std = _array(curve.get("std") or [None] * len(rounds))
            lines[arm["label"]] = (rounds, mean, std)
    if not lines:
        return None
    columns = min(len(lines), 2 if len(lines) <= 4 else 3)
    rows = -(-len(lines) // columns)
    figure = _figure(_WIDTH, 0.75 + rows * (1.75 if columns < 3 else 1.35))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    shown: dict[str, Any] = {}
    for panel, label in zip(panels.flat, lines, strict=False):
        shown |= _panel(panel, lines, label, ours=ours, reference=reference)
        if chance is not None:
            style: Any = {"color": _REFERENCE, "linewidth": 0.8, "linestyle": ":", "zorder": 1}
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
    low, high = _span([*guessed, *(value for edge in edges for value in edge)])
    first.set_ylim(low, high)
    _percent_axis(first.yaxis)
    figure.supxlabel("round", fontsize=9)
    figure.supylabel("test accuracy, mean over tasks", fontsize=9)
    names = {ours: f"{_name(ours)} (ours)", reference: f"{_name(reference)} (reference)"}
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
    return _drawing(figure)


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
            shown["others"] = panel.plot(x, y, color=_FAINT, linewidth=0.7, zorder=1)[0]
    for other, line in ((reference, "--"), (ours, "-")):
        if other in lines and other != label:
            color = _color(other, ours, reference)
            style: Any = {"color": color, "linewidth": 1.1, "zorder": 2}
            (shown[other],) = panel.plot(*lines[other][:2], line, **style)
    color = _color(label, ours, reference)
    band = panel.fill_between(
        rounds, mean - std, mean + std, color=color, alpha=0.22, linewidth=0, zorder=2
    )
    marker = "o" if len(rounds) <= 12 else ""
    style = {"color": color, "linewidth": 2, "marker": marker, "markersize": 3, "zorder": 3}
    panel.plot(rounds, mean, **style)
    bold = label in (ours, reference)
    panel.set_title(
        _name(label, 20 if bold else 24),
        fontsize=8.5,
        loc="left",
        pad=3,
        color=color,
        weight="bold" if bold else "normal",
    )
    panel.grid(color=_GRID, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
    if np.isfinite(std).any():
        shown["± std"] = band
    return shown


def per_task(
    arms: Sequence[Mapping[str, Any]], tasks: Sequence[str], *, ours: str, reference: str
) -> Drawing | None:
    """Draws each arm's accuracy on each task as a table in colours; None if there is no number.

    A cell's number is the accuracy in percent. Its colour is the difference to the reference on
    the same task, or the accuracy itself where the reference was not measured.

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
        accuracy = arm.get("accuracy") or {}
        measured = accuracy.get("per_task") or {}
        cells[:-1, column] = _array([(measured.get(task) or {}).get("mean") for task in tasks])
        cells[-1, column] = np.nan if (mean := mean_accuracy(arm)) is None else mean
    if not np.isfinite(cells).any():
        return None
    against = cells[:, labels.index(reference)] if reference in labels else np.nan
    difference = cells - np.reshape(against, (-1, 1))
    compared = bool(np.isfinite(difference).any())
    paint = 100 * (difference if compared else cells)
    spread = np.abs(paint[np.isfinite(paint) & (paint != 0)])
    # A quarter of the cells may be off the scale, so that bad arms leave the others a colour.
    limit = max(float(np.quantile(spread, 0.75)), 2.0) if compared and spread.size else 100.0
    colours = colormaps["RdBu" if compared else "Blues"].resampled(_SHADES)
    colours = colours.with_extremes(bad="#f1f1f1")

    names, columns = [_name(task) for task in tasks], [_name(label, 24) for label in labels]
    left, top = _words_width(names), _words_width(columns)
    width = max(left + 0.33 * len(arms), 3.6)
    figure = _figure(width, 0.205 * (len(tasks) + 1) + top + 0.75)
    axes = figure.add_subplot()
    image = axes.imshow(
        paint, cmap=colours, vmin=-limit if compared else 0, vmax=limit, aspect="auto"
    )
    for (row, column), value in np.ndenumerate(cells):
        shade = image.cmap(image.norm(paint[row, column]))
        dark = np.isfinite(paint[row, column]) and np.dot(shade[:3], (0.299, 0.587, 0.114)) < 0.5
        text = f"{100 * value:.0f}" if np.isfinite(value) else "–"
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
            tick.set(weight="bold", color=_color(label, ours, reference))
    axes.get_yticklabels()[-1].set_weight("bold")
    axes.axhline(len(tasks) - 0.5, color="black", linewidth=1)
    axes.spines[:].set_visible(False)
    extend = "both" if compared and spread.max(initial=0) > limit else "neither"
    style: Any = {"location": "bottom", "shrink": 0.8, "aspect": 28, "pad": 0.02}
    bar = figure.colorbar(image, ax=axes, extend=extend, **style)
    words = f"points above or below {_name(reference)}" if compared else "test accuracy, %"
    bar.set_label(words, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return _drawing(figure)


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

    cells = np.array([_array(row) for row in matrix], np.float64)
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

    names = [_name(tasks[i]) for i in order]
    left = _words_width(names)
    beside = len(tasks) <= _SIDE_BY_SIDE
    panels = 2 if label_spaces else 1
    across = panels if beside else 1
    side = min((_WIDTH - left - 0.1) / across, 3.7)
    tall = side + 0.3
    figure = _figure(_WIDTH, (tall + 0.55) if beside else panels * tall + 0.55)
    shape = (1, panels) if beside else (panels, 1)
    drawn = figure.subplots(*shape, squeeze=False).ravel()
    colours = colormaps["RdBu_r"].resampled(_SHADES).with_extremes(bad="#d9d9d9")
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
    return _drawing(figure)


def _figure(width: float, height: float) -> Any:
    figure = figures.blank_figure(width, height)
    figure.set_dpi(min(_RESOLUTION, math.sqrt(_MOST_DOTS / (width * height))))
    return figure


def _drawing(figure: Any) -> Drawing:
    """The figure as a PNG of few colours, which is the same for equal figures."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=figure.dpi, metadata={"Software": None})
    with Image.open(drawn, formats=("PNG",)) as picture:
        # Maximum coverage keeps the colours that few dots have, such as that of ours.
        few = picture.convert("RGB").quantize(
            256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
        )
    packed = io.BytesIO()
    few.save(packed, format="PNG", optimize=True)
    width, height = (round(inches * _ON_SCREEN) for inches in figure.get_size_inches())
    return Drawing(packed.getvalue(), width, height)


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


def _place_labels(
    figure: Any, axes: Any, labels: Sequence[tuple[float, float, str, str, bool]]
) -> None:
    """Writes (x, y, text, color, bold) near each point, where it covers neither label nor point.

    Points in a crowd get their labels in one column beside it, in the order of the points, with a
    thin line to each. Of the places around a crowd the first free one is taken, near ones first,
    or the one that covers least.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is measured here must stay where it is
    axes.autoscale(False)
    frame = axes.get_window_extent()
    unit = figure.dpi / 72
    points = axes.transData.transform([(x, y) for x, y, *_ in labels])
    notes = []
    for x, y, text, color, bold in labels:
        style: Any = {"fontsize": 8.5, "color": color, "weight": "bold" if bold else "normal"}
        style |= {"path_effects": [withStroke(linewidth=2, foreground="white")], "zorder": 5}
        place: Any = {"xytext": (0, 0), "textcoords": "figure pixels"}
        notes.append(axes.annotate(text, (x, y), ha="left", va="center", **place, **style))
    sizes = np.array([note.get_window_extent().size for note in notes])
    line = 1.08 * float(sizes[:, 1].max())

    taken = [Bbox([point - 5 * unit, point + 5 * unit]) for point in points]
    for crowd in _crowds(points, 30 * unit, line):
        width = float(sizes[crowd, 0].max())
        middle = points[crowd].mean(axis=0)
        best = None
        for gap, side, rise in _around(len(crowd)):
            edge = points[crowd, 0].max() if side > 0 else points[crowd, 0].min()
            x = edge + side * (gap * unit + width / 2)
            top = middle[1] + line * ((len(crowd) - 1) / 2 + rise)
            centres = [np.array((x, top - line * i)) for i in range(len(crowd))]
            half = np.array((width, line)) / 2
            boxes = [Bbox([centre - half, centre + half]) for centre in centres]
            cost = sum(
                sum(_overlap(box, other) for other in taken) + 10 * _outside(box, frame)
                for box in boxes
            )
            if best is None or cost < best[0] - 1e-6:
                best = (cost, side, boxes)
            if cost == 0:
                break
        assert best is not None
        _, side, boxes = best
        taken += boxes
        for i, box in zip(crowd, boxes, strict=True):
            left = box.x0 if side > 0 else box.x1 - sizes[i, 0]
            middle = (box.y0 + box.y1) / 2
            notes[i].set_position((left, middle))
            end = (left - 2 * unit if side > 0 else box.x1 + 2 * unit, middle)
            if math.dist(end, points[i]) > 12 * unit:
                ends = axes.transData.inverted().transform([points[i], end])
                axes.plot(*ends.T, color=labels[i][3], linewidth=0.7, alpha=0.8, zorder=2)
                taken.append(Bbox([np.minimum(points[i], end), np.maximum(points[i], end)]))


def _crowds(points: np.ndarray, near_x: float, near_y: float) -> list[list[int]]:
    """Groups of points that are near each other, large ones first; each from top to bottom."""
    crowds: list[list[int]] = []
    for i, point in enumerate(points):
        near = [
            crowd
            for crowd in crowds
            if any((np.abs(points[j] - point) < (near_x, near_y)).all() for j in crowd)
        ]
        crowds = [crowd for crowd in crowds if crowd not in near]
        crowds.append([i, *(j for crowd in near for j in crowd)])
    ordered = [sorted(crowd, key=lambda i: (-points[i][1], points[i][0], i)) for crowd in crowds]
    return sorted(ordered, key=lambda crowd: (-len(crowd), crowd[0]))


def _around(size: int) -> list[tuple[float, int, float]]:
    """Places for the labels of a crowd: (gap in points, right or left, lines up), best first."""
    gaps = (7, 24, 44, 70, 100, 140) if size == 1 else (22, 40, 64, 90, 130, 180)
    rises = sorted(np.arange(-6, 6.5, 0.5), key=lambda rise: (abs(rise), rise))
    places = [(gap, side, float(rise)) for gap in gaps for side in (1, -1) for rise in rises]
    return sorted(places, key=lambda place: place[0] + 14 * abs(place[2]))


def _overlap(one: Any, other: Any) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(width, 0) * max(height, 0)


def _outside(box: Any, frame: Any) -> float:
    return box.width * box.height - _overlap(box, frame)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis of accuracy: what was measured, and some air."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    air = max(0.06 * (high - low), 0.02)
    return max(low - air, -0.02), min(high + air, 1.02)


def _percent_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 2):g} %"))


def _color(label: str, ours: str, reference: str) -> str:
    return {reference: _REFERENCE, ours: _OURS}.get(label, _OTHER)


def _name(text: str, longest: int = 28) -> str:
    """A label that is not too long, in which a dollar sign does not begin mathematics."""
    text = " ".join(str(text).split())
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return figures.literal(text)


def _words_width(names: Sequence[str]) -> float:
    """Inches that the longest of the names needs at 8 points."""
    return 0.062 * max((len(name) for name in names), default=0) + 0.1


def _array(values: Sequence[Any]) -> np.ndarray:
    return np.array([np.nan if number(value) is None else float(value) for value in values])
