"""Clients that vanish: drop-out, stragglers, and tasks with too few holders left."""

import csv
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from matu_jax.aggregation import Slots
from matu_jax.fields import field
from matu_jax.json_files import regular_file


@dataclasses.dataclass(frozen=True)
class FailureConfig:
    """Clients that vanish, and when there are too few of them.

    Attributes:
      dropout: probability that a client that takes part in a round sends nothing.
      trace: a CSV file with the columns round (from 1), client and reason: who sends nothing when;
        "" = none.
      slowness: standard deviation of the logarithm of a client's time for a round, relative to the
        typical time; drawn anew for every round.
      deadline: who needs longer than this many typical times is too late; 0 = no deadline.
      quorum: holders of a task whose uploads a round needs to change the task; with fewer it keeps
        its vector.
      max_nonfinite_share: the run stops, with a message, where training fails (the loss or a
        parameter is not a finite number) in a larger share of a round's slots.
    """

    dropout: float = field(0.0, at_least=0, at_most=1)
    trace: str = ""
    slowness: float = field(0.0, at_least=0)
    deadline: float = field(0.0, at_least=0)
    quorum: int = field(1, at_least=1)
    max_nonfinite_share: float = field(0.5, at_least=0, at_most=1)

    def conflicts(self, where: str) -> Iterator[str]:
        """Yields what is wrong where one field is without effect for want of another."""
        if self.deadline and not self.slowness:
            yield (
                f"{where}.deadline: found {self.deadline}, but nobody is slow: set "
                f"{where}.slowness too."
            )
        if self.slowness and not self.deadline:
            yield (
                f"{where}.slowness: found {self.slowness}, but nothing waits: set "
                f"{where}.deadline too."
            )


_COLUMNS = ["round", "client", "reason"]


def read_trace(file: str, num_clients: int) -> dict[int, dict[int, str]]:
    """Reads who is absent when: `{round, from 1: {client: reason}}`.

    Args:
      file: CSV with a header and the columns round, client and reason, in this order.
      num_clients: clients are below it.

    Raises:
      ValueError: names the file and the line of what is wrong.
    """
    path = Path(file)
    try:
        text = regular_file(path).read_text(
            encoding="utf-8-sig"
        )  # with the mark that spreadsheets begin with
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8 text"
        raise ValueError(f"config.failures.trace: {path} cannot be read: {reason}.") from None
    absent: dict[int, dict[int, str]] = {}
    rows = csv.reader(text.splitlines())
    header = [name.strip() for name in next(_rows(rows, path), [])]
    if header != _COLUMNS:
        raise ValueError(
            f"{path}, line 1: found {','.join(header)!r}, expected {','.join(_COLUMNS)!r}."
        )
    for row in _rows(rows, path):
        if not row:
            continue
        number = row[0].strip() if len(row) == 3 else ""
        client = row[1].strip() if len(row) == 3 else ""
        known = all(word.isdecimal() and len(word) < 10 for word in (number, client))
        if not known or int(number) < 1 or int(client) >= num_clients:
            raise ValueError(
                f"{path}, line {rows.line_num}: found {','.join(row)!r}, expected a round from 1, "
                f"a client from 0 to {num_clients - 1}, and a reason."
            )
        absent.setdefault(int(number), {})[int(client)] = row[2].strip() or "no reason given"
    return absent


def _rows(rows: Any, path: Path) -> Iterator[list[str]]:
    """What a `csv.reader` reads, with its errors as those of the file."""
    try:
        yield from rows
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}.") from None


def absent_clients(
    config: FailureConfig,
    trace: Mapping[int, Mapping[int, str]],
    chosen: Bool[np.ndarray, "clients"],
    *,
    seed: int,
    round_index: int,
) -> dict[int, str]:
    """Who of a round's clients sends nothing, and why; drawn from (seed, round, client).

    Args:
      config: see `FailureConfig`.
      trace: from `read_trace`.
      chosen: bool `[clients]`, who takes part.
      seed: of the run.
      round_index: from 0.
    """
    absent: dict[int, str] = {}
    traced = trace.get(round_index + 1, {})
    if not (traced or config.dropout or config.deadline):
        return absent
    for client in np.flatnonzero(chosen).tolist():
        rng = np.random.default_rng((seed, round_index, client, 0xFA11))
        gone, slow = rng.random(), float(np.exp(config.slowness * rng.standard_normal()))
        if client in traced:
            absent[client] = f"absent by the trace: {traced[client]}"
        elif gone < config.dropout:
            absent[client] = "dropped out"
        elif config.deadline and slow > config.deadline:
            absent[client] = (
                f"too late: {slow:.2f} typical times, the deadline is {config.deadline:g}"
            )
    return absent


def without_quorum(slots: Slots, quorum: int) -> Bool[np.ndarray, "slots"]:
    """Slots that sent something for a task of which too few did: bool `[slots]`."""
    there = np.asarray(slots.weight) > 0
    task = np.asarray(slots.task)
    count = np.bincount(task[there], minlength=slots.num_tasks)
    return there & (count < quorum)[task]
