"""Takes a model out of a run: `python -m matu_jax.export --workdir RUN --task svhn --out DIR`.

What a task's client was measured with, in one of three formats:

    peft         a PEFT LoRA adapter (for runs with config.model.trainable = 'lora')
    merged       a Hugging Face checkpoint with the fine-tuned image tower
    safetensors  the raw task vector (fine-tuned minus base), with this package's names

and beside it head.safetensors ("weight" [classes, features]; "bias" of a trained head or
"logit_scale" of a zero-shot one) and a model card, README.md: how it was made, how to load it.

The round is the one that the run's results speak of, the best on validation, or --round. Data, base
checkpoint and state have to be the run's, byte for byte. Then the model is measured as the run did:
it must get as many validation and test examples right as the run recorded, up to those that are
near ties, which rounding may decide; else nothing is written. Of a round that the run did not
measure nothing can be compared. The card's accuracy is that on the test examples in float32. All
files of tensors are read back and compared bit for bit. Algorithms that train a linearised model
(ntk_fedavg) have none that these formats could hold.

Exit codes: 0 done; 2 a mistake in the command or the run, said in one message.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from matu_jax import algorithms, models, rounds
from matu_jax.aggregation import Slots
from matu_jax.checkpoint import Checkpoints
from matu_jax.commandline import Parser, UserError, check_words, run_file, run_program
from matu_jax.config import Config, did_you_mean
from matu_jax.data import Task
from matu_jax.evaluate import ROUNDING, Counts, count_slot
from matu_jax.models import exporting, huggingface
from matu_jax.models.architectures import transform_of
from matu_jax.models.checkpoint_config import architecture_of
from matu_jax.provenance import versions
from matu_jax.trees import PyTree, leaf_items
from matu_jax.workdir import (
    check_identity,
    chosen_round,
    config_of,
    records_of,
)

FORMATS = ("peft", "merged", "safetensors")


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
      recorded: the accuracy that the run recorded of it, by split; none where it did not measure.
      tasks: of the run.
      number: of the task among them.
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
    recorded: dict[str, float]
    tasks: Sequence[Task]
    number: int
    model: models.Model

    @property
    def accuracy(self) -> float | None:
        """What the run recorded on the test split."""
        return self.recorded.get("test")


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
    config = config_of(workdir)
    try:
        algorithm = _registered(config)
        if algorithm.local.linearised:
            raise UserError(
                f"--workdir {workdir}: config.algorithm {config.algorithm} trains the model's "
                "first-order expansion around its base, which is no checkpoint, adapter or sum of "
                "parameters: the same numbers in the ordinary model are another function. It "
                "cannot be exported; train with another algorithm, such as fedavg."
            )
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
            records = records_of(workdir, checkpoints, config)
            chosen, why = chosen_round(workdir, checkpoints, records, round_index)
            saved = {"state": target, "similarity_sum": similarity}
            restored, meta = checkpoints.restore_round(chosen, saved)
        identity = rounds.identity(config, federation)
        check_identity(workdir / "checkpoints", meta, config, identity)
    except ValueError as error:
        raise UserError(str(error)) from None
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
        recorded={
            split: measured[f"{split}_per_slot"][row]
            for split in ("validation", "test")
            if measured and measured[f"{split}_per_slot"][row] is not None
        },
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
    return Exported(
        config=config,
        task=task,
        client=int(slots.client[row]),
        vector=vector,
        params=params,
        frozen=jax.tree.map(np.asarray, model.frozen["backbone"]),
        head=head,
        tasks=federation.tasks,
        number=number,
        model=model,
        **about,
    )


def _registered(config: Config) -> algorithms.Algorithm:
    """The algorithm; says what to do about what only the experiment's file knows."""
    try:
        rounds.task_names(config)
        return algorithms.build(config)
    except ValueError as error:
        raise UserError(
            f"{error}\nIf the run's experiment file registers an algorithm, architecture or "
            "dataset of its own, give that file to --config."
        ) from None


