"""How fast the server's round is: against a PyTorch loop, and against dense arrays in JAX.

    python experiments/bench/bench_aggregate.py
    python experiments/bench/bench_aggregate.py --clients 100 --tasks 30 --parameters 300e3

All three compute eqs. 5 to 9 with similarity of aggregated vectors (a matrix product of signs) and
transfer="mean"; the results are compared before anything is timed. "paper" is
`matu.aggregate` with `AggregationConfig.paper()`, similarity over slots of different clients.
"outer jit" is "library" called inside a caller's own `jax.jit`. "shared" is "library" with the
parameters sharded over all devices, one per core on CPU, on which they lie already. In bfloat16,
uploads of all are; PyTorch's loop and dense JAX compute and return float32, ours rounds task
vectors, as clients have them.
"""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rivals import PAPER, SERVER, dense_aggregate, federation, torch_aggregate
from timing import (
    copier,
    finish,
    interleaved,
    memory_left,
    options,
    peak_growth,
    shared_out,
    traced,
)

import matu_jax as matu
from matu_jax.aggregation.storage import unpack
from matu_jax.runs.processes import use_cores


def _as_torch(uploads: matu.Unified, slots: matu.Slots, held: int, dtype: str) -> tuple[list, list]:
    vector, scales = np.array(uploads.vector["w"].astype(jnp.float32)), np.array(uploads.scales)
    bits = unpack(np.asarray(uploads.masks["w"]), vector.shape[1])
    clients, own = [], []
    for client in range(slots.num_clients):
        rows = slice(client * held, (client + 1) * held)
        masks = [torch.from_numpy(mask) for mask in bits[rows]]
        row = torch.from_numpy(vector[client]).to(getattr(torch, dtype))
        clients.append((row, masks, scales[rows].tolist()))
        columns = np.asarray(slots.task)[rows].tolist(), np.asarray(slots.weight)[rows].tolist()
        own.append(list(zip(*columns, strict=True)))
    return clients, own


def _prepared(name: str, clients: int, tasks: int, held: int, size: int, dtype: str):
    """A function without arguments, for the measurement of memory."""
    uploads, slots = federation(clients, tasks, held, size, jnp.dtype(dtype))
    if name == "torch loop":
        listed, own = _as_torch(uploads, slots, held, dtype)
        return lambda: torch_aggregate(listed, own, tasks)
    if name == "dense jax":
        return lambda: dense_aggregate(uploads, slots, held)
    return lambda: matu.aggregate(uploads, slots, SERVER)


def _check(uploads, slots, listed, own, held: int) -> None:
    ours = matu.aggregate(uploads, slots, SERVER)
    for theirs in (
        torch_aggregate(listed, own, slots.num_tasks),
        dense_aggregate(uploads, slots, held),
    ):
        found = ours.task_vectors["w"]
        exact = found.dtype == jnp.float32
        similarity_error = np.abs(ours.similarity - np.asarray(theirs[1])).max()
        errors = np.abs(found.astype(jnp.float32) - np.asarray(theirs[0])).max(axis=1)
        # Rounded similarities may lend to a task what others would not: most rows have to agree.
        right = errors <= 1e-4 if exact else np.sort(errors)[: -(-4 * len(errors) // 5)] <= 0.05
        if not (similarity_error <= (1e-5 if exact else 1e-3) and right.all()):  # nor for NaN
            raise SystemExit(
                f"the results differ, by {similarity_error:.2g} in similarities and up to "
                f"{errors.max():.2g} in task vectors; nothing was timed."
            )


def main() -> None:
    parser = options(__doc__ or "", "bench_aggregate")
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--tasks", type=int, default=30)
    parser.add_argument("--held", default="1,4", help="tasks per client")
    parser.add_argument("--parameters", default="300e3,3e6")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--trace", type=Path, help="a folder for traces of one call of the library")
    given = parser.parse_args()
    use_cores()
    outer = jax.jit(lambda uploads, slots: matu.aggregate(uploads, slots, SERVER))
    table = []
    sizes = [int(float(x)) for x in given.parameters.split(",")]
    for dtype, size in itertools.product(given.dtypes.split(","), sizes):
        for held in map(int, given.held.split(",")):
            case = given.clients, given.tasks, held, size
            if 5 * given.clients * held * size * 4 > memory_left():
                print(f"{case}: left out, it does not fit into memory")
                continue
            uploads, slots = federation(*case, jnp.dtype(dtype))
            listed, own = _as_torch(uploads, slots, held, dtype)
            _check(uploads, slots, listed, own, held)
            jax.clear_caches()
            spread, mesh = shared_out(uploads)
            shared = {}
            if mesh:
                shared["shared"] = lambda u=spread, s=slots, m=mesh: matu.aggregate(
                    u, s, SERVER, mesh=m
                )
            times = interleaved(
                {
                    "copy": copier(2**27),
                    "torch loop": lambda listed=listed, own=own: torch_aggregate(
                        listed, own, given.tasks
                    ),
                    "dense jax": lambda u=uploads, s=slots, h=held: dense_aggregate(u, s, h),
                    "library": lambda u=uploads, s=slots: matu.aggregate(u, s, SERVER),
                    "outer jit": lambda u=uploads, s=slots: outer(u, s),
                    "paper": lambda u=uploads, s=slots: matu.aggregate(u, s, PAPER),
                }
                | shared,
                given.repeats,
            )
            traced(lambda u=uploads, s=slots: matu.aggregate(u, s, SERVER), given.trace)
            on_all = times["shared"].median if shared else None
            del uploads, listed, own, spread, shared
            bandwidth = 2 * 2**27 / times["copy"].median
            bits = given.clients * held * size / 8
            width = jnp.dtype(dtype).itemsize
            moved = width * size * (2 * given.clients + 3 * given.tasks + 1) + 2 * bits
            ours = times["library"].median
            grown = {
                name: peak_growth(_prepared, name, *case, dtype)
                for name in ("torch loop", "dense jax", "library")
            }
            table.append(
                {
                    "clients": given.clients,
                    "tasks": given.tasks,
                    "held": held,
                    "d": size,
                    "dtype": dtype,
                    "torch loop ms": 1e3 * times["torch loop"].median,
                    "dense jax ms": 1e3 * times["dense jax"].median,
                    "library ms": 1e3 * ours,
                    "outer jit ms": 1e3 * times["outer jit"].median,
                    "shared ms": on_all and 1e3 * on_all,
                    "paper ms": 1e3 * times["paper"].median,
                    "first call s": times["library"].first,
                    "x torch loop": times["torch loop"].median / ours,
                    "shared x torch loop": on_all and times["torch loop"].median / on_all,
                    "x dense jax": times["dense jax"].median / ours,
                    "of copy floor": moved / bandwidth / ours,
                    **{f"{k} MB": None if v is None else v / 1e6 for k, v in grown.items()},
                }
            )
            finish("aggregate", table, given.out)


if __name__ == "__main__":
    main()
