"""MaTU (Tsouvalas et al., arXiv 2502.06376): a thin wrapper over the public aggregator."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

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
from matu_jax.aggregation.choices import AggregationRules, DefenceConfig
from matu_jax.algorithms.contract import Algorithm, Groups
from matu_jax.algorithms.means import zeros
from matu_jax.messages.layout import overhead_bytes
from matu_jax.messages.quantisation import restored, rounded
from matu_jax.messages.traffic import Message, Traffic
from matu_jax.trees import PyTree


@dataclasses.dataclass(frozen=True)
class MatuConfig(AggregationRules):
    """MaTU's choices: those of `AggregationRules`, which clients fold by too, and these.

    (Its defences are in DefenceConfig.)

    Attributes:
      downloads: what a client receives: "unified", one vector with a mask and a scale per task, or
        "task_vectors", those of its tasks as they are, each a unified of its own: nothing is lost
        by folding, and k tasks take k vectors. In int8 those are less traffic than one unified
        vector in float32 up to four tasks. Needs uploads = "change".
      precision: how vectors cross the network, up and down: "float32", "bfloat16", or "int8" with a
        float32 scale for 256 parameters (`matu_jax.messages.quantisation`).
    """

    downloads: Literal["unified", "task_vectors"] = "unified"
    precision: Literal["float32", "bfloat16", "int8"] = "float32"

    def conflicts(self, where: str) -> Iterator[str]:
        """Yields what is wrong where one rule needs another."""
        yield from super().conflicts(where)
        if self.downloads == "task_vectors" and self.uploads != "change":
            yield (
                f"{where}.downloads: 'task_vectors' needs {where}.uploads = 'change', where the "
                f"server keeps task vectors; found {self.uploads!r}."
            )


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


_AXES: tuple[Any, Any, Any] = "clients", "slots", "whole"  # where a tree has arrays otherwise


def matu(choices: MatuConfig, defence: DefenceConfig, mesh: Mesh | None = None) -> Algorithm:
    """MaTU on one device or with sharded parameters.

    Raises:
      ValueError: for choices that do not fit each other.
    """
    fields.checked(choices, "config.matu")
    precision, changes = choices.precision, choices.uploads == "change"
    folds_down = choices.downloads == "unified"
    rules = AggregationConfig.of(choices, defence)

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
        result = aggregate(uploads, slots, rules, state.server, mesh=mesh)
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

    clients, slots_, whole = _AXES
    by_client = Unified(clients, slots_, slots_)
    handed = by_client if folds_down else None if precision == "float32" else whole

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
        heads=defence,
        sharded_over=functools.partial(matu, choices, defence),
        groups=Groups(MatuState(handed, whole), by_client),
    )
