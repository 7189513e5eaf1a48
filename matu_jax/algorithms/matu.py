"""MaTU (Tsouvalas et al., arXiv 2502.06376): a thin wrapper over the public aggregator."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from matu_jax import fields
from matu_jax.aggregation import (
    AggregationConfig,
    ServerState,
    Unified,
    aggregate,
    modulate,
    unify,
)
from matu_jax.algorithms.contract import Algorithm
from matu_jax.algorithms.means import zeros
from matu_jax.config import Config
from matu_jax.messages.layout import overhead_bytes
from matu_jax.messages.quantisation import restored, rounded
from matu_jax.messages.traffic import Message, Traffic
from matu_jax.trees import PyTree


class MatuState(NamedTuple):
    """What the server hands out, and what it keeps.

    Attributes:
      downloads: made at the end of the round before: the clients' unifieds; where they receive task
        vectors, these as they arrive, leaves `[tasks, ...]`, or None if they arrive as they are.
      server: the server's own: the unified of all tasks, or, where uploads are changes, the exact
        task vectors and the evidence for transfer.
    """

    downloads: Unified | PyTree | None
    server: Unified | ServerState


def matu(config: Config, mesh: Mesh | None = None) -> Algorithm:
    """MaTU with the choices of `config.matu`, on one device or with sharded parameters."""
    precision, changes = config.matu.precision, config.matu.uploads == "change"
    folds_down = config.matu.downloads == "unified"
    fields.checked(config.matu, "config.matu")
    choices = AggregationConfig.of(config.matu, config.defence)

    def arrived(vector):
        return restored(rounded(vector, precision), vector)

    def received(unified):
        return unified._replace(vector=arrived(unified.vector))

    def nothing(base, rows, *groups):
        masks = jax.tree.map(lambda x: jnp.zeros((rows, -(-x.size // 8)), jnp.uint8), base)
        return Unified(zeros(base, *groups), masks, jnp.zeros(rows, jnp.float32))

    def handed_out(unifieds, task_vectors):
        # Rounded once: programs that round for themselves may differ by an ulp, and where nothing
        # has changed, a difference of zero has no sign.
        if folds_down:
            return received(unifieds)
        return None if precision == "float32" else arrived(task_vectors)

    def init(base, slots):
        unifieds = nothing(base, slots.client.shape[0], slots.num_clients)
        vectors = zeros(base, slots.num_tasks)
        downloads = handed_out(unifieds, vectors)
        if changes:
            evidence = jnp.zeros((slots.num_tasks, slots.num_tasks), jnp.float32)
            return MatuState(downloads, ServerState(vectors, evidence, evidence))
        return MatuState(downloads, nothing(base, slots.num_tasks))

    def server(state, uploads, slots):
        result = aggregate(uploads, slots, choices, state.server, mesh=mesh)
        keeps = result.state if changes else result.unified
        return MatuState(handed_out(result.downloads, result.task_vectors), keeps), {
            "similarity": result.similarity,
            "accepted": result.accepted,
        }

    def download(state, slots):
        if folds_down:
            return modulate(state.downloads, slots)
        vectors = state.server.task_vectors if state.downloads is None else state.downloads
        return jax.tree.map(lambda x: x[slots.task], vectors)

    def folded(unified):
        return Message(
            per_client=rounded(unified.vector, precision),
            per_shared_slot=(unified.masks, unified.scales),
        )

    def sent(state, uploads):
        if folds_down:
            return folded(uploads), folded(state.downloads)
        rows = jnp.zeros(uploads.scales.shape[0], jnp.int32)  # whose vectors does not matter here
        per_slot = jax.tree.map(lambda x: x[rows], state.server.task_vectors)
        return folded(uploads), Message(per_slot=rounded(per_slot, precision))

    def frame_bytes(k):
        return overhead_bytes(k), overhead_bytes(k) if folds_down else k * overhead_bytes(1)

    def upload(vectors, slots):
        return received(unify(vectors, slots, magnitude=choices.magnitude, mesh=mesh))

    return Algorithm(
        init=init,
        download=download,
        upload=upload,
        aggregate=server,
        traffic=Traffic(sent, frame_bytes, kept=lambda state: state.server),
        sends_change=changes,
        defence=config.defence,
        sharded_over=functools.partial(matu, config),
    )
