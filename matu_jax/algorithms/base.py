"""The contract of a federated algorithm, and what several of them share: means and splits."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from matu_jax.aggregation import Slots
from matu_jax.aggregation.fold import clip_to
from matu_jax.aggregation.robust import (
    agreement_weights,
    clip_factors,
    counted,
    vector_lengths,
    within_trim,
)
from matu_jax.config import NO_DEFENCE, DefenceConfig
from matu_jax.trees import PyTree, leaf_items


class LocalRule(NamedTuple):
    """How a slot trains on its client.

    Attributes:
      penalty: `(vector, download) -> scalar` added to the loss, both one slot's task vectors,
        leaves `[...]`, trained heads among them; None for no penalty.
      trains: `(vector, progress) -> factors`, a tree like the vector whose leaves broadcast against
        its leaves: 1 where a parameter trains in this step, 0 where it does not. Progress is the
        part of the round's steps that is done, a float32 scalar in [0, 1). None: everything trains.
      head_trains: `progress -> factor`, the same for a trained head; None: it always trains.
      linearised: whether the model is replaced by its first-order expansion around the base, in
        training and in evaluation.
    """

    penalty: Callable[[PyTree, PyTree], jax.Array] | None = None
    trains: Callable[[PyTree, jax.Array], PyTree] | None = None
    head_trains: Callable[[jax.Array], jax.Array] | None = None
    linearised: bool = False


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


class _Parts(NamedTuple):
    """The fields of an `Algorithm`, where they are described."""

    init: Callable[[PyTree, Slots], Any]
    download: Callable[[Any, Slots], PyTree]
    upload: Callable[[PyTree, Slots], Any]
    aggregate: Callable[[Any, Any, Slots], tuple[Any, dict[str, jax.Array]]]
    sent: Callable[[Any, Any], tuple[Message, Message]]
    local: LocalRule = LocalRule()
    shares_heads: bool = True
    kept: Callable[[Any], PyTree] = lambda state: state
    kept_per_client: bool = False
    evaluated: Callable[[Any, Slots], PyTree] | None = None
    one_shot: bool = False
    sends_change: bool = False
    defence: DefenceConfig | None = None
    frame_bytes: Callable[[int], tuple[int, int]] | None = None
    shared_over: Callable[[Mesh], "Algorithm"] | None = None


class Algorithm(_Parts):
    """A federated algorithm: pure functions, state first in and out; all of them jit.

    Task vectors are stacked over slots (leaves `[slots, ...]`); absent slots have weight 0, and
    what their rows hold must change nothing.

    Attributes:
      init: `(base, slots) -> state`; base leaves `[...]`.
      download: `(state, slots) -> vectors [slots, ...]`, where each slot starts its round, and what
        is evaluated unless `evaluated` says otherwise.
      upload: `(vectors [slots, ...], slots) -> uploads`, the client's side.
      aggregate: `(state, uploads, slots) -> (state, metrics)`, the server's side. Metrics is a dict
        of arrays; "similarity" `[tasks, tasks]` where the algorithm measures one; "accepted" bool
        `[slots]` where it refuses uploads by itself.
      sent: `(state, uploads) -> (uplink, downlink)`: the parts of uploads and state that cross the
        network, as `Message`s, from which traffic is counted.
      local: how slots train.
      shares_heads: whether trained heads are averaged among the holders of a task.
      kept: `state -> tree`: the part of the state that a real server has to keep between rounds,
        once it has handed out what it made: neither what clients keep for themselves nor downloads
        that have been delivered.
      kept_per_client: whether that part grows with the number of clients.
      evaluated: `(state, slots) -> vectors [slots, ...]`, what is evaluated; None = `download`.
      one_shot: whether messages cross the network once, after the last round.
      sends_change: whether upload is given what the round has changed, vectors less downloads,
        instead of the vectors.
      defence: the rules by which its means are defended against clients that lie; None where it has
        no defences.
      frame_bytes: `k -> (uplink, downlink)`, bytes that the messages of a client with k tasks hold
        besides what `sent` says: headers, task ids, checksums; None where they have no format.
      shared_over: makes the same algorithm with the parameters of the server's arithmetic, and of
        folding, shared out over the devices of a mesh, whose base, vectors and state have flat
        leaves (`[n]`, `[rows, n]`); None where it runs on one device, or needs the leaves' shapes.
        `_replace` leaves it out unless it is given anew: what it makes knows nothing of the change.
    """

    __slots__ = ()

    def _replace(self, **fields: Any) -> "Algorithm":
        """The algorithm with other fields; every one of them runs, on however many devices."""
        return super()._replace(**({"shared_over": None} | fields))

    __replace__ = _replace  # of `copy.replace`, from Python 3.13 on


def weighted_mean(
    vectors: PyTree, weight: jax.Array, group: jax.Array, num_groups: int
) -> tuple[PyTree, jax.Array]:
    """Weighted mean of rows per group, in float32.

    Args:
      vectors: leaves `[rows, ...]`.
      weight: float32 `[rows]`; rows of weight 0 do not count, whatever they hold.
      group: int32 `[rows]`.
      num_groups: number of groups.

    Returns:
      Means, leaves `[groups, ...]` in the storage dtype (0 for a group without weight), and the
      total weight `[groups]`.
    """
    total = jax.ops.segment_sum(weight, group, num_groups)
    share = weight / jnp.where(total > 0, total, 1.0)[group]

    def mean(leaf):
        def add(carry, row):
            x, part, where = row
            return carry.at[where].add(jnp.where(part > 0, part * x.astype(jnp.float32), 0.0)), None

        zero = jnp.zeros((num_groups, *leaf.shape[1:]), jnp.float32)
        return clip_to(jax.lax.scan(add, zero, (leaf, share, group))[0], leaf.dtype)

    return jax.tree.map(mean, vectors), total


def defended_mean(
    vectors: PyTree,
    before: PyTree,
    weight: jax.Array,
    group: jax.Array,
    num_groups: int,
    defence: DefenceConfig,
    slots: Slots | None = None,
) -> tuple[PyTree, jax.Array]:
    """`before` plus the mean of changes per group, by the rules of a defence; in float32.

    Args:
      vectors: leaves `[rows, ...]`; what a row has changed is its difference from its group's
        `before`.
      before: leaves `[groups, ...]`.
      weight: float32 `[rows]`; rows of weight 0 do not count, whatever they hold.
      group: int32 `[rows]`.
      num_groups: number of groups.
      defence: see `matu_jax.AggregationConfig`, with rows for slots and groups for tasks.
      slots: where rows are slots, whose client each is; None = each row is a client's only one.

    Returns:
      Leaves `[groups, ...]` in the storage dtype, `before` for a group without weight; and the
      total weight `[groups]`. Without defences, that is the weighted mean itself.
    """
    total = jax.ops.segment_sum(weight, group, num_groups)
    if defence == NO_DEFENCE:
        mean, _ = weighted_mean(vectors, weight, group, num_groups)
        return keep_where_absent(mean, before, total > 0), total

    present = weight > 0

    def change(x, b):
        rows = clip_to(x.astype(jnp.float32) - b.astype(jnp.float32)[group], jnp.float32)
        return jnp.where(present[:, None], rows.reshape(rows.shape[0], -1), 0.0)

    changes = jax.tree.map(change, vectors, before)
    if defence.clip:
        rows = weight.shape[0]
        client, clients = jnp.arange(rows), rows
        if slots is not None:
            client, clients = slots.client, slots.num_clients
        factors = clip_factors(row_lengths(changes), present, defence.clip, client, clients)
        changes = jax.tree.map(lambda x: factors[:, None] * x, changes)
    if defence.weighting == "agreement":

        def signs(x):
            own = jnp.sign(x)
            return (own * jax.ops.segment_sum(own, group, num_groups)[group]).sum(axis=1)

        leaves = jax.tree.leaves(changes)
        common = jnp.stack([signs(x) for x in leaves]).sum(axis=0)
        nonzero = jnp.stack([(x != 0).sum(axis=1) for x in leaves]).sum(axis=0)
        nonzero = nonzero.astype(jnp.float32)
        weight = agreement_weights(common, nonzero, weight, group, num_groups)
    if defence.trim:
        members = jnp.zeros(num_groups, jnp.int32).at[group].add(present.astype(jnp.int32))
        share = 1 / counted(defence.trim, members)

        def trimmed(x):
            def add(carry, row):
                extremes, mean = carry
                values, where, there = row
                grown, passed = within_trim(extremes[where], values, members[where])
                extremes = extremes.at[where].set(jnp.where(there, grown, extremes[where]))
                mean = mean.at[where].add(jnp.where(there, share[where] * passed, 0.0))
                return (extremes, mean), None

            extremes = jnp.full((num_groups, 2, defence.trim, x.shape[1]), -jnp.inf)
            mean = jnp.zeros((num_groups, x.shape[1]), jnp.float32)
            return jax.lax.scan(add, (extremes, mean), (x, group, present))[0][1]

        moved = jax.tree.map(trimmed, changes)
    else:
        moved, _ = weighted_mean(changes, weight, group, num_groups)

    def add(b, x):
        return clip_to(b.astype(jnp.float32) + x.reshape(b.shape), b.dtype)

    return keep_where_absent(jax.tree.map(add, before, moved), before, total > 0), total


def row_lengths(vectors: PyTree) -> jax.Array:
    """Euclidean lengths of the rows of a stacked tree, over all its leaves: float32 `[rows]`."""
    unit, length = vector_lengths([x.reshape(x.shape[0], -1) for x in jax.tree.leaves(vectors)])
    return unit * length


def headroom(rows: int) -> float:
    """A power of 2, which rounds nothing, by which the sum of so many float32 rows stays finite."""
    return 2.0 ** -math.ceil(math.log2(max(rows, 2)))


def per_row(values: jax.Array, like: jax.Array) -> jax.Array:
    """Gives values `[rows]` as many axes as an array `[rows, ...]` has, to broadcast against it."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def keep_where_absent(new: PyTree, old: PyTree, present: jax.Array) -> PyTree:
    """Takes rows of `new` where present and of `old` elsewhere; leaves `[rows, ...]`."""

    def choose(n, o):
        return jnp.where(per_row(present, n), n, o)

    return jax.tree.map(choose, new, old)


