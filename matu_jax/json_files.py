"""JSON that anybody may have written: read without surprises, and checked against a schema.

A schema is a type that pydantic knows, most often a `pydantic.BaseModel`; what a field may be
stands in its annotation, such as `Annotated[int, Field(ge=1)]`.

Also what other files of a run are read and written with.
"""

import errno
import json
import os
import re
import reprlib
from pathlib import Path
from typing import Any, TypeVar

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


def is_unfinished(path: Path) -> bool:
    """Whether a path is called as what `replace_file` leaves behind if its process is killed."""
    return re.fullmatch(r"\..+\.\d+\.tmp", path.name) is not None


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
