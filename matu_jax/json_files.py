"""JSON that anybody may have written: read without surprises, and checked against a schema.

A schema is a type that pydantic knows, most often a `pydantic.BaseModel`; what a field may be
stands in its annotation, such as `Annotated[int, Field(ge=1)]`.

Also what other files of a run are read and written with.
"""

import errno
import json
import math
import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


_DEEPEST = 100  # lists and objects in each other: real files have a handful, and walks may recurse


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
      ValueError: says why, without naming where the text is from, if it is no UTF-8 or no JSON,
        is nested more than 100 deep, or holds half a surrogate pair, which cannot be printed.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"nested more than {_DEEPEST} deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    level, depth = [value], 0
    while level:
        inner = []
        for item in level:
            if isinstance(item, dict):
                inner += [*item, *item.values()]
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str) and not item.isascii():
                try:
                    item.encode()
                except UnicodeEncodeError:
                    raise ValueError(f"{reprlib.repr(item)} holds half a surrogate pair") from None
        level, depth = inner, depth + 1
        if depth > _DEEPEST + 1:
            raise ValueError(f"nested more than {_DEEPEST} deep")
    return value


def regular_file(path: Path) -> Path:
    """The path itself, unless a pipe, a socket or a device is there, which might never end.

    Raises:
      OSError: if so. What is missing, or a directory, is left to who opens it.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def replace_file(path: Path, contents: bytes) -> None:
    """Writes a file such that a reader, or a run after a crash, finds the old one or the new.

    A link is replaced, and not what it leads to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


_UNFINISHED = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.tmp")


def is_unfinished(path: Path) -> bool:
    """Whether a path is called as what `replace_file` leaves behind if its process is killed."""
    return _UNFINISHED.fullmatch(path.name) is not None


def remove_unfinished(folder: Path, name: str = "") -> None:
    """Removes what `replace_file` left in a folder when its process was killed.

    What belongs to a process that is at work on this machine stays.

    Args:
      folder: need not be there.
      name: of the one file to look for; "" = of all.

    Raises:
      OSError: if it cannot be removed.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _UNFINISHED.fullmatch(path.name)
        if not match or name not in ("", match["name"]) or path.is_dir():
            continue
        try:
            os.kill(int(match["process"]), 0)
        except (ProcessLookupError, OverflowError):
            path.unlink(missing_ok=True)
        except PermissionError:  # another user's, and at work
            pass


def read_json(path: Path) -> Any:
    """What a JSON file says.

    Raises:
      OSError: if it cannot be read; a pipe or a device is no file either.
      ValueError: names the file, and says why its contents are none; see `parse_json`.
    """
    try:
        return parse_json(regular_file(path).read_bytes())
    except ValueError as error:  # of the text, or of the path itself, such as a NUL in it
        raise ValueError(f"{path}: damaged: {error}") from None


def check_readable(path: Path) -> None:
    """Checks that a file can be read, for libraries that say of every error that it is missing.

    Raises:
      OSError: says why not; a pipe, at which a reader would wait for ever, or a device is no file.
    """
    with regular_file(path).open("rb"):
        pass


def name_inside(name: str) -> str:
    """A file's name that others have written, which has to be of a file inside its folder.

    What is there under the name may be a link that leads out, as in Hugging Face's cache.

    Raises:
      ValueError: for one that leads out of the folder, or cannot be printed.
    """
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or not name.isprintable():
        raise ValueError("expected the name of a file in the same folder")
    return name


def is_own(file: Path) -> bool:
    """Whether a file lies in its folder, all links followed.

    In Hugging Face's cache, files of `snapshots/REVISION` are links to the `blobs` beside
    `snapshots`, which are the folder's own.
    """
    folder, real = file.parent.resolve(), file.resolve()
    blobs = folder.parent.parent / "blobs"
    cached = folder.parent.name == "snapshots" and real.parent == blobs
    return cached or real.is_relative_to(folder)


def checked(schema: type[T], value: Any, where: str) -> T:
    """Checks a value against a schema; keys that the schema does not know do not matter.

    Args:
      schema: a type that pydantic knows; types must be met exactly, but for an int as a float.
      value: what JSON has given.
      where: what to call it in the error.

    Returns:
      The value, with defaults of the schema filled in.

    Raises:
      ValueError: lists every field that is wrong: what was found, and what was expected.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(schema).validate_python(value, strict=True)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False, include_context=False):
            field = ".".join(map(str, problem["loc"])) or "value"
            if problem["type"] == "missing":
                lines.append(f"  {field}: missing")
                continue
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"  {field}: found {reprlib.repr(problem['input'])}: {message}")
        more = [f"  and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise ValueError("\n".join([f"{where}:", *lines[:10], *more])) from None


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


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `plain(value)` to a JSON file, atomically.

    Raises:
      ValueError: names the place of anything that JSON cannot hold; the file stays as it was.
    """
    path = Path(path)
    text = json.dumps(plain(value, path.name), indent=2, allow_nan=False, ensure_ascii=False)
    replace_file(path, (text + "\n").encode())
