"""The round loop: download, local training, upload, aggregation, evaluation. Prints nothing."""

import bisect
import dataclasses
import functools
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from matu_jax import attacks, failures, privacy
from matu_jax.aggregation import Slots
from matu_jax.algorithms import Algorithm, frame_bits, message_bits
from matu_jax.algorithms.base import zeros
from matu_jax.config import Config
from matu_jax.data import Task, embedded, prepared, selection, synthetic
from matu_jax.data.batching import gather, round_indices
from matu_jax.data.feed import Grid, grid, prefetched
from matu_jax.data.partition import assign, partition
from matu_jax.data.rendering import SIZE
from matu_jax.evaluate import EvaluationSet, evaluation, per_task
from matu_jax.hosts import agreed, gathered, highest, is_first
from matu_jax.local import Trained, local_training
from matu_jax.metrics import relatedness_auc
from matu_jax.models import Model, base_fingerprint, linearised
from matu_jax.models.architectures import check_architecture, transform_of
from matu_jax.models.backbone import recomputed_bytes
from matu_jax.parallel import (
    ROWS,
    WHOLE,
    collected,
    memory_there,
    on_cpu,
    on_each,
    on_server,
    own_devices,
    own_rows,
    padded_rows,
    placed,
    server_mesh,
    server_shardings,
    shares,
    slot_mesh,
    slots_at_once,
)
from matu_jax.trees import PyTree

SHARED_FROM = 1 << 20
"""Trained parameters from which the server's arithmetic is shared out over all devices; with fewer,
it is too little to be worth a program for several."""


class Federation(NamedTuple):
    """Who holds what.

    Attributes:
      tasks: all tasks, with their data.
      slots: client, task and number of training examples of every slot, as numpy arrays.
      indices: per slot, positions in its task's train split.
      trace: who sends nothing when, from `config.failures.trace`: {round: {client: reason}}.
    """

    tasks: tuple[Task, ...]
    slots: Slots
    indices: list[np.ndarray]
    trace: Mapping[int, Mapping[int, str]] = MappingProxyType({})


class StoppedError(RuntimeError):
    """A run that cannot sensibly go on; says why, and what to do."""


@dataclasses.dataclass(frozen=True)
class RoundResult:
    """What a round leaves behind.

    Attributes:
      round: 1 for the first.
      make_state: makes `state`.
      record: what metrics.jsonl holds of the round, as plain Python values.
      similarity: float32 `[tasks, tasks]` as the server measured it, or None.
    """

    round: int
    make_state: Callable[[], Any]
    record: dict[str, Any]
    similarity: np.ndarray | None

    @property
    def state(self) -> Any:
        """The algorithm's state; valid until the next round starts, which takes its buffers.

        Where the server is shared out, asking for it makes a copy, in the model's shapes.
        Of several processes, all ask for it or none; the first has it, as numpy arrays, the others
        have None.
        """
        return self.make_state()


def task_names(config: Config) -> tuple[str, ...]:
    """Names of the tasks that `config.data.tasks` stands for.

    Raises:
      ValueError: for tasks of the embedded benchmark and a model that takes other images, or an
        unknown architecture or dataset.
    """
    check_architecture(config.model.architecture)
    data = config.data
    generated = selection.is_generated(data.tasks, data.folders)
    if generated and transform_of(config.model).size != SIZE:
        raise ValueError(
            f"config.model.architecture: found {config.model.architecture!r}; the tasks "
            f"{data.tasks or 'embedded8'!r} have images of {SIZE} pixels, and it "
            "takes others. Give config.data.tasks = 'vision8', or config.model.architecture = "
            "'embedded'."
        )
    return selection.resolve(data.tasks, data.folders)


def load_tasks(config: Config) -> tuple[Task, ...]:
    """Loads the tasks of an experiment, with their data.

    Raises:
      ValueError: for an unknown name, or a dataset that is not prepared.
    """
    names, data = task_names(config), config.data
    if selection.is_generated(data.tasks, data.folders):
        return embedded.load(names)
    transform = transform_of(config.model)
    if data.source == "synthetic":
        return synthetic.load(
            names, transform=transform, image_folders=data.folders, seed=data.seed
        )
    return prepared.load(
        names,
        transform=transform,
        folders=data.folders,
        validation_fraction=data.validation_fraction,
        how=_how_to_prepare(config),
    )


