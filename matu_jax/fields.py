"""Choices as frozen dataclasses whose fields say what they may hold: checked, read and replaced.

A field is a bool, an int, a float, a str, one of the words of a `Literal`, a tuple, or a block: a
dataclass of the same kind. Whole numbers are taken for floats, and lists for tuples. A block may
have a method `conflicts(where)`, which yields what is wrong among fields that are right one by one.

All that is wrong with a block and the blocks in it is said in one message.
"""

import ast
import contextlib
import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeGuard, TypeVar

from matu_jax.errors import did_you_mean

B = TypeVar("B")

_BOUNDS = (
    ("at_least", lambda x, bound: x >= bound, "at least"),
    ("above", lambda x, bound: x > bound, "more than"),
    ("at_most", lambda x, bound: x <= bound, "at most"),
)


def field(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A dataclass field with a default and bounds; with any of them, it has to be finite."""
    bounds = {"at_least": at_least, "above": above, "at_most": at_most}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata=given)


def checked(block: B, where: str) -> B:
    """Checks every field of a block; returns it with floats and tuples where they belong.

    Args:
      block: as it was made, with whatever in its fields.
      where: its name, such as "config".

    Raises:
      ValueError: one message with all that is wrong.
    """
    return _built(type(block), block, where, _of_block)


def from_json(schema: type[B], found: Any, where: str) -> B:
    """A block as JSON has kept it: a mapping with all its fields, blocks within as mappings.

    Raises:
      ValueError: one message with every unknown field (with "did you mean"), missing field, wrong
        type and value out of range.
    """
    return _built(schema, found, where, _of_json)


def with_fields(block: B, fields: Mapping[str, Any], where: str) -> B:
    """A block with other values in some fields, of the right types and not checked otherwise.

    Args:
      block: stays as it is.
      fields: values by path, such as {"local.steps": 10}, or whole blocks, such as {"local":
        LocalConfig(steps=10)}.
      where: the block's name, such as "config".

    Raises:
      ValueError: one message with every unknown field (with "did you mean") and wrong type.
    """
    problems: list[str] = []
    for path, value in fields.items():
        try:
            name, holders, kind = _find(block, path, where)
            block = _replaced(holders, path, _fitted(kind, value, name, _shown(value)))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return block


def with_text(block: B, path: str, text: str, where: str) -> B:
    """A block with another value in one field, written as on a command line.

    Args:
      block: stays as it is.
      path: of the field, such as "local.steps".
      text: a number, a string, or a tuple such as (1, 2) or ("query", "value").
      where: the block's name, such as "config".

    Raises:
      ValueError: for an unknown field (with "did you mean"), or a value of the wrong type.
    """
    name, holders, kind = _find(block, path, where)
    value: Any = text
    if _plain(kind) is not str:
        # What is no literal stays a text, and is said to be of the wrong type.
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = ast.literal_eval(text)
    return _replaced(holders, path, _fitted(kind, value, name, repr(text)))


@functools.cache
def kinds(schema: type) -> dict[str, Any]:
    """The fields of a block, by name, and what each holds.

    Raises:
      TypeError: for a field that could be neither checked nor read.
    """
    hints = typing.get_type_hints(schema)
    found = {each.name: hints[each.name] for each in dataclasses.fields(schema)}
    for name, kind in found.items():
        if _plain(kind) not in (bool, int, float, str, tuple) and not _is_block(kind):
            raise TypeError(
                f"{schema.__name__}.{name}: found {kind}, expected bool, int, float, str, Literal, "
                "tuple or a dataclass."
            )
    return found


def _is_block(kind: Any) -> TypeGuard[type]:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _plain(kind: Any) -> Any:
    """A kind without its parameters: tuple for tuple[int, ...], str for Literal["a", "b"]."""
    origin = typing.get_origin(kind)
    return str if origin is Literal else origin or kind


def _built(schema: type[B], found: Any, where: str, values_of: Any) -> B:
    problems: list[str] = []
    built = _block(schema, found, where, values_of, problems)
    if problems:
        raise ValueError("\n".join(problems))
    return built


def _of_block(schema: type, found: Any) -> tuple[Any, str]:
    """The values in a block by name, None if it is another's; and what was expected."""
    values = None
    if type(found) is schema:  # a subclass's further fields could not be read again
        values = {name: getattr(found, name) for name in kinds(schema)}
    return values, f"{schema.__name__}(...)"


def _of_json(schema: type, found: Any) -> tuple[Any, str]:
    """The values in a mapping by name, None if it is none; and what was expected."""
    del schema
    return found if isinstance(found, Mapping) else None, "a block of fields"


def _block(schema: type, found: Any, where: str, values_of: Any, problems: list[str]) -> Any:
    """A block of checked values; None where something, which is added to problems, is wrong."""
    values, expected = values_of(schema, found)
    if values is None:
        problems.append(f"{where}: found {found!r}, expected {expected}.")
        return None
    before, right = len(problems), {}
    for name in values:
        if name not in kinds(schema):
            problems.append(f"{where}.{name}: no such field.{did_you_mean(name, kinds(schema))}")
    for each in dataclasses.fields(schema):
        name, kind, path = each.name, kinds(schema)[each.name], f"{where}.{each.name}"
        if name not in values:
            problems.append(f"{path}: missing.")
        elif _is_block(kind):
            right[name] = _block(kind, values[name], path, values_of, problems)
        else:
            try:
                right[name] = _fitted(kind, values[name], path, _shown(values[name]))
                problems += _out_of_range(each, kind, right[name], path)
            except ValueError as error:
                problems.append(str(error))
    if len(problems) > before:
        return None
    built = _of_values(schema, found, right)
    problems += getattr(built, "conflicts", lambda where: [])(where)
    return built


def _of_values(schema: type, found: Any, values: dict[str, Any]) -> Any:
    """What was found where it holds just these values, of these types; else another block."""

    def holds(name: str, value: Any) -> bool:
        own = getattr(found, name)
        return own is value or (type(own) is type(value) and own == value)

    if isinstance(found, schema) and all(holds(*item) for item in values.items()):
        return found
    return schema(**values)


def _out_of_range(each: dataclasses.Field, kind: Any, value: Any, where: str) -> list[str]:
    words = typing.get_args(kind) if typing.get_origin(kind) is Literal else (value,)
    problems = []
    if value not in words:
        problems.append(f"{where}: found {value!r}, an unknown choice.{did_you_mean(value, words)}")
    for bound, holds, said in _BOUNDS:
        limit = each.metadata.get(bound)
        if limit is not None and not (holds(value, limit) and value < float("inf")):
            problems.append(f"{where}: found {value}, expected {said} {limit}.")
    return problems


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _fitted(kind: Any, value: Any, where: str, shown: str) -> Any:
    """A value as its field holds it; ValueError if it is of another type."""
    if _is_block(kind):
        if type(value) is kind:
            return value
        names = ", ".join(sorted(kinds(kind)))
        raise ValueError(
            f"{where}: is a block of fields; set one of {names}, or give a {kind.__name__}(...)."
        )
    plain, value = _plain(kind), _tuples(value)
    if plain is float and type(value) is int and abs(value) < 2**1023:
        value = float(value)
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise ValueError(f"{where}: found {shown}, expected {plain.__name__}.")
    return value


def _find(block: Any, path: str, where: str) -> tuple[str, list[Any], Any]:
    """Where a field is: its full name, the blocks around it from the outermost, and its kind."""
    holders, kind = [block], type(block)
    for name in path.split("."):
        if not _is_block(kind):
            raise ValueError(f"{where}: is a value, not a block of fields; found {path!r}.")
        known = kinds(kind)
        if name not in known:
            raise ValueError(f"{where}.{name}: no such field.{did_you_mean(name, known)}")
        if not isinstance(holders[-1], kind):
            raise ValueError(f"{where}: found {holders[-1]!r}, expected {kind.__name__}(...).")
        where, kind = f"{where}.{name}", known[name]
        holders.append(getattr(holders[-1], name))
    return where, holders[:-1], kind


def _replaced(holders: list[Any], path: str, value: Any) -> Any:
    for holder, name in zip(reversed(holders), reversed(path.split(".")), strict=True):
        value = dataclasses.replace(holder, **{name: value})
    return value
