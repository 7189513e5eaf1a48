"""How fast messages are written and read: against safetensors, pickle, and copying memory.

    python experiments/bench/bench_wire.py

A message holds one client's unified vector of d parameters and, for k > 1 tasks, their masks (of
independent bits at density 3/4, as two tasks have that agree on half of the signs) and scales.
"encode" and "decode" are `matu_jax.messages.wire`'s from and to float32 arrays, with rounding and
all checks: checksum, every number finite, every mask; "zip" and "unzip" are the same with masks
compressed. The rivals write what was rounded before, check nothing, and unpickling runs what the
message says.
"""

import pickle
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load, save
from timing import copier, finish, interleaved, options, peak_growth

import matu_jax as matu
from matu_jax.messages import wire
from matu_jax.messages.layout import Precision
from matu_jax.messages.quantisation import rounded


def _unified(tasks: int, size: int) -> matu.Unified:
    rng = np.random.default_rng(0)
    vector = rng.standard_normal(size, np.float32)
    if tasks == 1:
        return jax.tree.map(np.asarray, matu.unify({"w": vector[None]}))
    first, second = (rng.integers(0, 256, (tasks, -(-size // 8)), np.uint8) for _ in range(2))
    masks = first | second
    masks[:, -1] &= (1 << (size % 8 or 8)) - 1
    return matu.Unified({"w": vector}, {"w": masks}, jnp.ones(tasks))


def _reader(tasks: int, size: int, precision: Precision):
    data = wire.encode(_unified(tasks, size), range(tasks), precision=precision)
    like = {"w": jax.ShapeDtypeStruct((size,), jnp.float32)}
    return lambda: wire.decode(data, like)


def _writer(tasks: int, size: int, precision: Precision):
    unified = _unified(tasks, size)
    return lambda: wire.encode(unified, range(tasks), precision=precision)


def _plain(unified: matu.Unified, precision: Precision) -> dict[str, np.ndarray]:
    """What the rivals write; bfloat16 as whole numbers, which safetensors knows in NumPy."""
    leaves = jax.tree.leaves(rounded({"w": unified.vector["w"][None]}, precision))
    arrays = [np.asarray(leaf)[0] for leaf in leaves]
    named = {
        f"v{i}": x.view(np.uint16) if x.dtype == jnp.bfloat16 else x for i, x in enumerate(arrays)
    }
    modulators = {"m": unified.masks["w"], "s": np.asarray(unified.scales)}
    modulators = modulators if len(unified.scales) > 1 else {}
    return named | modulators


def _row(tasks: int, size: int, precision: Precision, repeats: int) -> dict:
    unified = _unified(tasks, size)
    like = {"w": jax.ShapeDtypeStruct((size,), jnp.float32)}

    def encode(compress: bool) -> bytes:
        return wire.encode(unified, range(tasks), precision=precision, compress=compress)

    data, packed = encode(False), encode(True)
    plain = _plain(unified, precision)
    pickled, saved = pickle.dumps(plain), save(plain)
    work = {
        "copy": copier(len(data) // 4 * 4),
        "encode": lambda: encode(False),
        "decode": lambda: wire.decode(data, like),
        "pickle": lambda: pickle.dumps(plain),
        "unpickle": lambda: pickle.loads(pickled),
        "save": lambda: save(plain),
        "load": lambda: load(saved),
    }
    if tasks > 1:
        work |= {"zip": lambda: encode(True), "unzip": lambda: wire.decode(packed, like)}
    times = interleaved(work, repeats)
    names = [*work] if tasks > 1 else [*work, "zip", "unzip"]
    return {
        "d": size,
        "k": tasks,
        "vector": precision,
        "MB": len(data) / 1e6,
        "zipped MB": len(packed) / 1e6,
        **{f"{name} ms": 1e3 * times[name].median if name in times else None for name in names},
        "encode MB/s": len(data) / 1e6 / times["encode"].median,
        "decode MB/s": len(data) / 1e6 / times["decode"].median,
    }


def main() -> None:
    parser = options(__doc__ or "", "bench_wire")
    parser.add_argument("--parameters", default="3e6,87e6")
    parser.add_argument("--tasks", default="1,4")
    parser.add_argument("--precisions", default=",".join(get_args(Precision)))
    given = parser.parse_args()
    table = []
    for size in (int(float(x)) for x in given.parameters.split(",")):
        for precision in given.precisions.split(","):
            for tasks in map(int, given.tasks.split(",")):
                row = _row(tasks, size, precision, given.repeats)
                for name, work in (("encode", _writer), ("decode", _reader)):
                    grown = peak_growth(work, tasks, size, precision)
                    row[f"{name} grows MB"] = None if grown is None else grown / 1e6
                table.append(row)
                finish("messages", table, given.out)


if __name__ == "__main__":
    main()
