"""The programs of a run, each compiled once: what clients and server compute in a round."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from matu_jax.aggregation import Slots
from matu_jax.algorithms import Algorithm
from matu_jax.algorithms.contract import check_aggregated
from matu_jax.algorithms.means import zeros
from matu_jax.models import Model
from matu_jax.scenarios import attacks, privacy
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


class Programs(NamedTuple):
    """What a round computes, step by step; every one is compiled once in a run.

    Task vectors are stacked over slots. Where the server is sharded over all devices, its state has
    flat leaves, `[n]` and `[rows, n]`; else they have the model's shapes.

    Attributes:
      algorithm: the one that runs, sharded over the server's devices where they are several.
      server: the devices of the server's arithmetic.
      start: `state | None -> state`, where a run starts: from a state in the model's shapes, or
        afresh.
      download: `(state, slots, rows) -> vectors [rows, ...]`, where these slots start their round;
        over all devices.
      evaluated: the same, of what is evaluated.
      begin: `vectors -> carry` of local training, see `local_training`.
      advance: some steps of it; takes the carry's buffers.
      finish: `carry -> Trained`, with leaves as the server has them; takes the carry's buffers.
      noise: `slots -> noise` that differential privacy adds to what these slots have changed; None
        without it, or where it is drawn from a seed by `upload` itself.
      upload: `(state, trained, slots, rows, round, noise) -> (uploads, weight)`: the clients' side,
        simulated on the server's devices: of groups of trained vectors `[group, ...]` that together
        are those of `rows`, what clients send; and the weight of every slot, float32 `[slots]`. It
        is 0 for what is refused where noise or a lie has made a number that is not finite.
      aggregate: `(state, uploads, slots) -> (state, metrics)`; takes the state's buffers.
      saved: `state -> state` in the model's shapes, as checkpoints keep it; None at other
        processes than the first.
    """

    algorithm: Algorithm
    server: Mesh
    start: Callable[[Any], Any]
    download: Callable[[Any, Slots, np.ndarray], PyTree]
    evaluated: Callable[[Any, Slots, np.ndarray], PyTree]
    begin: Callable[[PyTree], Carry]
    advance: Callable[..., Carry]
    finish: Callable[[Carry], Trained]
    noise: Callable[[Slots], PyTree | None]
    upload: Callable[..., tuple[Any, jax.Array]]
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
    rows_of = _rows_of_shards if sharded else _rows_of_whole
    download = rows_of(algorithm.download, model.base, mesh)
    at_server = NamedSharding(server, WHOLE)
    return Programs(
        algorithm=algorithm,
        server=server,
        start=start,
        download=download,
        evaluated=rows_of(algorithm.evaluated, model.base, mesh)
        if algorithm.evaluated
        else download,
        begin=jax.jit(local.begin),
        advance=jax.jit(local.advance, donate_argnums=1),
        finish=_finish(local.finish, base),
        noise=functools.partial(_noise, config, changes_of(base, slots), server),
        upload=jax.jit(
            _upload(config, algorithm, federation.slots), out_shardings=(None, at_server)
        ),
        aggregate=jax.jit(
            _aggregate(config, algorithm), donate_argnums=0, out_shardings=(placement, at_server)
        ),
        saved=saved,
    )


def changes_of(base: PyTree, slots: Slots) -> PyTree:
    """Shapes of what all slots may change: leaves `[slots, ...]`."""
    return jax.eval_shape(lambda: zeros(base, len(slots.client)))


def _reshaped(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x.reshape(y.shape), tree, like)


def _rows_of_whole(
    vectors: Callable[[Any, Slots], PyTree], base: PyTree, mesh: Mesh
) -> Callable[..., PyTree]:
    """Makes `(state, slots, rows) -> vectors [rows, ...]`: each process computes its own rows.

    Leaves have the shapes of the base already, which is not looked at.
    """
    program = jax.jit(
        lambda state, slots, rows: jax.tree.map(lambda x: x[rows], vectors(state, slots))
    )

    def take(state, slots, rows):
        own = rows[own_rows(mesh, len(rows))]
        return placed(program(state, slots, own), mesh, ROWS)

    return take


def _rows_of_shards(
    vectors: Callable[[Any, Slots], PyTree], base: PyTree, mesh: Mesh
) -> Callable[..., PyTree]:
    """The same of a server that is sharded: from parts of leaves to whole leaves of some rows."""
    by_slot = NamedSharding(mesh, ROWS)

    def take(state, slots, rows):
        def shaped(x, like):
            whole = jax.lax.with_sharding_constraint(x, by_slot)
            return whole.reshape(whole.shape[0], *like.shape)

        taken = jax.tree.map(lambda x: x[rows], vectors(state, slots))
        return jax.tree.map(shaped, taken, base)

    return jax.jit(take, out_shardings=by_slot)


def _finish(finish: Callable[[Carry], Trained], base: PyTree) -> Callable[[Carry], Trained]:
    """Ends local training; vectors get the shapes of the server's base."""

    @functools.partial(jax.jit, donate_argnums=0)
    def finished(carry):
        trained = finish(carry)
        vectors = jax.tree.map(
            lambda x, like: x.reshape(x.shape[0], *like.shape), trained.vectors, base
        )
        return trained._replace(vectors=vectors)

    return finished


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

    def upload(state, trained, slots, rows, index, noise):
        def spread(*groups):
            whole = jnp.zeros((slots.client.shape[0], *groups[0].shape[1:]), groups[0].dtype)
            return whole.at[rows].set(jnp.concatenate(groups)[: rows.shape[0]])

        vectors = jax.tree.map(spread, *trained)
        if algorithm.sends_change or disturbed:
            before = algorithm.download(state, slots)
            vectors = jax.tree.map(jnp.subtract, vectors, before)
            if disturbed:
                vectors, slots = disturb(vectors, slots, index, noise)
            if not algorithm.sends_change:
                vectors = jax.tree.map(jnp.add, before, vectors)
        uploads = algorithm.upload(vectors, slots)
        if config.attack.kind in attacks.OF_UPLOADS:
            uploads = attacks.lied_upload(config.attack, uploads, jnp.asarray(of_liars), slots)
        return uploads, slots.weight

    return upload


def _aggregate(config: SimulationConfig, algorithm: Algorithm) -> Callable:
    """An algorithm's `aggregate`, checked while it is traced."""

    def aggregate(state, uploads, slots):
        found = algorithm.aggregate(state, uploads, slots)
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
