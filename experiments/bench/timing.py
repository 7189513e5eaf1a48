"""What the benchmarks share: interleaved timing, memory, what a device can do, tables and JSON."""

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from matu_jax.simulation.placement import AXIS, slot_mesh

PACKAGES = (
    *("jaxlib", "numpy", "torch", "peft", "transformers", "flwr", "ray", "fedjax", "numba"),
    *("libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12", "nvidia-cudnn-cu12"),
)


class Timing(NamedTuple):
    """Seconds of one function.

    Attributes:
      first: the first call, with compilation.
      median: of the calls after it.
      fastest: the same.
    """

    first: float
    median: float
    fastest: float


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Times functions in turn, A B C A B C ..., so that a drift of the machine meets them all."""
    first: dict[str, float] = {}
    steady: dict[str, list[float]] = {name: [] for name in functions}
    for round_index in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds = time.perf_counter() - start
            if round_index == 0:
                first[name] = seconds
            else:
                steady[name].append(seconds)
    return {
        name: Timing(first[name], statistics.median(values), min(values))
        for name, values in steady.items()
    }


def traced(function: Callable[[], Any], folder: Path | None) -> None:
    """Calls a function once more, under the profiler, if there is a folder for what it saw."""
    if folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            jax.block_until_ready(function())


def shared_out(tree: Any) -> tuple[Any, Mesh | None]:
    """Arrays `[rows, n]` with their columns on all devices, and the mesh.

    Others are whole on each device, and those whose columns the devices do not divide. Nothing and
    None where there is one device.
    """
    mesh = slot_mesh()
    if mesh.size == 1:
        return None, None

    def put(x):
        parted = jnp.ndim(x) > 1 and x.shape[1] % mesh.size == 0
        spec = PartitionSpec(None, AXIS) if parted else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.block_until_ready(jax.tree.map(put, tree)), mesh


def copier(size_bytes: int) -> Callable[[], Any]:
    """A function that reads and writes this many bytes each, as fast as the device copies."""
    if jax.default_backend() != "cpu":
        source = jax.numpy.zeros(size_bytes // 4)
        copy = jax.jit(lambda x: x + 1)
        return lambda: copy(source)
    source, target = np.ones(size_bytes // 4, np.float32), np.zeros(size_bytes // 4, np.float32)
    return lambda: np.copyto(target, source)


def multiplier(size: int, dtype: Any) -> tuple[Callable[[], Any], float]:
    """A function in which every device multiplies two square matrices, and its operations."""
    mesh = slot_mesh()
    ones = jnp.ones((mesh.size, size, size), dtype)
    matrices = jax.device_put(ones, NamedSharding(mesh, PartitionSpec(AXIS)))
    product = jax.jit(lambda x: x @ x)
    return lambda: product(matrices), 2.0 * mesh.size * size**3


def keep_programs(folder: str) -> None:
    """Keeps compiled programs, so that the processes that measure memory need not compile."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def peak_growth(work: Callable[..., Any], *arguments: Any) -> int | None:
    """Bytes by which the peak of resident memory grows in a fresh process that calls `work`.

    `work` returns a function without arguments; what it allocates before it returns that does not
    count. None where it cannot be told (no Linux), or the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(send, work, arguments))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        return None
    finally:
        process.join()


def _measure(send: Any, work: Callable[..., Any], arguments: tuple) -> None:
    function = work(*arguments)
    status = Path("/proc/self/status")
    if not status.exists():
        send.send(None)
        return

    def field(name: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or it would serve the work unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is there now
    before = field("VmRSS")
    jax.block_until_ready(function())
    send.send(field("VmHWM") - before)


def children_bytes() -> int | None:
    """Memory of all processes that descend from this one, pages that they share divided among them.

    None where it cannot be told (no Linux).
    """
    if not Path("/proc/self/smaps_rollup").exists():
        return None
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # where it has ended meanwhile
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
    total = 0
    for process in parents:
        ancestor = parents[process]
        while ancestor in parents and ancestor != os.getpid():
            ancestor = parents[ancestor]
        if ancestor == os.getpid():
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
                total += next(int(x.split()[1]) for x in lines if x.startswith("Pss:")) * 1024
    return total


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    device = jax.devices()[0]
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x
        ]
        cpu = names[0] if names else cpu
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "command": shlex.join(["python", *sys.argv]),
        "device": f"{device.device_kind} ({device.platform})",
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "packages": found,
    }


def options(doc: str, name: str) -> argparse.ArgumentParser:
    """The command line that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each function")
    parser.add_argument("--out", type=Path, default=Path(f"{name}.json"), help="JSON to write")
    return parser


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows as a table; the first row has all columns."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in rows[0]))
    Console(width=240).print(table)


def finish(title: str, rows: list[dict[str, Any]], out: Path, **more: Any) -> None:
    """Prints the rows as a table and writes them, and what else is given, with the machine."""
    show(title, rows)
    out.write_text(json.dumps({"machine": machine(), "rows": rows, **more}, indent=1) + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def memory_left() -> int:
    """Bytes of memory that are free now, or a guess of 8 GB."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return 8 * 10**9
    line = next(x for x in info.read_text().splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024
