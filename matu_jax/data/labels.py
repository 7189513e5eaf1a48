"""Labels of a table: numbers to predict, or names of classes, and what is odd about them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal

import numpy as np

from matu_jax.data.class_names import readable
from matu_jax.data.table import Row

_LARGEST = float(np.finfo(np.float32).max)
_SHOWN = 20


def is_number(text: str) -> bool:
    """Whether a text is a number that float32 holds: neither `nan` nor `inf`."""
    try:
        return abs(float(text)) <= _LARGEST and "_" not in text  # which Python takes between digits
    except ValueError:
        return False


def are_numbers(rows: Sequence[Row], name: str) -> bool:
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
    first: dict[str, dict[str, Row]] = {}  # by task and label
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


def classes_of(rows: Sequence[Row], name: str) -> list[str]:
    """A task's classes in order: by value if all are whole numbers, else by the alphabet.

    Args:
        rows: Its examples.
        name: What messages call the whole.

    Raises:
        ValueError: If there is one class alone, most are numbers that are not whole, or, of
            features, they are words of which there are more than half as many as examples.
    """
    names = sorted({row.label for row in rows})
    where = f"{name}: task {rows[0].task!r}"
    if len(names) < 2:
        raise ValueError(f"{where}: found one class, {names[0]!r}, expected 2 or more.")
    broken = [label for label in names if is_number(label) and not float(label).is_integer()]
    if 2 * len(broken) > len(names):
        raise ValueError(
            f"{where}: found {len(broken)} labels that are numbers and not whole, such as "
            f"{broken[0]!r}, expected names of classes, which is what images are labelled with "
            "here. To predict numbers make tasks of your own, see matu_jax.data.SOURCES."
        )
    words = not any(map(is_number, names))
    if words and rows[0].path is None and len(rows) >= _SHOWN and 2 * len(names) > len(rows):
        raise ValueError(
            f"{where}: found {len(names)} different labels in {len(rows)} rows, such as "
            f"{rows[0].label!r} ({rows[0].where}), expected classes of several rows each, or "
            "numbers, which are written as 5.43."
        )
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def untrained_classes(train: Sequence[Row], others: Sequence[Row], name: str) -> Iterator[str]:
    """Notes of classes that drawn splits measure a task on and do not train it on.

    Args:
        train: The task's examples to train on.
        others: Those to validate and to test on.
        name: What messages call the whole.

    Raises:
        ValueError: If one of these has its split given.
    """
    known = sorted({row.label for row in train})
    lacking: dict[str, Row] = {}
    for row in others:
        if row.label not in known:
            lacking.setdefault(row.label, row)
            if len(row.splits) == 1:
                raise ValueError(
                    f"{name}, {row.where}: task {row.task!r}: found the class {row.label!r} in "
                    f"{row.splits[0]}, which train lacks; it has {listed(known)}. Give train some, "
                    "leave these out, or mend the spelling."
                )
    if lacking:
        yield (
            "warning: classes that train lacks, by the draw: "
            f"{listed([f'{label!r} ({row.where})' for label, row in lacking.items()], 5)}"
        )


def notes_of_numbers(rows: Sequence[Row]) -> tuple[str, ...]:
    """What people should know of a task whose labels are numbers."""
    numbers = sorted({float(row.label) for row in rows})
    note = f"a regression of `label`, from {numbers[0]:g} to {numbers[-1]:g}"
    if len(numbers) <= _SHOWN // 2 and all(number.is_integer() for number in numbers):
        note += f" (names in place of numbers, such as 'class {numbers[0]:g}', would be classes)"
    return (note,)


def notes_of_classes(rows: Sequence[Row], classes: Sequence[str]) -> tuple[str, ...]:
    """What people should know of a task's classes: which there are, and what may be misspelled.

    Args:
        rows: The task's examples.
        classes: By label.
    """
    numbered = [f"{label} = {name}" for label, name in enumerate(classes)]
    return (f"classes: {listed(numbered)}", *alike(classes, "classes"), *_rare(rows))


def listed(words: Sequence[str], shown: int = _SHOWN) -> str:
    """The first words with commas between, and how many more there are."""
    more = f" and {len(words) - shown} more" if len(words) > shown else ""
    return ", ".join(words[:shown]) + more


def alike(names: Sequence[str], what: str) -> Iterator[str]:
    """Warnings of different names that may be one, spelled in two ways.

    Args:
        names: Such as those of classes, each once.
        what: What they are the names of, such as "classes".
    """
    letters: dict[str, list[str]] = {}
    numbers: dict[Decimal, list[str]] = {}
    for name in names:
        letters.setdefault("".join(name.casefold().split()), []).append(name)
        if is_number(name):
            numbers.setdefault(Decimal(name), []).append(name)
    for spelled, how in (
        (letters, "differ only in case and spaces"),
        (numbers, "are equal as numbers"),
    ):
        for same in spelled.values():
            if len(same) > 1:
                yield (
                    f"warning: {' and '.join(map(repr, same))} are {len(same)} {what} that {how}; "
                    "spell them alike if they are one"
                )


def _rare(rows: Sequence[Row]) -> Iterator[str]:
    counts = Counter(row.label for row in rows)
    first = {row.label: row.where for row in reversed(rows)}
    rare = [f"{name!r} ({n}, {first[name]})" for name, n in sorted(counts.items()) if n <= 2]
    if rare:
        yield f"warning: classes with one or two examples, if not misspelled: {listed(rare, 5)}"


def readable_names(rows: Sequence[Row], classes: Sequence[str], name: str) -> tuple[str, ...]:
    """Names of classes as people and text encoders read them.

    Raises:
        ValueError: If two read alike, with an example of each.
    """
    first: dict[str, str] = {}
    for label in classes:
        other = first.setdefault(readable(label), label)
        if other != label:
            one, two = (next(row for row in rows if row.label == each) for each in (other, label))
            raise ValueError(
                f"{name}: task {one.task!r}: the classes {other!r} ({one.where}) and {label!r} "
                f"({two.where}) both read as {readable(label)!r}; spell them alike if they are "
                "one, else rename one"
            )
    return tuple(first)
