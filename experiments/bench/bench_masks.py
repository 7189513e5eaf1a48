"""How far zlib compresses masks: against their entropy, and in the messages of a real run.

    python experiments/bench/bench_masks.py

First, masks of independent bits at given densities: bits per mask bit of the two ways that
`matu_jax.messages.wire` tries (a Huffman code of the bytes; of runs too), of zlib's levels 1 and 6,
and the entropy. Then the messages of experiments/quickstart.py: two rounds are run, and what the
server sends to its clients is encoded with masks as they are and compressed.
"""

import zlib
from pathlib import Path

import jax
import numpy as np
from timing import finish, options

from matu_jax import algorithms, models
from matu_jax.messages import wire
from matu_jax.messages.clients import of_client
from matu_jax.runs.commandline import read_config
from matu_jax.simulation import rounds
from matu_jax.simulation.federation import federate

QUICKSTART = Path(__file__).parents[1] / "quickstart.py"


def _bits(masks: bytes, level: int, strategy: int) -> float:
    work = zlib.compressobj(level, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
    return len(work.compress(masks) + work.flush()) / len(masks)


def _independent(density: float, bits: int) -> dict:
    drawn = np.random.default_rng(0).random(bits) < density
    masks = np.packbits(drawn, bitorder="little").tobytes()
    p = np.array([density, 1 - density])
    return {
        "density": density,
        "entropy": float(-(p * np.log2(np.maximum(p, 1e-300))).sum()),
        "Huffman": _bits(masks, 1, zlib.Z_HUFFMAN_ONLY),
        "runs": _bits(masks, 1, zlib.Z_RLE),
        "level 1": _bits(masks, 1, zlib.Z_DEFAULT_STRATEGY),
        "level 6": _bits(masks, 6, zlib.Z_DEFAULT_STRATEGY),
    }


def _messages(held: int) -> list[dict]:
    words = [
        "",
        f"--config={QUICKSTART}",
        "--config.rounds=2",
        "--config.evaluation.every_rounds=2",
    ]
    config, *_ = read_config([*words, f"--config.data.tasks_per_client={held}"], "")
    federation = federate(config)
    slots = federation.slots
    model = models.build_classifier(config.model, federation.tasks, seed=config.seed)
    for result in rounds.run(config, algorithms.build(config), model, federation):
        unified = jax.tree.map(np.asarray, result.state.downloads)
    bits = np.unpackbits(np.concatenate([m.ravel() for m in jax.tree.leaves(unified.masks)]))
    rows = []
    for precision in ("float32", "bfloat16", "int8"):
        size = dict.fromkeys((False, True), 0)
        for client in range(slots.num_clients):
            one, tasks = of_client(unified, slots, client)
            for compress in size:
                data = wire.encode(one, tasks, precision=precision, compress=compress)
                size[compress] += len(data)
                wire.decode(data, model.base)
        kilobits = [8 * total / slots.num_clients / 1000 for total in size.values()]
        rows.append(
            {
                "tasks a client": held,
                "vector": precision,
                "density": float(bits.mean()),
                "kbit a message": kilobits[0],
                "compressed": kilobits[1],
                "saved %": 100 * (1 - kilobits[1] / kilobits[0]),
            }
        )
    return rows


def main() -> None:
    parser = options(__doc__ or "", "bench_masks")
    parser.add_argument("--densities", default="0.5,0.6,0.7,0.75,0.8,0.9,0.95,0.99,0.999")
    parser.add_argument("--bits", type=float, default=8e6)
    parser.add_argument("--held", default="2,4", help="tasks a client holds, in real messages")
    given = parser.parse_args()
    rows = [_independent(float(x), int(given.bits)) for x in given.densities.split(",")]
    finish("bits per bit of a mask", rows, given.out)
    for held in filter(None, given.held.split(",")):
        out = given.out.with_stem(f"{given.out.stem}_{held}")
        finish("messages of the quickstart", _messages(int(held)), out)


if __name__ == "__main__":
    main()