Cut = Callable[[PyTree, int], PyTree]
"""`(tree, lead) -> counts`: how many rows of each leaf are shared, the first ones along its first
axis after `lead` stacked ones; an int per leaf."""


def last_blocks(count: int) -> Cut:
    """Shares everything but the last `count` transformer blocks and what comes after them.

    Blocks are found by their path: "blocks/<number>/..." or, stacked over depth on their first
    axis, "blocks/...". After them come a final norm and a projection.

    Raises:
      ValueError: from the cut, if no block would be shared.
    """

    def cut(tree: PyTree, lead: int) -> PyTree:
        items = [(path.split("/"), leaf.shape[lead:]) for path, leaf in leaf_items(tree)]
        depth = 0
        for words, shape in items:
            if words[0] == "blocks":
                depth = max(depth, int(words[1]) + 1 if words[1].isdecimal() else shape[0])
        if count >= depth:
            raise ValueError(
                f"config.personal_blocks: found {count}, but the model has {depth} "
                f"block{'' if depth == 1 else 's'} and at least one has to be shared."
            )
        rows = []
        for words, shape in items:
            if words[0] == "blocks" and not words[1].isdecimal():
                rows.append(depth - count)
            elif words[0] == "blocks":
                rows.append(shape[0] if int(words[1]) < depth - count else 0)
            else:
                rows.append(0 if words[0] in ("norm", "projection") else shape[0])
        return jax.tree.unflatten(jax.tree.structure(tree), rows)

    return cut


