"""The programs that are compiled: MaTU's aggregator and its options, local training, a round."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from rivals import dense_aggregate, dense_unify

import matu_jax as matu
from matu_jax.trees import PyTree

CLIENTS, HELD, TASKS, SIZE = 30, 4, 30, 3_000_000
"""Of the round: clients with so many tasks each, of so many, and trained parameters."""


class Program(NamedTuple):
    """What is compiled, from shapes alone.

    Attributes:
      function: to be jitted, or jitted.
      arguments: trees of `jax.ShapeDtypeStruct`.
      times: how many steps it makes; bytes and operations are given for one.
      more: what else is known of it, for the table.
    """

    function: Callable[..., Any]
    arguments: tuple[PyTree, ...]
    times: int = 1
    more: Mapping[str, Any] = MappingProxyType({})

    def floor_bytes(self) -> int:
        """Each argument read once and each result written once."""
        results = jax.eval_shape(self.function, *self.arguments)
        leaves = jax.tree.leaves((self.arguments, results))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)

    def on(self, device: Any) -> "Program":
        """The same with arguments that lie on a device."""
        sharding = SingleDeviceSharding(device)
        return self._replace(
            arguments=jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), self.arguments
            )
        )


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


# ------------------------------------------------------------------ the aggregator


def slots() -> matu.Slots:
    """Of the round: neighbours share tasks, no client holds a task twice."""
    client = np.repeat(np.arange(CLIENTS), HELD)
    task = (client + 7 * np.tile(np.arange(HELD), CLIENTS)) % TASKS
    weight = np.ones(CLIENTS * HELD, np.float32)
    return matu.Slots(client.astype(np.int32), task.astype(np.int32), weight, CLIENTS, TASKS)


def unify(rows: int, size: int, dtype: Any = jnp.float32, **options: Any) -> Program:
    return Program(functools.partial(matu.unify, **options), (shape(rows, size, dtype=dtype),))


def naive(rows: int, size: int) -> Program:
    return Program(dense_unify, (shape(rows, size),))


def clients(dtype: Any = jnp.float32, **options: Any) -> Program:
    """All clients' `unify`, as a simulation calls it."""
    return Program(
        lambda vectors, weight: matu.unify(
            vectors, dataclasses.replace(slots(), weight=weight), **options
        ),
        (shape(CLIENTS * HELD, SIZE, dtype=dtype), shape(CLIENTS * HELD)),
    )


def _uploads(dtype: Any) -> Any:
    """Shapes of a `matu.Unified` of all clients."""
    return jax.eval_shape(clients(dtype).function, *clients(dtype).arguments)


def server(
    config: matu.AggregationConfig, dtype: Any = jnp.float32, previous: bool = True
) -> Program:
    """The server's round, after one before it or as the first."""
    uploads, weight = _uploads(dtype), shape(CLIENTS * HELD)

    def first(uploads, weight):
        return matu.aggregate(uploads, dataclasses.replace(slots(), weight=weight), config)

    def later(uploads, weight, before):
        return matu.aggregate(uploads, dataclasses.replace(slots(), weight=weight), config, before)

    if not previous:
        return Program(first, (uploads, weight))
    result = jax.eval_shape(first, uploads, weight)
    before = result.state if config.uploads == "change" else result.unified
    return Program(later, (uploads, weight, before))


def naive_round() -> Program:
    """Dense arrays in JAX, of the paper's equations with transfer."""

    def dense(vector, masks, scales, weight):
        uploads = matu.Unified({"w": vector}, {"w": masks}, scales)
        given = jax.tree.map(jnp.asarray, dataclasses.replace(slots(), weight=weight))
        return dense_aggregate(uploads, given, HELD)

    return Program(dense, (*_uploads(jnp.float32), shape(CLIENTS * HELD)))


_paper = matu.AggregationConfig.paper

AGGREGATOR: dict[str, Callable[[], Program]] = {
    "unify, T = 8, d = 10M": lambda: unify(8, 10_000_000),
    "naive unify, T = 8, d = 10M": lambda: naive(8, 10_000_000),
    "unify, T = 30, d = 3M": lambda: unify(30, 3_000_000),
    "naive unify, T = 30, d = 3M": lambda: naive(30, 3_000_000),
    "clients' unify": clients,
    "round": lambda: server(
        matu.AggregationConfig(magnitude="mean", transfer="mean"), previous=False
    ),
    "naive round": naive_round,
}
"""What has bounds, and beside it dense arrays in JAX as one would write them first."""

OPTIONS: dict[str, Callable[[], Program]] = {
    "unify, T = 8, d = 10M, max": lambda: unify(8, 10_000_000, magnitude="max"),
    "unify, T = 30, d = 3M, max": lambda: unify(30, 3_000_000, magnitude="max"),
    "unify, T = 30, d = 3M, bfloat16": lambda: unify(30, 3_000_000, jnp.bfloat16),
    "clients' unify, max": lambda: clients(magnitude="max"),
    "clients' unify, bfloat16": lambda: clients(jnp.bfloat16),
    "round, defaults": lambda: server(matu.AggregationConfig()),
    "round, defaults, bfloat16": lambda: server(matu.AggregationConfig(), jnp.bfloat16),
    "round, defaults, max": lambda: server(matu.AggregationConfig(magnitude="max")),
    "round, paper": lambda: server(_paper()),
    "round, paper, mean": lambda: server(_paper(magnitude="mean")),
    "round, paper, similarity aggregated": lambda: server(_paper(similarity="aggregated")),
    "round, paper, transfer mean": lambda: server(_paper(transfer="mean")),
    "round, paper, transfer additive": lambda: server(_paper(transfer="additive")),
    "round, paper, change uploads": lambda: server(_paper(uploads="change")),
    "round, paper, clip": lambda: server(_paper(clip=1.5)),
    "round, paper, trim": lambda: server(_paper(trim=1)),
    "round, paper, agreement weighting": lambda: server(_paper(weighting="agreement")),
}
"""The choices that `unify` and `aggregate` have, one by one."""
