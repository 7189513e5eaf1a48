"""What crosses the network in a round, and its bits."""

from typing import NamedTuple

import jax
import numpy as np

from matu_jax.aggregation import Slots
from matu_jax.trees import PyTree


class Message(NamedTuple):
    """What crosses the network in one direction in one round, as trees of arrays or None.

    Attributes:
      per_client: leaves `[clients, ...]`, one row for every client that takes part.
      per_slot: leaves `[slots, ...]`, one row for every slot of such a client.
      per_shared_slot: the same, but left out for a client with a single slot, for which it says
        nothing (a unified of one slot has a trivial mask and the scale 1).
    """

    per_client: PyTree = None
    per_slot: PyTree = None
    per_shared_slot: PyTree = None


def message_bits(message: Message, slots: Slots) -> np.ndarray:
    """Bits that each client sends or receives: int64 `[clients]`; 0 for those absent.

    Counted from the shapes and dtypes of the message's arrays; `frame_bits` counts what is around
    them. Example counts, exchanged once when a client registers, are part of neither.
    """

    def row_bits(tree: PyTree) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(8 * leaf.size * leaf.dtype.itemsize // leaf.shape[0] for leaf in leaves)

    held = slots_held(slots)
    return (
        (held > 0) * row_bits(message.per_client)
        + held * row_bits(message.per_slot)
        + held * (held > 1) * row_bits(message.per_shared_slot)
    ).astype(np.int64)


def slots_held(slots: Slots) -> np.ndarray:
    """How many slots of each client are present: int64 `[clients]`."""
    present = np.asarray(slots.weight) > 0
    return np.bincount(np.asarray(slots.client)[present], minlength=slots.num_clients)
