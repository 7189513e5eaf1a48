"""Tables on the terminal: a run's plan and its results."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matu_jax.simulation.measures import measure_of, measures_of

if TYPE_CHECKING:
    from rich.table import Table


def result_table(summary: Mapping[str, Any]) -> "Table":
    """The table at the end of a run: what each task and their mean reach, traffic and time."""
    from rich.table import Table

    communication = summary["communication"]
    seconds = number(summary["seconds"]["total"])
    share = _percent(summary.get("overhead", {}).get("share"))  # runs of older versions lack it
    data = summary.get("data_fingerprint", {}).values()
    stand_ins = "on generated stand-ins, " * any(str(x).startswith("synthetic-") for x in data)
    chosen = "the best on validation"
    if summary[measure_of(summary).name].get("validation_mean") is None:
        chosen = "the last one: validation gave no finite number"
    table = Table(
        title=_text(
            f"{stand_ins}{summary['algorithm']}, seed {summary['seed']}: "
            f"round {summary['selected_round']} of {summary['rounds']},\n{chosen}"
        ),
        caption="per client and round:\n"
        f"{human_bits(communication['uplink_bits_per_client_round'])} up, "
        f"{human_bits(communication['downlink_bits_per_client_round'])} down\n"
        f"{seconds:.0f} seconds in all\n{share} the algorithm's own",
    )
    measures = measures_of(summary)
    table.add_column("task")
    for measure in measures:
        table.add_column(_text(f"test {measure.name}"), justify="right")
    tasks = list(summary[measures[0].name]["per_task"])
    for name in tasks:
        values = (m.text(summary[m.name]["per_task"].get(name)) for m in measures)
        table.add_row(_text(name), *values, end_section=name == tasks[-1])
    sites = list(summary[measures[0].name].get("per_site", ()))
    for name in sites:
        values = (m.text(summary[m.name]["per_site"].get(name)) for m in measures)
        table.add_row(_text(f"site {name}"), *values, end_section=name == sites[-1])
    means = (measure.text(summary[measure.name]["mean"]) for measure in measures)
    table.add_row("mean", *means, style="bold")
    return table


def plan_table(plan: Mapping[str, Any]) -> "Table":
    """The table at the start of a run: one row per entry, in order."""
    from rich import box
    from rich.table import Table

    table = Table(show_header=False, box=box.SIMPLE)
    table.add_column("what", style="bold")
    table.add_column("value", overflow="fold")
    for what, value in plan.items():
        table.add_row(_text(what), _text(value))
    return table


def human_bits(bits: float) -> str:
    """Bits in decimal units: `"1.26 Mbit"`."""
    return _human(bits, 1000, ("bit", "kbit", "Mbit", "Gbit", "Tbit"))


def human_bytes(count: float) -> str:
    """Bytes in binary units: `"1.50 MiB"`."""
    return _human(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _human(value: float, step: int, units: Sequence[str]) -> str:
    """Three significant digits, in the first unit in which the number stays below 1000."""
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / step, power + 1
    if abs(value) >= 999.5 or (power == 0 and float(value).is_integer()):
        return f"{value:.0f} {units[power]}"
    return f"{value:#.3g}".rstrip(".") + f" {units[power]}"


def number(value: Any) -> float:
    """A number of JSON, which has no NaN: NaN for None."""
    return float("nan") if value is None else float(value)


def _percent(value: Any) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _text(value: Any) -> Any:
    """Plain text: what stands in square brackets is not a style."""
    from rich.text import Text

    return Text(str(value))
