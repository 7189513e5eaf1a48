"""The merging program: `python -m matu_jax.merge --base B --models M1 M2 --out DIR`.

Merges fine-tuned checkpoints of one base, or rebuilds one of them from what `--method unify` wrote.
A checkpoint is a safetensors file, or a folder with model.safetensors or its shards and index, such
as Hugging Face's save_pretrained makes.

Exit codes: 0 done; 2 a mistake in the command or the checkpoints, said in one message; 130
interrupted with Ctrl-C. In neither of the last two cases is a result left behind.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from matu_jax.errors import UserError, did_you_mean
from matu_jax.merging import PASSES
from matu_jax.merging.folders import UNIFIED
from matu_jax.merging.options import Merge, Rebuild, settled
from matu_jax.merging.running import merge, rebuild
from matu_jax.models.tensors import TensorFileError
from matu_jax.runs.commandline import Parser, check_words, run_program

_EXAMPLES = """examples:
  python -m matu_jax.merge --base clip --models cars dtd sun --out unified
  python -m matu_jax.merge --base clip --unified unified --task dtd --out clip-dtd
  python -m matu_jax.merge --base clip --models cars dtd sun --method ties --density 0.1 --out ties
"""


def parse(argv: Sequence[str]) -> Merge | Rebuild:
    """Reads the command line, and fills in the defaults of the chosen method.

    Raises:
      UserError: with what is wrong.
      SystemExit: after --help.
    """
    parser = Parser(
        prog="python -m matu_jax.merge",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base", type=Path, required=True, help="the checkpoint that all were fine-tuned from")
    add("--out", type=Path, required=True, help="a folder to write to; new or empty")
    one = parser.add_argument_group("to merge")
    add = one.add_argument
    add("--models", type=Path, nargs="+", metavar="M", help="fine-tuned checkpoints")
    add("--names", nargs="+", metavar="NAME", help="their names; default: of the folders or files")
    add(
        "--method",
        choices=tuple(PASSES),
        help="unify (default): one vector, and a mask and a scale per model, from which each can "
        "be rebuilt (EMR-Merging, arXiv 2405.17461). ties: one checkpoint for all (arXiv "
        "2306.01708). arithmetic: base + scale * sum of task vectors (arXiv 2212.04089)",
    )
    add("--magnitude", choices=("max", "mean"), help="of unify; default: max")
    add("--density", type=float, help="of ties: fraction of entries kept; default: 0.2")
    add("--scale", type=float, help="of the merged vector; default: ties 1, arithmetic 0.3")
    add(
        "--only",
        metavar="PREFIX[,PREFIX]",
        help="merge tensors whose names begin so, and take all others from the base; with a ! "
        "before it, those that begin so come from the base: --only '!classifier.'",
    )
    two = parser.add_argument_group("to rebuild one model")
    two.add_argument("--unified", type=Path, metavar="FILE", help=f"{UNIFIED}, or its folder")
    two.add_argument("--task", metavar="NAME", help="the name of the model to rebuild")
    check_words(argv[1:])
    given, unknown = parser.parse_known_args(list(argv[1:]))
    if unknown:
        hint = did_you_mean(unknown[0].lstrip("-"), list(vars(given)))
        raise UserError(f"found {unknown[0]!r}, no such option.{hint} See --help.")
    return settled(given)


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns the exit code."""

    def work(console: Console) -> None:
        asked = parse(argv)
        try:
            merge(asked, console) if isinstance(asked, Merge) else rebuild(asked, console)
        except OSError as error:  # a full disk, or a file that may not be read
            raise UserError(f"{error.filename or asked.out}: {error.strerror}.") from None

    return run_program(
        work,
        interrupted="Interrupted. Nothing is left in --out.",
        mistakes=(UserError, TensorFileError),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
