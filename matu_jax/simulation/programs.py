"""The programs of a run, each compiled once: what clients and server compute in a round."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from matu_jax.aggregation import Slots
from matu_jax.algorithms import Algorithm
from matu_jax.algorithms.contract import Groups, by_axis, check_aggregated
from matu_jax.algorithms.means import zeros
from matu_jax.messages.traffic import Message
from matu_jax.models import Model
from matu_jax.scenarios import attacks, privacy
from matu_jax.simulation.batches import Group
from matu_jax.simulation.choices import SimulationConfig
from matu_jax.simulation.federation import Federation
from matu_jax.simulation.hosts import agreed, gathered, is_first
from matu_jax.simulation.local import Carry, Trained, local_training
from matu_jax.simulation.placement import (
    ROWS,
    WHOLE,
    on_server,
    own_rows,
    placed,
    server_mesh,
    server_shardings,
)
from matu_jax.trees import PyTree

SHARDED_FROM = 1 << 20
"""Trained parameters from which the server's arithmetic is sharded over all devices; with fewer,
it is too little to be worth a program for several."""


Kept = Literal["sums", "uploads", "vectors"]
"""What the server of a simulation keeps of a round while one group after the other is trained:

- sums alone, where the algorithm offers them;
- every client's upload, as it is sent;
- the vector of every slot, or its change, where uploads are made of all at once: of an algorithm
  that says nothing of groups, and where noise or a lie comes in between.
