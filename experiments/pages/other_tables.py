"""The tables of the quickstart, own image folders, performance and reliability."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from measured import bold_highest, grid, read, recorded, three_digits, timings

_QUICKSTART = {
    "matu": "**`matu`** (quickstart)",
    "per_task": "`per_task` (reference)",
    "matu, vectors": "`matu`, vectors instead of changes, no transfer",
    "matu, vectors, maximum magnitude": "the same, maximum magnitude",
    "individual": "`individual`",
    "fedavg": "`fedavg`",
}
_README = {**_QUICKSTART, "matu, vectors": "`matu`, folding whole vectors, as in the paper"}
del _README["matu, vectors, maximum magnitude"]
_UNIFY = "unify unify_one_thread unify_87_million unify_bfloat16"
_UNIFY_MEMORY = "unify unify_87_million unify_bfloat16"
_AGGREGATE = "aggregate aggregate_8_tasks aggregate_100_tasks aggregate_30_million"


def quickstart(names: Mapping[str, str], *, whole: bool) -> str:
    """A row an algorithm; with validation accuracy in the whole table."""
    found = {row["name"]: row for row in read("quickstart")["rows"]}
    rows = []
    for name, words in names.items():
        row = found[name]
        seeds = ", ".join(f"{x:.1f}" for x in row["test accuracy of each seed, %"])
        validation = [f"{row['validation accuracy, %']:.1f}"] if whole else []
        sent = str(row["uplink, kbit per client and round"])
        rows.append([words, recorded(row["test accuracy, %"]), seeds, *validation, sent])
    title = "test accuracy, % (mean ± std)" if whole else "test accuracy, %"
    last = ["validation, %"] * whole + ["uplink, kbit per client and round"]
    return grid(["algorithm", title, "seeds 0, 1, 2", *last], rows)


def own_folders() -> str:
    found = read("own_folders")["rows"]
    names = [name for name in found[0] if name != "task"]
    rows = []
    for row in found:
        cells = [recorded(row[name]) for name in names]
        rows.append([row["task"], *(cells if "at chance" in row["task"] else bold_highest(cells))])
    return grid(["task", *(f"`{name}`" if name == "matu" else name for name in names)], rows)


def timed(files: str, columns: str) -> str:
    """Columns, divided by commas, of the rows of files."""
    names = columns.split(",")
    return grid(names, [[three_digits(row[name]) for name in names] for row in timings(files)])


def unify_shared() -> str:
    columns = "T,d,copy GB/s,torch loop ms,library ms,outer jit ms,shared ms,x torch loop"
    names = f"{columns},shared x torch loop,of copy floor,shared of copy floor".split(",")
    rows = []
    for row in timings("unify_shared unify_30_million unify_100"):
        cells = {name: three_digits(row[name]) for name in names}
        cells["d"] += "" if row["dtype"] == "float32" else f" ({row['dtype']})"
        rows.append(list(cells.values()))
    return grid(names, rows)


def aggregate_memory() -> str:
    names = ["clients", "tasks", "held", "d", "dtype"]
    names += ["torch loop MB", "dense jax MB", "library MB"]
    rows = [
        [
            *(three_digits(row[name]) for name in names),
            f"{row['library MB'] / row['dense jax MB']:.2f}",
        ]
        for row in timings(_AGGREGATE)
    ]
    return grid([*names, "of dense jax"], rows)


def trace() -> str:
    title = "one call at T = 8, d = 10 million; `--trace FOLDER` makes such a trace"
    return grid([title, "ms"], [[row["kernel"], str(row["ms"])] for row in timings("unify_trace")])


def exponents() -> str:
    axes = {"clients": "clients", "held": "tasks a client", "parameters": "parameters"}
    quantities = {"unify s": "unify", "aggregate s": "aggregation", "grows MB": "memory"}
    fits = {
        (fit["quantity"], fit["axis"]): f"{fit['upper half']:.2f}"
        for fit in read("performance/scale")["fits"]
    }
    rows = [[words, *(fits[name, axis] for axis in axes)] for name, words in quantities.items()]
    return grid(["exponent", *axes.values()], rows)


def costs() -> str:
    """How many times as fast ours is as others."""

    def times(file: str, column: str, decimals: int = 1, **which: Any) -> str:
        (row,) = (r for r in timings(file) if all(r[key] == x for key, x in which.items()))
        return f"{row[column]:.{decimals}f}"

    vectors = {"T": 8, "d": 10_000_000}
    server = {"tasks": 30, "held": 4, "d": 3_000_000, "dtype": "float32"}
    torch, peft = "a loop in PyTorch", "a loop over PyTorch + PEFT"
    shared = "the same, parameters sharded over two CPU devices"
    two_threads = times("unify", "x torch loop", **vectors)
    one_thread = times("unify_one_thread", "x torch loop", **vectors)
    rows = [
        (
            "`unify`, 8 task vectors of 10 million parameters",
            torch,
            f"{two_threads} (one thread: {one_thread})",
        ),
        (shared, torch, times("unify_shared", "shared x torch loop", **vectors)),
        (
            "the server's round, 30 clients with 4 of 30 tasks, 3 million parameters",
            torch,
            times("aggregate", "x torch loop", **server),
        ),
        (shared, torch, times("aggregate", "shared x torch loop", **server)),
        (
            "local training, 30 clients, this benchmark's transformer",
            peft,
            times("clients", "x rival", rival="peft"),
        ),
        ("local training, CLIP ViT-B/32", peft, times("clients_clip", "x rival", 2)),
        ("local training, a perceptron", "fedjax", times("clients", "x rival", 2, rival="fedjax")),
        (
            "a whole round of FedAvg, 30 clients",
            "Flower's simulation",
            times("round", "x flower", clients=30),
        ),
    ]
    return grid(["", "against", "times as fast"], rows)


def fuzzing() -> str:
    found = read("reliability")["fuzzing"]
    rows = [
        [row["by"], f"{row['messages']:,}", str(row["seconds"]), row["result"]]
        for row in found["rows"]
    ]
    return grid([f"commit {found['commit']}", "messages", "seconds", "result"], rows)


def masks() -> str:
    found = read("reliability")["masks"]["rows"]
    density, entropy, *coded = names = list(found[0])
    rows = [
        [f"{row[density]:g}", f"{row[entropy]:g}", *(f"{row[name]:.3f}" for name in coded)]
        for row in found
    ]
    return grid(names, rows)


def masks_compressed() -> str:
    rows, above = [], None
    for row in read("reliability")["masks"]["quickstart"]:
        of = [str(row["tasks a client"]), str(row["density of masks"])]
        sizes = [str(row[f"{what}, kbit"]) for what in ("masks as they are", "compressed")]
        first = ["", ""] if of == above else of
        rows.append([*first, row["vector"], *sizes, f"{row['saved, %']:.1f} %"])
        above = of
    header = ["tasks a client", "density of masks", "vector", "masks as they are"]
    return grid([*header, "compressed", "saved"], rows)


def kills() -> str:
    rows = []
    for row in read("reliability")["kills"]["rows"]:
        compared = f" (compared {row['compared']})" if row["compared"] else ""
        beside = f", beside {row['beside']}" if row["beside"] else ""
        counts = [str(row["kills"]), str(row["runs"]), f"{row['seconds']} s{beside}"]
        rows.append([row["checkpoint every"], f"{row['commit']}{compared}", *counts])
        rows[-1].append(str(row["not saved"]))
    header = ["checkpoint every", "commit", "kills", "in runs of 12 rounds", "passed in"]
    return grid([*header, "rounds finished but not saved, in all"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "quickstart": partial(quickstart, _README, whole=False),
    "quickstart-whole": partial(quickstart, _QUICKSTART, whole=True),
    "own-folders": own_folders,
    "costs": costs,
    "unify": partial(
        timed,
        _UNIFY,
        "T,d,dtype,threads,copy GB/s,torch loop ms,dense jax ms,library ms,outer jit ms,numba ms,"
        "first call s,x torch loop,x dense jax,of copy floor,numba of copy floor",
    ),
    "unify-memory": partial(
        timed, _UNIFY_MEMORY, "T,d,dtype,torch loop MB,dense jax MB,library MB"
    ),
    "unify-trace": trace,
    "unify-shared": unify_shared,
    "aggregate": partial(
        timed,
        _AGGREGATE,
        "clients,tasks,held,d,dtype,torch loop ms,dense jax ms,library ms,outer jit ms,shared ms,"
        "default ms,first call s,x torch loop,shared x torch loop,x dense jax,of copy floor",
    ),
    "aggregate-memory": aggregate_memory,
    "clients": partial(
        timed,
        "clients clients_clip",
        "model,rival,clients,steps,batch,rival s,auto s,x rival,1 s,2 s,4 s,all s,of best,"
        "first call s,of dense,rival MB,auto MB,all MB",
    ),
    "round": partial(
        timed,
        "round",
        "clients,flower s,idle s,fedavg s,matu s,x flower,flower first s,first s,"
        "idle ms a client,flower MB,ours MB",
    ),
    "hosts": partial(
        timed,
        "hosts",
        "server,exchange s,download s,unify s,aggregate s,checkpoint s,round s,peak MB",
    ),
    "scale": partial(
        timed,
        "scale",
        "clients,tasks,held,parameters,unify s,aggregate s,first call s,ms a client,grows MB",
    ),
    "scale-exponents": exponents,
    "wire": partial(
        timed,
        "wire",
        "d,k,vector,MB,zipped MB,copy ms,encode ms,decode ms,pickle ms,unpickle ms,save ms,"
        "load ms,zip ms,unzip ms,encode MB/s,decode MB/s,encode grows MB,decode grows MB",
    ),
    "fuzzing": fuzzing,
    "masks": masks,
    "masks-compressed": masks_compressed,
    "kills": kills,
}
