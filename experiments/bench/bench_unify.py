"""How fast `unify` is: against a PyTorch loop, against dense JAX, and against copying memory.

    python experiments/bench/bench_unify.py
    python experiments/bench/bench_unify.py --threads 1

The floor of eqs. 1 to 4 is reading T x d numbers once and writing d numbers and T x d bits, at the
speed at which this machine copies memory. "library" is `matu.unify(x, magnitude="max")`, which
jits inside; "outer jit" is the same under `jax.jit`, with checks done once; "shared" is
`matu.unify(x, mesh=mesh)` with the parameters sharded over all devices, one per core on CPU, on
which they lie already. "numba", on CPU in float32, is what a compiler reaches that reads every
number from memory once, on all cores: pip install numba, or its columns stay empty.
"""

import os
import sys

if "--threads" in sys.argv[:-1]:  # before anything starts a pool of threads
    cores = sorted(os.sched_getaffinity(0))[: int(sys.argv[sys.argv.index("--threads") + 1])]
    os.sched_setaffinity(0, cores)

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rivals import dense_unify, numba_unify, torch_unify
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

unify = partial(matu.unify, magnitude="max")  # as EMR-Merging, which the rivals compute


def _vectors(rows: int, size: int, dtype: str) -> jax.Array:
    keys = jax.random.split(jax.random.key(0), rows)
    draw = jax.jit(lambda keys: jax.lax.map(lambda k: jax.random.normal(k, (size,)), keys))
    return jax.block_until_ready(draw(keys).astype(jnp.dtype(dtype)))


def _as_torch(x: jax.Array, dtype: str) -> list:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = torch.from_numpy(np.array(x.astype(jnp.float32))).to(getattr(torch, dtype))
    return list(whole.to(device))


def _torch_loop(rows: list):
    def call():
        result = torch_unify(rows)
        if rows[0].is_cuda:
            torch.cuda.synchronize()
        return result

    return call


def _prepared(name: str, rows: int, size: int, dtype: str):
    """A function without arguments, for the measurement of memory."""
    x = _vectors(rows, size, dtype)
    if name == "torch loop":
        return _torch_loop(_as_torch(x, dtype))
    function = {
        "library": lambda x: unify({"w": x}),
        "dense jax": dense_unify,
    }[name]
    jax.block_until_ready(function(x[:, :8]))  # JAX itself is not what is measured
    return lambda: function(x)


def _numba(x: jax.Array) -> dict:
    """The call by its name, checked; nothing where it does not apply."""
    call = numba_unify()
    if call is None or x.dtype != jnp.float32 or x.shape[1] % 8 or jax.default_backend() != "cpu":
        return {}
    values, ours = np.asarray(x), unify({"w": x})
    vector, masks, scales = call(values)
    np.testing.assert_array_equal(vector, ours.vector["w"])
    bits = np.unpackbits(masks, axis=1, bitorder="little").astype(bool)
    np.testing.assert_array_equal(bits, unpack(np.asarray(ours.masks["w"]), x.shape[1]))
    np.testing.assert_allclose(scales, ours.scales, rtol=1e-4)
    return {"numba": lambda: call(values)}


def _check(x: jax.Array, rows: list) -> None:
    ours, theirs = unify({"w": x}), torch_unify(rows)
    vector = np.asarray(ours.vector["w"].astype(jnp.float32))
    np.testing.assert_array_equal(vector, theirs[0].float().cpu().numpy())
    scales = np.array([float(scale) for scale in theirs[2]])
    np.testing.assert_allclose(np.asarray(ours.scales), scales, rtol=1e-4)


def main() -> None:
    parser = options(__doc__ or "", "bench_unify")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rows", default="8,30,100")
    parser.add_argument("--parameters", default="300e3,3e6,10e6,30e6,87e6")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--trace", type=Path, help="a folder for traces of one call of the library")
    given = parser.parse_args()
    use_cores()
    torch.set_num_threads(given.threads)
    wanted = [
        (int(rows), int(float(size)), dtype)
        for dtype in given.dtypes.split(",")
        for rows in given.rows.split(",")
        for size in given.parameters.split(",")
    ]
    table = []
    for rows, size, dtype in wanted:
        width = jnp.dtype(dtype).itemsize
        if 4 * rows * size * width + 4 * rows * size > memory_left():
            print(f"{rows} x {size:,} {dtype}: left out, it does not fit into memory")
            continue
        x = _vectors(rows, size, dtype)
        tensors = _as_torch(x, dtype)
        _check(x, tensors)
        numba = _numba(x)
        jax.clear_caches()
        outer = jax.jit(lambda x: unify({"w": x}))
        spread, mesh = shared_out({"w": x})
        shared = {"shared": lambda s=spread, m=mesh: unify(s, mesh=m)} if mesh else {}
        copied = min(rows * size * width, 2**28)
        times = interleaved(
            {
                "copy": copier(copied),
                "torch loop": _torch_loop(tensors),
                "dense jax": lambda x=x: dense_unify(x),
                "library": lambda x=x: unify({"w": x}),
                "outer jit": lambda x=x, outer=outer: outer(x),
            }
            | shared
            | numba,
            given.repeats,
        )
        traced(lambda x=x: unify({"w": x}), given.trace)
        once = times["numba"].median if numba else None
        on_all = times["shared"].median if shared else None
        del x, tensors, numba, spread, shared
        bandwidth = 2 * copied / times["copy"].median
        floor = (rows * size * width + size * width + rows * size / 8) / bandwidth
        ours = times["library"].median
        table.append(
            {
                "T": rows,
                "d": size,
                "dtype": dtype,
                "threads": given.threads,
                "copy GB/s": bandwidth / 1e9,
                "torch loop ms": 1e3 * times["torch loop"].median,
                "dense jax ms": 1e3 * times["dense jax"].median,
                "library ms": 1e3 * ours,
                "outer jit ms": 1e3 * times["outer jit"].median,
                "shared ms": on_all and 1e3 * on_all,
                "numba ms": once and 1e3 * once,
                "first call s": times["library"].first,
                "x torch loop": times["torch loop"].median / ours,
                "x dense jax": times["dense jax"].median / ours,
                "shared x torch loop": on_all and times["torch loop"].median / on_all,
                "of copy floor": floor / ours,
                "shared of copy floor": on_all and floor / on_all,
                "numba of copy floor": once and floor / once,
                **{
                    f"{name} MB": None if grown is None else grown / 1e6
                    for name in ("torch loop", "dense jax", "library")
                    for grown in [peak_growth(_prepared, name, rows, size, dtype)]
                },
            }
        )
        finish("unify", table, given.out)


if __name__ == "__main__":
    main()
