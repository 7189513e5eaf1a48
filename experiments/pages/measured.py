"""What was measured, read from the folder of results, and how its numbers are written."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
NONE = "–"


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def settings_of(comparison: str) -> dict[str, dict[str, Any]]:
    """The arms of a comparison, by setting and label."""
    settings = read(f"{comparison}/comparison")["settings"]
    return {each["name"]: {arm["label"]: arm for arm in each["arms"]} for each in settings}


def timings(files: str) -> list[dict[str, Any]]:
    """The rows of files of performance/, whose names are divided by spaces."""
    return [row for name in files.split() for row in read(f"performance/{name}")["rows"]]


def percent(arm: Mapping[str, Any]) -> float:
    """An arm's test accuracy in percent."""
    return 100 * arm["accuracy"]["mean"]


def kbit(arm: Mapping[str, Any], link: str = "uplink") -> float:
    """An arm's traffic per client and round."""
    return arm["communication"][f"{link}_bits_per_client_round"] / 1000


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    first, *others = (
        "|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in (header, *rows)
    )
    return "\n".join([first, "|" + "---|" * len(header), *others])


def accuracy(arm: Mapping[str, Any] | None) -> str:
    """An arm's test accuracy in percent and its deviation over seeds, `94.5 ± 1.1`."""
    return NONE if arm is None else f"{percent(arm):.1f} ± {100 * arm['accuracy']['std']:.1f}"


def recorded(value: Mapping[str, float]) -> str:
    """The same of a mean and a deviation in percent, of which no more digits were recorded."""
    return f"{value['mean']:.1f}" + (f" ± {value['std']:.1f}" if "std" in value else "")


def signed(fraction: float | None) -> str:
    """A difference of two accuracies in points."""
    if fraction is None:
        return NONE
    points = f"{100 * fraction:+.1f}"
    return "0.0" if points in ("+0.0", "-0.0") else points.replace("-", "−")


def three_digits(value: Any) -> str:
    """A measured number with three digits, or with all before its point; others as they are."""
    if value is None:
        return NONE
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    rounded = float(f"{value:.3g}")
    return f"{value:,.0f}" if rounded >= 1000 else f"{rounded:g}"


def bold_highest(cells: Sequence[str]) -> list[str]:
    """The cells, with those in bold whose means are the highest as printed."""
    means = [float("-inf") if cell == NONE else float(cell.split()[0]) for cell in cells]
    return [
        f"**{cell}**" if mean == max(means) else cell
        for cell, mean in zip(cells, means, strict=True)
    ]