"""


class Programs(NamedTuple):
    """What a round computes, step by step; every one is compiled once in a run.

    Task vectors are stacked over slots. Where the server is sharded over all devices, its state has
    flat leaves, `[n]` and `[rows, n]`; else they have the model's shapes.

    Attributes:
      algorithm: the one that runs, sharded over the server's devices where they are several.
      server: the devices of the server's arithmetic.
      start: `state | None -> state`, where a run starts: from a state in the model's shapes, or
        afresh.
      sent: the two `Message`s of a round, of shapes.
      download: `(state, rows) -> vectors [rows, ...]`, where these slots start their round; over
        all devices.
      evaluated: the same, of what is evaluated.
      begin: `vectors -> carry` of local training, see `local_training`.
      advance: some steps of it; takes the carry's buffers.
      finish: `(carry, downloads) -> Trained`, with leaves as the server has them: vectors, or
        changes, where the algorithm sends these; takes the carry's buffers.
      train: `(parameters, downloads, position, examples) -> Trained`, the three in one, where one
        piece of examples is all that a group trains on.
      open: `(state, slots) -> intake`, empty: what the server keeps of a round's groups, see
        `Kept`; slots weigh what is expected of them.
      take: `(intake, trained, slots, group) -> intake`: with what a group has trained; takes the
        intake's buffers.
      noise: `slots -> noise` that differential privacy adds to what these slots have changed; None
        without it, or where it is drawn from a seed by `upload` itself.
      upload: `(state, intake, slots, round, noise) -> (intake, weight)`, once all groups are there:
        what clients send, where they could not do it group by group; and the weight of every slot,
        float32 `[slots]`: 0 for what is refused where noise or a lie has made a number that is not
        finite.
      aggregate: `(state, intake, slots) -> (state, metrics)`; takes the state's buffers.
      saved: `state -> state` in the model's shapes, as checkpoints keep it; None at other
        processes than the first.
    """

    algorithm: Algorithm
    server: Mesh
    start: Callable[[Any], Any]
    sent: tuple[Message, Message]
    download: Callable[[Any, np.ndarray], PyTree]
    evaluated: Callable[[Any, np.ndarray], PyTree]
    begin: Callable[[PyTree], Carry]
    advance: Callable[..., Carry]
    finish: Callable[[Carry, PyTree], Trained]
    train: Callable[..., Trained]
    open: Callable[[Any, Slots], Any]
    take: Callable[[Any, Trained, Slots, Group], Any]
    noise: Callable[[Slots], PyTree | None]
    upload: Callable[..., tuple[Any, Any]]
    aggregate: Callable[[Any, Any, Slots], tuple[Any, dict[str, jax.Array]]]
    saved: Callable[[Any], Any]


def programs_of(
    config: SimulationConfig, algorithm: Algorithm, model: Model, federation: Federation, mesh: Mesh
) -> Programs:
    """Makes the programs of a run; nothing is compiled before it is called.

    Args:
      config: local training, attacks and privacy.
      algorithm: from `algorithms.build`.
      model: what is trained.
      federation: who holds what.
      mesh: the devices.
    """
    slots, base = federation.slots, model.base
    saved_shapes = jax.eval_shape(algorithm.init, base, slots)
    sharded = shards_server(model, algorithm, mesh)
    server = server_mesh(mesh, sharded)
    if sharded:
        assert algorithm.sharded_over
        algorithm = algorithm.sharded_over(server)
        # At the server, each leaf's parameters are in a row.
        base = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.size,), x.dtype), base)
    shapes = jax.eval_shape(algorithm.init, base, slots)
    placement = server_shardings(shapes, server)
    init = jax.jit(lambda: algorithm.init(base, slots), out_shardings=placement)
    reshape = jax.jit(
        lambda state: _reshaped(state, saved_shapes),
        out_shardings=server_shardings(saved_shapes, server),
    )

    def start(state: Any) -> Any:
        return on_server(_reshaped(init() if state is None else state, shapes), server)

    def saved(state: Any) -> Any:
        if jax.process_count() > 1:  # reshaped here, since there it would cross devices
            whole = gathered(state)
            return None if whole is None else _reshaped(whole, saved_shapes)
        return reshape(state) if sharded else state

    local = local_training(model, config.local, algorithm.local, mesh, seed=config.seed)
    kept, sent = what_is_kept(config, algorithm), _sent(base, algorithm.sends_change)
    changes, intake = changes_of(base, slots), intake_shapes(config, algorithm, base, slots)
    uploads = jax.eval_shape(algorithm.upload, changes, slots)
    sums = algorithm.groups.sums if algorithm.groups and kept == "sums" else None

    def empty(state, slots):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), intake)

    download = _rows(algorithm.download, algorithm.groups, model.base, slots, mesh, sharded)
    at_server, intake_lies = NamedSharding(server, WHOLE), server_shardings(intake, server)
    open_with, end_with = (sums.start, sums.end) if sums else (empty, algorithm.aggregate)

    def train(parameters, downloads, *rest):  # by whose name a profile has it
        return sent(local.whole(parameters, downloads, *rest), downloads)

    return Programs(
        algorithm=algorithm,
        server=server,
        start=start,
        sent=jax.eval_shape(algorithm.traffic.sent, shapes, uploads),
        download=download,
        evaluated=_rows(algorithm.evaluated, None, model.base, slots, mesh, sharded)
        if algorithm.evaluated
        else download,
        begin=jax.jit(local.begin),
        advance=jax.jit(local.advance, donate_argnums=1),
        finish=jax.jit(
            lambda carry, downloads: sent(local.finish(carry), downloads), donate_argnums=0
        ),
        train=jax.jit(train),
        open=jax.jit(open_with, out_shardings=intake_lies),
        take=_take(algorithm, kept, slots, intake_lies),
        noise=functools.partial(_noise, config, changes, server),
        upload=jax.jit(_upload(config, algorithm, slots), out_shardings=(None, at_server))
        if kept == "vectors"
        else lambda state, intake, slots, *_: (intake, slots.weight),
        aggregate=jax.jit(
            _aggregate(config, end_with), donate_argnums=0, out_shardings=(placement, at_server)
        ),
        saved=saved,
    )


def what_is_kept(config: SimulationConfig, algorithm: Algorithm) -> Kept:
    """What the server keeps of a round's groups."""
    lies = config.attack.kind not in ("none", "label_flip")
    if algorithm.groups is None or lies or config.privacy.clip_norm:
        return "vectors"
    # A task with too few holders is left out as a whole: when all have reported.
    return "sums" if algorithm.groups.sums and config.failures.quorum <= 1 else "uploads"


def intake_shapes(
    config: SimulationConfig, algorithm: Algorithm, base: PyTree, slots: Slots
) -> PyTree:
    """Shapes of what the server keeps of a round's groups, once it is all there."""
    kept, changes = what_is_kept(config, algorithm), changes_of(base, slots)
    if kept == "vectors":
        return changes
    if kept == "uploads":
        return jax.eval_shape(algorithm.upload, changes, slots)
    assert algorithm.groups
    assert algorithm.groups.sums
    state = jax.eval_shape(algorithm.init, base, slots)
    return jax.eval_shape(algorithm.groups.sums.start, state, slots)


