"""What the pictures of a comparison have in common: size, colours, axes, and the PNG."""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from matu_jax.comparison.arms import number
from matu_jax.runs import figures

WIDTH = 5.2  # inches
_RESOLUTION, _MOST_DOTS = 220, 1.6e6  # dots per inch, and in all, to keep the files small
_ON_SCREEN = 110  # CSS pixels per inch
OURS, REFERENCE, OTHER, FAINT, GRID = "#0b5394", "#222222", "#8a5a2b", "#c4ccd2", "#e4e4e4"
SHADES = 25  # of a scale of colours; so few survive the packing of the PNG as they are


class Drawing(NamedTuple):
    """A PNG and the size at which to show it, in CSS pixels."""

    png: bytes
    width: int
    height: int


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, as fine as its size allows."""
    figure = figures.blank_figure(width, height)
    figure.set_dpi(min(_RESOLUTION, math.sqrt(_MOST_DOTS / (width * height))))
    return figure


def to_drawing(figure: Any) -> Drawing:
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


def accuracy_limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis of accuracy: what was measured, and some air."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    air = max(0.06 * (high - low), 0.02)
    return max(low - air, -0.02), min(high + air, 1.02)


def percent_axis(axis: Any) -> None:
    """Writes an axis of fractions in percent."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 2):g} %"))


def color_of(label: str, ours: str, reference: str) -> str:
    """The colour of an arm."""
    return {reference: REFERENCE, ours: OURS}.get(label, OTHER)


def short_name(text: str, longest: int = 28) -> str:
    """A label that is not too long, in which a dollar sign does not begin mathematics."""
    text = " ".join(str(text).split())
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return figures.literal(text)


def words_width(names: Sequence[str]) -> float:
    """Inches that the longest of the names needs at 8 points."""
    return 0.062 * max((len(name) for name in names), default=0) + 0.1


def to_array(values: Sequence[Any]) -> np.ndarray:
    """The values as float64, NaN where there is none."""
    return np.array([np.nan if number(value) is None else float(value) for value in values])
