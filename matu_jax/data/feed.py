"""Feeding a device that holds less than a round: pieces that fit, made ahead by threads.

A piece is some slots' next batches. Whatever is drawn depends on the piece's position alone, so a
feed starts anywhere, and a run that goes on needs nothing but the number of its round.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

__all__ = ["BUDGET_BYTES", "VECTORS_BYTES", "Grid", "grid", "prefetched"]

BUDGET_BYTES = 256 * 2**20
"""Images that are sent to the devices at once, at most, unless one step of all needs more."""

VECTORS_BYTES = 32 * 2**20
"""What slots that are trained one group after the other hold of their own at once, at most, unless
as many as train at once need more. Small, so that a CPU's memory allocator, which gives large
pieces back to the system, finds it again in the next group."""


class Grid(NamedTuple):
    """How a round is cut: groups of slots, one after the other, and chunks of steps in each.

    Attributes:
        groups: Number of groups.
        slots: Slots in a group.
        chunks: Number of chunks.
        steps: Steps in a chunk.
    """

    groups: int
    slots: int
    chunks: int
    steps: int


def grid(
    slots: int,
    steps: int,
    step_bytes: int,
    *,
    multiple: int,
    at_once: int,
    least: int = 1,
    slot_bytes: int = 0,
    budget_bytes: int = BUDGET_BYTES,
    vectors_bytes: int = VECTORS_BYTES,
) -> Grid:
    """Cuts a round into pieces of at most `budget_bytes`, all of one shape.

    Args:
        slots: Slots that train in a round.
        steps: Steps of each.
        step_bytes: Bytes of one slot's batch.
        multiple: Devices; a group has a multiple of them.
        at_once: Slots that are trained at once, a multiple of `multiple`; a group has a multiple of
            them if the round is cut.
        least: Slots that a group has at least.
        slot_bytes: Bytes of what a slot holds of its own while its group trains: vectors and
            optimiser state.
        budget_bytes: Size of a piece; one step of the smallest group may be larger.
        vectors_bytes: Size of what a group's slots hold; that of the smallest group may be larger.

    Returns:
        The whole round as one piece if it fits, else groups of as many slots as fit.
    """
    whole = -(-slots // multiple) * multiple
    fitting = min(budget_bytes // (steps * step_bytes), vectors_bytes // max(slot_bytes, 1))
    if whole <= fitting:
        return Grid(1, whole, 1, steps)
    size = min(max(fitting // at_once, -(-least // at_once), 1) * at_once, whole)
    fits = max(1, budget_bytes // (size * step_bytes))
    chunk = max(n for n in range(1, min(fits, steps) + 1) if steps % n == 0)
    return Grid(-(-slots // size), size, steps // chunk, chunk)


def prefetched(
    make: Callable[[int], Any], start: int, stop: int, *, threads: int = 2, ahead: int = 2
) -> Iterator[Any]:
    """Yields `make(i)` for i from `start` to `stop - 1`, in order, made ahead by threads.

    Args:
        make: A pure function of the position.
        start: First position.
        stop: One past the last position.
        threads: How many are made at once.
        ahead: How many wait, at most.
    """
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options))