def changes_of(base: PyTree, slots: Slots) -> PyTree:
    """Shapes of what all slots may change: leaves `[slots, ...]`."""
    return jax.eval_shape(lambda: zeros(base, len(slots.client)))


def _reshaped(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x.reshape(y.shape), tree, like)


def _rows(
    vectors: Callable[[Any, Slots], PyTree],
    groups: Groups | None,
    base: PyTree,
    slots: Slots,
    mesh: Mesh,
    sharded: bool,
) -> Callable[[Any, np.ndarray], PyTree]:
    """Makes `(state, rows) -> vectors [rows, ...]` on all devices.

    Where the server is not sharded, each process computes its own rows; leaves have the shapes of
    the base already. Where it is, leaves come in parts, and become whole leaves of some rows.

    Args:
      vectors: of an algorithm.
      groups: what of the state is whose; None computes all slots' vectors, of which rows are taken.
      base: of the model.
      slots: all of them.
      mesh: the devices.
      sharded: whether the server is.
    """

    def of_rows(state, rows, clients, own):
        if groups is None:
            return jax.tree.map(lambda x: x[rows], vectors(state, slots))
        state = by_axis(groups.state, state, slots=lambda x: x[rows], clients=lambda x: x[clients])
        return vectors(state, own)

    by_slot = NamedSharding(mesh, ROWS)

    def of_shards(*given):
        def shaped(x, like):
            whole = jax.lax.with_sharding_constraint(x, by_slot)
            return whole.reshape(whole.shape[0], *like.shape)

        return jax.tree.map(shaped, of_rows(*given), base)

    program = jax.jit(of_shards, out_shardings=by_slot) if sharded else jax.jit(of_rows)

    def take(state, rows):
        if not sharded:
            rows = rows[own_rows(mesh, len(rows))]
        number = np.arange(len(rows), dtype=np.int32)
        own = Slots(number, slots.task[rows], slots.weight[rows], len(rows), slots.num_tasks)
        found = program(state, rows.astype(np.int32), slots.client[rows], own)
        return found if sharded else placed(found, mesh, ROWS)

    return take


def _sent(base: PyTree, sends_change: bool) -> Callable[[Trained, PyTree], Trained]:
    """Makes `(trained, downloads) -> trained` with what is sent, in the shapes of the server's."""

    def sent(trained, downloads):
        vectors = trained.vectors
        if sends_change:
            vectors = jax.tree.map(jnp.subtract, vectors, downloads)
        vectors = jax.tree.map(lambda x, like: x.reshape(len(x), *like.shape), vectors, base)
        return trained._replace(vectors=vectors)

    return sent


def _take(
    algorithm: Algorithm, kept: Kept, slots: Slots, placement: PyTree
) -> Callable[[Any, Trained, Slots, Group], Any]:
    """Makes the function that adds a group to what the server keeps; see `Programs.take`."""
    # Then a group may have as many clients as slots, and what fills it up be numbered anew.
    alone = bool((np.bincount(slots.client) <= 1).all())

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=placement)
    def taken(intake, trained, own, rows, clients):
        if kept == "vectors":
            return _put("slots", intake, trained.vectors, slots=rows)
        assert algorithm.groups
        own = dataclasses.replace(own, weight=jnp.where(trained.finite, own.weight, 0.0))
        if alone and own.num_clients == len(own.task):
            own = dataclasses.replace(own, client=np.arange(own.num_clients, dtype=np.int32))
        uploads = algorithm.upload(trained.vectors, own)
        if kept == "sums":
            assert algorithm.groups.sums
            return algorithm.groups.sums.add(intake, uploads, own)
        return _put(algorithm.groups.uploads, intake, uploads, slots=rows, clients=clients)

    def take(intake, trained, expected, group):
        weight = np.where(group.there, expected.weight[group.rows], 0).astype(np.float32)
        own = Slots(
            group.number, slots.task[group.rows], weight, len(group.clients), slots.num_tasks
        )
        # Beyond the last: what fills up is put nowhere.
        rows = np.where(group.there, group.rows, len(slots.task)).astype(np.int32)
        return taken(intake, trained, own, rows, group.clients)

    return take


