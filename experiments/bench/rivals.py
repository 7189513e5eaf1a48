"""What the aggregator is measured against: loops in PyTorch, dense arrays in JAX, Numba.

They compute what `matu_jax.unify` and, but for Numba, `matu_jax.aggregate` with `SERVER` do, and
the benchmarks check that they do.
"""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import matu_jax as matu
from matu_jax.aggregation.storage import unpack

PAPER = matu.AggregationConfig.paper()
SERVER = dataclasses.replace(PAPER, transfer="mean", similarity="aggregated")


def dealt(clients: int, tasks: int, held: int) -> matu.Slots:
    """Slots of clients with `held` tasks each; tasks are dealt out in turn."""
    client = jnp.repeat(jnp.arange(clients), held)
    task = (client * held + jnp.tile(jnp.arange(held), clients)) % tasks
    return matu.Slots(client, task, 1.0 + jnp.arange(clients * held) % 3, clients, tasks)


def federation(clients: int, tasks: int, held: int, size: int, dtype: Any) -> tuple[Any, Any]:
    """Uploads of clients with `held` tasks each, and their slots."""
    slots = dealt(clients, tasks, held)
    keys = jax.random.split(jax.random.key(0), clients * held)
    rows = jax.lax.map(lambda key: jax.random.normal(key, (size,), dtype), keys)
    return jax.block_until_ready(matu.unify({"w": rows}, slots, magnitude="max")), slots


# ------------------------------------------------------------------ PyTorch, a loop


def torch_unify(rows: list) -> tuple:
    """EMR-Merging's three steps, row by row, on PyTorch tensors."""
    import torch

    total = torch.zeros_like(rows[0], dtype=torch.float32)
    for row in rows:
        total += row
    sign = torch.sign(total)
    size = torch.zeros_like(total)
    for row in rows:
        torch.maximum(size, torch.where(row * sign > 0, row.abs().float(), 0.0), out=size)
    vector = (sign * size).to(rows[0].dtype)
    masks, scales = [], []
    for row in rows:
        mask = row * vector > 0
        masks.append(mask)
        kept = torch.where(mask, vector, 0.0).abs().sum(dtype=torch.float32)
        scales.append(row.abs().sum(dtype=torch.float32) / kept)
    return vector, masks, scales


def torch_aggregate(clients: list, slots: list, tasks: int) -> tuple:
    """The server's round over a list of `(vector, masks, scales)` and one of `(task, weight)`s.

    Similarity is a matrix product of signs; the rest goes task by task and client by client.
    """
    import torch

    holders: list[list] = [[] for _ in range(tasks)]
    for (vector, masks, scales), own in zip(clients, slots, strict=True):
        for mask, scale, (task, weight) in zip(masks, scales, own, strict=True):
            holders[task].append((vector, mask, scale, weight))
    size, vectors = clients[0][0].numel(), []
    for held in holders:
        mean, sign = torch.zeros(size), torch.zeros(size)
        for vector, mask, scale, weight in held:
            row = torch.where(mask, scale * vector.float(), 0.0)
            mean += row * (weight / sum(part for *_, part in held))
            sign += torch.sign(row)
        agreement = sign.abs() / len(held)
        gate = torch.where(agreement >= SERVER.agreement_threshold, 1.0, agreement)
        vectors.append(gate * mean)
    stacked = torch.stack(vectors)
    signs = torch.sign(stacked)
    similarity = (1 + signs @ signs.T / size) / 2
    allowed = torch.where(similarity >= SERVER.min_similarity, similarity, 0.0)
    allowed.fill_diagonal_(0.0)
    values, index = allowed.topk(min(SERVER.top_k, tasks), dim=1)
    mixing = torch.eye(tasks).scatter_add_(1, index, values)
    mixed = (mixing / mixing.sum(dim=1, keepdim=True)) @ stacked
    everything = torch_unify(list(mixed))
    downloads = [torch_unify([mixed[task] for task, _ in own]) for own in slots]
    return mixed, similarity, everything, downloads


# ------------------------------------------------------------------ Numba, one pass


