"""The round loop: download, local training, upload, aggregation, evaluation. Prints nothing."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Float32

from matu_jax.aggregation import Slots
from matu_jax.algorithms import Algorithm
from matu_jax.messages.traffic import Message, Traffic, frame_bits, message_bits
from matu_jax.models import Model, linearised
from matu_jax.scenarios import attacks, privacy
from matu_jax.simulation.attendance import Attendance
from matu_jax.simulation.batches import round_grid, round_groups, training_batches
from matu_jax.simulation.choices import SimulationConfig
from matu_jax.simulation.clock import Clock
from matu_jax.simulation.evaluate import measuring
from matu_jax.simulation.federation import Federation
from matu_jax.simulation.hosts import agreed
from matu_jax.simulation.measures import main_measure
from matu_jax.simulation.memory import fitted
from matu_jax.simulation.placement import (
    ROWS,
    WHOLE,
    collected,
    on_server,
    own_rows,
    padded_rows,
    placed,
    slot_mesh,
)
from matu_jax.simulation.programs import Programs, changes_of, programs_of
from matu_jax.simulation.relatedness import related, relatedness_auc
from matu_jax.trees import PyTree

RECORD = frozenset(
    {"round", "loss", "measure", "similarity_auc", "clients", "aggregated", "dropped", "seconds"}
    | {f"{way}link_{what}" for way in ("up", "down") for what in ("bits", "frame_bits")}
)
"""What a round's record holds besides metrics."""

SUMMARY = frozenset(
    (
        "against_ours",
        "algorithm",
        "also",
        "chance",
        "commands",
        "commit",
        "communication",
        "config",
        "curve",
        "data_fingerprint",
        "date",
        "diverged",
        "label",
        "label_spaces",
        "liars",
        "machine",
        "metrics",
        "overhead",
        "overrides",
        "privacy",
        "rounds",
        "rounds_to_95",
        "score",
        "seed",
        "selected_round",
        "selection",
        "server",
        "server_state_bytes",
        "server_state_per_client",
        "similarity",
        "slots",
        "versions",
    )
)
"""What a run's summary, or an arm of a comparison, holds besides metrics."""


@dataclasses.dataclass(frozen=True)
class RoundResult:
    """What a round leaves behind.

    Attributes:
      round: 1 for the first.
      make_state: makes `state`.
      make_vectors: makes `vectors`.
      record: what metrics.jsonl holds of the round, as plain Python values; with what was measured
        under the name of each metric, see `evaluate.measuring`, or None if nothing was. "measure"
        says by which of them the run is measured, see `measures.Measure`.
      similarity: float32 `[tasks, tasks]` as the server measured it, or None.
    """

    round: int
    make_state: Callable[[], Any]
    make_vectors: Callable[[], PyTree]
    record: dict[str, Any]
    similarity: Float32[np.ndarray, "tasks tasks"] | None

    @property
    def state(self) -> Any:
        """The algorithm's state; valid until the next round starts, which takes its buffers.

        Where the server is sharded, asking for it makes a copy, in the model's shapes.
        Of several processes, all ask for it or none; the first has it, as numpy arrays, the others
        have None.
        """
        return self.make_state()

    @property
    def vectors(self) -> PyTree[Float[np.ndarray, "slots ..."]]:
        """The task vector that each slot holds now, and is measured by: leaves `[slots, ...]`.

        Valid as long as `state`; of one process.
        """
        return self.make_vectors()


