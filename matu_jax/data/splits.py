"""Which split each example of a source goes to, and at which row it stands there."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from matu_jax.data.datasets import Source
from matu_jax.data.prepared import SEED, TEST_FRACTION


class Places(NamedTuple):
    """Where the examples of a source go: `part[i]` (0 train, 1 test) and the row there.

    The first `validation` rows of train are the source's own validation split.
    """

    part: np.ndarray
    row: np.ndarray
    counts: tuple[int, int]
    validation: int


def counts(source: Source) -> tuple[int, int]:
    """Images of train (and validation) and of test, before any is left out."""
    return places_of(source).counts


def places_of(source: Source) -> Places:
    """Shuffles the training images, and draws the test split from them if there is none."""
    given = source.validation
    count = len(source.train) - given
    # By hashes, which are the same in every version of every library.
    keys = [hashlib.sha256(f"{SEED}/{index}".encode()).digest() for index in range(count)]
    rank = np.empty(count, np.int64)
    rank[sorted(range(count), key=keys.__getitem__)] = np.arange(count)
    drawn = np.zeros(count, bool)
    if source.test is None:
        drawn = _drawn(rank, np.array(source.labels[:count] or [0] * count))
    official = len(source.test or ())
    part = np.concatenate([drawn, np.zeros(given, bool), np.ones(official, bool)]).astype(int)
    rows = [np.empty(count, np.int64), np.arange(given), np.arange(official)]
    for one, first in ((~drawn, given), (drawn, 0)):
        rows[0][one] = first + np.argsort(np.argsort(rank[one]))
    tested = int(part.sum())
    return Places(part, np.concatenate(rows), (len(part) - tested, tested), given)


def _drawn(rank: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which images are tested on where there is no test split: the last of each label.

    Args:
        rank: `[examples]`, their places in the shuffled order.
        labels: `[examples]`. Of two images or more, one is tested on and one is trained on.

    Returns:
        bool `[examples]`; one image at least is tested on.
    """
    drawn = np.zeros(len(rank), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(rank[members])]
        tested = min(max(1, round(TEST_FRACTION * len(members))), len(members) - 1)
        drawn[members[len(members) - tested :]] = True
    if not drawn.any():
        drawn[np.argmax(rank)] = True
    return drawn


def distinct(
    places: Places, trained: Sequence[bytes], tested: Sequence[bytes]
) -> tuple[np.ndarray, int]:
    """Which training images occur neither in the test split nor earlier in the source's order.

    Args:
        places: Where the examples are.
        trained: Hashes of the pixels of all training images, by rows.
        tested: The same of the test split.

    Returns:
        bool `[examples]`, whether a row of the training images is kept, as all of the source's own
        validation split are; and how many are not since they are in the test split.
    """
    given = places.validation
    in_test, seen = set(tested), set(trained[:given])
    keep, left_out = np.arange(len(trained)) < given, 0
    rows = places.row[places.part == 0]  # in the source's order
    for row in rows[rows >= given]:
        key = trained[row]
        left_out += key in in_test
        keep[row] = key not in in_test and key not in seen
        seen.add(key)
    return keep, left_out