def _how_to_prepare(config: Config) -> str:
    """What prepares an experiment's datasets, whichever experiment file is given."""
    words = [f"--config.data.{name}={getattr(config.data, name)}" for name in ("tasks", "folders")]
    fields = ("architecture", "checkpoint", "head", "task_heads")
    words += [f"--config.model.{name}={getattr(config.model, name)}" for name in fields]
    return (
        "run python -m matu_jax.prepare with --config and the run's experiment file, and with "
        f"{shlex.join(words)}"
    )


def federate(config: Config) -> Federation:
    """Loads the tasks and deals them out to clients.

    Raises:
      ValueError: for an unknown task, data that is not there, an assignment or partition that
        cannot be made, an attack of nobody, or a trace that cannot be read; it names the setting
        to change.
    """
    data = config.data
    trace = {}
    if config.failures.trace:
        trace = failures.read_trace(config.failures.trace, data.clients)
    tasks = load_tasks(config)
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
    slots = Slots(client, task, weight, data.clients, len(tasks))
    holders = np.bincount(slots.task, minlength=slots.num_tasks)
    if config.attack.kind != "none" and not attacks.liars(config.attack, slots, config.seed).any():
        raise ValueError(
            f"config.attack.share: found {config.attack.share:g}, of which nobody lies: a task has "
            f"at most {holders.max()} holders. Set at least {1 / holders.max():.2f} or so, or "
            "config.attack.kind = 'none'."
        )
    return Federation(tasks, slots, indices, trace)


def fingerprints(federation: Federation) -> dict[str, Any]:
    """What tells one state of each task's data from another, as JSON holds it."""
    return {task.name: task.fingerprint or embedded.fingerprint(task) for task in federation.tasks}


def identity(config: Config, federation: Federation) -> dict[str, Any]:
    """What a run is of, as its checkpoints keep it: "config", and what "data" and "base" hold.

    `workdir.check_identity` compares with it.

    Raises:
      ValueError: if the base checkpoint cannot be found or read.
    """
    return {
        "config": dataclasses.asdict(config),
        "data": fingerprints(federation),
        "base": base_fingerprint(config.model),
    }


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


