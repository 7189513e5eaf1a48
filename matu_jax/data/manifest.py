"""A table of examples, a CSV file with a header, whose rows say whose they are.

| column | |
|---|---|
| `label` | a class name; or, beside features and where all labels are, a finite number to predict |
| `path` | an image, relative to the file's folder; or else |
| any other column | a feature, a number |
| `task` | optional; without it the file's name |
| `site` | optional; without it examples are dealt out at random |
| `split` | optional: train, validation (or val, valid), test; where it is empty, drawn |
| `group` | optional, such as a patient, who is in one split alone; empty = the row's own |

UTF-8; names that differ only in their Unicode normalisation (NFC or NFD) are one. Paths may lead
out of the folder.

Splits that are not given are drawn, by hashes of `config.data.seed` and the row's group, else its
image's path or its features: in whatever order rows stand, and whatever other rows there are, a row
has the same split as far as the shares of its task at its site allow. Of a task with rows for
training and for testing, but none for validation, a part of train is validated on. A group is in
one split in all tasks, and so is an image, and what they join by way of each other; a table that
gives them two is refused. Rows with the same features (as float32) are drawn into one split too.
Where the table gives them two, and where two files show the same pixels, the later split keeps them
(test, else validation), and the run's notes count what the others lose.
"""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from matu_jax.data import SPLITS, selection
from matu_jax.data.labels import is_number, listed
from matu_jax.data.selection import SPLITS as SPLIT_NAMES
from matu_jax.data.table import Row, Table, allowed, check_groups, in_float32
from matu_jax.errors import did_you_mean
from matu_jax.json_files import regular_file

COLUMNS = ("path", "label", "site", "task", "split", "group")
"""What is no feature."""

_NAMELESS = re.compile(r"(Unnamed: \d+)?")
"""A column without a name, as it is and as pandas writes it the next time."""

_SOMEBODY = re.compile(
    r"(?i:patient|subject|participant|person|individual|group|hospital|clinic|institut)"
    r"|(?i:^|[^a-z])(?i:ids?)$|(?<=[a-z])I[dD]s?$"
)
"""In the name of a column that may say of whom, or whose, an example is."""


def read(file: str | os.PathLike[str]) -> Table:
    """Reads a manifest.

    Raises:
        ValueError: With file and line, for what is missing, twice, or no number, and for a group in
            two splits.
    """
    path = Path(file)
    try:
        with regular_file(path).open(encoding="utf-8-sig", newline="") as stream:
            _check_commas(stream.readline(), path)
            stream.seek(0)
            table = csv.reader(stream, strict=True)
            header = [selection.composed(name.strip()) for name in next(table, [])]
            features = _check_header(header, path)
            rows = [
                _row(dict(zip(header, values, strict=True)), features, path, table.line_num)
                for values in _lines(table, header, path)
            ]
    except OSError as error:
        raise ValueError(f"config.data.manifest: {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no UTF-8 ({error.reason}). Save it as UTF-8.") from None
    except csv.Error as error:
        raise ValueError(f"{path}: is no CSV: {error}.") from None
    if not rows:
        raise ValueError(f"{path}: found a header and no row, expected one per example.")
    _check_once(rows, path)
    check_groups(rows, str(path))
    rows = _with_validation(rows)
    notes = tuple(_notes(features, [row.features for row in rows])) if features else ()
    return Table(str(path), rows, dict.fromkeys((row.task for row in rows), notes))


def _with_validation(rows: list[Row]) -> list[Row]:
    """Rows with the splits that their groups leave them.

    Of tasks that have no example to validate on, those to train on may be in either split.
    """
    open_to = allowed(rows)
    validated = {
        row.task for row, splits in zip(rows, open_to, strict=True) if "validation" in splits
    }
    return [
        row._replace(
            splits=SPLITS[:2] if row.task not in validated and splits == SPLITS[:1] else splits
        )
        for row, splits in zip(rows, open_to, strict=True)
    ]


def _check_commas(line: str, path: Path) -> None:
    """Checks that columns are not separated otherwise, as far as the first line tells."""

    def words(mark: str) -> list[str]:
        return [word.strip().strip('"') for word in line.split(mark)]

    for mark, called in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if "label" in words(mark) and mark in line and "label" not in words(","):
            raise ValueError(
                f"{path}, line 1: found columns that {called} separate, expected commas. Save the "
                "table as CSV with commas, and with points in numbers."
            )


