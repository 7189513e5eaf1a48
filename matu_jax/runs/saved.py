"""One slot's task vector out of a run: read from a checkpoint, and measured again."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from matu_jax import models
from matu_jax.algorithms import ALGORITHMS, Algorithm
from matu_jax.config import Config
from matu_jax.data import selection
from matu_jax.errors import UserError, did_you_mean
from matu_jax.models import Metric, Model
from matu_jax.runs.checkpoints import Checkpoints
from matu_jax.runs.log import selected
from matu_jax.runs.workdir import (
    EXPERIMENT,
    changed_tasks,
    changes,
    chosen_round,
    config_of,
    differences,
    records_of,
)
from matu_jax.simulation.choices import SimulationConfig
from matu_jax.simulation.evaluate import EvaluationSet, evaluation, summed
from matu_jax.simulation.federation import (
    Federation,
    algorithm_for,
    check_names,
    federate,
    identity,
    measured,
)
from matu_jax.simulation.measures import Measure, main_measure, measure_of
from matu_jax.simulation.placement import ROWS, WHOLE, placed, slot_mesh
from matu_jax.trees import PyTree


@dataclasses.dataclass(frozen=True)
class SavedSlot:
    """What a client was measured with on one of its tasks.

    Attributes:
      config: the run's.
      federation: the run's.
      model: the run's.
      row: of the slot.
      round: rounds completed.
      why: how this round was chosen.
      why_client: how this client was chosen.
      vector: task vector, leaves `[...]`, numpy arrays.
      recorded: by metric and split, what the run recorded of it; nothing where it did not measure.
      at_sites: by site, what the run recorded of this round on the test split, by what it is
        measured by; nothing where it did not measure, or data belongs to no site.
      measure: what that is.
    """

    config: Config
    federation: Federation
    model: Model
    row: int
    round: int
    why: str
    why_client: str
    vector: PyTree
    recorded: Mapping[str, Mapping[str, float]]
    at_sites: Mapping[str, float | None]
    measure: Measure

    def measured_on(self, split: str) -> tuple[list[PyTree], int]:
        """What the slot is measured on, as `sums_of` takes it: splits, and which of them."""
        splits, which = measured(self.federation, split)
        return splits, int(which[self.row])

    @property
    def task(self) -> int:
        """The task's position."""
        return int(self.federation.slots.task[self.row])

    @property
    def client(self) -> int:
        """Whose it is."""
        return int(self.federation.slots.client[self.row])

    @property
    def client_name(self) -> str:
        """Whose it is, for people: "client 2", "client 2 (site north)"."""
        return _client_name(self.federation, self.client)


def read_slot(
    workdir: Path,
    task_name: str,
    client: int | str | None = None,
    round_index: int | None = None,
) -> SavedSlot:
    """Reads a slot's task vector out of a run's checkpoint.

    Args:
      workdir: of the run.
      task_name: one of its tasks.
      client: one that holds the task, by its number (a text, too) or its site's name; None = the
        holder that is best on validation.
      round_index: rounds completed; None = the round of the run's results, see `log.selected`.

    Raises:
      UserError: if there is no such run, task, holder or round, the run's data or checkpoint is not
        there or another than it was, or its algorithm trains a linearised model.
    """
    config = config_of(workdir)
    try:
        _check_registered(config)
        federation = federate(config)
        names = [task.name for task in federation.tasks]
        if task_name not in names:
            raise UserError(f"--task {task_name}: no such task.{did_you_mean(task_name, names)}")
        model = models.build(config.model, federation.tasks, seed=config.seed)
        algorithm = algorithm_for(config, model)
        _check_ordinary(workdir, config, algorithm)
        target = jax.eval_shape(lambda: algorithm.init(model.base, federation.slots))
        similarity = np.zeros((len(names),) * 2, np.float32)
        with Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
            records = records_of(workdir, checkpoints, config)
            chosen, why = chosen_round(workdir, checkpoints, records, round_index)
            saved = {"state": target, "similarity_sum": similarity}
            now = identity(config, federation, model)
            try:
                restored, meta = checkpoints.restore_round(chosen, saved)
            except ValueError:  # a model that has changed has other leaves, too
                newest, _ = checkpoints.whole()
                if newest is not None:
                    _check_same(workdir, checkpoints.meta(newest), config, now)
                raise
        _check_same(workdir, meta, config, now)
    except ValueError as error:
        raise UserError(str(error)) from None
    record = selected([record for record in records if record["round"] == chosen])
    row, why_client = _holder(federation, names.index(task_name), client, record)
    vectors = jax.jit(algorithm.evaluated or algorithm.download)
    vector = jax.tree.map(
        lambda x: np.asarray(x[row]), vectors(restored["state"], federation.slots)
    )
    recorded = {name: _recorded(record[name], row) for name in model.metrics} if record else {}
    measure = main_measure(model.metrics, federation.tasks)
    at_sites = record[measure.name].get("test_per_site", {}) if record else {}
    return SavedSlot(
        config, federation, model, row, chosen, why, why_client, vector, recorded, at_sites, measure
    )