def partly_shared(cut: Cut, defence: DefenceConfig) -> Algorithm:
    """FedAvg, defended, of what a cut shares; the rest stays with its slot, at its client.

    The state is the shared vector, leaves `[...]`, and every slot's personal part, leaves `[slots,
    ...]`; both have the tree of the model, with leaves without rows where there is nothing.
    """

    def split(tree: PyTree, lead: int) -> tuple[PyTree, PyTree]:
        def part(first: bool):
            def take(leaf, rows):
                low, high = (0, rows) if first else (rows, leaf.shape[lead])
                return jax.lax.slice_in_dim(leaf, low, high, axis=lead)

            return jax.tree.map(take, tree, cut(tree, lead))

        return part(True), part(False)

    def init(base, slots):
        rows = slots.client.shape[0]
        return split(zeros(base), 0)[0], split(zeros(base, rows), 1)[1]

    def download(state, slots):
        def join(shared, personal):
            whole = jnp.broadcast_to(shared[None], (slots.client.shape[0], *shared.shape))
            return jnp.concatenate([whole, personal], axis=1)

        return jax.tree.map(join, *state)

    def upload(vectors, slots):
        shared, personal = split(vectors, 1)
        return mean_of_clients(shared, slots), personal

    def aggregate(state, uploads, slots):
        shared = mean_over_clients(uploads[0], slots, state[0], defence)
        return (shared, keep_where_absent(uploads[1], state[1], slots.weight > 0)), {}

    return Algorithm(
        init=init,
        download=download,
        upload=upload,
        aggregate=aggregate,
        sent=lambda state, uploads: (Message(uploads[0]), Message(uploads[0])),
        shares_heads=False,
        kept=lambda state: state[0],
        defence=defence,
    )


def mean_of_clients(vectors: PyTree, slots: Slots) -> PyTree:
    """Each client's mean over its slots, weighted by examples: leaves `[clients, ...]`."""
    return weighted_mean(vectors, slots.weight, slots.client, slots.num_clients)[0]


