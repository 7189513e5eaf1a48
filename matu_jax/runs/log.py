"""What a run writes for programs: metrics.jsonl, its records, and summary.json."""

import functools
import hashlib
import json
import math
import os
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, Field, create_model

from matu_jax.json_files import checked, parse_json, plain, read_json, regular_file, replace_file
from matu_jax.simulation.measures import ACCURACY, measure_of

_Finite = Annotated[float, Field(allow_inf_nan=False)]


_Fraction = Annotated[_Finite, Field(ge=0, le=1)]


_Count = Annotated[int, Field(ge=0)]


_Size = Annotated[_Finite, Field(ge=0)]


def selection(record: Mapping[str, Any]) -> str:
    """By what rule `selected` has chosen a record, in words."""
    measure = measure_of(record)
    if _rank(record) == -math.inf:
        return f"the last round measured, since none has a finite mean validation {measure.name}"
    return f"the round with the best mean validation {measure.name}, the first of equals"


def selected(records: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The record of the round that a run's results and exports speak of, see `selection`.

    Args:
      records: a run's; by the name of their measure {"validation_mean", ...}, or None if nothing
        was measured.

    Returns:
      One of them; None where none was measured.
    """
    measured = [record for record in records if measured_in(record)]
    best = max(measured, key=_rank, default=None)
    return best if best is None or _rank(best) > -math.inf else measured[-1]


def measured_in(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a record holds under the name of its measure; None if nothing was measured."""
    return record[measure_of(record).name]


def _rank(record: Mapping[str, Any]) -> float:
    return measure_of(record).rank((measured_in(record) or {})["validation_mean"])


_N = TypeVar("_N")


class _Measured(BaseModel, Generic[_N]):
    validation_mean: _N | None
    test_mean: _N | None
    test_per_task: dict[str, _N | None]
    test_per_slot: list[_N | None]


class MeasureSchema(BaseModel):
    """A `Measure` as JSON has kept it."""

    name: str
    higher_is_better: bool
    percent: bool


class _Named(BaseModel):
    """What says which of its fields holds what was measured; older versions lack it."""

    measure: MeasureSchema | None = None


class _Record(BaseModel):
    """What a summary, a picture or a comparison needs of a round."""

    round: int
    loss: _Finite | None
    similarity_auc: _Fraction | None
    clients: list[_Count]
    aggregated: bool
    uplink_bits: _Count
    downlink_bits: _Count
    uplink_frame_bits: _Count = 0  # older versions lack them
    downlink_frame_bits: _Count = 0
    seconds: dict[str, _Size]


class _Results(BaseModel, Generic[_N]):
    mean: _N | None
    validation_mean: _N | None
    per_task: dict[str, _N | None]
    per_site: dict[str, _N | None] = {}  # where data belongs to sites


class _Traffic(BaseModel):
    uplink_bits_per_client_round: _Size
    downlink_bits_per_client_round: _Size


class _Seconds(BaseModel):
    total: _Size


class _Kept(BaseModel):
    kept_bytes: _Count
    kept_per_client: bool


class _Similarity(BaseModel):
    auc: _Fraction | None
    auc_first_round: _Fraction | None
    auc_last_round: _Fraction | None
    matrix: list[list[_Finite]]


class _Data(BaseModel):
    clients: _Count


class _Config(BaseModel):
    data: _Data


class _Summary(BaseModel):
    """What tables and comparisons need of summary.json."""

    algorithm: str
    seed: int
    rounds: Annotated[int, Field(ge=1)]
    selected_round: _Count
    communication: _Traffic
    seconds: _Seconds
    similarity: _Similarity | None
    label_spaces: list[str]
    chance: dict[str, _Finite] | None = None  # older versions lack it, and what follows
    metrics: str | None = None
    config: _Config
    server: _Kept


def read_summary(path: Path) -> dict[str, Any]:
    """Reads a run's summary.json.

    Raises:
      ValueError: names the file, and what is damaged or missing in it, or why it cannot be read.
    """
    try:
        summary = read_json(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    kinds = _Results[_Fraction], _Results[_Finite]
    _check(_Summary, kinds, summary, f"{path}: damaged")
    return summary


def _check(schema: type[BaseModel], kinds: tuple[Any, Any], found: Any, where: str) -> None:
    """Checks a record or a summary, and in it what is held under the name of its measure.

    Args:
      schema: of the rest.
      kinds: of what is held there: parts of 1, as accuracy is, or any numbers.
      found: the record or summary.
      where: what to call it in errors.
    """
    checked(_Named, found, where)
    measure = measure_of(found)
    checked(_with(schema, measure.name, kinds[measure != ACCURACY]), found, where)


@functools.cache
def _with(schema: type[BaseModel], name: str, kind: Any) -> type[BaseModel]:
    """A schema with one field more."""
    measured: Any = (kind, Field(alias=name))
    return create_model(schema.__name__, __base__=schema, measured=measured)


class MetricsLog:
    """An append-only file of JSON objects, one a line and round; on disk when `append` returns.

    Records carry their round, 1-based, under "round". A line without its newline is one that was
    being written when the run was killed: it is no record yet.

    Attributes:
      path: the file; it need not exist yet, its folder must.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path: Path = Path(path)
        self._written = hashlib.sha256()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what `truncate_after` has kept and `append` has added since."""
        return self._written.hexdigest()

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a record, converted by `plain`.

        Raises:
          ValueError: if the record has no integer under "round", or names what JSON cannot hold.
        """
        values = plain(record, self.path.name)
        if type(values.get("round")) is not int:
            raise ValueError(
                f'{self.path.name}: found {values.get("round")!r} under "round"; expected the '
                "number of the round, from 1."
            )
        line = (json.dumps(values, allow_nan=False, ensure_ascii=False) + "\n").encode()
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._written.update(line)

    def records(self) -> list[dict[str, Any]]:
        """All complete records, in order; none if the file does not exist.

        Raises:
          ValueError: names a complete line that is not a record.
        """
        return [self._record(number, line) for number, line in enumerate(self._lines(), start=1)]

    def first(self, count: int) -> list[dict[str, Any]]:
        """The records of rounds 1 to `count`, each there once, in order and with every field.

        Raises:
          ValueError: says which round or which field is missing, damaged or there twice, and how
            many rounds the file has up to there.
        """
        lines = self._lines()
        records = []
        for number in range(1, count + 1):
            if number > len(lines):
                raise ValueError(f"{self.path}: found {_said(number - 1)}, expected {_said(count)}")
            record = self._record(number, lines[number - 1])
            if record["round"] != number:
                raise ValueError(
                    f"{self.path}, line {number}: found round {record['round']}, expected round "
                    f"{number}: each round from 1 to {count} once, in order"
                )
            kinds = _Measured[_Fraction] | None, _Measured[_Finite] | None
            _check(_Record, kinds, record, f"{self.path}, line {number}")
            records.append(record)
        return records

    def check(self, count: int, fingerprint: str | None) -> None:
        """Checks that the file begins with rounds 1 to `count`, as they were written.

        Args:
          count: how many rounds.
          fingerprint: what it was after these rounds; None = not known, as in older versions.

        Raises:
          ValueError: as `first`, or if a line has changed since.
        """
        self.first(count)
        found = hashlib.sha256(b"".join(self._lines()[:count])).hexdigest()
        if fingerprint not in (None, found):
            raise ValueError(f"{self.path}: a line of rounds 1 to {count} was changed later")

    def truncate_after(self, count: int, fingerprint: str | None = None) -> None:
        """Keeps the records of rounds 1 to `count`, and drops what follows, atomically.

        To be called before a run is resumed from the checkpoint of that round, or with 0 where it
        starts afresh.

        Raises:
          ValueError: as `check`; the file stays as it was.
        """
        self.check(count, fingerprint)
        kept = b"".join(self._lines()[:count])
        if self.path.exists():
            replace_file(self.path, kept)
        self._written = hashlib.sha256(kept)

    def _lines(self) -> list[bytes]:
        """The file's complete lines, each with its newline."""
        if not os.path.lexists(self.path):
            return []
        try:
            text = regular_file(self.path).read_bytes()
        except OSError as error:
            raise ValueError(f"{self.path}: {error.strerror}") from None
        return [line + b"\n" for line in text.split(b"\n")[:-1]]

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = parse_json(line)
            if type(record["round"]) is int:
                return record
        except (ValueError, KeyError, TypeError):
            pass
        raise ValueError(
            f"{self.path}, line {number}: found {reprlib.repr(line)}, which is no JSON object with "
            'a "round"'
        )


def _said(count: int) -> str:
    return f"rounds 1 to {count}" if count else "no round"
