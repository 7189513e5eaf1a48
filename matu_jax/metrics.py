"""What a run writes for people and programs: metrics.jsonl, summary.json, and the AUC in them."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def relatedness_auc(similarity: Any, related: Any) -> float | None:
    """How well similarity tells related from unrelated pairs of tasks: 1 fully, 1/2 by chance.

    The probability that a related pair, drawn at random, has a higher similarity than an unrelated
    one; ties count one half (the area under the ROC curve; Mann and Whitney 1947). Pairs are
    unordered and of two different tasks.

    Args:
      similarity: symmetric, finite off the diagonal, `[tasks, tasks]`.
      related: symmetric, bool `[tasks, tasks]`; the diagonal does not matter.

    Returns:
      A number in [0, 1], or None where there is no related or no unrelated pair.

    Raises:
      ValueError: if shapes differ, or an array is not symmetric, or a similarity is not finite.
    """
    similarity, related = np.asarray(similarity, np.float64), np.asarray(related)
    if (
        similarity.ndim != 2
        or not len(similarity) == similarity.shape[1]
        or (related.shape != similarity.shape)
    ):
        raise ValueError(
            f"relatedness_auc: found similarity {similarity.shape} and related {related.shape}; "
            "expected two matrices [tasks, tasks]."
        )
    if related.dtype != np.bool_:
        raise ValueError(f"relatedness_auc: related is {related.dtype}; expected bool.")
    pairs = np.triu_indices(len(similarity), k=1)
    score, label = similarity[pairs], related[pairs]
    if not np.isfinite(score).all():
        first, second = (int(axis[~np.isfinite(score)][0]) for axis in pairs)
        raise ValueError(
            f"relatedness_auc: the similarity of tasks {first} and {second} is "
            f"{similarity[first, second]}; expected finite numbers."
        )
    if not (np.allclose(score, similarity.T[pairs]) and (label == related.T[pairs]).all()):
        raise ValueError(
            "relatedness_auc: found a matrix that is not symmetric; pairs have no order, so make "
            "it symmetric first, for instance (a + a.T) / 2."
        )
    if label.all() or not label.any():
        return None
    difference = score[label][:, None] - score[~label][None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def plain(value: Any, where: str = "value") -> Any:
    """Turns a value into what JSON knows; NaN and infinities, which it does not, become None.

    Args:
      value: nested mappings, lists and tuples of None, bool, numbers, strings, paths, and numpy or
        JAX arrays and scalars.
      where: what to call the value in the error.

    Returns:
      The same in dicts, lists, str, int, float, bool and None.

    Raises:
      ValueError: names the place of anything else.
    """
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.dtype != np.object_:
            return plain(array.tolist(), where)
    raise ValueError(
        f"{where}: found {type(value).__name__}, which has no place in JSON; expected numbers, "
        "strings, arrays, and lists and mappings of them (a dataclass: dataclasses.asdict)."
    )


def _replace(path: Path, text: str) -> None:
    """Writes a file such that a reader, or a run after a crash, finds the old one or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `plain(value)` to a JSON file, atomically.

    Raises:
      ValueError: names the place of anything that JSON cannot hold; the file stays as it was.
    """
    path = Path(path)
    text = json.dumps(plain(value, path.name), indent=2, allow_nan=False, ensure_ascii=False)
    _replace(path, text + "\n")


class MetricsLog:
    """An append-only file of JSON objects, one a line and round; on disk when `append` returns.

    Records carry their round, 1-based, under "round". A line without its newline is one that was
    being written when the run was killed: it is no record yet.

    Attributes:
      path: the file; it need not exist yet, its folder must.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

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
        line = json.dumps(values, allow_nan=False, ensure_ascii=False) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """All complete records, in order; none if the file does not exist.

        Raises:
          ValueError: names a complete line that is not a record.
        """
        return [json.loads(line) for line in self._lines()]

    def truncate_after(self, round_index: int) -> None:
        """Drops the records of later rounds and a half-written last line, atomically.

        To be called before a run is resumed from the checkpoint of `round_index`, or with 0 where
        it starts afresh.

        Raises:
          ValueError: names a complete line that is not a record; the file stays as it was.
        """
        if self.path.exists():
            kept = [line for line in self._lines() if json.loads(line)["round"] <= round_index]
            _replace(self.path, "".join(kept))

    def _lines(self) -> list[str]:
        """The file's complete lines, each one found to be a record."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().decode("utf-8", errors="replace").split("\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                valid = isinstance(json.loads(line)["round"], int)
            except (ValueError, KeyError, TypeError):
                valid = False
            if not valid:
                raise ValueError(
                    f"{self.path}, line {number}: found {line[:60]!r}, which is no JSON object "
                    'with a "round". Remove that line, or move the file away.'
                )
        return [line + "\n" for line in lines]