def mean_over_clients(
    uploads: PyTree, slots: Slots, before: PyTree, defence: DefenceConfig
) -> PyTree:
    """Mean over clients, weighted by examples: leaves `[...]`; `before` where nobody is there."""
    weight = jax.ops.segment_sum(slots.weight, slots.client, slots.num_clients)
    one_group = jnp.zeros(slots.num_clients, jnp.int32)
    old = jax.tree.map(lambda leaf: leaf[None], before)
    mean, _ = defended_mean(uploads, old, weight, one_group, 1, defence)
    return jax.tree.map(lambda leaf: leaf[0], mean)


def zeros(base: PyTree, *rows: int) -> PyTree:
    """Zero task vectors, leaves `[*rows, ...]` in the base's dtypes."""
    return jax.tree.map(lambda leaf: jnp.zeros((*rows, *leaf.shape), leaf.dtype), base)


def message_bits(message: Message, slots: Slots) -> np.ndarray:
    """Bits that each client sends or receives: int64 `[clients]`; 0 for those absent.

    Counted from the shapes and dtypes of the message's arrays; `frame_bits` counts what is around
    them. Example counts, exchanged once when a client registers, are part of neither.
    """

    def row_bits(tree: PyTree) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(8 * leaf.size * leaf.dtype.itemsize // leaf.shape[0] for leaf in leaves)

    held = _held(slots)
    return (
        (held > 0) * row_bits(message.per_client)
        + held * row_bits(message.per_slot)
        + held * (held > 1) * row_bits(message.per_shared_slot)
    ).astype(np.int64)


def frame_bits(algorithm: Algorithm, slots: Slots) -> np.ndarray:
    """Bits of headers, task ids and checksums, up and down: int64 `[2, clients]`.

    0 for clients that are absent, and where there is no format.
    """
    count = algorithm.frame_bytes or (lambda k: (0, 0))
    held = _held(slots).tolist()
    return np.array([[8 * size for size in (count(k) if k else (0, 0))] for k in held], np.int64).T


def _held(slots: Slots) -> np.ndarray:
    """How many slots of each client are present: int64 `[clients]`."""
    present = np.asarray(slots.weight) > 0
    return np.bincount(np.asarray(slots.client)[present], minlength=slots.num_clients)


def with_heads(inner: Algorithm) -> Algorithm:
    """Extends an algorithm to trees `{"shared": ..., "head": ...}`.

    The inner algorithm sees "shared" alone. Heads belong to tasks: they are averaged among a task's
    holders, or stay with their slot where the algorithm shares nothing.
    """

    def init(base, slots):
        rows = slots.num_tasks if inner.shares_heads else slots.client.shape[0]
        return inner.init(base["shared"], slots), zeros(base["head"], rows)

    def download(state, slots):
        head = jax.tree.map(lambda x: x[slots.task], state[1]) if inner.shares_heads else state[1]
        return {"shared": inner.download(state[0], slots), "head": head}

    def upload(vectors, slots):
        return inner.upload(vectors["shared"], slots), vectors["head"]

    def aggregate(state, uploads, slots):
        shared, metrics = inner.aggregate(state[0], uploads[0], slots)
        head, before = uploads[1], state[1]
        if inner.sends_change:
            start = before
            if inner.shares_heads:
                start = jax.tree.map(lambda x: x[slots.task], start)
            head = jax.tree.map(jnp.add, start, head)
        if inner.shares_heads:
            defence = inner.defence or NO_DEFENCE
            groups = slots.weight, slots.task, slots.num_tasks
            return (shared, defended_mean(head, before, *groups, defence, slots)[0]), metrics
        return (shared, keep_where_absent(head, before, slots.weight > 0)), metrics

    def sent(state, uploads):
        up, down = inner.sent(state[0], uploads[0])
        if not inner.shares_heads:
            return up, down
        return (
            up._replace(per_slot=(up.per_slot, uploads[1])),
            down._replace(per_slot=(down.per_slot, uploads[1])),
        )

    def evaluated(state, slots):
        shared = (inner.evaluated or inner.download)(state[0], slots)
        return download(state, slots) | {"shared": shared}

    def kept(state):
        return inner.kept(state[0]), state[1] if inner.shares_heads else None

    def trains(vector, progress):
        local, factor = inner.local, 1.0
        shared = jax.tree.map(lambda _: 1.0, vector["shared"])
        if local.trains:
            shared = local.trains(vector["shared"], progress)
        if local.head_trains:
            factor = local.head_trains(progress)
        return {"shared": shared, "head": jax.tree.map(lambda _: factor, vector["head"])}

    share = inner.shared_over
    return inner._replace(
        shared_over=(lambda mesh: with_heads(share(mesh))) if share else None,
        init=init,
        download=download,
        upload=upload,
        aggregate=aggregate,
        sent=sent,
        evaluated=evaluated,
        kept=kept,
        local=inner.local._replace(
            trains=trains if inner.local.trains or inner.local.head_trains else None
        ),
    )
