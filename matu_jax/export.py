"""Takes a model out of a run: `python -m matu_jax.export --workdir RUN --task svhn --out DIR`.

What a task's client was measured with, in one of three formats:

    peft         a PEFT LoRA adapter (for runs with config.model.trainable = 'lora')
    merged       a Hugging Face checkpoint with the fine-tuned image tower
    safetensors  the raw task vector (fine-tuned minus base), with this package's names

and beside it head.safetensors ("weight" [classes, features]; "bias" of a trained head or
"logit_scale" of a zero-shot one) and a model card, README.md: how it was made, how to load it.

The round is the one that the run's results speak of, the best on validation, or --round. What is
written is measured on the test split first, in float32, and the card gives that accuracy; where it
is another than the run recorded, nothing is written. Algorithms that train a linearised model
(ntk_fedavg) have none that these formats could hold.

Exit codes: 0 done; 2 a mistake in the command or the run, said in one message.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from safetensors.numpy import save_file

from matu_jax import algorithms, models, rounds
from matu_jax.aggregation import Slots
from matu_jax.checkpoint import Checkpoints
from matu_jax.commandline import Parser, UserError, check_words, run_file, run_program
from matu_jax.config import Config, did_you_mean, freeze
from matu_jax.data import Task
from matu_jax.json_files import checked, read_json
from matu_jax.metrics import SELECTION, MetricsLog, read_summary, selected
from matu_jax.models import exporting, huggingface
from matu_jax.models.checkpoint_config import architecture_of
from matu_jax.parallel import WHOLE, placed, slot_mesh
from matu_jax.provenance import versions
from matu_jax.trees import PyTree, leaf_items
from matu_jax.workdir import check_origin

FORMATS = ("peft", "merged", "safetensors")


MOST_DIFFERENCE = 0.01
"""Between an export's accuracy and the run's: of the test examples, though two at least.