def _put(axes: PyTree, whole: PyTree, part: PyTree, **where: jax.Array) -> PyTree:
    """Writes arrays `[some, ...]` to the rows of arrays `[all, ...]` that `where` has by axis."""

    def put(rows: jax.Array) -> Callable[[Any], jax.Array]:
        return lambda pair: pair.whole.at[rows].set(pair.part, mode="drop")

    pairs = jax.tree.map(lambda x, y: _Pair(x, y), whole, part)
    return by_axis(axes, pairs, **{axis: put(rows) for axis, rows in where.items()})


class _Pair:
    """A leaf of two trees."""

    def __init__(self, whole: jax.Array, part: jax.Array):
        self.whole, self.part = whole, part


def _noise(
    config: SimulationConfig, changes: PyTree, server: Mesh, present: Slots
) -> PyTree | None:
    """Noise from the operating system's entropy, the same at all processes; None without it."""
    if not config.privacy.clip_norm or config.privacy.seed >= 0:
        return None
    if is_first():
        noise = privacy.drawn(config.privacy, changes, present)
    else:  # which takes what the first has drawn
        noise = jax.tree.map(lambda x: np.zeros(x.shape, np.int32), changes)
    return on_server(agreed(noise), server)


def _upload(config: SimulationConfig, algorithm: Algorithm, slots: Slots) -> Callable:
    """What clients send: their vectors, or changes, noised, lied about, and folded."""
    of_liars = attacks.liars(config.attack, slots, config.seed)[slots.client]
    lies_in_changes = config.attack.kind not in ("none", "label_flip", *attacks.OF_UPLOADS)
    disturbed = lies_in_changes or config.privacy.clip_norm > 0

    def disturb(changes, slots, index, noise):
        """Changes as they are sent; slots weigh 0 whose numbers are no longer all finite."""
        if config.privacy.clip_norm:
            seed = config.privacy.seed if noise is None else None
            changes = privacy.privatised(config.privacy, changes, slots, index, seed, noise=noise)
        if lies_in_changes:
            told = jnp.asarray(of_liars)
            changes = attacks.lied(config.attack, changes, told, slots, index, config.seed)
        finite = [
            jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1) for x in jax.tree.leaves(changes)
        ]
        weight = jnp.where(jnp.stack(finite).all(axis=0), slots.weight, 0.0)
        return changes, dataclasses.replace(slots, weight=weight)

    def upload(state, vectors, slots, index, noise):
        if disturbed and algorithm.sends_change:  # vectors are changes already
            vectors, slots = disturb(vectors, slots, index, noise)
        elif disturbed:
            before = algorithm.download(state, slots)
            changes = jax.tree.map(jnp.subtract, vectors, before)
            changes, slots = disturb(changes, slots, index, noise)
            vectors = jax.tree.map(jnp.add, before, changes)
        uploads = algorithm.upload(vectors, slots)
        if config.attack.kind in attacks.OF_UPLOADS:
            uploads = attacks.lied_upload(config.attack, uploads, jnp.asarray(of_liars), slots)
        return uploads, slots.weight

    return upload


def _aggregate(config: SimulationConfig, ended: Callable) -> Callable:
    """An algorithm's `aggregate`, or the end of its sums, checked while it is traced."""

    def aggregate(state, intake, slots):
        found = ended(state, intake, slots)
        check_aggregated(found, state, config.algorithm)
        return found

    return aggregate


def shards_server(model: Model, algorithm: Algorithm, mesh: Mesh) -> bool:
    """Whether the parameters of the server's arithmetic are sharded over all devices.

    Not where most of them would not be: in leaves that the devices do not divide.
    """
    sizes = [leaf.size for leaf in jax.tree.leaves(model.base)]
    parted = sum(size for size in sizes if size % (8 * mesh.size) == 0)  # masks have eight a byte
    return (
        algorithm.sharded_over is not None
        and mesh.size > 1
        and sum(sizes) >= SHARDED_FROM
        and parted >= 0.9 * sum(sizes)
    )