def measure(exported: Exported, kind: str) -> Counts:
    """Counts the test examples that what is to be written gets right, in float32.

    First the parameters are counted as the run did, in its dtype and batches, on its validation and
    test examples. Each count has to be the recorded one, but for near ties, which may have changed
    sides, see `evaluate.near_ties`. Then they are counted in float32; merged kernels too, which may
    differ from adapters by near ties alone.

    Args:
      exported: from `read_run`.
      kind: of `FORMATS`; with "merged", the adapters are measured inside the kernels.

    Raises:
      UserError: if a count is another.
    """
    config, exact = exported.config, exported.model
    dtype, run = config.model.compute_dtype, exact
    if dtype != "float32":
        run = models.build(config.model, exported.tasks, seed=config.seed)
    counts = {split: _count(exported, run, split, dtype=dtype) for split in exported.recorded}
    for split, accuracy in exported.recorded.items():
        _check_count(exported, counts[split], accuracy * counts[split].examples, split)
    in_float32 = counts.get("test") if run is exact else None
    in_float32 = in_float32 or _count(exported, exact, "test")
    if kind == "merged" and config.model.trainable == "lora":
        tower = exporting.merged_tower(exported.params, exported.frozen, config.model)
        merged = exact._replace(frozen=exact.frozen | {"backbone": tower})
        params = jax.tree.map(np.zeros_like, exported.params)
        adapters, in_float32 = in_float32, _count(exported, merged, "test", params=params)
        if abs(in_float32.right - adapters.right) > max(in_float32.near, adapters.near):
            raise UserError(
                f"task {exported.task.name}: merged kernels classify {in_float32.right} of "
                f"{in_float32.examples} test examples rightly, adapters beside them "
                f"{adapters.right}; nothing is written. Export with --format peft."
            )
    return in_float32


def _check_count(exported: Exported, found: Counts, recorded: float, split: str) -> None:
    if abs(found.right - recorded) <= found.near + 1e-6:
        return
    raise UserError(
        f"task {exported.task.name}: the model of client {exported.client} after round "
        f"{exported.round} classifies {found.right} of {found.examples} {split} examples rightly, "
        f"but the run recorded {recorded:.6g}, and {found.near} are near enough to a tie for "
        "rounding to decide. It is not the model that was measured, so nothing is written. Have "
        "the base checkpoint or the installed versions changed since? Versions then are in "
        "summary.json."
    )


def _count(
    exported: Exported,
    model: models.Model,
    split: str,
    *,
    dtype: str = "float32",
    params: PyTree | None = None,
) -> Counts:
    """Counts on a split with the exported head, of the exported parameters or others."""
    head = exported.head
    params = exported.params if params is None else params
    if "trained" in model.frozen:
        kernel, bias = (np.zeros_like(model.base["head"][name]) for name in ("kernel", "bias"))
        if "bias" in head:
            kernel[:, : len(head["bias"])] = head["weight"].T
            bias[: len(head["bias"])] = head["bias"]
        params = {"shared": params, "head": {"kernel": kernel, "bias": bias}}
    splits = [getattr(task, split) for task in exported.tasks]
    classes = exported.task.num_classes
    return count_slot(
        exported.config, model, splits, exported.number, classes, params, rounding=ROUNDING[dtype]
    )


def _holder(slots: Slots, task: int, client: int | None, measured: dict | None, name: str) -> int:
    """The slot whose model is taken."""
    for split in ("validation_per_slot", "test_per_slot"):
        if measured is None:
            break
        found = len(measured.get(split) or ())
        if found != len(slots.task):
            raise UserError(
                f"metrics.jsonl: {split}: found {found} numbers, expected {len(slots.task)}, one "
                "for each slot of this federation. Bring the file back."
            )
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

    def rank(row: int) -> float:
        value = measured["validation_per_slot"][row]
        return -np.inf if value is None else value  # a slot of which nothing was measured

    return int(max(rows.tolist(), key=rank))