@cache
def numba_unify() -> Any:
    """What a CPU can do: eqs. 1 to 4 block by block on all cores, compiled by Numba.

    A function of float32 `[rows, n]`, n a multiple of 8, to vector, masks and scales, as numpy
    arrays. Numba is not a dependency of this package; without it, None.
    """
    try:
        import numba  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        return None

    zero = np.float32(0)

    @numba.njit(parallel=True, boundscheck=False, fastmath={"nsz", "arcp", "contract", "reassoc"})
    def call(x):
        rows, size = x.shape
        vector = np.empty(size, np.float32)
        masks = np.empty((rows, size // 8), np.uint8)
        blocks = -(-size // 2048)
        own, kept = np.zeros((blocks, rows), np.float32), np.zeros((blocks, rows), np.float32)
        for block in numba.prange(blocks):
            start, stop = 2048 * block, min(2048 * (block + 1), size)
            u, width = vector[start:stop], stop - start
            total, high = np.zeros(width, np.float32), np.zeros(width, np.float32)
            low = np.zeros(width, np.float32)
            for r in range(rows):
                row = x[r, start:stop]
                for i in range(width):
                    value = row[i]
                    total[i] += value
                    high[i] = max(high[i], value)
                    low[i] = min(low[i], value)
            for i in range(width):
                u[i] = high[i] if total[i] > 0 else (low[i] if total[i] < 0 else zero)
            bits = np.empty(width, np.uint8)
            for r in range(rows):
                row, packed = x[r, start:stop], masks[r, start // 8 : stop // 8]
                all_of_it, agreeing = zero, zero
                for i in range(width):
                    agree = row[i] * u[i] > 0
                    all_of_it += abs(row[i])
                    agreeing += abs(u[i]) if agree else zero
                    bits[i] = agree
                own[block, r], kept[block, r] = all_of_it, agreeing
                for i in range(width // 8):
                    byte = bits[8 * i]
                    for k in range(1, 8):
                        byte |= bits[8 * i + k] << k
                    packed[i] = byte
        return vector, masks, own.sum(axis=0) / kept.sum(axis=0)

    return call


# ------------------------------------------------------------------ JAX, dense arrays


@jax.jit
def dense_unify(vectors: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eqs. 1 to 4 as one would write them first, on `[rows, n]`."""
    x = vectors.astype(jnp.float32)
    sign = jnp.sign(x.sum(axis=0))
    vector = sign * jnp.where(x * sign > 0, jnp.abs(x), 0.0).max(axis=0)
    mask = x * vector > 0
    scales = jnp.abs(x).sum(axis=1) / jnp.where(mask, jnp.abs(vector), 0.0).sum(axis=1)
    return vector.astype(vectors.dtype), jnp.packbits(mask, axis=1, bitorder="little"), scales


@partial(jax.jit, static_argnames="held")
def dense_aggregate(uploads: matu.Unified, slots: matu.Slots, held: int) -> tuple:
    """Eqs. 5 to 9 with every array in full; clients hold `held` tasks each, in order."""
    vector, masks = uploads.vector["w"], uploads.masks["w"]
    size, tasks = vector.shape[1], slots.num_tasks
    bits = unpack(masks, size)
    rows = uploads.scales[:, None] * bits * vector[slots.client].astype(jnp.float32)
    member = jax.nn.one_hot(slots.task, tasks).T
    weight = member * slots.weight
    mean = weight / weight.sum(axis=1, keepdims=True) @ rows
    agreement = jnp.abs(member @ jnp.sign(rows)) / member.sum(axis=1, keepdims=True)
    own = jnp.where(agreement >= SERVER.agreement_threshold, 1.0, agreement) * mean
    signs = jnp.sign(own)
    similarity = (1 + signs @ signs.T / size) / 2
    allowed = jnp.where(similarity >= SERVER.min_similarity, similarity, 0.0)
    values, index = jax.lax.top_k(allowed * (1 - jnp.eye(tasks)), min(SERVER.top_k, tasks))
    mixing = jnp.eye(tasks).at[jnp.arange(tasks)[:, None], index].add(values)
    mixed = mixing / mixing.sum(axis=1, keepdims=True) @ own
    downloads = jax.vmap(dense_unify)(mixed[slots.task.reshape(-1, held)])
    return mixed, similarity, dense_unify(mixed), downloads
