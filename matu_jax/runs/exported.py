"""One task's image model out of a run: tower and head, measured again."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from matu_jax import models
from matu_jax.config import Config
from matu_jax.data import ImageTask, Split, image_tasks
from matu_jax.errors import UserError
from matu_jax.models import exporting
from matu_jax.models.classification import ROUNDING, near_ties
from matu_jax.runs.saved import SavedSlot, sums_of
from matu_jax.simulation.choices import SimulationConfig
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
      slot: what was read of the run.
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
    recorded: Mapping[str, float]
    tasks: Sequence[ImageTask]
    number: int
    model: models.Classifier
    slot: SavedSlot

    @property
    def accuracy(self) -> float | None:
        """What the run recorded on the test split."""
        return self.recorded.get("test")


def exported(slot: SavedSlot) -> Exported:
    """Parts a slot's task vector into the tower's and the head's.

    Args:
      slot: of a task of images, from `saved.read_slot`.

    Raises:
      UserError: if the run's model is one of `models.MODELS`, or its tasks are no images.
    """
    config, federation, row = slot.config, slot.federation, slot.row
    number = int(federation.slots.task[row])
    # Kernels are wanted as they were given, and nothing is trained.
    exact = dataclasses.replace(config.model, compute_dtype="float32", remat=False)
    try:
        tasks = image_tasks(federation.tasks)
        model = models.build_classifier(exact, tasks, seed=config.seed)
    except ValueError as error:
        raise UserError(str(error)) from None
    task, vector = tasks[number], slot.vector
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
        client=int(federation.slots.client[row]),
        round=slot.round,
        why=slot.why,
        vector=vector,
        params=params,
        frozen=jax.tree.map(np.asarray, model.frozen["backbone"]),
        head=head,
        recorded=slot.recorded.get("accuracy", {}),
        tasks=tasks,
        number=number,
        model=model,
        slot=slot,
    )


def measure(exported: Exported, kind: str) -> Counts:
    """Counts the test examples that what is to be written gets right, in float32.

    First the parameters are counted as the run did, in its dtype and batches, on its validation and
    test examples. Each count has to be the recorded one, but for near ties, which may have changed
    sides, see `classification.near_ties`. Then they are counted in float32; merged kernels too,
    which may differ from adapters by near ties alone.

    Args:
      exported: from `exported`.
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
    splits, own = exported.slot.measured_on(split)
    rounding = ROUNDING[dtype]
    return count_slot(
        exported.config, model, splits, own, exported.number, params, rounding=rounding
    )


def count_slot(
    config: SimulationConfig,
    model: models.Classifier,
    splits: Sequence[Split],
    own: int,
    task: int,
    params: PyTree,
    *,
    rounding: float,
) -> Counts:
    """Measures one slot's parameters as a round does: the same examples in the same batches.

    Args:
      config: as in `saved.sums_of`.
      model: what is evaluated; its base does not matter.
      splits: as in `saved.sums_of`.
      own: as in `saved.sums_of`.
      task: the slot's.
      params: of the slot, base and task vector added.
      rounding: as in `classification.ROUNDING`.
    """
    metrics = {"accuracy": model.metrics["accuracy"], "near": near_ties(rounding)}
    sums = sums_of(config, model, metrics, splits, own, task, params)
    right, examples = (int(sums["accuracy"][name]) for name in ("right", "examples"))
    return Counts(right, examples, int(sums["near"]))