The same parameters give the same logits but for rounding, by which only examples change sides whose
two highest logits all but tie: none or a few in ten thousand between float32 programs, and up to a
few in a thousand where accelerators multiply in fewer bits. Another model, or another round, is
further away, or as good.
"""


@dataclasses.dataclass(frozen=True)
class Exported:
    """One task's model out of a run.

    Attributes:
      config: the run's.
      task: with its classes.
      client: whose model it is.
      round: rounds completed.
      why: how this round was chosen.
      vector: task vector, leaves `[...]`, without the head.
      params: base + vector, without the head.
      frozen: the rest of the image tower.
      head: "weight" float32 `[classes, features]` and "bias" `[classes]` (trained), or "weight" and
        "logit_scale" `[]` (zero-shot).
      accuracy: what the run recorded of it on the test split, or None where it did not measure.
      federation: the run's tasks, and the one slot whose model it is.
      model: the run's, computing in float32.
    """

    config: Config
    task: Task
    client: int
    round: int
    why: str
    vector: PyTree
    params: PyTree
    frozen: PyTree
    head: dict[str, np.ndarray]
    accuracy: float | None
    federation: rounds.Federation
    model: models.Model


def read_run(
    workdir: Path, task_name: str, client: int | None = None, round_index: int | None = None
) -> Exported:
    """Reads a task's model out of a run's checkpoint.

    Args:
      workdir: of the run.
      task_name: one of its tasks.
      client: one that holds the task; None = the holder with the best validation accuracy.
      round_index: rounds completed; None = the round of the run's results, see `metrics.selected`.

    Raises:
      UserError: if there is no such run, task, holder or round, the run's data or checkpoint is not
        there, or its algorithm trains a linearised model.
    """
    config = _config_of(workdir)
    try:
        algorithm = algorithms.build(config)
        if algorithm.local.linearised:
            raise UserError(
                f"--workdir {workdir}: config.algorithm {config.algorithm} trains the model's "
                "first-order expansion around its base, which is no checkpoint, adapter or sum of "
                "parameters: the same numbers in the ordinary model are another function. It "
                "cannot be exported; train with another algorithm, such as fedavg."
            )
        _check_registered(config)
        federation = rounds.federate(config)
        names = [task.name for task in federation.tasks]
        if task_name not in names:
            raise UserError(f"--task {task_name}: no such task.{did_you_mean(task_name, names)}")
        # Kernels are wanted as they were given, and nothing is trained.
        exact = dataclasses.replace(config.model, compute_dtype="float32", remat=False)
        model = models.build(exact, federation.tasks, seed=config.seed)
        target = jax.eval_shape(lambda: algorithm.init(model.base, federation.slots))
        similarity = np.zeros((len(names),) * 2, np.float32)
        with Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
            records = _records(workdir, checkpoints, config)
            chosen, why = _round(workdir, checkpoints, records, round_index)
            saved = {"state": target, "similarity_sum": similarity}
            restored, meta = checkpoints.restore_round(chosen, saved)
    except ValueError as error:
        raise UserError(str(error)) from None
    check_origin(workdir / "checkpoints", meta, config)
    accuracies = [record["accuracy"] for record in records if record["round"] == chosen]
    measured = accuracies[0] if accuracies else None
    row = _holder(federation.slots, names.index(task_name), client, measured, task_name)
    vectors = jax.jit(algorithm.evaluated or algorithm.download)
    vector = jax.tree.map(
        lambda x: np.asarray(x[row]), vectors(restored["state"], federation.slots)
    )
    return _exported(
        config,
        federation,
        model,
        vector,
        row,
        round=chosen,
        why=why,
        accuracy=measured["test_per_slot"][row] if measured else None,
    )


def _exported(
    config: Config,
    federation: rounds.Federation,
    model: models.Model,
    vector: PyTree,
    row: int,
    **about: Any,
) -> Exported:
    """Parts a slot's task vector into the tower's and the head's."""
    slots = federation.slots
    number = int(slots.task[row])
    task = federation.tasks[number]
    params = jax.tree.map(lambda a, b: np.asarray(a) + b, model.base, vector)
    if "trained" in model.frozen and bool(model.frozen["trained"][number]):
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
    part = slice(row, row + 1)
    alone = dataclasses.replace(
        slots, client=slots.client[part], task=slots.task[part], weight=slots.weight[part]
    )
    return Exported(
        config=config,
        task=task,
        client=int(slots.client[row]),
        vector=vector,
        params=params,
        frozen=jax.tree.map(np.asarray, model.frozen["backbone"]),
        head=head,
        federation=federation._replace(slots=alone),
        model=model,
        **about,
    )


def _check_registered(config: Config) -> None:
    """Says what to do about architectures and datasets that only the experiment's file knows."""
    try:
        rounds.task_names(config)
    except ValueError as error:
        raise UserError(
            f"{error}\nIf the run's experiment file registers an architecture or dataset of its "
            "own, give that file to --config."
        ) from None


def _records(workdir: Path, checkpoints: Checkpoints, config: Config) -> list[dict]:
    """The records of the rounds up to the newest whole checkpoint, as they were written.

    Raises:
      ValueError: if one is missing, or was changed later.
    """
    newest, _ = checkpoints.whole()
    if newest is None:
        return []
    meta = checkpoints.meta(newest)
    check_origin(checkpoints.directory, meta, config)
    log = MetricsLog(workdir / "metrics.jsonl")
    try:
        log.check(newest, meta.get("metrics"))
    except ValueError as error:
        raise ValueError(
            f"{error}. They say which round and which client is exported, and what it reached. "
            "Bring the file back from a copy."
        ) from None
    return log.first(newest)