def _check_registered(config: Config) -> None:
    """Says what to do about what only the experiment's file knows."""
    try:
        check_names(config)
        if config.algorithm not in ALGORITHMS:
            raise ValueError(
                f"config.algorithm: found {config.algorithm!r}, no such algorithm."
                + did_you_mean(config.algorithm, ALGORITHMS)
            )
    except ValueError as error:
        raise UserError(
            f"{error}\nIf the run's experiment file registers an algorithm, architecture, model, "
            "source or dataset of its own, give that file to --config."
        ) from None


def _check_same(
    workdir: Path, meta: Mapping[str, Any], config: Config, now: Mapping[str, Any]
) -> None:
    """Refuses what was trained on other data, another base or by another config than there are now.

    Args:
      workdir: of the run.
      meta: what was saved with a checkpoint; older versions left some of it out.
      config: of the run.
      now: from `federation.identity`.

    Raises:
      UserError: with what differs.
    """
    lines = differences(meta["config"], config) if "config" in meta else []
    changed = [f"the checkpoint's config, where {line}" for line in lines]
    found = changes(meta, now)
    if "data" in found:
        tasks = ", ".join(changed_tasks(*found["data"]))
        changed.append(f"the data of task {tasks}, or how this version of matu_jax divides it")
    if "base" in found:
        changed.append(
            "config.model.checkpoint, or a model of your own, holds other tensors than when this "
            "run began"
        )
    if "measured_by" in found:
        then, since = (", ".join(names) for names in found["measured_by"])
        changed.append(f"metrics (the main one first): then {then}, now {since}")
    if "lower_is_better" in found:
        then, since = (", ".join(names) or "none" for names in found["lower_is_better"])
        changed.append(f"metrics of which lower values are better: then {then}, now {since}")
    if "held" in found:
        changed.append(
            "the order of tasks, or which examples slots or sites hold: task vectors would be "
            "taken for others'"
        )
    if not changed:
        return
    kept = workdir / EXPERIMENT
    copy = f" {kept} is a copy of the experiment's file as it was then." if kept.exists() else ""
    raise UserError(
        f"--workdir {workdir}: is not exported, since not all is as it was when the run was made:"
        + "\n  "
        + "\n  ".join(changed)
        + "\nBring the data, files and code of then back, and give the same command again."
        f"{copy} The run itself is whole: leave its folders as they are."
    )


def _check_ordinary(workdir: Path, config: Config, algorithm: Algorithm) -> None:
    if algorithm.local.linearised:
        raise UserError(
            f"--workdir {workdir}: config.algorithm {config.algorithm} trains the model's "
            "first-order expansion around its base, which is no checkpoint, adapter or sum of "
            "parameters: the same numbers in the ordinary model are another function. It "
            "cannot be exported; train with another algorithm, such as fedavg."
        )


