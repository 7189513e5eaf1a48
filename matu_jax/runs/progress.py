"""How far a run is: a bar on a terminal; elsewhere, as in logs, a plain line a round."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from matu_jax.runs.log import measured_in
from matu_jax.simulation.measures import measure_of


def draws_bars(console: Console) -> bool:
    """Whether a console's output is looked at while it comes: colours can be had without that."""
    return console.is_terminal and console.file.isatty() and not console.is_dumb_terminal


class RoundProgress:
    """Says after each round how far a run is; a context manager once `begin` was called.

    Args:
      console: where to say it, from `commandline.plain_console`.
      label: stands before every line; "" where there is one run only.
      bar: whether a bar is drawn on terminals; False where another one is there already.
    """

    def __init__(self, console: Console, *, label: str = "", bar: bool = True):
        self._label, self._lines = f"{label}: " if label else "", not draws_bars(console)
        self._bar = Progress(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(),
            console=console,
            disable=self._lines or not bar,
        )
        self._total = self._measured = 0
        self._running = 0.0

    def begin(self, total: int, done: int) -> "RoundProgress":
        """Notes how many rounds there are, and how many were made before."""
        self._total = total
        self._job = self._bar.add_task("", total=total, completed=done)
        self._last = time.perf_counter()
        return self

    def __enter__(self) -> "RoundProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def advance(self, record: Mapping[str, Any]) -> None:
        """Shows a round that is done.

        Args:
          record: as in metrics.jsonl.
        """
        now = time.perf_counter()
        taken, self._last = now - self._last, now
        self._running += max(taken - record["seconds"].get("compile", 0.0), 0.0)
        self._measured += 1
        self._bar.update(self._job, completed=record["round"], description=_status(record))
        if self._lines:
            left = self._total - record["round"]
            remain = f", about {duration(left * self._running / self._measured)} to go"
            self.say(
                f"round {record['round']} of {self._total}: {_status(record)}, {taken:.1f} s"
                + (remain if left else "")
            )

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._bar.console.print(f"{self._label}{text}")


def duration(seconds: float) -> str:
    """Seconds for people: `"40 s"`, `"12 min"`, `"3 h 05 min"`."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _status(record: Mapping[str, Any]) -> str:
    loss = "no loss" if record["loss"] is None else f"loss {record['loss']:.3f}"
    measure, measured = measure_of(record), measured_in(record)
    return f"{loss}, {measure.name} {measure.text(measured['test_mean'])}" if measured else loss