def round_grid(config: Config, federation: Federation, mesh: Mesh) -> Grid:
    """How a round's training is cut into pieces that fit the devices."""
    local, slots = config.local, federation.slots
    trained = len(trained_slots(config, slots, participants(config, slots, 0)))
    per_device = slots_at_once(mesh, -(-trained // mesh.size), local.parallel_slots)
    image = int(np.prod(federation.tasks[0].train.images.shape[1:]))
    return grid(
        trained,
        local.steps,
        local.batch_examples * image,
        multiple=mesh.size,
        at_once=per_device * mesh.size,
    )


def _evaluation_sets(
    config: Config, federation: Federation, mesh: Mesh
) -> dict[str, EvaluationSet]:
    return {
        split: EvaluationSet(
            [getattr(task, split) for task in federation.tasks],
            federation.slots.task,
            mesh,
            batch_examples=config.evaluation.batch_examples,
            max_examples=config.evaluation.max_examples,
            seed=config.seed,
            parallel_slots=config.local.parallel_slots,
        )
        for split in ("validation", "test")
    }


def _shares_server(model: Model, algorithm: Algorithm, mesh: Mesh) -> bool:
    """Whether all devices share the parameters of the server's arithmetic out.

    Not where most of them would not be: in leaves that the devices do not divide.
    """
    sizes = [leaf.size for leaf in jax.tree.leaves(model.base)]
    parted = sum(size for size in sizes if size % (8 * mesh.size) == 0)  # masks have eight a byte
    return (
        algorithm.shared_over is not None
        and mesh.size > 1
        and sum(sizes) >= SHARED_FROM
        and parted >= 0.9 * sum(sizes)
    )


def predicted_bytes(
    config: Config, model: Model, algorithm: Algorithm, federation: Federation, mesh: Mesh
) -> dict[str, int]:
    """Predicts device memory before anything is compiled, over all devices, in bytes.

    Activations are the residuals of one gradient's backward pass, as its abstract evaluation
    lists them, less the frozen parameters among them, for as many slots as train at once; with
    remat, those of one block that is computed again are added, but not what its backward pass holds
    besides: XLA was seen to need 1.6 times as much then (ViT-B/16, float32, on CPU).
    """
    slots, local = federation.slots, config.local
    pixels = federation.tasks[0].train.images.shape[1:]
    batch = jax.ShapeDtypeStruct((local.batch_examples, *pixels), jnp.uint8)

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    def residuals(vector, frozen, images):
        key = jax.random.key(0) if model.stochastic else None
        return jax.vjp(lambda v: model.logits(v, frozen, images, jnp.int32(0), key), vector)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, model.base, model.frozen, batch))
    shared = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(model.frozen)]
    activations = 0
    for leaf in kept:
        if (leaf.shape, leaf.dtype) in shared:
            shared.remove((leaf.shape, leaf.dtype))
        elif not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            activations += size(leaf)
    activations += recomputed_bytes(config.model, local.batch_examples)
    cut = round_grid(config, federation, mesh)
    trained = cut.groups * cut.slots
    per_device = slots_at_once(mesh, cut.slots // mesh.size, local.parallel_slots)
    state = jax.eval_shape(lambda: algorithm.init(model.base, slots))
    vector = size(model.base)
    pieces = [s.image_bytes for s in _evaluation_sets(config, federation, mesh).values()]
    images = local.batch_examples * int(np.prod(pixels))
    # One server per process, which all results reach by all its devices; or one over all devices.
    servers = 1 if _shares_server(model, algorithm, mesh) else len(shares(mesh, mesh.size))
    copies = mesh.size if servers > 1 else 1
    return {
        "parameters": (size(model.frozen) + vector) * mesh.size,
        "activations": per_device * mesh.size * activations,
        "optimiser": 4 * cut.slots * vector,
        "task vectors": ((1 + copies) * trained + 2 * servers * slots.client.shape[0]) * vector,
        "server state": 2 * servers * size(state),
        "batches": (1 if cut.groups * cut.chunks == 1 else 2) * cut.slots * cut.steps * images,
        "evaluation images": mesh.size * sum(pieces),
    }


def fitted(
    config: Config, model: Model, algorithm: Algorithm, federation: Federation, mesh: Mesh
) -> Config:
    """Chooses `config.local.parallel_slots` where it is 0: on accelerators, by predicted memory.

    As many slots at once as leave a tenth of the memory free, all if they fit; one if nothing fits.
    On CPU, and where a device does not tell its memory, 0 stays, see `parallel.map_slots`.
    """
    there = memory_there(own_devices(mesh)[0])  # of equal devices in all processes
    if config.local.parallel_slots or on_cpu(mesh) or there is None:
        return config

    def choose(count: int) -> Config:
        return dataclasses.replace(
            config, local=dataclasses.replace(config.local, parallel_slots=count)
        )

    def needed(count: int) -> float:
        parts = predicted_bytes(choose(count), model, algorithm, federation, mesh)
        return sum(parts.values()) / mesh.size

    slots = federation.slots
    trained = len(trained_slots(config, slots, participants(config, slots, 0)))
    most = -(-trained // mesh.size)
    fits = most
    if needed(most) > 0.9 * there:
        fits = max(bisect.bisect_right(range(1, most), 0.9 * there, key=needed), 1)
    return choose(-highest(-fits))  # what every process has room for


def run(
    config: Config,
    algorithm: Algorithm,
    model: Model,
    federation: Federation,
    *,
    mesh: Mesh | None = None,
    start: tuple[int, Any] | None = None,
) -> Iterator[RoundResult]:
    """Runs an experiment, round by round; all processes of a run call it alike, see `hosts`.

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

    Raises:
      ValueError: at once, for an attack on masks or scales where uploads have none, or noise of
        `config.privacy` that is too large.
      StoppedError: in the round in which the training of too many slots fails.
    """
    if config.attack.kind in attacks.OF_UPLOADS:
        slots = federation.slots
        state = jax.eval_shape(algorithm.init, model.base, slots)
        vectors = jax.eval_shape(algorithm.download, state, slots)
        if not attacks.has_modulators(jax.eval_shape(algorithm.upload, vectors, slots)):
            raise ValueError(
                f"config.attack.kind: found {config.attack.kind!r}, but the uploads of "
                f"{config.algorithm!r} have no masks and scales; choose another kind."
            )
    if config.privacy.clip_norm:
        privacy.grid_step(config.privacy, _changes(model.base, federation.slots))
    return _run(config, algorithm, model, federation, mesh or slot_mesh(), start)


def _changes(base: PyTree, slots: Slots) -> PyTree:
    """Shapes of what all slots may change: leaves `[slots, ...]`."""
    return jax.eval_shape(lambda: zeros(base, len(slots.client)))


def _run(
    config: Config,
    algorithm: Algorithm,
    model: Model,
    federation: Federation,
    mesh: Mesh,
    start: tuple[int, Any] | None,
) -> Iterator[RoundResult]:
    shared = _shares_server(model, algorithm, mesh)
    server = server_mesh(mesh, shared)
    base, shapes = model.base, jax.eval_shape(algorithm.init, model.base, federation.slots)
    if shared:
        assert algorithm.shared_over
        algorithm = algorithm.shared_over(server)
        # At the server, each leaf's parameters are in a row.
        base = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.size,), x.dtype), base)
    tasks, slots = federation.tasks, federation.slots
    num_classes = np.array([tasks[t].num_classes for t in slots.task], np.int32)
    config = fitted(config, model, algorithm, federation, mesh)
    model = linearised(model) if algorithm.local.linearised else model
    local = local_training(model, config.local, algorithm.local, mesh, seed=config.seed)
    begin, advance = jax.jit(local.begin), jax.jit(local.advance, donate_argnums=1)

    @functools.partial(jax.jit, donate_argnums=0)
    def finish(carry: Any) -> Trained:
        trained = local.finish(carry)
        vectors = jax.tree.map(
            lambda x, like: x.reshape(x.shape[0], *like.shape), trained.vectors, base
        )
        return trained._replace(vectors=vectors)

    def some(vectors: Callable[[Any, Slots], PyTree]) -> Callable[..., PyTree]:
        """Makes `(state, slots, rows) -> vectors` of these slots, shared out over the devices."""
        by_slot = NamedSharding(mesh, ROWS)

        def take(state, slots, rows):
            return jax.tree.map(lambda x: x[rows], vectors(state, slots))

        def take_shared(state, slots, rows):
            def shaped(x, like):
                whole = jax.lax.with_sharding_constraint(x, by_slot)
                return whole.reshape(whole.shape[0], *like.shape)

            return jax.tree.map(shaped, take(state, slots, rows), model.base)

        if shared:
            return jax.jit(take_shared, out_shardings=by_slot)
        program = jax.jit(take)

        def take_own(state, slots, rows):
            own = rows[own_rows(mesh, len(rows))]
            return placed(program(state, slots, own), mesh, ROWS)

        return take_own

    download = some(algorithm.download)
    evaluated = some(algorithm.evaluated) if algorithm.evaluated else download

    lies = attacks.liars(config.attack, slots, config.seed)[slots.client]
    lies_in_changes = config.attack.kind not in ("none", "label_flip", *attacks.OF_UPLOADS)
    disturbed = lies_in_changes or config.privacy.clip_norm > 0

    at_server = NamedSharding(server, WHOLE)
    changes = _changes(base, slots)

    @functools.partial(jax.jit, out_shardings=(None, at_server))
    def upload(
        state: Any,
        trained: list[PyTree],
        slots: Slots,
        rows: jax.Array,
        index: jax.Array,
        noise: PyTree | None,
    ) -> tuple[Any, jax.Array]:
        """What clients send, and the weights of what is taken."""

        def spread(*groups):
            whole = jnp.zeros((slots.client.shape[0], *groups[0].shape[1:]), groups[0].dtype)
            return whole.at[rows].set(jnp.concatenate(groups)[: rows.shape[0]])

        vectors = jax.tree.map(spread, *trained)
        if algorithm.sends_change or disturbed:
            before = algorithm.download(state, slots)
            vectors = jax.tree.map(jnp.subtract, vectors, before)
            if config.privacy.clip_norm:
                seed = config.privacy.seed if noise is None else None
                vectors = privacy.privatised(
                    config.privacy, vectors, slots, index, seed, noise=noise
                )
            if lies_in_changes:
                vectors = attacks.lied(
                    config.attack, vectors, jnp.asarray(lies), slots, index, config.seed
                )
            if disturbed:  # the server takes no numbers that are not finite
                finite = [
                    jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1)
                    for x in jax.tree.leaves(vectors)
                ]
                weight = jnp.where(jnp.stack(finite).all(axis=0), slots.weight, 0.0)
                slots = dataclasses.replace(slots, weight=weight)
            if not algorithm.sends_change:
                vectors = jax.tree.map(jnp.add, before, vectors)
        uploads = algorithm.upload(vectors, slots)
        if config.attack.kind in attacks.OF_UPLOADS:
            uploads = attacks.lied_upload(config.attack, uploads, jnp.asarray(lies), slots)
        return uploads, slots.weight

    flat_shapes = jax.eval_shape(algorithm.init, base, slots)
    placement = server_shardings(flat_shapes, server)
    aggregate = jax.jit(algorithm.aggregate, donate_argnums=0, out_shardings=(placement, at_server))
    placed_shapes = server_shardings(shapes, server)
    shaped = jax.jit(lambda state: _reshaped(state, shapes), out_shardings=placed_shapes)

    def as_saved(state: Any) -> Any:
        if jax.process_count() > 1:  # reshaped here, since there it would cross devices
            whole = gathered(state)
            return None if whole is None else _reshaped(whole, shapes)
        return shaped(state) if shared else state

    init = jax.jit(lambda: algorithm.init(base, slots), out_shardings=placement)
    done, state = start or (0, init())
    state = on_server(_reshaped(state, flat_shapes), server)
    messages = None
    parameters = placed((model.base, model.frozen), mesh, WHOLE)
    measure = measuring(config, model, federation, mesh, parameters)
    cut = round_grid(config, federation, mesh)
    own = own_rows(mesh, cut.slots)
    batches = _batches(config, federation, cut, own, done)
    for index in range(done, config.rounds):
        clock = _Clock()
        chosen = participants(config, slots, index)
        rows = trained_slots(config, slots, chosen)
        results: list[Trained] = []
        for part in padded_rows(rows, cut.slots).reshape(cut.groups, cut.slots):
            downloads = download(state, slots, part)
            clock.lap("server_download", downloads)
            carry = begin(downloads)
            position = np.stack(
                [np.full(cut.slots, index), slots.client[part], slots.task[part]], axis=1
            ).astype(np.int32)
            for _ in range(cut.chunks):
                # The next piece crosses over while the one before is computed; no third one does.
                examples = placed(next(batches), mesh, ROWS)
                clock.lap("data")
                clock.lap("local_training", carry)
                carry = advance(
                    parameters, carry, downloads, position, num_classes[part], *examples
                )
            results.append(finish(carry))
            clock.lap("local_training", results[-1])
        results = collected(results, mesh, server)
        clock.lap("exchange", results)
        trained = [result.vectors for result in results]
        loss, finite = (
            np.concatenate([np.asarray(getattr(result, name)) for result in results])[: len(rows)]
            for name in ("loss", "finite")
        )
        takes_part = chosen[slots.client[rows]]
        failed = rows[takes_part & ~finite]
        _check_failed(config, federation, failed, int(takes_part.sum()), index)
        absent = failures.absent_clients(
            config.failures, federation.trace, chosen, seed=config.seed, round_index=index
        )
        gone = np.isin(slots.client, list(absent))
        reasons = {row: absent[slots.client[row]] for row in rows[takes_part & gone[rows]]}
        reasons |= dict.fromkeys(failed, "training loss or a parameter is not a finite number")
        present = _weighted(slots, np.isin(range(len(gone)), rows[takes_part & finite]) & ~gone)

        noise = None
        if config.privacy.clip_norm and config.privacy.seed < 0:
            if is_first():
                noise = privacy.drawn(config.privacy, changes, present)
            else:  # which takes what the first has drawn
                noise = jax.tree.map(lambda x: np.zeros(x.shape, np.int32), changes)
            noise = on_server(agreed(noise), server)
            clock.lap("client_noise", noise)
        uploads, taken = upload(state, trained, present, rows, np.int32(index), noise)
        clock.lap("client_unify", uploads)
        messages = messages or jax.eval_shape(algorithm.sent, state, uploads)
        counted = _weighted(slots, np.asarray(taken) > 0)
        refused = np.flatnonzero((present.weight > 0) & (counted.weight == 0))
        reasons |= dict.fromkeys(refused, "upload refused: a number is not finite")
        few = failures.without_quorum(counted, config.failures.quorum)
        reasons |= dict.fromkeys(
            np.flatnonzero(few), f"fewer than {config.failures.quorum} holders of the task reported"
        )
        counted = _weighted(slots, (counted.weight > 0) & ~few)
        metrics: dict[str, Any] = {}
        if counted.weight.any():  # else nothing changes
            state, metrics = aggregate(state, uploads, counted)
        if "accepted" in metrics:
            wrong = np.flatnonzero((counted.weight > 0) & ~np.asarray(metrics["accepted"]))
            reasons |= dict.fromkeys(
                wrong, "upload refused: a number is not finite, or a scale < 0"
            )
        clock.lap("server_aggregation", (state, metrics))
        state = on_server(agreed(state), server)  # no process drifts away by its rounding
        clock.lap("exchange", state)
        del downloads, results, trained, uploads, carry, examples, noise

        senders, receivers = present, _weighted(slots, chosen[slots.client])
        if algorithm.one_shot:  # everybody, after the last round
            senders = receivers = _weighted(slots, np.full(len(gone), index + 1 == config.rounds))
        accuracy = None
        if (index + 1) % config.evaluation.every_rounds == 0 or index + 1 == config.rounds:
            accuracy = measure(functools.partial(evaluated, state, slots))
            clock.lap("evaluation")

        similarity = np.asarray(metrics["similarity"]) if "similarity" in metrics else None
        yield RoundResult(
            index + 1,
            functools.partial(as_saved, state),
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
                "aggregated": bool(counted.weight.any()),
                "uplink_bits": int(message_bits(messages[0], senders).sum()),
                "downlink_bits": int(message_bits(messages[1], receivers).sum()),
                "uplink_frame_bits": int(frame_bits(algorithm, senders)[0].sum()),
                "downlink_frame_bits": int(frame_bits(algorithm, receivers)[1].sum()),
                "dropped": [
                    {
                        "client": int(slots.client[row]),
                        "task": tasks[slots.task[row]].name,
                        "reason": reasons[row],
                    }
                    for row in sorted(reasons)
                ],
                "seconds": clock.seconds,
            },
            similarity,
        )


