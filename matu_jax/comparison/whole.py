"""What of a comparison is finished in a workdir, besides the part that is run."""

import dataclasses
from pathlib import Path

from matu_jax.comparison import plan
from matu_jax.comparison.plan import Comparison
from matu_jax.errors import UserError
from matu_jax.runs import workdir as workdirs
from matu_jax.runs.commandline import Source


def with_finished(
    part: Comparison, whole: Comparison, source: Source, workdir: Path
) -> tuple[Comparison, Source]:
    """What a report tells of: the part that is run, and whatever else of the whole is finished.

    A report of the part alone would replace that of the whole.

    Args:
      part: of the comparison; as its file has it, without searched fields.
      whole: likewise.
      source: where the part is from.
      workdir: where the runs are.

    Returns:
      All settings, arms and seeds that either has, and the source that commands are made of.
    """
    there = (int(at.name) for at in workdir.glob("runs/*/*/*") if at.name.isdecimal())
    known = dict.fromkeys([*whole.seeds, *part.seeds, *sorted(there)])
    every = dataclasses.replace(whole, seeds=tuple(known))
    done = [run for run in plan.runs(every) if is_finished(run, workdir)]
    settings, arms, seeds = (
        [name for name in getattr(every, what) if name in getattr(part, what) or name in also]
        for what, also in (
            ("settings", {run.setting for run in done}),
            ("arms", {run.arm for run in done}),
            ("seeds", {run.seed for run in done}),
        )
    )
    options = {k: v for k, v in source.options.items() if k not in ("settings", "arms", "seeds")}
    for what, names in (("settings", settings), ("arms", arms)):
        if len(names) < len(getattr(whole, what)):
            options |= plan.option(what, names, getattr(whole, what))
    if seeds != list(whole.seeds):
        options["seeds"] = ",".join(map(str, seeds))
    told = plan.only(every, settings=settings, arms=arms, seeds=seeds)
    return told, source._replace(options=options)


def is_finished(run: plan.Run, workdir: Path) -> bool:
    """Whether a run's results are there."""
    return (run.folder(workdir) / "summary.json").exists()


def check_configs(comparison: Comparison, workdir: Path) -> None:
    """Checks that finished runs are of the configs that the comparison has now.

    Args:
      comparison: with the searched fields in its arms.
      workdir: where the runs are.

    Raises:
      UserError: names the folder of a run of another config, and the fields that differ.
    """
    for run in plan.runs(comparison):
        if is_finished(run, workdir):
            try:
                config = plan.run_config(comparison, run)
            except ValueError as error:
                raise UserError(str(error)) from None
            with workdirs.disk_errors(workdir):
                workdirs.check(run.folder(workdir), config)
