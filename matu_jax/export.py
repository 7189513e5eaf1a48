"""Takes a model out of a run: `python -m matu_jax.export --workdir RUN --task svhn --out DIR`.

What a task's clients would receive after the run's last checkpoint, in one of three formats:

    peft         a PEFT LoRA adapter (for runs with config.model.trainable = 'lora')
    merged       a Hugging Face checkpoint with the fine-tuned image tower
    safetensors  the raw task vector (fine-tuned minus base), with this package's names

and beside it head.safetensors ("weight" [classes, features]; "bias" of a trained head or
"logit_scale" of a zero-shot one) and a model card, README.md: how it was made, how to load it.

Exit codes: 0 done; 2 a mistake in the command or the run, said in one message.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from safetensors.numpy import save_file

from matu_jax import algorithms, models, rounds
from matu_jax.aggregation import Slots
from matu_jax.checkpoint import Checkpoints
from matu_jax.commandline import UserError, run_program
from matu_jax.config import Config, did_you_mean, freeze
from matu_jax.data import Task
from matu_jax.metrics import MetricsLog
from matu_jax.models import exporting, huggingface
from matu_jax.models.checkpoint_config import architecture_of
from matu_jax.provenance import versions
from matu_jax.trees import PyTree, leaf_items
from matu_jax.workdir import check_origin

FORMATS = ("peft", "merged", "safetensors")


@dataclasses.dataclass(frozen=True)
class Exported:
    """One task's model out of a run.

    Attributes:
      config: the run's.
      task: with its classes.
      client: whose download it is.
      round: rounds completed.
      vector: task vector, leaves `[...]`, without the head.
      params: base + vector, without the head.
      frozen: the rest of the image tower.
      head: "weight" float32 `[classes, features]` and "bias" `[classes]` (trained), or "weight" and
        "logit_scale" `[]` (zero-shot).
      accuracy: test accuracy of that client's download when last measured, or None.
    """

    config: Config
    task: Task
    client: int
    round: int
    vector: PyTree
    params: PyTree
    frozen: PyTree
    head: dict[str, np.ndarray]
    accuracy: float | None


def read_run(workdir: Path, task_name: str, client: int | None = None) -> Exported:
    """Reads a task's model out of a run's newest checkpoint.

    Args:
      workdir: of the run.
      task_name: one of its tasks.
      client: one that holds the task; None = the holder with the best validation accuracy.

    Raises:
      UserError: if there is no such run, task or holder, or the run's data or checkpoint is not
        there.
    """
    config = _config_of(workdir)
    # Kernels are wanted as they were given, and nothing is trained.
    exact = dataclasses.replace(config.model, compute_dtype="float32", remat=False)
    try:
        federation = rounds.federate(config)
        names = [task.name for task in federation.tasks]
        if task_name not in names:
            raise UserError(f"--task {task_name}: no such task.{did_you_mean(task_name, names)}")
        model = models.build(exact, federation.tasks, seed=config.seed)
        algorithm, slots = algorithms.build(config), federation.slots
        target = jax.eval_shape(lambda: algorithm.init(model.base, slots))
        similarity = np.zeros((len(names),) * 2, np.float32)
        with Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
            restored = checkpoints.restore({"state": target, "similarity_sum": similarity})
    except ValueError as error:
        raise UserError(str(error)) from None
    if restored is None:
        raise UserError(f"--workdir {workdir}: has no checkpoint yet; train for a round first.")
    check_origin(workdir / "checkpoints", restored[2], config)
    records = [
        record
        for record in MetricsLog(workdir / "metrics.jsonl").records()
        if record["accuracy"] and record["round"] <= restored[0]
    ]
    measured = records[-1]["accuracy"] if records else None
    number = names.index(task_name)
    row = _holder(slots, number, client, measured, task_name)
    vector = jax.tree.map(
        lambda x: np.asarray(x[row]), jax.jit(algorithm.download)(restored[1]["state"], slots)
    )
    params = jax.tree.map(lambda a, b: np.asarray(a) + b, model.base, vector)
    task = federation.tasks[number]
    trained = "trained" in model.frozen and bool(model.frozen["trained"][number])
    if trained:
        kernel, bias = params["head"]["kernel"], params["head"]["bias"]
        head = {
            "weight": kernel.T[: task.num_classes].copy(order="C"),
            "bias": bias[: task.num_classes],
        }
    else:
        head = {
            "weight": np.asarray(model.frozen["heads"][number][: task.num_classes]),
            "logit_scale": np.float32(model.logit_scale),
        }
    if "trained" in model.frozen:
        vector, params = vector["shared"], params["shared"]
    return Exported(
        config=config,
        task=task,
        client=int(slots.client[row]),
        round=restored[0],
        vector=vector,
        params=params,
        frozen=jax.tree.map(np.asarray, model.frozen["backbone"]),
        head=head,
        accuracy=measured["test_per_slot"][row] if measured else None,
    )


def _holder(slots: Slots, task: int, client: int | None, measured: dict | None, name: str) -> int:
    """The slot whose download is taken."""
    rows = np.flatnonzero(slots.task == task)
    holders = slots.client[rows].tolist()
    if client is not None:
        if client not in holders:
            raise UserError(
                f"--client {client}: does not hold task {name}; clients "
                f"{', '.join(map(str, holders))} do."
            )
        return int(rows[holders.index(client)])
    if measured is None:
        return int(rows[0])
    return int(max(rows, key=lambda row: measured["validation_per_slot"][row]))


def _config_of(workdir: Path) -> Config:
    file = workdir / "config.json"
    try:
        return freeze(ConfigDict(json.loads(file.read_text())))
    except OSError as error:
        raise UserError(
            f"--workdir {workdir}: {file} cannot be read ({error.strerror}); expected the workdir "
            "of a run of matu_jax.train."
        ) from None
    except ValueError as error:
        raise UserError(
            f"{file}: {error}\nIt is damaged, or was written by another version of matu_jax."
        ) from None


def write(exported: Exported, kind: str, out: Path) -> None:
    """Writes a model in one of `FORMATS`, its head and its card, into a new folder.

    Raises:
      UserError: if the format does not fit the run, or the folder is there already.
    """
    config, model = exported.config, exported.config.model
    if kind != "safetensors" and model.architecture == "embedded":
        raise UserError(
            f"--format {kind}: the run is of the embedded architecture, which nothing else "
            "loads. Use --format safetensors."
        )
    if kind == "peft" and model.trainable == "full":
        raise UserError(
            "--format peft: the run trained every parameter, so there is no adapter. Use --format "
            "merged."
        )
    if kind == "peft" and model.checkpoint == "random":
        raise UserError(
            "--format peft: the run's image tower was drawn at random, so nobody has the base that "
            "the adapter belongs to. Use --format merged."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is there already. Give a new folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as unfinished:
        folder = Path(unfinished) / "model"
        folder.mkdir()
        try:
            loaded_by = _write_model(exported, kind, folder)
        except ValueError as error:
            raise UserError(str(error)) from None
        names = json.dumps(list(exported.task.class_names))
        head = {name: np.asarray(value, np.float32) for name, value in exported.head.items()}
        save_file(head, folder / "head.safetensors", {"class_names": names})
        (folder / "README.md").write_text(_card(exported, kind, loaded_by, config))
        if out.exists():
            out.rmdir()
        folder.rename(out)


def _write_model(exported: Exported, kind: str, folder: Path) -> str:
    model = exported.config.model
    if kind == "safetensors":
        tensors = {path: np.ascontiguousarray(leaf) for path, leaf in leaf_items(exported.vector)}
        about = {
            "format": "matu_jax task vector: fine-tuned minus base",
            "task": exported.task.name,
        }
        save_file(tensors, folder / "task_vector.safetensors", about)
        return ""
    architecture, source = architecture_of(model), huggingface.folder_of(model)
    if kind == "peft":
        return exporting.write_adapter(folder, exported.params, model, architecture)
    tower = exporting.merged_tower(exported.params, exported.frozen, model)
    return exporting.write_merged(
        folder,
        tower,
        architecture,
        source,
        class_names=exported.task.class_names,
        head=exported.head,
    )


def _card(exported: Exported, kind: str, loaded_by: str, config: Config) -> str:
    model, data, task = config.model, config.data, exported.task
    checkpoint, revision = exporting.base_model(model.checkpoint)
    header: dict[str, Any] = {"library_name": "peft" if kind == "peft" else "transformers"}
    if model.checkpoint not in ("random", "embedded") and not Path(checkpoint).exists():
        header["base_model"] = checkpoint
    at = f", revision={revision!r}" if revision else ""
    loading = {
        "peft": "# with transformers 5.23 or newer\n"
        f"base = transformers.{loaded_by}.from_pretrained({checkpoint!r}{at})\n"
        'model = peft.PeftModel.from_pretrained(base, "FOLDER")',
        "merged": f'model = transformers.{loaded_by}.from_pretrained("FOLDER")',
        "safetensors": "# Add the tensors to base parameters of the same names.\n"
        'vector = safetensors.numpy.load_file("FOLDER/task_vector.safetensors")',
    }[kind]
    if "bias" in exported.head:
        classify = "logits = features @ weight.T + bias"
    else:
        classify = "logits = logit_scale * features / norm(features) @ weight.T"
    measured = "not measured" if exported.accuracy is None else f"{100 * exported.accuracy:.1f} %"
    rows = {
        "task": f"{task.name}, {task.num_classes} classes",
        "base model": f"{model.checkpoint} ({model.architecture})",
        "trained": "LoRA of rank "
        f"{model.lora_rank}, alpha {model.lora_alpha:g}, on {', '.join(model.lora_targets)}"
        if model.trainable == "lora"
        else "every parameter of the image tower",
        "algorithm": config.algorithm,
        "rounds": f"{exported.round} of {config.rounds}",
        "clients": f"{data.clients}, {data.tasks_per_client} tasks each; this is the download of "
        f"client {exported.client}",
        "test accuracy": f"{measured} (that client's download, when last measured)",
        "data": f"{data.source} {data.tasks}, fingerprint {task.fingerprint or 'none'}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    head = "".join(f"{key}: {value}\n" for key, value in header.items())
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    settings = json.dumps(dataclasses.asdict(config), indent=2)
    return (
        f"---\n{head}---\n\n# {task.name}, fine-tuned with matu_jax\n\n| | |\n|---|---|\n{table}\n"
        f"Load it:\n\n```python\n{loading}\n```\n\nClassify with head.safetensors (class names in "
        f"its metadata), from image embeddings `features`:\n\n```python\n{classify}\n```\n\n"
        f"The run's configuration:\n\n```json\n{settings}\n```\n"
    )


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m matu_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="of a run of matu_jax.train")
    parser.add_argument("--task", required=True, help="one of the run's tasks")
    parser.add_argument("--format", choices=FORMATS, default="merged")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--client",
        type=int,
        help="whose download (default: the holder with the best validation accuracy)",
    )
    options = parser.parse_args(argv[1:])

    def work(console: Console) -> None:
        try:
            exported = read_run(options.workdir, options.task, options.client)
            write(exported, options.format, options.out)
        except OSError as error:
            raise UserError(f"--out {options.out}: {error}") from None
        console.print(
            f"{options.out}: task {exported.task.name}, client {exported.client}, after round "
            f"{exported.round}, as {options.format}. README.md there says how to load it.",
            markup=False,
        )

    return run_program(work, interrupted="Interrupted. Nothing is left in --out.")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
