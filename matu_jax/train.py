"""The experiment program: `python -m matu_jax.train --config experiments/quickstart.py`.

    --config FILE             an experiment: a Python file with get_config()
    --config.FIELD=VALUE      changes a field, such as --config.rounds=3 or --config.local.steps=10;
                              --config.data=synthetic is short for --config.data.source=synthetic
    --workdir DIR             where results and checkpoints go; a directory of an interrupted run
                              is gone on with. Default: runs/<config>-<time>
    --distributed             joins the other processes of a run on a Cloud TPU pod or under Slurm,
                              where this very command is started once per host or task
    --coordinator HOST:PORT --processes N --process I
                              does so on other machines: process I of N, which meet at process 0,
                              at a port that is free there
    --profile                 traces one round, the second if there is one, into WORKDIR/profile,
                              for TensorBoard and https://ui.perfetto.dev

How far the run is goes to standard error: a bar on a terminal, elsewhere a line a round.

Compiled programs are kept in ~/.cache/matu_jax/compiled, and found there by the next run;
JAX_ENABLE_COMPILATION_CACHE=false turns that off.

Of several processes, each reads the data and trains the slots of its own devices; process 0 alone
prints, and reads and writes the workdir.

Exit codes: 0 done; 2 a mistake in the command, the config or the workdir, said in one message;
130 stopped with Ctrl-C, 143 with SIGTERM (preemption): the first one of either, at any process,
lets the round under way end and saves it.
"""

import contextlib
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from matu_jax import algorithms
from matu_jax.config import Config
from matu_jax.errors import UserError
from matu_jax.runs.commandline import (
    INTERRUPTED,
    Source,
    plain_console,
    read_config,
    read_words,
    run_program,
)
from matu_jax.runs.plan import check_inputs
from matu_jax.runs.processes import OPTIONS, join, keep_programs, use_cores
from matu_jax.runs.progress import RoundProgress
from matu_jax.runs.training import is_finished, train
from matu_jax.runs.workdir import keep_experiment, opened
from matu_jax.simulation import hosts
from matu_jax.simulation.attendance import StoppedError

_WORDS = (__doc__ or "", ["workdir", *OPTIONS], ["profile", "distributed"])


def parse(argv: Sequence[str]) -> tuple[Config, Source, Path, dict[str, str]]:
    """Reads the command line: the checked config, its source, the workdir, and the options given.

    Raises:
      UserError: with what is wrong, and where.
    """
    config, source, options = read_config(argv, *_WORDS)
    try:
        algorithms.build(config)
    except ValueError as error:
        raise UserError(str(error)) from None
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    workdir = options.get("workdir") or Path("runs") / f"{source.file.stem}-{stamp}"
    return config, source, Path(workdir), options


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns the exit code."""

    def work(console: Console) -> None:
        use_cores()
        join(read_words(argv, *_WORDS)[1])  # both before the experiment's file, which may use JAX
        config, source, workdir, options = parse(argv)
        keep_programs()
        if not hosts.is_first():
            console = Console(quiet=True)
        if not is_finished(workdir):
            with hosts.together():
                check_inputs(config, source)
        with contextlib.ExitStack() as stack:
            with hosts.together():
                if hosts.is_first():
                    stack.enter_context(opened(workdir, config))
                    if changed := keep_experiment(workdir, source.file):
                        console.print(f"note: {changed}")
            progress = RoundProgress(plain_console(stderr=True)) if hosts.is_first() else None
            profile = "profile" in options
            train(config, source.file.stem, workdir, console, progress=progress, profile=profile)

    mistakes = (UserError, StoppedError)
    return run_program(work, interrupted=INTERRUPTED, mistakes=mistakes)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
