"""From a round's messages to the arrays that hold all clients, and from these to each client's."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from matu_jax.aggregation import Slots, Unified
from matu_jax.messages.layout import WireError, fingerprint
from matu_jax.messages.wire import decode
from matu_jax.trees import PyTree


def gather(
    messages: Mapping[int, bytes | WireError], like: PyTree, slots: Slots, *, round_number: int
) -> tuple[Unified, Slots, list[str]]:
    """Puts the uploads of a round together for `aggregate`, without those that are refused.

    No message is larger than `message_bytes` says for the tasks that its client holds.

    Args:
      messages: by client: its message, or why there is none.
      like: leaves `[...]`, as for `decode`.
      slots: which client holds which task, and how many examples it has.
      round_number: the round that uploads have to be of.

    Returns:
      Uploads: vector leaves `[clients, ...]`, masks `[slots, bytes]`, scales `[slots]`; the slots,
      with weight 0 for every client of which nothing was taken; and one line for each refusal.
    """
    client, task = np.asarray(slots.client), np.asarray(slots.task)
    weight = np.array(slots.weight, np.float32)
    shapes = [(leaf.shape, jnp.dtype(leaf.dtype)) for leaf in jax.tree.leaves(like)]
    vectors = [np.zeros((slots.num_clients, *shape), dtype) for shape, dtype in shapes]
    masks = [
        np.zeros((len(client), -(-int(np.prod(shape, dtype=np.int64)) // 8)), np.uint8)
        for shape, _ in shapes
    ]
    scales = np.zeros(len(client), np.float32)
    refused = []
    taken = np.zeros(slots.num_clients, np.bool_)
    tree = fingerprint(like)
    for sender, message in messages.items():
        try:
            if isinstance(message, WireError):
                raise message
            rows = np.flatnonzero((client == sender) & (weight > 0))
            held = sorted(task[rows].tolist())
            limits = {"num_tasks": slots.num_tasks, "max_tasks": max(len(held), 1)}
            found = decode(message, like, tree=tree, **limits)
            if (found.kind, found.client, found.round) != ("upload", sender, round_number):
                raise WireError(
                    f"found a {found.kind} of client {found.client}, round {found.round}, expected "
                    f"an upload of client {sender}, round {round_number}."
                )
            if sorted(found.tasks) != held:
                raise WireError(f"tasks: found {sorted(found.tasks)}, expected {held}.")
        except WireError as error:
            refused.append(f"client {sender}: {error}")
            continue
        taken[sender] = True
        order = [found.tasks.index(t) for t in task[rows]]
        for target, leaf in zip(vectors, jax.tree.leaves(found.unified.vector), strict=True):
            target[sender] = leaf
        for target, leaf in zip(masks, jax.tree.leaves(found.unified.masks), strict=True):
            target[rows] = leaf[order]
        scales[rows] = found.unified.scales[order]
    weight[~taken[client]] = 0
    treedef = jax.tree.structure(like)
    uploads = Unified(treedef.unflatten(vectors), treedef.unflatten(masks), jnp.asarray(scales))
    present = Slots(slots.client, slots.task, weight, slots.num_clients, slots.num_tasks)
    return uploads, present, refused


def of_client(unified: Unified, slots: Slots, client: int) -> tuple[Unified, tuple[int, ...]]:
    """What `encode` takes, for one client of a unified of all.

    Args:
      unified: vector leaves `[clients, ...]`, masks `[slots, bytes]`, scales `[slots]`.
      slots: the slots it was folded with; those of weight 0 are left out.
      client: which one.

    Returns:
      The client's own unified: vector leaves `[...]`, masks `[k, bytes]`, scales `[k]`; its tasks.
    """
    rows = np.flatnonzero((np.asarray(slots.client) == client) & (np.asarray(slots.weight) > 0))
    return (
        Unified(
            jax.tree.map(lambda leaf: leaf[client], unified.vector),
            jax.tree.map(lambda leaf: leaf[rows], unified.masks),
            unified.scales[rows],
        ),
        tuple(np.asarray(slots.task)[rows].tolist()),
    )