def write(
    exported: Exported, kind: str, out: Path, say: Callable[[str], None] = lambda line: None
) -> None:
    """Writes a model in one of `FORMATS`, its head and its card, into a new folder.

    Before that it is measured, see `measure`. Every file of tensors is read back and compared bit
    for bit; a merged checkpoint also as any other is read, with the image tower that was measured.

    Args:
      exported: from `read_run`.
      kind: of `FORMATS`.
      out: the folder.
      say: is told, a line at a time, what is done and what is left out.

    Raises:
      UserError: if the format does not fit the run, the folder is there already, the model is not
        the one that the run measured, or a file reads back otherwise. Nothing is written then.
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
    say(f"Measuring on {_examples(exported)} examples first.")
    measured = measure(exported, kind)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as unfinished:
        folder = Path(unfinished) / "model"
        folder.mkdir()
        names = json.dumps(list(exported.task.class_names))
        head = {name: np.asarray(value, np.float32) for name, value in exported.head.items()}
        try:
            loaded_by = _write_model(exported, kind, folder)
            exporting.save_checked(head, folder / "head.safetensors", {"class_names": names})
        except ValueError as error:
            raise UserError(str(error)) from None
        card = _card(exported, kind, loaded_by, measured)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            out.rmdir()
        folder.rename(out)
    links = exporting.links_left_out(huggingface.folder_of(model)) if kind == "merged" else []
    if links:
        say(f"Not copied, links out of the base's folder: {', '.join(links)}")


def _examples(exported: Exported) -> str:
    """How many examples are measured, such as "20 validation and 20 test"."""
    most, counts = exported.config.evaluation.max_examples, []
    for split in exported.recorded | {"test": None}:
        there = len(getattr(exported.task, split).labels)
        counts.append(f"{min(there, most or there)} {split}")
    return " and ".join(counts)


def _write_model(exported: Exported, kind: str, folder: Path) -> str:
    model = exported.config.model
    if kind == "safetensors":
        tensors = dict(leaf_items(exported.vector))
        about = {
            "format": "matu_jax task vector: fine-tuned minus base",
            "task": exported.task.name,
        }
        exporting.save_checked(tensors, folder / "task_vector.safetensors", about)
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


def _card(exported: Exported, kind: str, loaded_by: str, measured: Counts) -> str:
    """The text of an export's README.md.

    Args:
      exported: the model.
      kind: "peft", "merged" or "safetensors".
      loaded_by: the transformers class that loads it.
      measured: on the test split, in float32.
    """
    config, task = exported.config, exported.task
    model, data = config.model, config.data
    library = {"peft": "peft", "merged": "transformers", "safetensors": "matu_jax"}[kind]
    header: dict[str, Any] = {"library_name": library}
    checkpoint, _ = exporting.base_model(model.checkpoint)
    if model.checkpoint not in ("random", "embedded") and not Path(checkpoint).exists():
        header["base_model"] = checkpoint
    images = f"made {transform_of(model).size} pixels high and wide"
    if model.architecture != "embedded":
        images = exporting.images_text(architecture_of(model))
    recorded = "; the run did not measure this round"
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
        "clients": f"{data.clients}, tasks of each: {data.tasks_per_client}; this is the model of "
        f"client {exported.client}",
        "test accuracy": f"{100 * (measured.right / measured.examples):.1f} % of "
        f"{measured.examples} of {len(task.test.labels)} test examples (of these files, in "
        f"float32{recorded})",
        "images": images,
        "data": f"{data.source} {data.tasks or 'folders'}, "
        f"fingerprint {task.fingerprint or 'none'}",
        **({"about the data": "; ".join(task.notes)} if task.notes else {}),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    return exporting.model_card(
        f"{task.name}, fine-tuned with matu_jax",
        header,
        rows,
        loading=_loading(exported, kind, loaded_by),
        classify=_classify(exported, kind),
        settings=dataclasses.asdict(config),
    )


def _loading(exported: Exported, kind: str, loaded_by: str) -> str:
    """Python code that loads the model."""
    model = exported.config.model
    checkpoint, revision = exporting.base_model(model.checkpoint)
    if kind == "merged":
        return f'import transformers\n\nmodel = transformers.{loaded_by}.from_pretrained("FOLDER")'
    if kind == "peft":
        at = f", revision={revision!r}" if revision else ""
        return (
            "import peft\nimport transformers  # 5.23 or newer\n\n"
            f"base = transformers.{loaded_by}.from_pretrained({checkpoint!r}{at})\n"
            'model = peft.PeftModel.from_pretrained(base, "FOLDER")'
        )
    where = f"the base, {model.checkpoint!r}"
    if model.checkpoint == "random":
        where = f"the base, which matu_jax.models.build draws from seed {exported.config.seed}"
    return (
        "import safetensors.numpy\n\n"
        f"# To be added to parameters of the same names of {where}.\n"
        'vector = safetensors.numpy.load_file("FOLDER/task_vector.safetensors")'
    )


def _classify(exported: Exported, kind: str) -> str:
    """Python code that uses the head."""
    head, kept = exported.head, "torch"
    norm = "features.norm(dim=-1, keepdim=True)"
    if kind == "safetensors":
        kept, norm = "numpy", "(features**2).sum(axis=-1, keepdims=True) ** 0.5"
        features = "# features [examples, features]: of the image tower with base + vector"
    else:
        code = exporting.features_code(architecture_of(exported.config.model), kind)
        features = f"features = {code}"
    logits = f'head["logit_scale"] * features / {norm} @ head["weight"].T'
    if "bias" in head:
        logits = 'features @ head["weight"].T + head["bias"]'
    return (
        f"import safetensors.{kept}\n\n"
        f'head = safetensors.{kept}.load_file("FOLDER/head.safetensors")\n'
        f"{features}\n"
        f"logits = {logits}"
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
        help="an experiment file to execute first, where it registers algorithms, architectures or "
        "datasets",
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
            write(exported, options.format, options.out, console.print)
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