def run(
    config: SimulationConfig,
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
      One `RoundResult` per round. Everything random is drawn from (seed, round, client, task), but
      for noise from the operating system's entropy, so that a run that goes on from a state equals
      one that was never interrupted.

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
    taken = RECORD | SUMMARY
    if taken & model.metrics.keys():
        raise ValueError(
            f"model.metrics: found {', '.join(model.metrics)}; expected none of the names that "
            f"records and summaries have already: {', '.join(sorted(taken))}."
        )
    main_measure(model.metrics, federation.tasks)
    if algorithm.local.linearised and model.linearise is None:
        linearised(model)  # says what is missing
    if config.privacy.clip_norm:
        privacy.grid_step(config.privacy, changes_of(model.base, federation.slots))
    return _rounds(config, algorithm, model, federation, mesh or slot_mesh(), start)


def _rounds(
    config: SimulationConfig,
    algorithm: Algorithm,
    model: Model,
    federation: Federation,
    mesh: Mesh,
    start: tuple[int, Any] | None,
) -> Iterator[RoundResult]:
    config = fitted(config, model, algorithm, federation, mesh)
    model = linearised(model) if algorithm.local.linearised else model
    programs = programs_of(config, algorithm, model, federation, mesh)
    parameters = placed((model.base, model.frozen), mesh, WHOLE)
    traffic = programs.algorithm.traffic
    done, saved = start or (0, None)
    state = programs.start(saved)
    train = _training(config, programs, federation, mesh, model, parameters, done)
    measure = measuring(config, model, federation, mesh, parameters)
    by = main_measure(model.metrics, federation.tasks)
    for index in range(done, config.rounds):
        clock, attendance = Clock(), Attendance(config, federation, index)

        intake, loss, finite = train(state, attendance, index, clock)
        present = attendance.after_training(finite)

        noise = programs.noise(present)
        if noise is not None:
            clock.lap("client_noise", noise)
        intake, taken = programs.upload(state, intake, present, np.int32(index), noise)
        clock.lap("client_unify", intake)

        counted = attendance.after_upload(present, np.asarray(taken))
        metrics: dict[str, Any] = {}
        if counted.weight.any():  # else nothing changes
            state, metrics = programs.aggregate(state, intake, counted)
        attendance.after_aggregation(counted, metrics)
        clock.lap("server_aggregation", (state, metrics))
        # So that no process drifts away by its rounding.
        state = on_server(agreed(state), programs.server)
        clock.lap("exchange", state)
        del intake, noise  # evaluation has their room

        measured: dict[str, Any] = dict.fromkeys((*model.metrics, by.name))
        if (index + 1) % config.evaluation.every_rounds == 0 or index + 1 == config.rounds:
            measured = measure(functools.partial(programs.evaluated, state))
            clock.lap("evaluation")

        similarity = np.asarray(metrics["similarity"]) if "similarity" in metrics else None
        kept = loss[attendance.takes_part & finite]
        record = {
            "round": index + 1,
            "loss": float(np.mean(kept)) if kept.size else None,
            "measure": by._asdict(),
            **measured,
            "similarity_auc": None
            if similarity is None
            else relatedness_auc(similarity, related(federation.tasks)),
            "clients": np.flatnonzero(attendance.chosen).tolist(),
            "aggregated": bool(counted.weight.any()),
            **_bits(programs.sent, traffic, *attendance.exchanging(present, traffic.one_shot)),
            "dropped": attendance.dropped(),
            "seconds": clock.seconds,
        }
        yield RoundResult(
            index + 1,
            functools.partial(programs.saved, state),
            functools.partial(_held, programs, state, len(federation.slots.task), mesh),
            record,
            similarity,
        )


def _held(programs: Programs, state: Any, slots: int, mesh: Mesh) -> PyTree:
    """What is evaluated, of all slots in their order."""
    vectors = programs.evaluated(state, padded_rows(np.arange(slots), mesh.size))
    return jax.tree.map(lambda x: np.asarray(x)[:slots], vectors)


def _training(
    config: SimulationConfig,
    programs: Programs,
    federation: Federation,
    mesh: Mesh,
    model: Model,
    parameters: Any,
    done: int,
) -> Callable[..., tuple[Any, np.ndarray, np.ndarray]]:
    """Makes the function that trains the slots of a round, group after group.

    Returns:
      `(state, attendance, index, clock) -> (intake, loss, finite)`: what the server keeps of all
      groups, see `Programs.open`; the mean loss, float32 `[trained]`; and bool `[trained]`, False
      where training failed. To be called for every round from `done` on, in order.
    """
    slots = federation.slots
    cut = round_grid(config, federation, mesh, model)
    groups = round_groups(config, federation, cut)
    own = own_rows(mesh, cut.slots)
    batches = training_batches(config, federation, cut, groups, own, done)

    def through(downloads, position, clock):
        """What the group of these positions trains, in one piece or in several."""
        if cut.chunks == 1:
            examples = placed(next(batches), mesh, ROWS)
            clock.lap("data")
            return programs.train(parameters, downloads, position, examples)
        carry = programs.begin(downloads)
        for _ in range(cut.chunks):
            # The next piece crosses over while the one before is computed; no third one does.
            examples = placed(next(batches), mesh, ROWS)
            clock.lap("data")
            clock.lap("local_training", carry)  # of the piece before
            carry = programs.advance(parameters, carry, downloads, position, examples)
        return programs.finish(carry, downloads)

    def train(state, attendance, index, clock):
        intake = programs.open(state, attendance.expected)
        clock.lap("server_aggregation", intake)
        loss, finite = np.zeros(len(slots.task), np.float32), np.zeros(len(slots.task), bool)
        for group in groups(index):
            downloads = programs.download(state, group.rows)
            clock.lap("server_download", downloads)
            position = np.stack(
                [np.full(cut.slots, index), slots.client[group.rows], slots.task[group.rows]],
                axis=1,
            ).astype(np.int32)
            trained = through(downloads, position, clock)
            clock.lap("local_training", trained)
            del downloads
            trained = collected(trained, mesh, programs.server)
            clock.lap("exchange", trained)
            intake = programs.take(intake, trained, attendance.expected, group)
            rows = group.rows[group.there]
            loss[rows] = np.asarray(trained.loss)[group.there]
            finite[rows] = np.asarray(trained.finite)[group.there]
            del trained
            clock.lap("client_unify", intake)
        return intake, loss[attendance.rows], finite[attendance.rows]

    return train


def _bits(
    messages: tuple[Message, Message], traffic: Traffic, senders: Slots, receivers: Slots
) -> dict[str, int]:
    """What crosses the network in a round, as the record has it."""
    return {
        "uplink_bits": int(message_bits(messages[0], senders).sum()),
        "downlink_bits": int(message_bits(messages[1], receivers).sum()),
        "uplink_frame_bits": int(frame_bits(traffic, senders)[0].sum()),
        "downlink_frame_bits": int(frame_bits(traffic, receivers)[1].sum()),
    }