def _round(
    workdir: Path, checkpoints: Checkpoints, records: Sequence[dict], given: int | None
) -> tuple[int, str]:
    """The round whose checkpoint is taken, and why."""
    there = checkpoints.complete()
    if not there:
        raise UserError(f"--workdir {workdir}: has no checkpoint yet; train for a round first.")
    choices = f"There are checkpoints of rounds {', '.join(map(str, there))}"
    if given is not None:
        if given not in there:
            raise UserError(f"--round {given}: has no checkpoint. {choices}.")
        return given, "as asked for"
    best = selected(records)
    if best is None:
        return there[-1], "the last one saved; no accuracy was measured"
    if best["round"] not in there:
        raise UserError(
            f"--workdir {workdir}: round {best['round']}, {SELECTION}, has no checkpoint, as in "
            f"runs of older versions. {choices}; take one with --round {there[-1]}."
        )
    if os.path.lexists(workdir / "summary.json"):
        told = read_summary(workdir / "summary.json")["selected_round"]
        if told != best["round"]:
            raise UserError(
                f"--workdir {workdir}: summary.json speaks of round {told}, and of the rounds up "
                f"to the newest checkpoint, {best['round']} is {SELECTION}: a checkpoint is "
                f"missing or damaged. Bring it back, or take another, such as --round {there[-1]}."
            )
    return best["round"], SELECTION


def measure(exported: Exported, kind: str) -> float:
    """Test accuracy of what is to be written, in float32, with the run's evaluation settings.

    Args:
      exported: from `read_run`.
      kind: of `FORMATS`; with "merged", the adapters are measured inside the kernels.

    Raises:
      UserError: if the run recorded another accuracy, further away than `MOST_DIFFERENCE`.
    """
    config, frozen = exported.config, exported.model.frozen
    params = exported.params
    if kind == "merged" and config.model.trainable == "lora":
        tower = exporting.merged_tower(params, exported.frozen, config.model)
        frozen = frozen | {"backbone": tower}
        params = jax.tree.map(np.zeros_like, params)
    found = _accuracy(exported, exported.model._replace(frozen=frozen), params)
    recorded = exported.accuracy
    if recorded is None:
        return found
    task, evaluation = exported.task, config.evaluation
    examples = min(len(task.test.labels), evaluation.max_examples or len(task.test.labels))
    most = max(MOST_DIFFERENCE, 2.5 / examples)
    compared = found
    if abs(found - recorded) > most and config.model.compute_dtype != "float32":
        model = models.build(config.model, exported.federation.tasks, seed=config.seed)
        compared = _accuracy(exported, model, exported.params)
    if abs(compared - recorded) > most:
        raise UserError(
            f"task {task.name}: the model of client {exported.client} after round "
            f"{exported.round} has a test accuracy of {100 * compared:.1f} %, but the run recorded "
            f"{100 * recorded:.1f} %, over the same {examples} examples; rounding explains "
            f"{100 * most:.1f} at most. It is not the model that was measured, so nothing is "
            "written. Have the data, the base checkpoint or the installed versions changed since? "
            f"Versions then are in summary.json; this run's data had the fingerprint "
            f"{task.fingerprint or 'none'}."
        )
    return found


def _accuracy(exported: Exported, model: models.Model, params: PyTree) -> float:
    """Test accuracy of parameters, with the exported head."""
    federation, head = exported.federation, exported.head
    if "trained" in model.frozen:
        kernel, bias = (np.zeros_like(model.base["head"][name]) for name in ("kernel", "bias"))
        if "bias" in head:
            kernel[:, : len(head["bias"])] = head["weight"].T
            bias[: len(head["bias"])] = head["bias"]
        params = {"shared": params, "head": {"kernel": kernel, "bias": bias}}
    mesh = slot_mesh(jax.local_devices()[:1])
    nothing = jax.tree.map(np.zeros_like, params)  # to which the whole parameters are added
    parameters = placed((nothing, model.frozen), mesh, WHOLE)
    measured = rounds.measuring(
        exported.config, model, federation, mesh, parameters, splits=("test",)
    )(lambda rows: jax.tree.map(lambda x: np.repeat(x[None], len(rows), axis=0), params))
    return measured["test_per_slot"][0]