def _reshaped(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x.reshape(y.shape), tree, like)


def _batches(
    config: Config, federation: Federation, cut: Grid, own: np.ndarray, done: int
) -> Iterator[Any]:
    """Images and labels of every piece of every round from `done` on, made ahead by threads.

    Of the rows that are this process's `own`; nothing else is read.
    """
    slots, tasks, local = federation.slots, federation.tasks, config.local

    flips = config.attack.kind == "label_flip"
    lies = attacks.liars(config.attack, slots, config.seed)

    @functools.lru_cache(maxsize=4)
    def drawn(index: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = trained_slots(config, slots, participants(config, slots, index))
        part = padded_rows(rows, cut.slots).reshape(cut.groups, cut.slots)[group][own]
        return (
            part,
            slots.task[part],
            round_indices(
                [federation.indices[row] for row in part],
                slots.client[part],
                slots.task[part],
                seed=config.seed,
                round_index=index,
                steps=local.steps,
                batch_size=local.batch_examples,
            ),
        )

    def piece(number: int) -> tuple[np.ndarray, np.ndarray]:
        index, rest = divmod(number, cut.groups * cut.chunks)
        group, chunk = divmod(rest, cut.chunks)
        part, task, indices = drawn(index, group)
        chunks = indices[:, chunk * cut.steps : (chunk + 1) * cut.steps]
        images, labels = gather(tasks, task, chunks)
        for slot in np.flatnonzero(flips & lies[slots.client[part]]):
            labels[slot] = tasks[task[slot]].num_classes - 1 - labels[slot]
        return images, labels

    pieces = cut.groups * cut.chunks
    return prefetched(piece, done * pieces, config.rounds * pieces)


def measuring(
    config: Config,
    model: Model,
    federation: Federation,
    mesh: Mesh,
    parameters: Any,
) -> Callable[[Callable[[np.ndarray], PyTree]], dict[str, Any]]:
    """Makes the function that evaluates: (slots -> vectors, in `ROWS`) to what a record holds.

    Args:
      config: says which examples are measured, and how many at once.
      model: what is evaluated.
      federation: its tasks, and the slots that are measured.
      mesh: the devices.
      parameters: (base, frozen), placed on all of them.
    """
    tasks, slots = federation.tasks, federation.slots
    num_classes = np.array([tasks[t].num_classes for t in slots.task], np.int32)
    program = jax.jit(evaluation(model, mesh, parallel_slots=config.local.parallel_slots))
    sets = _evaluation_sets(config, federation, mesh)
    resident = {
        split: on_each(whole.load(0), mesh)
        for split, whole in sets.items()
        if len(whole.pieces) == 1
    }

    def measure(vectors_of: Callable[[np.ndarray], PyTree]) -> dict[str, Any]:
        accuracy: dict[str, Any] = {}
        for split, whole in sets.items():
            counts = np.zeros((len(slots.task), 2), np.int64)
            loaded = (
                iter([resident[split]])
                if split in resident
                else prefetched(whole.load, 0, len(whole.pieces))
            )
            waiting: list[tuple[Any, jax.Array]] = []
            group, vectors = None, None
            for piece, examples in zip(whole.pieces, loaded, strict=True):
                if split not in resident:
                    examples = on_each(examples, mesh)
                for before, counted in waiting:  # of the piece before: two are there at most
                    counted = np.asarray(collected(counted, mesh))
                    counts[before.slots[: before.rows]] += counted[: before.rows]
                if piece.slots is not group:  # the pieces of one group of slots share its array
                    group, vectors = piece.slots, None  # the group before makes room first
                    vectors = vectors_of(piece.slots)
                counted = program(
                    (*parameters, *examples),
                    vectors,
                    placed(piece.local, mesh, ROWS),
                    slots.task[piece.slots].astype(np.int32),
                    num_classes[piece.slots],
                )
                waiting = [(piece, counted)]
            for before, counted in waiting:
                counted = np.asarray(collected(counted, mesh))
                counts[before.slots[: before.rows]] += counted[: before.rows]
            per_slot = counts[:, 0] / counts[:, 1]
            by_task = per_task(per_slot, slots.task, len(tasks))
            accuracy[f"{split}_mean"] = float(np.nanmean(by_task))
            accuracy[f"{split}_per_task"] = {
                task.name: float(a) for task, a in zip(tasks, by_task, strict=True)
            }
            accuracy[f"{split}_per_slot"] = per_slot.tolist()
        return accuracy

    return measure


def _check_failed(
    config: Config, federation: Federation, failed: np.ndarray, trained: int, index: int
) -> None:
    """Stops a run in which the training of too many slots fails."""
    allowed = config.failures.max_nonfinite_share
    if len(failed) <= allowed * trained:
        return
    client, task = federation.slots.client[failed[0]], federation.slots.task[failed[0]]
    raise StoppedError(
        f"round {index + 1}: training failed in {len(failed)} of {trained} slots (client {client}, "
        f"task {federation.tasks[task].name}, and so on): the loss or a parameter is not a finite "
        f"number. config.failures.max_nonfinite_share = {allowed:g} allows no more. Lower "
        "config.local.learning_rate, or compute in float32, and start in another directory; the "
        "rounds before are as they were."
    )


def _weighted(slots: Slots, there: np.ndarray) -> Slots:
    """The slots, with weight 0 for those that are not there, bool `[slots]`."""
    weight = np.where(there, slots.weight, 0).astype(np.float32)
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
