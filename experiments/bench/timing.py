"""What the benchmarks share: interleaved timing, memory, the copy bandwidth, tables and JSON."""

import argparse
import ctypes
import datetime
import gc
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table


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


def copier(size_bytes: int) -> Callable[[], Any]:
    """A function that reads and writes this many bytes each, as fast as the device copies."""
    if jax.default_backend() != "cpu":
        source = jax.numpy.zeros(size_bytes // 4)
        copy = jax.jit(lambda x: x + 1)
        return lambda: copy(source)
    source, target = np.ones(size_bytes // 4, np.float32), np.zeros(size_bytes // 4, np.float32)
    return lambda: np.copyto(target, source)


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
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "device": f"{device.device_kind} ({device.platform})",
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def options(doc: str, name: str) -> argparse.ArgumentParser:
    """The command line that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each function")
    parser.add_argument("--out", type=Path, default=Path(f"{name}.json"), help="JSON to write")
    return parser


def finish(title: str, rows: list[dict[str, Any]], out: Path) -> None:
    """Prints the rows as a table and writes them with the machine as JSON."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in rows[0]))
    Console(width=200).print(table)
    out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


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
