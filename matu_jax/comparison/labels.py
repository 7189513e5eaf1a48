"""Labels beside the points of a scatter plot, where they cover neither labels nor points."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def place_labels(
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
