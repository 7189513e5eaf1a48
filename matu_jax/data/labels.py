"""Labels of a table: numbers to predict, or names of classes."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

_LARGEST = float(np.finfo(np.float32).max)


class _Labelled(Protocol):
    """What is read of a `matu_jax.data.rows.Row`."""

    @property
    def where(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def label(self) -> str: ...


def is_number(text: str) -> bool:
    """Whether a text is a number that float32 holds: neither `nan` nor `inf`."""
    try:
        return abs(float(text)) <= _LARGEST and "_" not in text  # which Python takes between digits
    except ValueError:
        return False


def are_numbers(rows: Sequence[_Labelled], name: str) -> bool:
    """Whether labels are numbers to predict, in all tasks alike; else they are names of classes.

    Args:
        rows: Examples with features, of one or more tasks.
        name: What messages call the whole.

    Raises:
        ValueError: If most of a task's different labels are numbers, and one is not; or if the
            labels of one task are numbers, not all of them whole, and those of another are not.
    """
    words = [row for row in rows if not is_number(row.label)]
    if not words:
        return True
    first: dict[str, dict[str, _Labelled]] = {}  # by task and label
    for row in rows:
        first.setdefault(row.task, {}).setdefault(row.label, row)
    for task, labels in first.items():
        numbers = [label for label in labels if is_number(label)]
        strange = [row for label, row in labels.items() if label not in numbers]
        if strange and 2 * len(numbers) > len(labels):
            raise ValueError(
                f"{name}, {strange[0].where}: `label`: found {strange[0].label!r}, no finite "
                f"number, while {len(numbers)} of the {len(labels)} different labels of task "
                f"{task!r} are. To predict numbers put one there, or leave the row out; to predict "
                f"classes call none by a number alone: 'class {numbers[0]}' in place of "
                f"{numbers[0]!r}."
            )
        broken = [label for label in numbers if not float(label).is_integer()]
        if broken and not strange:
            row = labels[broken[0]]
            raise ValueError(
                f"{name}, {row.where}: task {task!r} is labelled with numbers, such as "
                f"{row.label!r}, and task {words[0].task!r} with words, such as "
                f"{words[0].label!r} ({words[0].where}). A run predicts either numbers or classes: "
                "choose tasks of one kind by config.data.tasks."
            )
    return False


def classes_of(labels: Sequence[str]) -> list[str]:
    """The different labels in order: by value if all are whole numbers, else by the alphabet."""
    names = sorted(set(labels))
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names
