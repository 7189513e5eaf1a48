"""A merge from folder to folder, or a model rebuilt from one, with what merge.json says of it."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from matu_jax.json_files import write_json
from matu_jax.merging import tables
from matu_jax.merging.alignment import Alignment, align
from matu_jax.merging.folders import RECORD, UNIFIED, copy_files, output_folder
from matu_jax.merging.methods import PASSES, merge_models, unify_models
from matu_jax.merging.options import Merge, Rebuild
from matu_jax.merging.rebuilding import rebuild_model, unified_tasks
from matu_jax.merging.sums import Summary
from matu_jax.models.tensors import WHOLE, TensorFiles
from matu_jax.runs.commandline import plain_console
from matu_jax.runs.provenance import versions

_SIMILARITY = (
    "A = (1 + (1/d) sum sgn(a) sgn(b)) / 2 over the d merged parameters that are not zero in both "
    "of two task vectors (model - base): 1 the same signs, 1/2 unrelated, 0 opposite; a zero in "
    "one of them counts one half, and where all are zero in both, A is 1/2"
)


def merge(asked: Merge, console: Console) -> None:
    """Merges models into a new folder, and prints what was found.

    Raises:
      OSError, TensorFileError: for what the user has to mend; nothing is left in the folder then.
    """
    clock = time.perf_counter()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(output_folder(asked.out))
        base = stack.enter_context(TensorFiles(asked.base))
        models = {
            name: stack.enter_context(TensorFiles(path)) for name, path in asked.models.items()
        }
        alignment = align(base, models, asked.only or ())
        progress = stack.enter_context(_progress(alignment.parameters * PASSES[asked.method]))
        settings: dict[str, Any] = {"progress": progress}
        if asked.method == "unify":
            result = file(UNIFIED)
            settings |= {"magnitude": asked.magnitude}
            summary = unify_models(base, models, alignment, result, **settings)
        else:
            result = file(WHOLE)
            settings |= {"method": asked.method, "scale": asked.scale, "density": asked.density}
            summary = merge_models(base, models, alignment, result, **settings)
        record = _record(asked, base, models, alignment, summary, result)
        if asked.method != "unify":
            record |= copy_files(asked.base, file)
        record["seconds"] = time.perf_counter() - clock
        write_json(file(RECORD), record)
    tables.show(record, console)


def rebuild(asked: Rebuild, console: Console) -> None:
    """Rebuilds one model into a new folder, and prints how near it is.

    Raises:
      OSError, TensorFileError: for what the user has to mend; nothing is left in the folder then.
    """
    clock = time.perf_counter()
    path = asked.unified / UNIFIED if asked.unified.is_dir() else asked.unified
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(output_folder(asked.out))
        base, unified = (stack.enter_context(TensorFiles(p)) for p in (asked.base, path))
        parameters = sum(t.size for n, t in unified.tensors.items() if n.startswith("vector."))
        progress = stack.enter_context(_progress(parameters))
        scale = rebuild_model(unified, base, asked.task, file(WHOLE), progress=progress)
        tasks = unified_tasks(unified)
        not_merged = [name for name in base.tensors if f"vector.{name}" not in unified.tensors]
        record = {
            "unified": path,
            "base": {"path": asked.base, "fingerprint": tasks.base_fingerprint},
            "task": asked.task,
            "scale": scale,
            "cosine": tasks.cosines.get(asked.task),
            "from_base": not_merged if tasks.from_base is None else tasks.from_base,
            "from_base_known": tasks.from_base is not None,
            "left_out": tasks.left_out.get(asked.task, []),
            "models": list(tasks.scales),
            "parameters": parameters,
            **copy_files(asked.base, file),
            "versions": versions(),
            "seconds": time.perf_counter() - clock,
        }
        write_json(file(RECORD), record)
    console.print(f"{asked.task}: scale {scale:.4f}, {parameters:,} parameters rebuilt.")
    for line in tables.rebuilt_notes(record):
        console.print(line)
    console.print(f"Result: {asked.out / WHOLE}")


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
    asked: Merge,
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
        "method": asked.method,
        "settings": {o: getattr(asked, o) for o in options if getattr(asked, o) is not None},
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
