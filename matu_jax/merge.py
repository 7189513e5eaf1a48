"""The merging program: `python -m matu_jax.merge --base B --models M1 M2 --out DIR`.

Merges fine-tuned checkpoints of one base, or rebuilds one of them from what `--method unify` wrote.
A checkpoint is a safetensors file, or a folder with model.safetensors or its shards and index, such
as Hugging Face's save_pretrained makes.

Exit codes: 0 done; 2 a mistake in the command or the checkpoints, said in one message; 130
interrupted with Ctrl-C. In neither of the last two cases is a result left behind.
"""

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from matu_jax.errors import UserError, did_you_mean
from matu_jax.json_files import write_json
from matu_jax.merging import (
    PASSES,
    Alignment,
    Summary,
    align,
    given_name,
    merge_models,
    rebuild_model,
    tables,
    unified_tasks,
    unify_models,
)
from matu_jax.merging.folders import RECORD, copy_files, output_folder
from matu_jax.models.tensors import WHOLE, TensorFileError, TensorFiles
from matu_jax.runs.commandline import Parser, check_words, plain_console, run_program
from matu_jax.runs.provenance import versions

UNIFIED = "unified.safetensors"
_SIMILARITY = (
    "A = (1 + (1/d) sum sgn(a) sgn(b)) / 2 over the d merged parameters that are not zero in both "
    "of two task vectors (model - base): 1 the same signs, 1/2 unrelated, 0 opposite; a zero in "
    "one of them counts one half, and where all are zero in both, A is 1/2"
)
_EXAMPLES = """examples:
  python -m matu_jax.merge --base clip --models cars dtd sun --out unified
  python -m matu_jax.merge --base clip --unified unified --task dtd --out clip-dtd
  python -m matu_jax.merge --base clip --models cars dtd sun --method ties --density 0.1 --out ties
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
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
    _check(given)
    return given


def _check(given: argparse.Namespace) -> None:
    """Refuses options that contradict or do not belong to each other; sets defaults."""
    if (given.models is None) == (given.unified is None):
        raise UserError("give either --models to merge, or --unified to rebuild one. See --help.")
    if given.unified is not None:
        owner, allowed = "--unified", ("task",)
        if given.task is None:
            raise UserError("--task is missing: the name of the model to rebuild.")
    else:
        given.method = given.method or "unify"
        owner = f"--method {given.method}"
        allowed = {"unify": ("magnitude",), "ties": ("density", "scale"), "arithmetic": ("scale",)}
        allowed = ("method", "names", "only", *allowed[given.method])
    for option in ("method", "names", "only", "magnitude", "density", "scale", "task"):
        if option not in allowed and getattr(given, option) is not None:
            raise UserError(f"--{option} has no effect with {owner}; leave it out.")
    defaults = {"magnitude": "max", "density": 0.2}
    defaults["scale"] = 1.0 if given.method == "ties" else 0.3
    for option in defaults.keys() & set(allowed):
        if getattr(given, option) is None:
            setattr(given, option, defaults[option])
    if given.density is not None and not 0 < given.density <= 1:
        raise UserError(f"--density: found {given.density}, expected above 0 and at most 1.")
    if given.scale is not None and not math.isfinite(given.scale):
        raise UserError(f"--scale: found {given.scale}, expected a finite number.")
    if given.only is not None:
        given.only = tuple(given.only.split(","))
        if not all(prefix.removeprefix("!") for prefix in given.only):
            raise UserError("--only: found an empty prefix, expected PREFIX[,PREFIX].")


def name_models(paths: Sequence[Path], names: Sequence[str] | None) -> dict[str, Path]:
    """Names checkpoints by `names`, or their folders or files.

    Raises:
      UserError: if names are not as many as paths, or two are the same.
    """
    if names is not None and len(names) != len(paths):
        raise UserError(f"--names: found {len(names)}, expected {len(paths)}, one per model.")

    if names is not None and not all(names):
        raise UserError("--names: found an empty name, expected one or more letters.")

    def default(path: Path) -> str:
        path = path.absolute()
        name = given_name(path.parent if path.name == WHOLE else path)
        return name.removesuffix(".safetensors")

    named: dict[str, Path] = {}
    for path, name in zip(paths, names or map(default, paths), strict=True):
        if name in named:
            raise UserError(
                f"the models {named[name]} and {path} are both called {name!r}. Give each its own "
                "name: --names NAME1 NAME2 ..."
            )
        named[name] = path
    return named


def merge(given: argparse.Namespace, console: Console) -> None:
    """Merges the models that the command line names.

    Raises:
      TensorFileError, UserError: for what the user has to mend.
    """
    clock = time.perf_counter()
    named = name_models(given.models, given.names)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(output_folder(given.out))
        base = stack.enter_context(TensorFiles(given.base))
        models = {name: stack.enter_context(TensorFiles(path)) for name, path in named.items()}
        alignment = align(base, models, given.only or ())
        progress = stack.enter_context(_progress(alignment.parameters * PASSES[given.method]))
        settings: dict[str, Any] = {"progress": progress}
        if given.method == "unify":
            result = file(UNIFIED)
            settings |= {"magnitude": given.magnitude}
            summary = unify_models(base, models, alignment, result, **settings)
        else:
            result = file(WHOLE)
            settings |= {"method": given.method, "scale": given.scale, "density": given.density}
            summary = merge_models(base, models, alignment, result, **settings)
        record = _record(given, base, models, alignment, summary, result)
        if given.method != "unify":
            record |= copy_files(given.base, file)
        record["seconds"] = time.perf_counter() - clock
        write_json(file(RECORD), record)
    tables.show(record, console)


def rebuild(given: argparse.Namespace, console: Console) -> None:
    """Rebuilds the checkpoint of one model.

    Raises:
      TensorFileError, UserError: for what the user has to mend.
    """
    clock = time.perf_counter()
    path = given.unified / UNIFIED if given.unified.is_dir() else given.unified
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(output_folder(given.out))
        base, unified = (stack.enter_context(TensorFiles(p)) for p in (given.base, path))
        parameters = sum(t.size for n, t in unified.tensors.items() if n.startswith("vector."))
        progress = stack.enter_context(_progress(parameters))
        scale = rebuild_model(unified, base, given.task, file(WHOLE), progress=progress)
        tasks = unified_tasks(unified)
        not_merged = [name for name in base.tensors if f"vector.{name}" not in unified.tensors]
        record = {
            "unified": path,
            "base": {"path": given.base, "fingerprint": tasks.base_fingerprint},
            "task": given.task,
            "scale": scale,
            "cosine": tasks.cosines.get(given.task),
            "from_base": not_merged if tasks.from_base is None else tasks.from_base,
            "from_base_known": tasks.from_base is not None,
            "left_out": tasks.left_out.get(given.task, []),
            "models": list(tasks.scales),
            "parameters": parameters,
            **copy_files(given.base, file),
            "versions": versions(),
            "seconds": time.perf_counter() - clock,
        }
        write_json(file(RECORD), record)
    console.print(f"{given.task}: scale {scale:.4f}, {parameters:,} parameters rebuilt.")
    for line in tables.rebuilt_notes(record):
        console.print(line)
    console.print(f"Result: {given.out / WHOLE}")


@contextlib.contextmanager
def _progress(parameters: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("merging"), BarColumn(bar_width=30))
    console = plain_console(stderr=True)
    with Progress(
        *columns,
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        job = bar.add_task("", total=parameters)
        yield lambda done: bar.advance(job, done)


def _record(
    given: argparse.Namespace,
    base: TensorFiles,
    models: Mapping[str, TensorFiles],
    alignment: Alignment,
    summary: Summary,
    result: Path,
) -> dict[str, Any]:
    """What merge.json says, without its seconds."""
    options = ("only", "magnitude", "density", "scale")
    all_bytes = len(models) * sum(base.tensors[name].nbytes for name in alignment.merged)
    return {
        "method": given.method,
        "settings": {o: getattr(given, o) for o in options if getattr(given, o) is not None},
        "base": {"path": base.path, "fingerprint": summary.base_fingerprint},
        "models": [
            {"name": name, "path": models[name].path}
            | measured
            | {"left_out": alignment.left_out[name]}
            for name, measured in summary.models.items()
        ],
        "similarity": {"definition": _SIMILARITY, "matrix": summary.similarity},
        "parameters": alignment.parameters,
        "tensors": {
            "merged": len(alignment.merged),
            "equal": alignment.equal,
            "from_base": alignment.from_base,
        },
        "bytes": {
            "merged_tensors_of_all_models": all_bytes,
            "result_file": result.stat().st_size,
            "ratio": result.stat().st_size / all_bytes,
        },
        "result": result,
        "versions": versions(),
    }


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns the exit code."""

    def work(console: Console) -> None:
        given = parse(argv)
        try:
            (merge if given.unified is None else rebuild)(given, console)
        except OSError as error:  # a full disk, or a file that may not be read
            raise UserError(f"{error.filename or given.out}: {error.strerror}.") from None

    return run_program(
        work,
        interrupted="Interrupted. Nothing is left in --out.",
        mistakes=(UserError, TensorFileError),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
