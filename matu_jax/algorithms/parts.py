"""What is shared and what stays: splits of a model's parameters, and heads of tasks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from matu_jax.aggregation.choices import NO_DEFENCE, DefenceConfig
from matu_jax.algorithms.contract import Algorithm, Groups, Sums
from matu_jax.algorithms.means import (
    defended_mean,
    keep_where_absent,
    mean_of_clients,
    mean_over_clients,
    sums_by_task,
    zeros,
)
from matu_jax.messages.traffic import Message, Traffic
from matu_jax.trees import PyTree, leaf_items

Cut = Callable[[PyTree, int], PyTree]
"""`(tree, lead) -> counts`: how many rows of each leaf are shared, the first ones along its first
axis after `lead` stacked ones; an int per leaf."""


def last_blocks(count: int, where: str) -> Cut:
    """Shares everything but the last `count` transformer blocks and what comes after them.

    Blocks are found by their path: "blocks/<number>/..." or, stacked over depth on their first
    axis, "blocks/...". After them come a final norm and a projection.

    Args:
      count: how many blocks.
      where: the name of the field that says so.

    Raises:
      ValueError: from the cut, if no block would be shared.
    """

    def cut(tree: PyTree, lead: int) -> PyTree:
        items = [(path.split("/"), leaf.shape[lead:]) for path, leaf in leaf_items(tree)]
        depth = 0
        for words, shape in items:
            if words[0] == "blocks":
                depth = max(depth, int(words[1]) + 1 if words[1].isdecimal() else shape[0])
        if not depth:
            raise ValueError(
                f"{where}: found {count}, but the model has no transformer blocks: none of its "
                'arrays has a path that begins with "blocks/". Choose another config.algorithm.'
            )
        if count >= depth:
            raise ValueError(
                f"{where}: found {count}, but the model has {depth} "
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
    """FedAvg, defended, of what a cut shares; the rest, and a head, stay with their slot.

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
        traffic=Traffic(
            lambda state, uploads: (Message(uploads[0]), Message(uploads[0])),
            kept=lambda state: state[0],
        ),
        heads=None,
        groups=Groups(("whole", "slots"), ("clients", "slots")),
    )


def with_heads(inner: Algorithm) -> Algorithm:
    """Extends an algorithm to trees `{"shared": ..., "head": ...}`.

    The inner algorithm sees "shared" alone. Heads belong to tasks: they are averaged among a task's
    holders, or stay with their slot where the algorithm shares nothing.
    """
    defence, by_task = inner.heads, inner.heads is not None

    def init(base, slots):
        rows = slots.num_tasks if by_task else slots.client.shape[0]
        return inner.init(base["shared"], slots), zeros(base["head"], rows)

    def download(state, slots):
        head = jax.tree.map(lambda x: x[slots.task], state[1]) if by_task else state[1]
        return {"shared": inner.download(state[0], slots), "head": head}

    def upload(vectors, slots):
        return inner.upload(vectors["shared"], slots), vectors["head"]

    def aggregate(state, uploads, slots):
        shared, metrics = inner.aggregate(state[0], uploads[0], slots)
        head, before = uploads[1], state[1]
        if inner.sends_change:
            start = before
            if by_task:
                start = jax.tree.map(lambda x: x[slots.task], start)
            head = jax.tree.map(jnp.add, start, head)
        if defence is not None:
            groups = slots.weight, slots.task, slots.num_tasks
            return (shared, defended_mean(head, before, *groups, defence, slots)[0]), metrics
        return (shared, keep_where_absent(head, before, slots.weight > 0)), metrics

    def sent(state, uploads):
        up, down = inner.traffic.sent(state[0], uploads[0])
        if not by_task:
            return up, down
        return (
            up._replace(per_slot=(up.per_slot, uploads[1])),
            down._replace(per_slot=(down.per_slot, uploads[1])),
        )

    def evaluated(state, slots):
        assert inner.evaluated
        return download(state, slots) | {"shared": inner.evaluated(state[0], slots)}

    def kept(state):
        return inner.traffic.kept(state[0]), state[1] if by_task else None

    def trains(vector, progress):
        local, factor = inner.local, 1.0
        shared = jax.tree.map(lambda _: 1.0, vector["shared"])
        if local.trains:
            shared = local.trains(vector["shared"], progress)
        if local.head_trains:
            factor = local.head_trains(progress)
        return {"shared": shared, "head": jax.tree.map(lambda _: factor, vector["head"])}

    def groups(of_inner: Groups) -> Groups:
        sums = None
        if of_inner.sums and defence == NO_DEFENCE and not inner.sends_change:
            sums = _both(of_inner.sums, sums_by_task())
        heads = "whole" if by_task else "slots"
        return Groups((of_inner.state, heads), (of_inner.uploads, "slots"), sums)

    shard = inner.sharded_over
    return inner._replace(
        sharded_over=(lambda mesh: with_heads(shard(mesh))) if shard else None,
        init=init,
        download=download,
        upload=upload,
        aggregate=aggregate,
        traffic=inner.traffic._replace(sent=sent, kept=kept),
        evaluated=evaluated if inner.evaluated else None,
        local=inner.local._replace(
            trains=trains if inner.local.trains or inner.local.head_trains else None
        ),
        groups=groups(inner.groups) if inner.groups else None,
    )


def _both(first: Sums, second: Sums) -> Sums:
    """The sums of pairs; metrics are those of the first."""

    def end(state, sums, slots):
        new, metrics = first.end(state[0], sums[0], slots)
        return (new, second.end(state[1], sums[1], slots)[0]), metrics

    return Sums(
        start=lambda state, slots: (first.start(state[0], slots), second.start(state[1], slots)),
        add=lambda sums, uploads, group: (
            first.add(sums[0], uploads[0], group),
            second.add(sums[1], uploads[1], group),
        ),
        end=end,
    )
