"""Looks at a machine and an experiment before a run: `python -m matu_jax.doctor --config FILE`.

    --config FILE             an experiment: a Python file with get_config()
    --config.FIELD=VALUE      changes a field, as for matu_jax.train
    --workdir DIR             where the run shall go, or an interrupted run is

Tells whether devices, memory, packages and extras, data, checkpoint, disk and workdir are as the
experiment needs them, what to do where they are not, and what to know of the data. Changes nothing,
but for a checkpoint that it fetches.

Exit codes: 0 the experiment can be run; 2 it cannot, or there is a mistake in the command or the
config; 130 interrupted with Ctrl-C.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from matu_jax import algorithms
from matu_jax.errors import UserError
from matu_jax.runs.commandline import read_config, run_program
from matu_jax.runs.examination import examine
from matu_jax.runs.processes import use_cores

_STYLE = {"ok": "green", "note": "yellow", "problem": "bold red"}


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns the exit code."""

    def work(console: Console) -> int:
        use_cores()  # before the experiment's file, which may use JAX
        config, source, options = read_config(argv, __doc__ or "", options=["workdir"])
        try:
            algorithms.build(config)
        except ValueError as error:
            raise UserError(str(error)) from None
        workdir = Path(options["workdir"]) if "workdir" in options else None
        worst = 0
        for level, subject, text in examine(config, source, workdir):
            # Lines of any length, and no table, whose cells would break the commands in them.
            console.print(Text.assemble((f"{level:9}", _STYLE[level]), f"{subject:21}{text}"))
            worst = max(worst, list(_STYLE).index(level))
        if worst < 2:
            words = ["--workdir", str(workdir)] if workdir else []
            console.print(f"{source.command('train', words)} can be run.")
        return 2 if worst == 2 else 0

    return run_program(work, interrupted="Interrupted.")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
