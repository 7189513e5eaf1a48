"""What each part of MaTU's fold is worth, and what transfer by similarity should compare.

    python -m matu_jax.compare --config experiments/ablation_fold.py

Clients send changes, and the server adds the mean of each task's to exact task vectors; nothing
else differs between the arms but what they name. They are written densely here, slot by slot,
rather than as options of the library, which has those that won. "folded" is what the library
computes with transfer="none", "download not folded" the same with downloads="task_vectors"
(tests/aggregation/test_ablation.py); "folded" is what the first arms are measured by,
"mean of 3" is folded with eq. 8's plain mean of three lenders.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from matu_jax.aggregation import direction_similarity
from matu_jax.algorithms import ALGORITHMS, Algorithm, LocalRule
from matu_jax.algorithms.means import keep_where_absent, weighted_mean, zeros
from matu_jax.messages.traffic import Message, Traffic
from matu_jax.runs.commandline import run_file
from matu_jax.trees import leaf_items


def fold(vectors, slots, *, masks=True, scales="l1"):
    """Eqs. 1 to 4 with mean magnitude, and back: leaves `[slots, ...]`.

    Args:
      vectors: leaves `[slots, ...]`.
      slots: which client each row belongs to.
      masks: whether a slot leaves out what does not agree with it.
      scales: "l1" (of the whole vector), "l1 per layer" (of every leaf: a layer's A, or its B),
        "least squares" or "none".
    """

    def of_client(x):
        return jax.ops.segment_sum(x, slots.client, slots.num_clients)[slots.client]

    def part(x):
        elected = jnp.sign(of_client(x))
        agree = (x * elected) > 0
        size = of_client(jnp.where(agree, jnp.abs(x), 0.0)) / jnp.maximum(
            of_client(agree.astype(x.dtype)), 1.0
        )
        return jnp.where(agree, elected * size, 0.0) if masks else elected * size

    def ratio(above, below):
        return jnp.where(below > 0, above / jnp.where(below > 0, below, 1.0), 0.0)

    def total(x):
        return jnp.sum(x, axis=tuple(range(1, x.ndim)), keepdims=True)

    parts = jax.tree.map(part, vectors)
    if scales == "none":
        return parts
    if scales == "l1 per layer":
        return jax.tree.map(
            lambda x, u: u * ratio(total(jnp.abs(x)), total(jnp.abs(u))), vectors, parts
        )

    def whole(values):
        return sum(total(x).reshape(-1) for x in jax.tree.leaves(values))

    if scales == "l1":
        above, below = (whole(jax.tree.map(jnp.abs, tree)) for tree in (vectors, parts))
    else:
        above = whole(jax.tree.map(jnp.multiply, vectors, parts))
        below = whole(jax.tree.map(jnp.square, parts))
    scale = ratio(above, below)
    return jax.tree.map(lambda u: u * scale.reshape(-1, *[1] * (u.ndim - 1)), parts)


def products(vectors, base):
    """What LoRA adds to every kernel, A B less the base's: leaves `[slots, in, out]`."""

    def product(pair, start):
        if "lora_a" not in pair:
            return {name: product(pair[name], start[name]) for name in pair}
        a, b = (pair[name] + start[name][None] for name in ("lora_a", "lora_b"))
        first = jnp.matmul(start["lora_a"], start["lora_b"])
        return jnp.matmul(a, b) - first[None]

    return product(vectors, base)


def lending(similarity, slots, *, sharpened, lenders=3):
    """Weights `[tasks, tasks]` of a mean with the most similar tasks, rows sum to 1.

    Args:
      similarity: `[slots, slots]`, direction similarity; pairs of one client do not count.
      slots: the slots.
      sharpened: whether a lender's weight is its similarity's place between the median over pairs
        of tasks (0) and the largest (1), instead of the similarity itself.
      lenders: how many tasks lend.
    """
    present = slots.weight > 0
    apart = slots.client[:, None] != slots.client[None, :]
    apart = (apart & present[:, None] & present[None, :]).astype(jnp.float32)
    member = jax.nn.one_hot(slots.task, slots.num_tasks).T
    pairs = member @ apart @ member.T
    mean = jnp.where(
        pairs > 0, member @ (apart * similarity) @ member.T / jnp.maximum(pairs, 1.0), 0.0
    )
    other = (pairs > 0) & ~jnp.eye(slots.num_tasks, dtype=jnp.bool_)
    if sharpened:
        low = jnp.nanmedian(jnp.where(other, mean, jnp.nan))
        mean = jnp.maximum(mean - low, 0.0) / jnp.maximum(
            jnp.where(other, mean, low).max() - low, 1e-6
        )
    values, index = jax.lax.top_k(jnp.where(other, mean, 0.0), min(lenders, slots.num_tasks))
    weights = jnp.eye(slots.num_tasks).at[jnp.arange(slots.num_tasks)[:, None], index].add(values)
    return weights / weights.sum(axis=1, keepdims=True)


class State(NamedTuple):
    """What the server keeps, and what it handed out.

    Attributes:
      exact: task vectors, leaves `[tasks, ...]`.
      downloads: where slots start, leaves `[slots, ...]`.
      base: leaves `[...]`.
    """

    exact: Any
    downloads: Any
    base: Any


def dense(
    config,
    *,
    masks=True,
    scales="l1",
    folds_up=True,
    folds_down=True,
    b_only=False,
    transfer=False,
    sharpened=False,
    of_products=False,
):
    """MaTU with changes, written densely; see the arms below for the choices.

    Args:
      config: what every algorithm takes.
      masks: see `fold`.
      scales: see `fold`.
      folds_up: whether uploads are folded.
      folds_down: whether downloads are folded.
      b_only: whether A stays at its random start, so that B alone is the task vector.
      transfer: whether tasks mix with the three most similar ones.
      sharpened: see `lending`.
      of_products: whether similarity is that of the changes of A B.
    """
    folded = partial(fold, masks=masks, scales=scales)

    def message(vectors, slots, folds):
        """Of the size of what crosses the network; its numbers do not matter."""
        if b_only:
            vectors = [x for path, x in leaf_items(vectors) if path.endswith("lora_b")]
        if not folds:
            return Message(per_slot=vectors)
        count = slots.client.shape[0]
        numbers = {"l1 per layer": len(jax.tree.leaves(vectors)), "none": 0}
        bits = [jnp.zeros((count, -(-x[0].size // 8)), jnp.uint8) for x in jax.tree.leaves(vectors)]
        return Message(
            per_client=jax.tree.map(
                lambda x: jnp.zeros((slots.num_clients, *x.shape[1:]), x.dtype), vectors
            ),
            per_shared_slot=(bits if masks else None, jnp.zeros((count, numbers.get(scales, 1)))),
        )

    def upload(changes, slots):
        present = slots.weight > 0
        changes = keep_where_absent(changes, jax.tree.map(jnp.zeros_like, changes), present)
        sent = message(changes, slots, folds_up), message(changes, slots, folds_down)
        return (folded(changes, slots) if folds_up else changes), sent

    def aggregate(state, uploads, slots):
        changes = uploads[0]
        mean, weight = weighted_mean(changes, slots.weight, slots.task, slots.num_tasks)
        if transfer:
            compared = changes
            if of_products:
                after = products(jax.tree.map(jnp.add, state.downloads, changes), state.base)
                before = products(state.downloads, state.base)
                compared = jax.tree.map(jnp.subtract, after, before)
            mixing = lending(direction_similarity(compared), slots, sharpened=sharpened)
            mean = jax.tree.map(lambda x: jnp.tensordot(mixing, x, axes=1), mean)
        moved = jax.tree.map(jnp.add, state.exact, mean)
        exact = keep_where_absent(moved, state.exact, weight > 0)
        downloads = jax.tree.map(lambda x: x[slots.task], exact)
        if folds_down:
            downloads = folded(downloads, slots)
        return State(exact, downloads, state.base), {}

    return Algorithm(
        init=lambda base, slots: State(
            zeros(base, slots.num_tasks), zeros(base, slots.client.shape[0]), base
        ),
        download=lambda state, slots: state.downloads,
        upload=upload,
        aggregate=aggregate,
        traffic=Traffic(lambda state, uploads: uploads[1], kept=lambda state: state.exact),
        local=ALGORITHMS["fed_lora_b"](config).local if b_only else LocalRule(),
        sends_change=True,
    )


VARIANTS = {
    "folded": {},
    "masks off": {"masks": False},
    "scales off": {"scales": "none"},
    "least-squares scales": {"scales": "least squares"},
    "scales per layer": {"scales": "l1 per layer"},
    "upload not folded": {"folds_up": False},
    "download not folded": {"folds_down": False},
    "B only": {"b_only": True},
    "mean of 3": {"transfer": True},
    "mean of 3, sharpened": {"transfer": True, "sharpened": True},
    "mean of 3, of products": {"transfer": True, "of_products": True},
    "mean of 3, of products, sharpened": {
        "transfer": True,
        "of_products": True,
        "sharpened": True,
    },
}

ALGORITHMS.update({f"ablation: {name}": partial(dense, **v) for name, v in VARIANTS.items()})


OF_THE_FOLD = (*list(VARIANTS)[:7], "B only")
OF_SIMILARITY = ("folded", *list(VARIANTS)[7:])


def get_config():
    shipped = run_file(Path(__file__).with_name("compare8.py"))
    fours = run_file(Path(__file__).with_name("ablation_rules.py")).settings["fours"]
    fours = dataclasses.replace(fours, arms=OF_THE_FOLD)
    # With one task a client nothing is lost by folding.
    kin = dataclasses.replace(shipped.settings["kin"], arms=OF_SIMILARITY)
    return dataclasses.replace(
        shipped,
        title="Ablations of the fold, and of what similarity compares",
        experiment=shipped.experiment.with_fields({"evaluation.every_rounds": 4}),
        settings={
            "pairs": shipped.settings["pairs"],
            "fours": fours,
            "kin": kin,
        },
        arms={name: {"algorithm": f"ablation: {name}"} for name in VARIANTS},
        reference="folded",
        ours="folded",
        search={},
        own_search={},
        tuned="",
    )