def _recorded(measured: Mapping[str, Any], row: int) -> dict[str, float]:
    """What a record holds of a slot, by split; without what was not measured."""
    found = {split: measured[f"{split}_per_slot"][row] for split in ("validation", "test")}
    return {split: value for split, value in found.items() if value is not None}


def sums_of(
    config: SimulationConfig,
    model: Model,
    metrics: Mapping[str, Metric],
    splits: Sequence[PyTree],
    own: int,
    task: int,
    params: PyTree,
) -> PyTree:
    """Measures one slot's parameters as a round does: the same examples in the same batches.

    Args:
      config: says which examples are measured, and how many at once.
      model: what is evaluated; its base does not matter.
      metrics: what is measured of its outputs.
      splits: from `SavedSlot.measured_on`.
      own: which of them is the slot's.
      task: the slot's.
      params: of the slot, base and task vector added.

    Returns:
      By metric, leaves int64 or float64 `[...]`.
    """
    mesh = slot_mesh(jax.local_devices()[:1])
    whole = EvaluationSet(
        splits,
        np.array([own]),
        mesh,
        batch_examples=config.evaluation.batch_examples,
        max_examples=config.evaluation.max_examples,
        seed=config.seed,
    )
    program = jax.jit(evaluation(model, metrics, mesh))
    nothing = jax.tree.map(np.zeros_like, params)  # to which the whole parameters are added
    shared: tuple[Any, ...] = placed((nothing, model.frozen), mesh, WHOLE)
    vectors = placed(jax.tree.map(lambda x: np.asarray(x)[None], params), mesh, ROWS)
    sums = summed(program, shared, whole, lambda _: vectors, np.array([task]), mesh)
    return jax.tree.map(lambda x: x[0], sums)


def _holder(
    federation: Federation,
    task: int,
    client: int | str | None,
    record: Mapping[str, Any] | None,
) -> tuple[int, str]:
    """The slot whose model is taken, and how its client was chosen."""
    slots, name = federation.slots, federation.tasks[task].name
    measure = measure_of(record or {})
    measured = record[measure.name] if record else None
    for split in ("validation_per_slot", "test_per_slot"):
        if measured is None:
            break
        found = len(measured.get(split) or ())
        if found != len(slots.task):
            raise UserError(
                f"metrics.jsonl: {split}: found {found} numbers, expected {len(slots.task)}, one "
                "for each slot of this federation. Bring the file back."
            )
    rows = np.flatnonzero(slots.task == task).tolist()
    holders = slots.client[rows].tolist()
    if client is not None:
        number = _client_number(federation, client)
        if number not in holders:
            names = ", ".join(_client_name(federation, holder) for holder in holders)
            raise UserError(
                f"--client {client}: does not hold task {name}; those that do: {names}."
            )
        return rows[holders.index(number)], "as asked for"
    if len(rows) == 1:
        return rows[0], "the only one that holds the task"
    # None of a slot of which nothing was measured.
    ranks = [
        measure.rank(measured["validation_per_slot"][row]) if measured else -np.inf for row in rows
    ]
    if max(ranks) == -np.inf:
        return rows[0], f"the first of {len(rows)} that hold the task, none measured on validation"
    best = rows[int(np.argmax(ranks))]
    return best, f"of {len(rows)} that hold the task, the best on validation"


def _client_number(federation: Federation, client: int | str) -> int | None:
    """A client's number, given as that or by its site's name; None where there is none such."""
    if isinstance(client, int):
        return client
    site = selection.composed(client)
    if site in federation.sites:
        return federation.sites.index(site)
    return int(client) if client.isdecimal() else None


def _client_name(federation: Federation, client: int) -> str:
    site = f" (site {federation.sites[client]})" if federation.sites else ""
    return f"client {client}{site}"
