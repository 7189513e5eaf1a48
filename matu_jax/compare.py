"""The comparison program: `python -m matu_jax.compare --config experiments/compare8.py`.

    --config FILE             a comparison: a Python file with get_config(). Models and tasks of
                              its own it puts into MODELS and SOURCES, as experiments/tabular.py
    --config.FIELD=VALUE      changes a field of all runs, such as --config.rounds=3
    --workdir DIR             where runs and reports go; runs that are there already are not made
                              again. Default: runs/<config>
    --settings A,B            only these settings; likewise --arms and --seeds
    --tune                    searches every arm's own fields, with the same number of trials each,
                              on validation, and writes what it found beside FILE

How far it is goes to standard error: a bar on a terminal, elsewhere a line a round.

Writes comparison.json, report.html, report.md and pictures into the workdir. They tell of all runs
of the comparison that are finished there, also where --settings, --arms or --seeds choose a part.
A run that was interrupted goes on from its last checkpoint.

Exit codes: 0 done; 2 a mistake in the command, the config or the workdir, said in one message;
130 stopped with Ctrl-C, 143 with SIGTERM: the round under way ends and is saved.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from matu_jax import algorithms
from matu_jax.comparison import plan
from matu_jax.comparison.running import compare, tune
from matu_jax.errors import UserError
from matu_jax.runs.commandline import INTERRUPTED, Source, read_words, run_file, run_program
from matu_jax.runs.processes import keep_programs, use_cores


def parse(argv: Sequence[str]) -> tuple[plan.Comparison, plan.Comparison, Source, Path, bool]:
    """Reads the command line.

    Returns:
      The part of the comparison that is chosen, the whole, their source, the workdir, and whether
      to search.

    Raises:
      UserError: with what is wrong, and where.
    """
    names = ["settings", "arms", "seeds"]
    source, options = read_words(argv, __doc__ or "", ["workdir", *names], ["tune"])
    source = source._replace(options={k: v for k, v in options.items() if k != "tune"})
    file, fields, _ = source
    comparison = run_file(file)
    if not isinstance(comparison, plan.Comparison):
        raise UserError(
            f"--config {file}: get_config() returned {type(comparison).__name__}, expected a "
            "matu_jax.comparison.plan.Comparison. An experiment is run by matu_jax.train."
        )
    try:
        whole = plan.overridden(comparison, fields)
        chosen = {name: options[name] for name in names if name in options}
        comparison = plan.part(whole, **chosen)
        plan.check(comparison)
        for run in plan.runs(comparison):
            algorithms.build(plan.run_config(comparison, run))
    except ValueError as error:
        raise UserError(f"--config {file}: {error}") from None
    workdir = Path(options.get("workdir") or Path("runs") / file.stem)
    return comparison, whole, source, workdir, "tune" in options


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns the exit code."""

    def work(console: Console) -> None:
        use_cores()  # before the experiment's file, which may use JAX
        comparison, whole, source, workdir, tuning = parse(argv)
        keep_programs()
        given = comparison, source, workdir, console
        if tuning:
            console.print(f"Written: {tune(*given)}")
        else:
            compare(*given, whole=whole)

    return run_program(work, interrupted=INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