def _holder(slots: Slots, task: int, client: int | None, measured: dict | None, name: str) -> int:
    """The slot whose model is taken."""
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
    for split in ("validation_per_slot", "test_per_slot"):
        if len(measured.get(split) or ()) != len(slots.task):
            raise UserError(
                f"metrics.jsonl: {split}: found {len(measured.get(split) or ())} numbers, expected "
                f"{len(slots.task)}, one for each slot of this federation. Bring the file back."
            )

    def rank(row: int) -> float:
        value = measured["validation_per_slot"][row]
        return -np.inf if value is None else value  # a slot of which nothing was measured

    return int(max(rows.tolist(), key=rank))


def _config_of(workdir: Path) -> Config:
    file = workdir / "config.json"
    try:
        return freeze(checked(dict[str, Any], read_json(file), str(file)))
    except OSError as error:
        raise UserError(
            f"--workdir {workdir}: {file} cannot be read ({error.strerror}); expected the workdir "
            "of a run of matu_jax.train. If it is one, move away what is in the file's place: the "
            "command that made the run, given once more, writes the file anew."
        ) from None
    except ValueError as error:
        raise UserError(
            f"--workdir {workdir}: {error}\n{file} is damaged, or was written by another version "
            "of matu_jax."
        ) from None


def write(exported: Exported, kind: str, out: Path) -> None:
    """Writes a model in one of `FORMATS`, its head and its card, into a new folder.

    Raises:
      UserError: if the format does not fit the run, or the folder is there already.
    """
    model = exported.config.model
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
    measured = measure(exported, kind)
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
        card = _card(exported, kind, loaded_by, measured)
        (folder / "README.md").write_text(card, encoding="utf-8")
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


def _card(exported: Exported, kind: str, loaded_by: str, measured: float) -> str:
    config, task = exported.config, exported.task
    model, data = config.model, config.data
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
    recorded = ""
    if exported.accuracy is not None:
        recorded = f"; recorded in training: {100 * exported.accuracy:.1f} %"
    rows = {
        "task": f"{task.name}, {task.num_classes} classes",
        "base model": f"{model.checkpoint} ({model.architecture})",
        "trained": "LoRA of rank "
        f"{model.lora_rank}, alpha {model.lora_alpha:g}, on {', '.join(model.lora_targets)}"
        if model.trainable == "lora"
        else "every parameter of the image tower",
        "algorithm": config.algorithm,
        "rounds": f"{exported.round} of {config.rounds}: {exported.why}",
        "clients": f"{data.clients}, {data.tasks_per_client} tasks each; this is the model of "
        f"client {exported.client}",
        "test accuracy": f"{100 * measured:.1f} % (of these files, in float32{recorded})",
        "data": f"{data.source} {data.tasks or 'folders'}, "
        f"fingerprint {task.fingerprint or 'none'}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    return exporting.model_card(
        f"{task.name}, fine-tuned with matu_jax",
        header,
        rows,
        loading=loading,
        classify=classify,
        settings=dataclasses.asdict(config),
    )


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns the exit code."""
    parser = Parser(
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
        help="whose model (default: the holder with the best validation accuracy)",
    )
    parser.add_argument(
        "--round",
        type=int,
        help="after which round (default: the one of the run's results, the best on validation)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="an experiment file to execute first, where it registers architectures or datasets",
    )

    def work(console: Console) -> None:
        check_words(argv[1:])
        options = parser.parse_args(argv[1:])
        if options.config:
            run_file(options.config)  # for what it registers; the config is the run's own
        try:
            exported = read_run(options.workdir, options.task, options.client, options.round)
        except OSError as error:
            raise UserError(f"{error.filename or options.workdir}: {error.strerror}") from None
        try:
            examples = len(exported.task.test.labels)
            console.print(f"Measuring on up to {examples} test examples first.")
            write(exported, options.format, options.out)
        except OSError as error:
            raise UserError(f"--out {options.out}: {error}") from None
        console.print(
            f"{options.out}: task {exported.task.name}, client {exported.client}, after round "
            f"{exported.round}, as {options.format}. README.md there says how to load it.\n"
            f"Round {exported.round} of {exported.config.rounds}: {exported.why}."
        )

    return run_program(work, interrupted="Interrupted. Nothing is left in --out.")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
