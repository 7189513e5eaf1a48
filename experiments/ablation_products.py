"""What is folded: A and B of LoRA, as MaTU does here, or their products.

    python -m matu_jax.compare --config experiments/ablation_products.py

A product A B has the size of a kernel. The server keeps one per task; a client receives its tasks'
products folded, starts from the best factors of LoRA's rank (by singular values, shared out evenly
between A and B), and sends the change of the products, folded. As in ablation_fold, from which the
fold is taken, nothing is lent between tasks; "folded" is MaTU without transfer.
"""

import dataclasses
import runpy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from matu_jax.algorithms import ALGORITHMS, Algorithm, LocalRule
from matu_jax.algorithms.means import keep_where_absent, weighted_mean
from matu_jax.messages.traffic import Message, Traffic
from matu_jax.runs.commandline import run_file

HERE = Path(__file__)
_of_the_fold = runpy.run_path(str(HERE.with_name("ablation_fold.py")))
fold, products = _of_the_fold["fold"], _of_the_fold["products"]


def factors(product, base):
    """Vectors A - A0 and B - B0 whose products are nearest: leaves `[slots, ...]`.

    Args:
      product: what products have gained over the base's, leaves `[slots, in, out]`.
      base: A0 and B0, leaves `[...]`; where a slot has gained nothing, they stay.
    """
    if isinstance(product, dict):
        return {name: factors(product[name], base[name]) for name in product}
    a0, b0 = base["lora_a"][None], base["lora_b"][None]
    rank = a0.shape[-1]
    # One by one: XLA on CPU has been seen to wait for ever on many at once.
    decompose = partial(jnp.linalg.svd, full_matrices=False)
    u, s, v = jax.lax.map(decompose, product + jnp.matmul(a0, b0))
    root = jnp.sqrt(s[..., :rank])
    a, b = u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]
    gained = jnp.any(product != 0, axis=(-2, -1), keepdims=True)
    return {"lora_a": jnp.where(gained, a - a0, 0.0), "lora_b": jnp.where(gained, b - b0, 0.0)}


class State(NamedTuple):
    """What the server keeps, and what it handed out.

    Attributes:
      exact: what each task's products have gained, leaves `[tasks, in, out]`.
      downloads: where slots start, leaves `[slots, ...]`, as factors.
      base: leaves `[...]`.
    """

    exact: Any
    downloads: Any
    base: Any


def of_products(config, *, folds):
    """MaTU over products; `folds`: whether they are folded, or sent one by one."""
    del config

    def message(products, slots):
        if not folds:
            return Message(per_slot=products)
        count, leaves = slots.client.shape[0], jax.tree.leaves(products)
        bits = [jnp.zeros((count, -(-x[0].size // 8)), jnp.uint8) for x in leaves]
        vectors = [jnp.zeros((slots.num_clients, *x.shape[1:]), x.dtype) for x in leaves]
        return Message(per_client=vectors, per_shared_slot=(bits, jnp.zeros((count, 1))))

    def folded(vectors, slots):
        return fold(vectors, slots) if folds else vectors

    def init(base, slots):
        vectors = jax.tree.map(lambda x: jnp.zeros((slots.client.shape[0], *x.shape)), base)
        exact = jax.tree.map(
            lambda x: jnp.zeros((slots.num_tasks, *x.shape[1:])), products(vectors, base)
        )
        return State(exact, vectors, base)

    def upload(changes, slots):
        present = slots.weight > 0
        return keep_where_absent(changes, jax.tree.map(jnp.zeros_like, changes), present), slots

    def aggregate(state, uploads, slots):
        changes, _ = uploads
        after = products(jax.tree.map(jnp.add, state.downloads, changes), state.base)
        gained = jax.tree.map(jnp.subtract, after, products(state.downloads, state.base))
        mean, weight = weighted_mean(
            folded(gained, slots), slots.weight, slots.task, slots.num_tasks
        )
        moved = jax.tree.map(jnp.add, state.exact, mean)
        exact = keep_where_absent(moved, state.exact, weight > 0)
        handed = folded(jax.tree.map(lambda x: x[slots.task], exact), slots)
        return State(exact, factors(handed, state.base), state.base), {}

    def sent(state, uploads):
        changes, slots = uploads
        either = message(products(changes, state.base), slots)
        return either, either

    return Algorithm(
        init=init,
        download=lambda state, slots: state.downloads,
        upload=upload,
        aggregate=aggregate,
        traffic=Traffic(sent, kept=lambda state: state.exact),
        local=LocalRule(),
        sends_change=True,
    )


ALGORITHMS["ablation: products folded"] = partial(of_products, folds=True)
ALGORITHMS["ablation: products, not folded"] = partial(of_products, folds=False)


def get_config():
    shipped = run_file(HERE.with_name("compare8.py"))
    fours = run_file(HERE.with_name("ablation_rules.py")).settings["fours"]
    names = ("folded", "products folded", "products, not folded")
    return dataclasses.replace(
        shipped,
        title="Ablations of what is folded: factors or products",
        experiment=shipped.experiment.with_fields({"evaluation.every_rounds": 4}),
        settings={
            "pairs": shipped.settings["pairs"],
            "fours": dataclasses.replace(fours, arms=()),
        },
        arms={name: {"algorithm": f"ablation: {name}"} for name in names},
        reference="folded",
        ours="folded",
        search={},
        own_search={},
        tuned="",
    )
