"""What crosses the network in a round, and its bits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int64, Shaped

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

    per_client: PyTree[Shaped[Array, "clients ..."]] = None
    per_slot: PyTree[Shaped[Array, "slots ..."]] = None
    per_shared_slot: PyTree[Shaped[Array, "slots ..."]] = None


class Traffic(NamedTuple):
    """What of an algorithm crosses the network, and what its server keeps in between.

    Attributes:
      sent: `(state, uploads) -> (uplink, downlink)`: the parts of uploads and state that cross the
        network, as `Message`s, whose bits are counted.
      frame_bytes: `k -> (uplink, downlink)`, bytes that the messages of a client with k tasks hold
        besides what `sent` says: headers, task ids, checksums; None where they have no format.
      one_shot: whether messages cross the network once, after the last round.
      kept: `state -> tree`: the part of the state that a real server has to keep between rounds,
        once it has handed out what it made: neither what clients keep for themselves nor downloads
        that have been delivered.
      kept_per_client: whether that part grows with the number of clients.
    """

    sent: Callable[[Any, Any], tuple[Message, Message]]
    frame_bytes: Callable[[int], tuple[int, int]] | None = None
    one_shot: bool = False
    kept: Callable[[Any], PyTree] = lambda state: state
    kept_per_client: bool = False


def message_bits(message: Message, slots: Slots) -> Int64[np.ndarray, "clients"]:
    """Bits that each client sends or receives: int64 `[clients]`; 0 for those absent.

    Counted from the shapes and dtypes of the message's arrays; `frame_bits` counts what is around
    them. Example counts, exchanged once when a client registers, are part of neither.
    """

    def row_bits(tree: PyTree) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(8 * leaf.size * leaf.dtype.itemsize // leaf.shape[0] for leaf in leaves)

    held = _slots_held(slots)
    return (
        (held > 0) * row_bits(message.per_client)
        + held * row_bits(message.per_slot)
        + held * (held > 1) * row_bits(message.per_shared_slot)
    ).astype(np.int64)


def frame_bits(traffic: Traffic, slots: Slots) -> Int64[np.ndarray, "2 clients"]:
    """Bits of headers, task ids and checksums, up and down: int64 `[2, clients]`.

    0 for clients that are absent, and where there is no format.
    """
    count = traffic.frame_bytes or (lambda k: (0, 0))
    held = _slots_held(slots).tolist()
    return np.array([[8 * size for size in (count(k) if k else (0, 0))] for k in held], np.int64).T


def _slots_held(slots: Slots) -> Int64[np.ndarray, "clients"]:
    """How many slots of each client are present: int64 `[clients]`."""
    present = np.asarray(slots.weight) > 0
    return np.bincount(np.asarray(slots.client)[present], minlength=slots.num_clients)
