"""The round loop: download, local training, upload, aggregation, evaluation. Prints nothing."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from matu_jax.aggregation import Slots
from matu_jax.algorithms import Algorithm, frame_bits, message_bits
from matu_jax.algorithms.means import zeros
from matu_jax.config import Config
from matu_jax.models import Model, linearised
from matu_jax.scenarios import attacks, failures, privacy
from matu_jax.simulation.batches import round_grid, training_batches
from matu_jax.simulation.clock import Clock
from matu_jax.simulation.evaluate import measuring
from matu_jax.simulation.federation import Federation
from matu_jax.simulation.hosts import agreed, gathered, is_first
from matu_jax.simulation.local import Trained, local_training
from matu_jax.simulation.memory import fitted
from matu_jax.simulation.participation import participants, trained_slots, weighted
from matu_jax.simulation.placement import (
    ROWS,
    WHOLE,
    collected,
    on_server,
    own_rows,
    padded_rows,
    placed,
    server_mesh,
    server_shardings,
    shards_server,
    slot_mesh,
)
from matu_jax.simulation.relatedness import related, relatedness_auc
from matu_jax.trees import PyTree


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
    shared = shards_server(model, algorithm, mesh)
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
    batches = training_batches(config, federation, cut, own, done)
    for index in range(done, config.rounds):
        clock = Clock()
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
        present = weighted(slots, np.isin(range(len(gone)), rows[takes_part & finite]) & ~gone)

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
        counted = weighted(slots, np.asarray(taken) > 0)
        refused = np.flatnonzero((present.weight > 0) & (counted.weight == 0))
        reasons |= dict.fromkeys(refused, "upload refused: a number is not finite")
        few = failures.without_quorum(counted, config.failures.quorum)
        reasons |= dict.fromkeys(
            np.flatnonzero(few), f"fewer than {config.failures.quorum} holders of the task reported"
        )
        counted = weighted(slots, (counted.weight > 0) & ~few)
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

        senders, receivers = present, weighted(slots, chosen[slots.client])
        if algorithm.one_shot:  # everybody, after the last round
            senders = receivers = weighted(slots, np.full(len(gone), index + 1 == config.rounds))
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


jax.monitoring.register_event_duration_secs_listener(Clock.listen)
