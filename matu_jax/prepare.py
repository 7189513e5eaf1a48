"""Prepares an experiment's or a comparison's datasets: `python -m matu_jax.prepare --config FILE`.

    --config FILE             an experiment or a comparison: a Python file with get_config()
    --config.FIELD=VALUE      changes a field, such as --config.data.tasks=dtd,svhn or
                              --config.data.folders=/data/images
    --dry-run                 only tells what would be done, and how large it would be

Every image goes once through the model's transform into the cache ($MATU_JAX_CACHE, or
~/.cache/matu_jax). A dataset is taken from the image folder <folders>/<name> if there is one
(config.data.folders, or $MATU_JAX_FOLDERS, or `folders` in the cache), and else from TensorFlow
Datasets. Folders are laid out as <name>/train/<class>/<image> and <name>/test/<class>/<image>, or,
where there is no test split, as <name>/<class>/<image>; images in <name>/val/<class> are validated
on, and not trained on. Folders of your own need nothing else; all
in config.data.folders are prepared where config.data.tasks names none. What is prepared already is
left alone, unless its image folder has changed; what was interrupted is gone on with.

Exit codes: 0 all datasets are prepared (with --dry-run: are, or can be as far as can be told
without a download); 2 some are not, or there is a mistake in the command or the config; 130
interrupted with Ctrl-C.
"""

import sys
import warnings
from collections.abc import Sequence

from PIL import Image
from rich.console import Console

from matu_jax.comparison import plan
from matu_jax.config import Config
from matu_jax.errors import UserError
from matu_jax.models.images import transform_of
from matu_jax.runs.commandline import read_config, read_words, run_file, run_program
from matu_jax.runs.preparing import prepare


def parse(argv: Sequence[str]) -> tuple[list[Config], bool]:
    """Reads the command line: an experiment, or a comparison's settings; and whether to try only.

    Raises:
      UserError: with what is wrong, and where.
    """
    doc, flags = __doc__ or "", ["dry-run"]
    (file, fields, _), options = read_words(argv, doc, flags=flags)
    comparison = run_file(file)
    if not isinstance(comparison, plan.Comparison):
        return [read_config(argv, doc, flags=flags)[0]], "dry-run" in options
    try:
        comparison = plan.overridden(comparison, fields)
        plan.check(comparison)
        configs = [plan.run_config(comparison, run) for run in plan.runs(comparison)]
        # Runs that ask for the same data ask for it once.
        asked = {
            (c.data.tasks, c.data.folders, c.data.source, transform_of(c.model)): c for c in configs
        }
    except ValueError as error:
        raise UserError(f"--config {file}: {error}") from None
    return list(asked.values()), "dry-run" in options


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns the exit code."""
    # An image too large to be decoded safely is an error, and no warning before it.
    warnings.simplefilter("error", Image.DecompressionBombWarning)

    def work(console: Console) -> int:
        configs, dry_run = parse(argv)
        ready = [prepare(config, console, dry_run=dry_run) for config in configs]
        return 0 if all(ready) else 2

    return run_program(work, interrupted="Interrupted. The same command goes on.")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
