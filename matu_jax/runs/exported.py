"""One task's model out of a run: read, measured again, written."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from matu_jax import algorithms, models
from matu_jax.aggregation import Slots
from matu_jax.config import Config
from matu_jax.data import ImageTask, Split, image_tasks
from matu_jax.errors import UserError, did_you_mean
from matu_jax.models import exporting
from matu_jax.models.classification import ROUNDING, near_ties
from matu_jax.runs.checkpoints import Checkpoints
from matu_jax.runs.workdir import check_identity, chosen_round, config_of, records_of
from matu_jax.simulation.choices import SimulationConfig
from matu_jax.simulation.evaluate import EvaluationSet, evaluation, summed
from matu_jax.simulation.federation import Federation, federate, identity, task_names
from matu_jax.simulation.placement import ROWS, WHOLE, placed, slot_mesh
from matu_jax.trees import PyTree


class Counts(NamedTuple):
    """Of one split: examples classified rightly, all that were measured, and near ties."""

    right: int
    examples: int
    near: int


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
    task: ImageTask
    client: int
    round: int
    why: str
    vector: PyTree
    params: PyTree
    frozen: PyTree
    head: dict[str, np.ndarray]
    recorded: dict[str, float]
    tasks: Sequence[ImageTask]
    number: int
    model: models.Classifier

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
      round_index: rounds completed; None = the round of the run's results, see `log.selected`.

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
        federation = federate(config)
        names = [task.name for task in federation.tasks]
        if task_name not in names:
            raise UserError(f"--task {task_name}: no such task.{did_you_mean(task_name, names)}")
        # Kernels are wanted as they were given, and nothing is trained.
        exact = dataclasses.replace(config.model, compute_dtype="float32", remat=False)
        model = models.build_classifier(exact, federation.tasks, seed=config.seed)
        target = jax.eval_shape(lambda: algorithm.init(model.base, federation.slots))
        similarity = np.zeros((len(names),) * 2, np.float32)
        with Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
            records = records_of(workdir, checkpoints, config)
            chosen, why = chosen_round(workdir, checkpoints, records, round_index)
            saved = {"state": target, "similarity_sum": similarity}
            restored, meta = checkpoints.restore_round(chosen, saved)
        wanted = identity(config, federation, model)
        check_identity(workdir / "checkpoints", meta, config, wanted)
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
    federation: Federation,
    model: models.Classifier,
    vector: PyTree,
    row: int,
    **about: Any,
) -> Exported:
    """Parts a slot's task vector into the tower's and the head's."""
    slots = federation.slots
    number = int(slots.task[row])
    tasks = image_tasks(federation.tasks)
    task = tasks[number]
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
        tasks=tasks,
        number=number,
        model=model,
        **about,
    )


def _registered(config: Config) -> algorithms.Algorithm:
    """The algorithm; says what to do about what only the experiment's file knows."""
    try:
        task_names(config)
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
    sides, see `classification.near_ties`. Then they are counted in float32; merged kernels too,
    which may differ from adapters by near ties alone.

    Args:
      exported: from `read_run`.
      kind: of `FORMATS`; with "merged", the adapters are measured inside the kernels.

    Raises:
      UserError: if a count is another.
    """
    config, exact = exported.config, exported.model
    dtype, run = config.model.compute_dtype, exact
    if dtype != "float32":
        run = models.build_classifier(config.model, exported.tasks, seed=config.seed)
    counts = {split: _count(exported, run, split, dtype=dtype) for split in exported.recorded}
    for split, accuracy in exported.recorded.items():
        _check_count(exported, counts[split], accuracy * counts[split].examples, split)
    in_float32 = counts.get("test") if run is exact else None
    in_float32 = in_float32 or _count(exported, exact, "test")
    if kind == "merged" and config.model.trainable == "lora":
        tower = exporting.merged_tower(exported.params, exported.frozen, config.model)
        merged = dataclasses.replace(exact, frozen=exact.frozen | {"backbone": tower})
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
    model: models.Classifier,
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
    return count_slot(
        exported.config, model, splits, exported.number, params, rounding=ROUNDING[dtype]
    )


def count_slot(
    config: SimulationConfig,
    model: models.Classifier,
    splits: Sequence[Split],
    task: int,
    params: PyTree,
    *,
    rounding: float,
) -> Counts:
    """Measures one slot's parameters as a round does: the same examples in the same batches.

    Args:
      config: says which examples are measured, and how many at once.
      model: what is evaluated; its base does not matter.
      splits: one per task of the run.
      task: the slot's.
      params: of the slot, base and task vector added.
      rounding: as in `classification.ROUNDING`.
    """
    mesh = slot_mesh(jax.local_devices()[:1])
    whole = EvaluationSet(
        splits,
        np.array([task]),
        mesh,
        batch_examples=config.evaluation.batch_examples,
        max_examples=config.evaluation.max_examples,
        seed=config.seed,
    )
    metrics = {"accuracy": model.metrics["accuracy"], "near": near_ties(rounding)}
    program = jax.jit(evaluation(model, metrics, mesh))
    nothing = jax.tree.map(np.zeros_like, params)  # to which the whole parameters are added
    shared: tuple[Any, ...] = placed((nothing, model.frozen), mesh, WHOLE)
    vectors = placed(jax.tree.map(lambda x: np.asarray(x)[None], params), mesh, ROWS)
    sums = summed(program, shared, whole, lambda _: vectors, np.array([task]), mesh)
    right, examples = (int(sums["accuracy"][name][0]) for name in ("right", "examples"))
    return Counts(right, examples, int(sums["near"][0]))


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
