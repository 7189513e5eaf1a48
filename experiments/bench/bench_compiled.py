"""What MaTU's programs cost on accelerators, none of which need be there.

    pip install -e '.[compilers]'
    python experiments/bench/bench_compiled.py
    python experiments/bench/bench_compiled.py --tables aggregator --devices h100 --only unify

XLA compiles for a TPU or an NVIDIA GPU that is described to it, from shapes alone, and what it has
compiled is read: bytes through memory (`compiled/traffic.py` says how they are counted), kernels,
temporary memory, matrix products, what crosses between devices, and how long it took to compile.
Nothing runs, so that nothing is timed but the compiler: milliseconds are bytes over bandwidth and
operations over rate, the time below which a step cannot fall. The tables:

    aggregator  `unify` and the server's round, beside dense arrays in JAX; with bounds
    options     every choice that they have
    training    a step of local training of the experiments, with the memory that the plan predicts
    slices      the same on slices of several chips
    round       every program of a round on several devices, and what crosses between them

Each program is compiled in a process of its own, which is ended after --seconds. "x floor" is bytes
over what it takes to read every argument once and to write every result once.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: it looks for no device

TABLES = ("aggregator", "options", "training", "slices", "round")
EXPERIMENTS = ("vitb32", "vitl14", "vitb32_tfds30", "vitb16_emr30")
SLICES = (("v5e", "2x4"), ("v5p", "2x2x1"), ("h100", "1x1x8"))
ROUNDS = (("v5e", "4x4"), ("v5p", "2x2x4"), ("h100", "1x1x8"))
ROUND = ("download", "training", "exchange", "clients' unify", "aggregation")


@dataclasses.dataclass(frozen=True)
class Case:
    """What one process compiles: a program of a table, for a device or a slice."""

    table: str
    program: str
    device: str
    shape: str = ""


def cases(table: str, devices: list[str]) -> Iterator[Case]:
    """All cases of a table."""
    from compiled import programs

    if table in ("slices", "round"):
        names = EXPERIMENTS if table == "slices" else ROUND
        for device, shape in SLICES if table == "slices" else ROUNDS:
            if device in devices:
                yield from (Case(table, name, device, shape) for name in names)
        return
    found = {"aggregator": programs.AGGREGATOR, "options": programs.OPTIONS}
    for device in devices:
        yield from (Case(table, name, device) for name in found.get(table, EXPERIMENTS))


def built(case: Case) -> Any:
    """The program of a case, for its devices."""
    from compiled import programs
    from compiled.devices import DEVICES, topology

    found = topology(case.device, case.shape)
    if case.table in ("aggregator", "options"):
        table = programs.AGGREGATOR if case.table == "aggregator" else programs.OPTIONS
        program = table[case.program]().on(found[0])
        return program._replace(more={"floor bytes": program.floor_bytes()})
    from compiled import experiments

    name = "vitb32" if case.table == "round" else case.program
    whole = experiments.experiment(name, found, DEVICES[case.device].memory_bytes)
    if case.table == "round":
        return experiments.parts_of_round(whole)[case.program]()
    return experiments.training(whole)


def measured(case: Case, hlo: Path | None) -> dict[str, Any]:
    """Compiles a program and reads what came out."""
    import jax
    from compiled.devices import DEVICES
    from compiled.kernels import Kernels
    from compiled.traffic import describe, traffic

    device, program = DEVICES[case.device], built(case)
    function = program.function
    kernels = Kernels(device.platform, device.cache_bytes)
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    start = time.perf_counter()
    with kernels.noted():
        lowered = jitted.lower(*program.arguments)
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if text is None or memory is None:
        raise SystemExit(f"{case}: XLA says nothing of what it has compiled.")
    if hlo:
        hlo.mkdir(parents=True, exist_ok=True)
        words = "-".join(dataclasses.astuple(case)).replace(" ", "_").replace("/", "_")
        (hlo / f"{words}.txt").write_text(text, "utf-8")
    found, times = traffic(text, device.platform, kernels.find), program.times
    row = {
        "bytes": found.bytes / times,
        "most bytes": found.most_bytes / times,
        "launches": found.launches / times,
        "operations": {dtype: count / times for dtype, count in found.operations.items()},
        "temporary bytes": memory.temp_size_in_bytes,
        "argument bytes": memory.argument_size_in_bytes,
        "result bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "compile s": seconds,
        **program.more,
        "movers": [describe(mover) for mover in found.largest(6)],
        "collectives": [x._asdict() for x in found.collectives],
        "unknown loops": sorted(set(found.unknown_loops)),
        "unknown kernels": sorted(set(found.unknown_kernels)),
    }
    row["memory ms"] = 1e3 * row["bytes"] / device.bytes_per_s
    row["products ms"] = 1e3 * sum(row["operations"].values()) / device.operations_per_s
    row["link ms"] = 1e3 * sum(x.link_bytes for x in found.collectives) / device.link_bytes_per_s
    if floor := program.more.get("floor bytes"):
        row["x floor"] = found.bytes / floor
        row["most x floor"] = found.most_bytes / floor
    return row


def cudnn_folders() -> list[str]:
    """Where the cuDNN that was installed by pip has its libraries, which JAX asks for a version."""
    try:
        found = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        return []
    places = found.submodule_search_locations if found else None
    return [str(Path(place) / "lib") for place in places or []]


def in_own_process(case: Case, seconds: float, hlo: Path | None) -> dict[str, Any]:
    """The row of a case, or why there is none."""
    from compiled.devices import DEVICES, GPU_FLAGS

    words = [json.dumps(dataclasses.asdict(case)), *(["--hlo", str(hlo)] if hlo else [])]
    environment = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if DEVICES[case.device].platform == "cuda":
        flags = f"{os.environ.get('XLA_FLAGS', '')} {GPU_FLAGS}"
        environment["XLA_FLAGS"] = flags.strip()
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(
            [*cudnn_folders(), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        )
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--case", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not compiled after {seconds:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": lines[-1][:300], "after s": time.perf_counter() - start}
    return json.loads(done.stdout.splitlines()[-1])


COLUMNS = {
    "aggregator": "x floor,most x floor,launches,temporary MB,memory ms,compile s",
    "options": "x floor,most x floor,launches,temporary MB,memory ms,compile s",
    "training": "GB a step,memory ms,products ms,temporary GB,needed GB,predicted GB,launches,"
    "compile s",
    "round": "a round,temporary GB,memory ms,link MB,link ms,collectives,compile s",
}
COLUMNS["slices"] = COLUMNS["training"]


def cells(row: dict[str, Any], table: str) -> dict[str, Any]:
    """A row as the table has it."""
    title = " ".join(x for x in (row["device"], row["shape"]) if x)
    start = {"program": row["program"], "device": title}
    if "failed" in row:
        return start | {"failed": row["failed"]}
    known = row | {
        "GB a step": row["bytes"] / 1e9,
        "temporary MB": row["temporary bytes"] / 1e6,
        "temporary GB": row["temporary bytes"] / 1e9,
        "needed GB": sum(row[f"{x} bytes"] for x in ("temporary", "argument", "result")) / 1e9,
        "link MB": sum(x["link_bytes"] for x in row["collectives"]) / 1e6,
        "collectives": ", ".join(sorted({x["opcode"] for x in row["collectives"]})) or "none",
        "launches": round(row["launches"]),
    }
    return start | {name: known.get(name) for name in COLUMNS[table].split(",")}


def show_largest(rows: list[dict[str, Any]]) -> None:
    """Prints what moves most in every program."""
    for row in rows:
        for mover in row.get("movers", [])[:3]:
            print(
                f"{row['program']}, {row['device']} {row['shape']}: {mover['MB']:,.0f} MB in "
                f"{mover['times']} x {mover['what']} {mover['shape']}, {mover['where']}"
            )
        for what in ("unknown loops", "unknown kernels"):
            for place in row.get(what, []):
                print(f"{row['program']}, {row['device']}: {what}: {place}")


def main() -> None:
    from compiled.devices import DEVICES
    from timing import machine, show

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--devices", default=",".join(DEVICES))
    parser.add_argument("--only", default="", help="programs whose names have this in them")
    parser.add_argument("--seconds", type=float, default=600, help="for one program")
    parser.add_argument("--keep", action="store_true", help="keep the rows that OUT has already")
    parser.add_argument("--hlo", type=Path, help="a folder for what XLA has compiled, as text")
    parser.add_argument("--out", type=Path, default=Path("accelerators"), help="folder for JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measured(Case(**json.loads(given.case)), given.hlo)))
        return
    for option, asked, there in (
        ("tables", given.tables, TABLES),
        ("devices", given.devices, DEVICES),
    ):
        if unknown := [name for name in asked.split(",") if name not in there]:
            raise SystemExit(
                f"--{option}: found {unknown[0]!r}, expected some of {', '.join(there)}."
            )
    given.out.mkdir(parents=True, exist_ok=True)
    commit = machine()["commit"]
    for table in given.tables.split(","):
        file = given.out / f"{table}.json"
        rows = json.loads(file.read_text("utf-8"))["rows"] if given.keep and file.exists() else []
        rows = [row for row in rows if "failed" not in row]
        there = {tuple(row[x] for x in ("program", "device", "shape")) for row in rows}
        for case in cases(table, given.devices.split(",")):
            key = dataclasses.astuple(case)[1:]
            if given.only not in case.program or key in there:
                continue
            start = dict(zip(("program", "device", "shape"), key, strict=True))
            rows.append(
                {**start, "commit": commit} | in_own_process(case, given.seconds, given.hlo)
            )
            print(json.dumps(cells(rows[-1], table)), flush=True)
            known = {name: device._asdict() for name, device in DEVICES.items()}
            whole = {"machine": machine(), "devices": known, "rows": rows}
            file.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
        done = [cells(row, table) for row in rows if "failed" not in row]
        if done:
            show(table, done)
        show_largest(rows)


if __name__ == "__main__":
    main()