def _check_header(header: list[str], path: Path) -> list[str]:
    """The names of the features."""
    where = f"{path}, line 1"
    features = [name for name in header if name not in COLUMNS]
    if not any(header):
        raise ValueError(f"{where}: found no header, expected names of columns such as path,label.")
    if nameless := [at for at, name in enumerate(header, 1) if _NAMELESS.fullmatch(name)]:
        index = (
            " The first is pandas' index, if `to_csv` wrote it: write with index=False."
            if nameless[0] == 1
            else ""
        )
        raise ValueError(
            f"{where}: found no name of column {listed([*map(str, nameless)])}, expected one each. "
            f"Give it a name, or leave the column out.{index}"
        )
    for name in header:
        if header.count(name) > 1:
            raise ValueError(f"{where}: found the column {name!r} {header.count(name)} times.")
    if "label" not in header:
        hint = did_you_mean("label", header) if len(header) > 1 else ""
        raise ValueError(f"{where}: found {listed(header)}, but no column `label`.{hint}")
    for name in features:
        if name.casefold() in COLUMNS:
            raise ValueError(
                f"{where}: found the column {name!r}, which would be a feature; spell it "
                f"`{name.casefold()}`, or otherwise."
            )
    if "path" in header and features:
        raise ValueError(
            f"{where}: found `path` and {listed(features)}, expected a column `path` of images, or "
            "columns of features, and not both. A column that says whose an image is, is called "
            "`site`; one that says of whom or what it is, `group`. Leave other columns out."
        )
    if "path" not in header and not features:
        raise ValueError(
            f"{where}: found {listed(header)}, expected a column `path` of images too, or columns "
            f"of features (all but {', '.join(COLUMNS)})."
        )
    return features


def _notes(features: list[str], numbers: Sequence[tuple[float, ...]]) -> Iterator[str]:
    """What people should know of the columns of features."""
    yield f"features, in the order of x: {listed(features)}"
    for name, column in zip(features, zip(*numbers, strict=True), strict=True):
        repeats = len({*column}) < len(column) and all(map(float.is_integer, column))
        if repeats and _SOMEBODY.search(name):
            yield (
                f"warning: the column {name!r}, whole numbers that repeat, is a feature; if it "
                "says whom an example is of, rename it to `group`: nobody is in two splits then; "
                "if it says whose an example is, rename it to `site`"
            )


def _lines(table, header: list[str], path: Path) -> Iterator[list[str]]:
    for values in table:
        if not any(value.strip() for value in values):
            continue
        if len(values) != len(header):
            raise ValueError(
                f"{path}, line {table.line_num}: found {len(values)} values, expected "
                f"{len(header)}, one per column."
            )
        yield [value.strip() for value in values]


def _row(values: dict[str, str], features: list[str], path: Path, line: int) -> Row:
    where = f"{path}, line {line}"
    for name in ("label", "path", "site", "task"):
        if values.get(name) == "":
            raise ValueError(f"{where}: `{name}` is empty; give it, or leave the row out.")
    split = values.get("split", "").lower()
    if split and split not in SPLIT_NAMES:
        raise ValueError(
            f"{where}: split: found {split!r}, expected one of {', '.join(SPLIT_NAMES)}, or "
            "nothing to have it drawn."
        )
    image = path.parent / values["path"] if "path" in values else None
    values = {name: selection.composed(value) for name, value in values.items()}
    numbers = tuple(_number(values[name], where, name) for name in features)
    splits = (SPLIT_NAMES[split],) if split else SPLITS
    groups = [f"group {values['group']!r}"] if values.get("group") else []
    if image:
        groups.append(f"image {os.path.relpath(image, path.parent)}")
    elif "train" in splits:
        groups.append(f"features {in_float32(numbers).tolist()}")
    return Row(
        f"line {line}",
        values.get("task", selection.composed(path.stem)),
        values.get("site", ""),
        values["label"],
        splits,
        tuple(groups),
        image,
        numbers,
    )


def _number(text: str, where: str, name: str) -> float:
    if not is_number(text):
        raise ValueError(
            f"{where}: `{name}`: found {text!r}, expected a finite number (of float32). Leave the "
            "row out, or put a number there; a column that is no feature has to go, or be called "
            "as what it is: `site` if it says whose an example is (such as a hospital), `group` if "
            "it says of whom (such as a patient), or `task`."
        )
    return float(text)


def _check_once(rows: list[Row], path: Path) -> None:
    seen: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.path is None:
            return
        first = seen.setdefault((row.task, os.path.normpath(row.path)), row)
        if first is not row:
            raise ValueError(
                f"{path}, {row.where}: {row.path} stands in {first.where} of the task already. "
                "Remove one of the rows."
            )
