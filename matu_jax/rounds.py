"""The round loop: download, local training, upload, aggregation, evaluation. Prints nothing."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from matu_jax.aggregation import Slots
from matu_jax.algorithms import Algorithm, message_bits
from matu_jax.config import Config
from matu_jax.data import Task, embedded
from matu_jax.data.batching import gather, round_indices
from matu_jax.data.partition import assign, partition
from matu_jax.evaluate import evaluation, evaluation_set, per_task
from matu_jax.local import Trained, local_training
from matu_jax.metrics import relatedness_auc
from matu_jax.models import Model
from matu_jax.parallel import AXIS, padded_rows, slot_mesh
from matu_jax.trees import PyTree


class Federation(NamedTuple):
    """Who holds what.

    Attributes:
      tasks: all tasks, with their data.
      slots: client, task and number of training examples of every slot, as numpy arrays.
      indices: per slot, positions in its task's train split.
    """

    tasks: tuple[Task, ...]
    slots: Slots
    indices: list[np.ndarray]


class RoundResult(NamedTuple):
    """What a round leaves behind.

    Attributes:
      round: 1 for the first.
      state: the algorithm's state; valid until the next round starts, which takes its buffers.
      record: what metrics.jsonl holds of the round, as plain Python values.
      similarity: float32 `[tasks, tasks]` as the server measured it, or None.
    """

    round: int
    state: Any
    record: dict[str, Any]
    similarity: np.ndarray | None


def task_names(config: Config) -> tuple[str, ...]:
    """Names of the tasks that `config.data.tasks` stands for."""
    sets = {"embedded8": embedded.EIGHT, "embedded30": tuple(embedded.TASKS)}
    return sets.get(config.data.tasks) or tuple(
        name.strip() for name in config.data.tasks.split(",") if name.strip()
    )


def federate(config: Config) -> Federation:
    """Loads the tasks and deals them out to clients.

    Raises:
      ValueError: for an unknown task, or an assignment or partition that cannot be made; it names
        the setting to change.
    """
    data = config.data
    tasks = embedded.load(task_names(config))
    try:
        client, task = assign(
            data.clients, data.tasks_per_client, len(tasks), data.seed, data.assignment or None
        )
        indices = partition(
            [t.train.labels for t in tasks],
            client,
            task,
            examples_per_slot=data.examples_per_slot or None,
            alpha=data.dirichlet_alpha or None,
            seed=data.seed,
        )
    except ValueError as error:
        names = ", ".join(f"{i} = {t.name}" for i, t in enumerate(tasks))
        raise ValueError(
            f"config.data (clients, tasks_per_client, assignment, examples_per_slot, "
            f"dirichlet_alpha) cannot be dealt out: {error}. Tasks: {names}."
        ) from None
    weight = np.array([len(rows) for rows in indices], np.float32)
    return Federation(tasks, Slots(client, task, weight, data.clients, len(tasks)), indices)


def related(tasks: tuple[Task, ...]) -> np.ndarray:
    """Ground truth of relatedness: two tasks with one label space; bool `[tasks, tasks]`."""
    spaces = np.array([task.label_space for task in tasks])
    return spaces[:, None] == spaces[None, :]


def participants(config: Config, slots: Slots, round_index: int) -> np.ndarray:
    """Draws the clients of a round from (seed, round): bool `[clients]`."""
    count = config.clients_per_round or slots.num_clients
    chosen = np.zeros(slots.num_clients, bool)
    rng = np.random.default_rng((config.seed, round_index, 0x5E1EC7))
    chosen[rng.permutation(slots.num_clients)[:count]] = True
    return chosen


def trained_slots(config: Config, slots: Slots, chosen: np.ndarray) -> np.ndarray:
    """Which slots are trained in a round: as many every round, so that nothing recompiles.

    The chosen clients' slots come first; where clients differ in their number of tasks, slots of
    others fill up (their weight is 0). int64 `[trained]`.
    """
    held = np.sort(np.bincount(slots.client, minlength=slots.num_clients))
    size = int(held[-(config.clients_per_round or slots.num_clients) :].sum())
    order = np.argsort(~chosen[slots.client], kind="stable")
    return np.sort(order[:size])


def predicted_bytes(
    config: Config, model: Model, algorithm: Algorithm, federation: Federation, devices: int
) -> dict[str, int]:
    """Predicts device memory before anything is compiled, over all devices, in bytes.

    Activations are the residuals of one gradient's backward pass, as its abstract evaluation
    lists them, for as many slots as train at once.
    """
    slots, local = federation.slots, config.local
    image = federation.tasks[0].train.images.shape[1:]
    batch = jax.ShapeDtypeStruct((local.batch_examples, *image), jnp.uint8)

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    def logits(vector, frozen, images):
        return jax.vjp(lambda v: model.logits(v, frozen, images), vector)[1]

    residuals = size(jax.eval_shape(logits, model.base, model.frozen, batch))
    trained = len(trained_slots(config, slots, participants(config, slots, 0)))
    on_cpu = jax.default_backend() == "cpu"
    at_once = local.parallel_slots or (1 if on_cpu else -(-trained // devices))
    state = jax.eval_shape(lambda: algorithm.init(model.base, slots))
    examples = sum(len(t.validation.labels) + len(t.test.labels) for t in federation.tasks)
    vector = size(model.base)
    return {
        "parameters": (size(model.frozen) + vector) * devices,
        "activations": min(at_once * devices, trained) * residuals,
        "optimiser": min(at_once * devices, trained) * 4 * vector,
        "task vectors": (2 * trained + 2 * slots.client.shape[0]) * vector,
        "server state": 2 * size(state),
        "batches": trained * local.steps * local.batch_examples * int(np.prod(image)),
        "evaluation images": devices * examples * int(np.prod(image)),
    }


def run(
    config: Config,
    algorithm: Algorithm,
    model: Model,
    federation: Federation,
    *,
    mesh: Mesh | None = None,
    start: tuple[int, Any] | None = None,
) -> Iterator[RoundResult]:
    """Runs an experiment, round by round.

    Args:
      config: rounds, seeds, participation, local training, evaluation.
      algorithm: from `algorithms.build`.
      model: from `models.build`.
      federation: from `federate`.
      mesh: the devices; all, if None.
      start: (rounds done, state) to go on from; None starts afresh.

    Yields:
      One `RoundResult` per round. Everything random is drawn from (seed, round, client, task), so
      a run that goes on from a state equals one that was never interrupted.
    """
    mesh = mesh or slot_mesh()
    everywhere, server = NamedSharding(mesh, PartitionSpec()), mesh.devices.flat[0]
    over_slots = NamedSharding(mesh, PartitionSpec(AXIS))
    tasks, slots = federation.tasks, federation.slots
    num_classes = np.array([tasks[t].num_classes for t in slots.task], np.int32)
    train = jax.jit(local_training(model, config.local, algorithm.local, mesh))
    measure = jax.jit(evaluation(model, mesh, parallel_slots=config.local.parallel_slots))
    sets = {
        split: jax.device_put(
            evaluation_set([getattr(t, split) for t in tasks], config.evaluation.batch_examples),
            everywhere,
        )
        for split in ("validation", "test")
    }

    @jax.jit
    def download(state: Any, slots: Slots, rows: jax.Array) -> PyTree:
        return jax.tree.map(lambda x: x[rows], algorithm.download(state, slots))

    @jax.jit
    def upload(trained: PyTree, slots: Slots, rows: jax.Array) -> Any:
        def spread(leaf):
            whole = jnp.zeros((slots.client.shape[0], *leaf.shape[1:]), leaf.dtype)
            return whole.at[rows].set(leaf[: rows.shape[0]])

        return algorithm.upload(jax.tree.map(spread, trained), slots)

    aggregate = jax.jit(algorithm.aggregate, donate_argnums=0)

    every_slot = padded_rows(np.arange(len(slots.task)), mesh)
    measured_on = (slots.task[every_slot], num_classes[every_slot])
    done, state = start or (0, jax.jit(algorithm.init)(model.base, slots))
    state = jax.device_put(state, server)
    messages = None
    parameters = jax.device_put((model.base, model.frozen), everywhere)
    for index in range(done, config.rounds):
        clock = _Clock()
        chosen = participants(config, slots, index)
        rows = trained_slots(config, slots, chosen)
        padded = padded_rows(rows, mesh)
        drawn = round_indices(
            [federation.indices[row] for row in padded],
            slots.client[padded],
            slots.task[padded],
            seed=config.seed,
            round_index=index,
            steps=config.local.steps,
            batch_size=config.local.batch_examples,
        )
        images, labels = gather(tasks, slots.task[padded], drawn)
        clock.lap("data")

        downloads = jax.device_put(download(state, slots, padded), over_slots)
        clock.lap("server_download", downloads)
        trained: Trained = train(parameters, downloads, num_classes[padded], images, labels)
        trained = jax.device_put(trained, server)
        clock.lap("local_training", trained)
        loss, finite = (np.asarray(x)[: len(rows)] for x in (trained.loss, trained.finite))
        takes_part = chosen[slots.client[rows]]
        weight = np.zeros_like(slots.weight)
        weight[rows] = slots.weight[rows] * (takes_part & finite)
        present = Slots(slots.client, slots.task, weight, slots.num_clients, slots.num_tasks)

        uploads = upload(trained.vectors, present, rows)
        clock.lap("client_unify", uploads)
        messages = messages or jax.eval_shape(algorithm.sent, state, uploads)
        state, metrics = aggregate(state, uploads, present)
        clock.lap("server_aggregation", (state, metrics))
        del downloads, trained, uploads

        accuracy = None
        if (index + 1) % config.evaluation.every_rounds == 0 or index + 1 == config.rounds:
            vectors = jax.device_put(download(state, slots, every_slot), over_slots)
            accuracy = {}
            for split, examples in sets.items():
                hits = measure((*parameters, examples), vectors, *measured_on)
                per_slot = np.asarray(hits, np.float64)[: len(slots.task)]
                by_task = per_task(per_slot, slots.task, len(tasks))
                accuracy[f"{split}_mean"] = float(np.nanmean(by_task))
                accuracy[f"{split}_per_task"] = {
                    task.name: float(a) for task, a in zip(tasks, by_task, strict=True)
                }
                accuracy[f"{split}_per_slot"] = per_slot.tolist()
            clock.lap("evaluation")

        similarity = np.asarray(metrics["similarity"]) if "similarity" in metrics else None
        yield RoundResult(
            index + 1,
            state,
            {
                "round": index + 1,
                "loss": float(np.mean(loss[takes_part & finite]))
                if (takes_part & finite).any()
                else None,
                "accuracy": accuracy,
                "similarity_auc": None
                if similarity is None
                else relatedness_auc(similarity, related(tasks)),
                "clients": np.flatnonzero(chosen).tolist(),
                "uplink_bits": int(message_bits(messages[0], present).sum()),
                "downlink_bits": int(message_bits(messages[1], _chosen(slots, chosen)).sum()),
                "dropped": [
                    {
                        "client": int(slots.client[row]),
                        "task": tasks[slots.task[row]].name,
                        "reason": "training loss or a parameter is not a finite number",
                    }
                    for row in rows[takes_part & ~finite]
                ],
                "seconds": clock.seconds,
            },
            similarity,
        )


def _chosen(slots: Slots, chosen: np.ndarray) -> Slots:
    weight = np.where(chosen[slots.client], slots.weight, 0).astype(np.float32)
    return Slots(slots.client, slots.task, weight, slots.num_clients, slots.num_tasks)


class _Clock:
    """Seconds of each phase of a round, with the time spent compiling kept apart."""

    _compiling = 0.0

    def __init__(self):
        self.seconds = {"compile": 0.0}
        self._last = time.perf_counter()
        self._compiled = _Clock._compiling

    def lap(self, phase: str, result: Any = None) -> None:
        jax.block_until_ready(result)
        now, compiled = time.perf_counter(), _Clock._compiling
        compiling, self._compiled = compiled - self._compiled, compiled
        self.seconds["compile"] += compiling
        self.seconds[phase] = self.seconds.get(phase, 0.0) + max(now - self._last - compiling, 0.0)
        self._last = now

    @staticmethod
    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event in (
            "/jax/core/compile/jaxpr_trace_duration",
            "/jax/core/compile/jaxpr_to_mlir_module_duration",
            "/jax/core/compile/backend_compile_duration",
        ):
            _Clock._compiling += duration_secs


jax.monitoring.register_event_duration_secs_listener(_Clock.listen)
