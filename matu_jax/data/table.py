"""Examples with a site, a task and a group each, and how they are divided among splits.

`matu_jax.data.manifest` reads such rows from a file, `matu_jax.data.sites` from folders.
"""

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from matu_jax.data import SPLITS

TEST_FRACTION = 0.2
"""Of the examples whose split is not given, what is tested on."""

_Cell = tuple[str, str]  # a task, and a site


class Row(NamedTuple):
    """One example.

    Attributes:
        where: What messages call it, such as "line 7".
        task: Its task's name.
        site: Whose it is; "" = nobody's.
        label: A class name, or a number, as it is written.
        splits: Those that it may be in: one, where that is given.
        groups: What it belongs to that may not be divided among splits, such as a patient, and
            itself; rows that share one of them, with each other or by way of others, are in one.
            Splits are drawn by the first. Without any, its split is given.
        path: The image's; None for features.
        features: Numbers; () for an image.
    """

    where: str
    task: str
    site: str
    label: str
    splits: tuple[str, ...]
    groups: tuple[Hashable, ...]
    path: Path | None
    features: tuple[float, ...]


class Table(NamedTuple):
    """All examples of a manifest, or of folders of sites.

    Attributes:
        name: What messages call it: where it is.
        rows: In a fixed order.
        notes: By task, what people should know of how it was read.
    """

    name: str
    rows: Sequence[Row]
    notes: Mapping[str, tuple[str, ...]] = MappingProxyType({})


def in_float32(numbers: Sequence[float]) -> Float32[np.ndarray, "features"]:
    """Numbers as a model sees them; of the two zeros the positive one."""
    return np.array(numbers, np.float32) + np.float32(0)


def components(rows: Sequence[Row]) -> list[int]:
    """Which rows have to stay together: of each row, a number that those have in common."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[Hashable, int] = {}
    for i, row in enumerate(rows):
        for group in row.groups:
            parent[root(i)] = root(first.setdefault(group, i))
    return [root(i) for i in range(len(rows))]


def allowed(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The splits that each row may be in, with all that it has to stay together with."""
    groups = components(rows)
    common: dict[int, tuple[str, ...]] = {}
    for row, group in zip(rows, groups, strict=True):
        common[group] = tuple(split for split in common.get(group, SPLITS) if split in row.splits)
    return [common[group] for group in groups]


def shares(validation_fraction: float) -> dict[str, float]:
    """The part of examples without a split that each split should have."""
    held_out = {"validation": (1 - TEST_FRACTION) * validation_fraction, "test": TEST_FRACTION}
    return {"train": 1 - sum(held_out.values()), **held_out}


def divided(rows: Sequence[Row], validation_fraction: float, seed: int) -> list[str]:
    """The split of each row, drawn where none is given; all rows of a group have one.

    Groups take their turns in the order of hashes of the seed and their rows' first group, so that
    neither the order of rows matters nor, but for the number of examples that splits should have of
    each task at each site, what other rows there are.
    """
    open_to, cells = allowed(rows), [(row.task, row.site) for row in rows]
    quotas = _quotas(cells, open_to, shares(validation_fraction))
    groups: dict[int, list[int]] = {}
    for i, group in enumerate(components(rows)):
        groups.setdefault(group, []).append(i)
    left = Counter(cell for members in groups.values() for cell in {cells[i] for i in members})
    filled, chosen = Counter(), [""] * len(rows)

    def wants(split: str, members: Sequence[int]) -> bool:
        """Whether a split is short of so many examples, or would else have none."""
        held = Counter(cells[i] for i in members)
        empty = [cell for cell in held if quotas[cell, split] and not filled[cell, split]]
        if split == SPLITS[0]:
            return bool(empty)
        short = sum(quotas[cell, split] - filled[cell, split] - n / 2 for cell, n in held.items())
        return short > 0 or any(left[cell] <= empty_splits(cell) for cell in empty)

    def empty_splits(cell: _Cell) -> int:
        return sum(quotas[cell, split] > 0 and not filled[cell, split] for split in SPLITS)

    def turn(members: Sequence[int]) -> tuple[bool, str]:
        drawn = len(open_to[members[0]]) > 1
        return drawn, min(_hash(seed, rows[i].groups[0]) for i in members) if drawn else ""

    for members in sorted(groups.values(), key=turn):
        splits = open_to[members[0]]
        split = next((split for split in splits if wants(split, members)), splits[0])
        for i in members:
            chosen[i] = split
            filled[cells[i], split] += 1
        left.subtract({cells[i] for i in members})
    return chosen


def _quotas(
    cells: Sequence[_Cell], open_to: Sequence[tuple[str, ...]], share: Mapping[str, float]
) -> Counter[tuple[_Cell, str]]:
    """How many examples of each task at each site every split should have.

    Args:
        cells: Of each row its task and site.
        open_to: Of each row the splits that it may be in.
        share: Of each split, of examples that may be in any.
    """
    quotas = Counter()

    def least(cell: _Cell, splits: Sequence[str]) -> str:
        return min(splits, key=lambda split: quotas[cell, split] / share[split])

    for _, cell, splits in sorted((len(s), c, s) for c, s in zip(cells, open_to, strict=True)):
        quotas[cell, least(cell, splits)] += 1
    return quotas


def _hash(seed: int, group: Hashable) -> str:
    return hashlib.sha256(repr((seed, group)).encode()).hexdigest()


def check_groups(rows: Sequence[Row], name: str) -> None:
    """Checks that nothing that has to stay together is given two splits.

    Raises:
        ValueError: Otherwise, with two rows of it.
    """
    given: dict[int, Row] = {}
    for row, group in zip(rows, components(rows), strict=True):
        if row.splits == SPLITS:
            continue
        first = given.setdefault(group, row)
        if first.splits != row.splits:
            shared = [str(group) for group in row.groups if group in first.groups]
            how = f"of the same {shared[0]}" if shared else "of a group by way of other rows"
            raise ValueError(
                f"{name}, {row.where}: is in {row.splits[0]}, and {first.where}, {how}, in "
                f"{first.splits[0]}. Put a group into one split, in all tasks: who was trained on "
                "is not new in a test."
            )
