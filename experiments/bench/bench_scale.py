"""How a round of MaTU grows: with clients, with tasks per client, and with parameters.

    python experiments/bench/bench_scale.py                  at most about 4 minutes
    python experiments/bench/bench_scale.py --seconds 1200   everything that fits into memory
    python experiments/bench/bench_scale.py --quick          seconds; whether it runs

"unify" is what clients do (eqs. 1 to 4, all of them), "aggregate" the server's round (eqs. 5 to 9
and its downloads), both with the choices that runs make by default. One axis grows at a time.
"grows MB" is by how much the peak of memory grows in a process that does both and holds the
clients' task vectors and the server's state already. Exponents are slopes of log time and log
memory against the logarithm of what grows: of all points, and of the upper half of them, where
what a call costs however little it does weighs less.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rivals import dealt
from timing import (
    Timing,
    finish,
    interleaved,
    keep_programs,
    memory_left,
    options,
    peak_growth,
    show,
)

import matu_jax as matu

# What grows, with (clients, tasks, held, parameters), in which None stands for it, and its values.
AXES = {
    "clients": ((None, 16, 1, 100_000), (10, 30, 100, 300, 1000, 3000, 10_000)),
    "held": ((20, 16, None, 1_000_000), (1, 2, 4, 8, 16)),
    "parameters": (
        (5, 4, 2, None),
        (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 87_000_000),
    ),
}
QUICK = {
    "clients": ((None, 4, 1, 2_000), (2, 8)),
    "held": ((3, 4, None, 2_000), (1, 4)),
    "parameters": ((2, 3, 2, None), (1_000, 30_000)),
}
Case = tuple[int, int, int, int]
CHOICES = matu.AggregationConfig()


def cases(axis: tuple[tuple, tuple[int, ...]]) -> Iterator[Case]:
    """Every case of an axis, the smallest first."""
    fixed, values = axis
    for value in values:
        clients, tasks, held, size = (value if part is None else part for part in fixed)
        yield clients, tasks, held, size


@partial(jax.jit, static_argnums=(0, 1))
def _vectors(rows: int, size: int) -> jax.Array:
    """Windows into one stretch of noise: as good as independent here, and quick to make."""
    noise = jax.random.normal(jax.random.key(0), (2 * size,))
    starts = jnp.arange(rows) * 7919 % size
    return jax.lax.map(lambda start: jax.lax.dynamic_slice(noise, (start,), (size,)), starts)


def _prepared(case: Case) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Both halves of a round: `() -> uploads`, and `uploads -> what the server makes of them`."""
    clients, tasks, held, size = case
    slots = dealt(clients, tasks, held)
    vectors = {"w": jax.block_until_ready(_vectors(clients * held, size))}
    evidence = jnp.zeros((tasks, tasks))
    state = matu.ServerState({"w": jnp.zeros((tasks, size))}, evidence, evidence)
    return (
        lambda: matu.unify(vectors, slots, magnitude=CHOICES.magnitude),
        lambda uploads: matu.aggregate(uploads, slots, CHOICES, state),
    )


def _round(case: Case, programs: str) -> Callable[[], Any]:
    """A round as one function, called once: its memory is measured without the compiler's."""
    keep_programs(programs)
    unify, aggregate = _prepared(case)

    def both():
        uploads = unify()
        return uploads, aggregate(uploads)

    jax.block_until_ready(both())
    return both


def exponent(x: list[float], y: list[float]) -> float:
    """The p of y = c x^p by least squares of logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def fits(axis: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The exponents of one axis, of what was measured at two points or more."""
    found = []
    for quantity in ("unify s", "aggregate s", "grows MB"):
        points = [(row[axis], row[quantity]) for row in rows if row[quantity]]
        if len(points) < 2:
            continue
        x, y = map(list, zip(*points, strict=True))
        upper = min(len(x) // 2, len(x) - 2)
        found.append(
            {
                "axis": axis,
                "from": x[0],
                "to": x[-1],
                "quantity": quantity,
                "exponent": exponent(x, y),
                "upper half": exponent(x[upper:], y[upper:]),
            }
        )
    return found


def _measured(case: Case, repeats: int, programs: str) -> dict[str, Any]:
    def timed() -> dict[str, Timing]:  # what it holds is gone before memory is measured
        unify, aggregate = _prepared(case)
        uploads = None

        def clients():
            nonlocal uploads
            uploads = unify()
            return uploads

        return interleaved({"unify": clients, "aggregate": lambda: aggregate(uploads)}, repeats)

    times = timed()
    jax.clear_caches()
    grown = peak_growth(_round, case, programs)
    clients, tasks, held, size = case
    return {
        "clients": clients,
        "tasks": tasks,
        "held": held,
        "parameters": size,
        "unify s": times["unify"].median,
        "aggregate s": times["aggregate"].median,
        "first call s": times["unify"].first + times["aggregate"].first,
        "ms a client": 1e3 * (times["unify"].median + times["aggregate"].median) / clients,
        "grows MB": None if grown is None else grown / 1e6,
    }


def main() -> None:
    parser = options(__doc__ or "", "bench_scale")
    parser.set_defaults(repeats=3)
    parser.add_argument("--seconds", type=float, default=240, help="for everything, about")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as programs:  # new, so that first calls here compile
        keep_programs(programs)
        _run(given, programs)


def _run(given: argparse.Namespace, programs: str) -> None:
    axes = QUICK if given.quick else AXES
    start, rows = time.perf_counter(), {axis: [] for axis in axes}
    for number, axis in enumerate(axes):
        # Every axis may take an equal part of what is left to it and those after it.
        now = time.perf_counter() - start
        until = now + (given.seconds - now) / (len(axes) - number)
        least = took = work = 0.0
        for case in cases(axes[axis]):
            clients, tasks, held, size = case
            # Beyond what the smallest case takes, time goes with the numbers, or along "held" at
            # most with their square.
            done, work = work, float(clients * held * size) * (held if axis == "held" else 1)
            expected = least + (took - least) * work / done if done else 0.0
            needed = 4 * size * (clients * held + 3 * clients + 5 * tasks)
            now = time.perf_counter() - start
            reason = ""
            if needed > 0.8 * memory_left():
                reason = f"it needs about {needed / 1e9:.1f} GB of memory"
            elif now >= until:
                reason = f"--seconds {given.seconds:g} are over"
            elif now + expected > until:
                reason = f"it would take about {expected:.0f} s of --seconds {given.seconds:g}"
            if reason:
                print(f"{clients} clients, {held} tasks each, d = {size:,}: left out, {reason}")
                break
            rows[axis].append(_measured(case, given.repeats, programs))
            took = time.perf_counter() - start - now
            least = min(least or took, took)
    table = [row for part in rows.values() for row in part]
    found = [fit for axis, part in rows.items() for fit in fits(axis, part)]
    if not table:
        raise SystemExit(f"--seconds {given.seconds:g}: too little for a single case.")
    if found:
        show("exponents", found)
    total = time.perf_counter() - start
    finish(f"scale ({total:.0f} s)", table, given.out, fits=found, seconds=total)


if __name__ == "__main__":
    main()
