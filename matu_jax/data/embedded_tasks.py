"""The table of the embedded benchmark: 30 image-classification tasks.

A task is an *attribute* asked about a *domain*, named `attribute/domain`: `hue/noise` asks for the
hue of the sprite in images of the domain `noise`. Six attributes times five domains make 30 tasks
of 8 to 10 classes, 32×32×3. Every image is a sprite standing on a bar, before a texture:

| domain | sprite | background |
|---|---|---|
| `handwritten` | scikit-learn's real handwritten digits | smooth swell of light |
| `grating` | digits of many fonts | sinusoidal grating |
| `clutter` | ten capital letters | bright strokes on dark ground |
| `noise` | the same letters, dark | bright streaky noise |
| `plaid` | ten shapes, pastel | hard-edged plaid |

| attribute | question | classes |
|---|---|---|
| `digit`, `letter` or `shape` | which sprite is it? | 10 |
| `hue` | what colour is the sprite? | 10 |
| `position` | in which of 3×3 places does it stand? | 9 |
| `tilt` | how far is it turned? (the bar tells where its foot is) | 8 |
| `ground` | what colour is the background? | 8 |
| `flow` | which way do the lines of the background run? | 8 |

All attributes are drawn independently of each other and equally often, so no attribute tells
anything about another. Tasks of one domain label *the same images* differently: one model cannot
serve both, which is what makes the benchmark hard. Tasks of one attribute share the meaning of
their labels across domains, which is what there is to gain (`relatedness`).

The real digits, and the fonts, are divided among train, validation and test before anything is
drawn.
"""

import difflib
from typing import Literal, NamedTuple

import numpy as np

from matu_jax.data.sprites import DIGITS, LETTERS, SHAPES

__all__ = ["DOMAINS", "EIGHT", "SETS", "TASKS", "TaskSpec", "relatedness", "spec_of"]

HUES = ("red", "orange", "yellow", "green", "mint", "cyan", "blue", "indigo", "purple", "pink")
GROUNDS = ("red", "amber", "lime", "green", "cyan", "blue", "violet", "rose")
POSITIONS = tuple(
    f"{y} {x}" for y in ("top", "middle", "bottom") for x in ("left", "centre", "right")
)
TILTS = tuple(f"{degrees:+d}°" for degrees in range(-49, 50, 14))
FLOWS = tuple(f"{degrees:g}°" for degrees in np.arange(8) * 22.5)
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "hue": HUES,
    "position": POSITIONS,
    "tilt": TILTS,
    "ground": GROUNDS,
    "flow": FLOWS,
}
IDENTITIES = {"digit": DIGITS, "letter": LETTERS, "shape": SHAPES}


class _Style(NamedTuple):
    """How a domain looks. Pairs are the ends of a uniform draw per image; values are 0 to 1."""

    texture: str
    ink_saturation: tuple[float, float]
    ink_value: tuple[float, float]
    ground_saturation: tuple[float, float]
    ground_value: tuple[float, float]
    contrast: tuple[float, float]


class _Domain(NamedTuple):
    identity: str
    sprites: str
    style: _Style


DOMAINS: dict[str, _Domain] = {
    "handwritten": _Domain(
        "digit",
        "handwritten",
        _Style("swell", (0.65, 0.85), (0.9, 1.0), (0.6, 0.8), (0.5, 0.6), (0.75, 0.9)),
    ),
    "grating": _Domain(
        "digit",
        "digits",
        _Style("grating", (0.8, 1.0), (0.9, 1.0), (0.6, 0.9), (0.5, 0.6), (0.6, 0.8)),
    ),
    "clutter": _Domain(
        "letter",
        "letters",
        _Style("clutter", (0.75, 0.95), (0.95, 1.0), (0.7, 0.9), (0.55, 0.65), (0.8, 0.9)),
    ),
    "noise": _Domain(
        "letter",
        "letters",
        _Style("noise", (0.9, 1.0), (0.35, 0.5), (0.35, 0.5), (0.95, 1.0), (0.45, 0.55)),
    ),
    "plaid": _Domain(
        "shape",
        "shapes",
        _Style("plaid", (0.45, 0.6), (0.95, 1.0), (0.8, 1.0), (0.45, 0.55), (0.6, 0.8)),
    ),
}


class TaskSpec(NamedTuple):
    """One row of `TASKS`."""

    name: str
    label_space: str
    domain: str
    class_names: tuple[str, ...]


def _table() -> dict[str, TaskSpec]:
    specs = {}
    for domain, (identity, *_) in DOMAINS.items():
        for space, names in ({identity: IDENTITIES[identity]} | ATTRIBUTES).items():
            specs[f"{space}/{domain}"] = TaskSpec(f"{space}/{domain}", space, domain, names)
    return specs


TASKS: dict[str, TaskSpec] = _table()
"""All 30 tasks by name, domain by domain."""

EIGHT: tuple[str, ...] = tuple(
    f"{space}/{domain}"
    for domain in ("handwritten", "grating")
    for space in ("hue", "position", "tilt", "flow")
)
"""Four attributes of two domains: 4 pairs share a label space, 12 a domain, 12 neither."""
SETS: dict[str, tuple[str, ...]] = {"embedded8": EIGHT, "embedded30": tuple(TASKS)}
"""Named sets of tasks."""


def relatedness(a: str, b: str) -> Literal["both", "label_space", "domain", "neither"]:
    """Says how two tasks are related; this is the ground truth of the benchmark.

    Args:
        a: Name of a task of `TASKS`.
        b: Name of a task of `TASKS`.

    Returns:
        `"label_space"`: the same question about images of another kind. Such tasks can help each
        other, and only they count as *related* when a similarity is scored.
        `"domain"`: another question about the very same images, so the two contradict each other.
        `"neither"`: another question about other images.
        `"both"`: a task and itself.

    Raises:
        ValueError: If a name is unknown.
    """
    one, other = spec_of(a), spec_of(b)
    if one.label_space == other.label_space:
        return "both" if one.domain == other.domain else "label_space"
    return "domain" if one.domain == other.domain else "neither"


def spec_of(name: str) -> TaskSpec:
    """The row of a task.

    Raises:
        ValueError: If the name is unknown; says what may be meant.
    """
    if name in TASKS:
        return TASKS[name]
    close = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"the tasks are {', '.join(TASKS)}"
    raise ValueError(f"unknown task {name!r}; {hint}")
