"""How fast messages are written and read: against safetensors, pickle, and copying memory.

    python experiments/bench/bench_wire.py

A message holds one client's unified vector of d parameters and, for k > 1 tasks, their masks and
scales. "encode" and "decode" are `matu_jax.wire`'s, with all checks: checksum, every number finite,
every mask. The rivals check nothing, and unpickling runs what the message says.
"""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load, save
from timing import copier, finish, interleaved, options, peak_growth

import matu_jax as matu
from matu_jax import wire


def _unified(tasks: int, size: int, dtype: str) -> matu.Unified:
    rng = np.random.default_rng(0)
    vector = jnp.asarray(rng.standard_normal(size, np.float32)).astype(dtype)
    if tasks == 1:
        unified = matu.unify({"w": vector[None]})
    else:
        masks = rng.integers(0, 256, (tasks, -(-size // 8)), np.uint8)
        masks[:, -1] &= (1 << (size % 8 or 8)) - 1
        unified = matu.Unified({"w": vector}, {"w": masks}, jnp.ones(tasks))
    return jax.tree.map(np.asarray, unified)


def _reader(tasks: int, size: int, dtype: str):
    unified = _unified(tasks, size, dtype)
    like = {"w": jax.ShapeDtypeStruct((size,), dtype)}
    data = wire.encode(unified, range(tasks))
    del unified
    return lambda: wire.decode(data, like)


def _writer(tasks: int, size: int, dtype: str):
    unified = _unified(tasks, size, dtype)
    return lambda: wire.encode(unified, range(tasks))


def main() -> None:
    parser = options(__doc__ or "", "bench_wire")
    parser.add_argument("--parameters", default="3e6,87e6")
    parser.add_argument("--tasks", default="1,4")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    given = parser.parse_args()
    table = []
    for dtype in given.dtypes.split(","):
        for size in (int(float(x)) for x in given.parameters.split(",")):
            for tasks in map(int, given.tasks.split(",")):
                unified = _unified(tasks, size, dtype)
                like = {"w": jax.ShapeDtypeStruct((size,), dtype)}
                data = wire.encode(unified, range(tasks))
                plain = {
                    "w": unified.vector["w"],
                    "m": unified.masks["w"],
                    "s": unified.scales,
                }
                pickled, saved = pickle.dumps(plain), save(plain)
                times = interleaved(
                    {
                        "copy": copier(len(data) // 4 * 4),
                        "encode": lambda u=unified, k=tasks: wire.encode(u, range(k)),
                        "decode": lambda d=data, t=like: wire.decode(d, t),
                        "pickle": lambda p=plain: pickle.dumps(p),
                        "unpickle": lambda d=pickled: pickle.loads(d),
                        "save": lambda p=plain: save(p),
                        "load": lambda d=saved: load(d),
                    },
                    given.repeats,
                )
                del unified, pickled, saved, plain
                milliseconds = {f"{name} ms": 1e3 * t.median for name, t in times.items()}
                table.append(
                    {
                        "d": size,
                        "k": tasks,
                        "dtype": dtype,
                        "MB": len(data) / 1e6,
                        **milliseconds,
                        "encode MB/s": len(data) / 1e6 / times["encode"].median,
                        "decode MB/s": len(data) / 1e6 / times["decode"].median,
                        **{
                            f"{name} grows MB": None if grown is None else grown / 1e6
                            for name, work in (("encode", _writer), ("decode", _reader))
                            for grown in [peak_growth(work, tasks, size, dtype)]
                        },
                    }
                )
                finish("messages", table, given.out)


if __name__ == "__main__":
    main()
