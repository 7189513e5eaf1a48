"""Rounds of two processes: each computes the server's whole arithmetic, or they share it out.

    python experiments/bench/bench_hosts.py

Two processes on this machine, one CPU device each, train all parameters of a transformer with
random weights for MaTU, as `python -m matu_jax.train` does; runs of both kinds take turns. Seconds
are the medians over rounds of all runs of a kind, but the first two, which compile; "round" is
their sum, without training, data and evaluation. "peak MB" is the larger resident memory of the
two. Between two hosts a network would slow down what crosses, "exchange" and "download" most.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from timing import finish, options

from matu_jax.models import embedded
from matu_jax.models.vit import VisionTransformer, ViTShape

PROGRAM = """
import resource, sys
from matu_jax import train
from matu_jax.simulation import programs

programs.SHARDED_FROM = int(sys.argv[1])
code = train.main(["train", *sys.argv[3:]])
with open(sys.argv[2], "w") as file:
    file.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
sys.exit(code)
"""
FROM = {"each": 10**12, "shared": 0}
PHASES = {
    "exchange": "exchange",
    "download": "server_download",
    "unify": "client_unify",
    "aggregate": "server_aggregation",
    "checkpoint": "checkpoint",
}


def checkpoint(folder: Path, width: int, depth: int) -> Path:
    """A random checkpoint for the embedded benchmark's tasks."""
    shape = ViTShape(width=width, depth=depth, heads=4, mlp_width=4 * width)
    model = VisionTransformer(shape, rngs=nnx.Rngs(0))
    embedded.write(folder / "random.safetensors", shape, model, np.eye(10, width))
    return folder / "random.safetensors"


def run(kind: str, weights: Path, rounds: int, folder: Path) -> tuple[list[dict], float, int]:
    """One run of two processes: its records, the larger peak in MB, and the parameters trained."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    fields = {
        "rounds": rounds,
        "model.checkpoint": weights,
        "model.trainable": "full",
        "local.steps": 1,
        "local.batch_examples": 2,
        "evaluation.every_rounds": rounds,
        "evaluation.max_examples": 8,
    }
    words = [
        f"--config={Path(__file__).parents[1] / 'quickstart.py'}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
        *(f"--workdir={folder / 'run'}", f"--coordinator=localhost:{port}", "--processes=2"),
    ]
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", PROGRAM, str(FROM[kind]), folder / f"peak{process}"),
                *(*words, f"--process={process}"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
        )
        for process in range(2)
    ]
    texts = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("\n".join(texts))
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    peak = max(int((folder / f"peak{process}").read_text()) for process in range(2)) * 1024 / 1e6
    line = next(line for line in texts[0].splitlines() if "parameters trained" in line)
    return records, peak, int(line.split()[2].replace(",", ""))


def main() -> None:
    parser = options(__doc__ or "", "bench_hosts")
    parser.set_defaults(repeats=2)  # runs of each kind
    parser.add_argument("--rounds", type=int, default=6, help="of a run")
    parser.add_argument("--width", type=int, default=256, help="of the transformer")
    parser.add_argument("--depth", type=int, default=6, help="of the transformer")
    given = parser.parse_args()
    records: dict[str, list[dict]] = {kind: [] for kind in FROM}
    peaks: dict[str, float] = dict.fromkeys(FROM, 0.0)
    size = 0
    with tempfile.TemporaryDirectory() as name:
        weights = checkpoint(Path(name), given.width, given.depth)
        for repeat in range(given.repeats):
            for kind in FROM:
                folder = Path(name) / f"{kind}{repeat}"
                folder.mkdir()
                found, peak, size = run(kind, weights, given.rounds, folder)
                records[kind] += [record["seconds"] for record in found[2:]]
                peaks[kind] = max(peaks[kind], peak)
    rows: list[dict[str, Any]] = []
    for kind, seconds in records.items():
        row = {
            f"{name} s": statistics.median(record[phase] for record in seconds)
            for name, phase in PHASES.items()
        }
        rows.append(
            {"server": kind, "parameters": size}
            | row
            | {"round s": sum(row.values()), "peak MB": peaks[kind]}
        )
    finish("two processes", rows, given.out)


if __name__ == "__main__":
    main()
