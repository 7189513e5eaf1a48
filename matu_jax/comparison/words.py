"""Numbers and lists of a comparison in words; "–" stands for what is not known."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from matu_jax.comparison.arms import mean_result, number, number_at, results_of, verdict_of
from matu_jax.comparison.collect import TOO_FEW
from matu_jax.comparison.html import Code
from matu_jax.config import renamed
from matu_jax.simulation.measures import Measure, measure_of

NONE = "–"


def missing_words(setting: Mapping[str, Any]) -> str:
    """The runs that are not done, by arm: `"3 runs (a: seeds 0 and 1; b: seed 2)."`, or `""`."""
    missing = setting.get("missing") or []
    seeds: dict[str, list[str]] = {}
    for run in missing:
        seeds.setdefault(str(run["label"]), []).append(str(run["seed"]))
    if not seeds:
        return ""
    of_arms = (f"{k}: seed{'s' * (len(v) > 1)} {listed(v)}" for k, v in seeds.items())
    return f"{counted(len(missing), 'run')} ({'; '.join(of_arms)})."


def left_out_words(arms: Iterable[Mapping[str, Any]], lacks: Any) -> str:
    """Names the arms that a picture lacks, as a sentence, or `""`."""
    labels = [arm["label"] for arm in arms if lacks(arm)]
    return f" Not measured, so not shown: {listed(labels)}." if labels else ""


def result_words(arm: Mapping[str, Any]) -> str:
    """What an arm reaches and its deviation over seeds: `84.1 ± 0.3 %`, `0.452 ± 0.011`."""
    return spread_words(measure_of(arm), mean_result(arm), number(results_of(arm).get("std")))


def spread_words(measure: Measure, mean: float | None, std: float | None) -> str:
    """A mean and its deviation, as its measure is read."""
    if mean is None or std is None:
        return measure.text(mean)
    return f"{measure.number(mean)} ± {measure.number(std)}" + " %" * measure.percent


def difference_word(measure: Measure) -> str:
    """What differences are counted in: points, hundredths of a measure that is read in percent."""
    return "points" if measure.percent else measure.name


def lower_words(measure: Measure) -> str:
    """Says of a measure of which lower values are better that they are."""
    return "" if measure.higher_is_better else ", lower is better"


def percent_of(part: float | None, whole: float | None) -> str:
    """What percentage the part is of the whole; "–" where the whole is nothing or not known."""
    if part is None or not whole or part / whole < 0:
        return NONE
    return f"{100 * part / whole:.1f} %"


def against_words(arm: Mapping[str, Any]) -> str:
    """By how much the arm is better than ours, and what the test says of it."""
    difference, p = (
        number_at(arm, "against_ours", "difference"),
        number_at(arm, "against_ours", "p_value"),
    )
    if difference is None:
        return NONE
    percent = measure_of(arm).percent
    points = f"{100 * difference:+.1f}" if percent else f"{difference:+.3f}"
    points = points.replace("-", "−")
    points = points[1:] if not float(points[1:]) else points
    said = verdict_of(arm)
    if p is None or said == TOO_FEW:
        return points
    mark = " ‡" if said == "mixed" else ""
    return f"{points} (p < 0.001){mark}" if p < 0.001 else f"{points} (p = {p:.3f}){mark}"


def rounds_words(found: Mapping[str, Any] | None) -> str:
    """How many rounds it took, and how many of the seeds got there if not all did."""
    if not found:
        return NONE
    mean, reached, of = number(found.get("mean")), found.get("reached"), found.get("of")
    if mean is None:
        return "never" if reached == 0 and of else NONE
    part = f" ({reached} of {of})" if reached != of else ""
    return f"{mean:.1f}".removesuffix(".0") + part


def seconds_words(value: float | None) -> str:
    """Seconds with as many digits as their size calls for."""
    if value is None:
        return NONE
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:.{1 if value >= 1 else 3}f}"


def decimals(value: float | None, places: int) -> str:
    """A number with so many decimals."""
    return NONE if value is None else f"{value:.{places}f}"


def with_unit(unit: Any, value: Any) -> str:
    """A number as `unit` writes it, such as `human_bits`."""
    return NONE if (found := number(value)) is None else unit(found)


def or_none(value: Any) -> Any:
    """The value, or the sign for none."""
    return NONE if value is None else value


def fields_words(fields: Mapping[str, Any] | None) -> Iterator[str]:
    """Fields and their values as words, by the names of now: `data.clients = 12, rounds = 3`."""
    if not fields:
        yield "none"
    for i, (path, value) in enumerate(renamed(fields or {}).items()):
        if i:
            yield ", "
        yield Code(f"{path} = {json.dumps(value, ensure_ascii=False)}")


def counted(count: float, word: str) -> str:
    """`1 arm`, `2 arms`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def listed(words: Iterable[str]) -> str:
    """The words as an English list: `"a, b and c"`."""
    *most, last = list(words) or [NONE]
    return f"{', '.join(most)} and {last}" if most else last
