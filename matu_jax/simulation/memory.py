"""How much memory a run needs, and how many slots train at once for it."""

import bisect
import dataclasses
import os
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from matu_jax.algorithms import Algorithm
from matu_jax.data import example_bytes, example_shapes
from matu_jax.models import MODELS, Model
from matu_jax.models.backbone import recomputed_bytes
from matu_jax.simulation.batches import round_grid
from matu_jax.simulation.choices import SimulationConfig
from matu_jax.simulation.evaluate import evaluation_sets
from matu_jax.simulation.federation import Federation
from matu_jax.simulation.hosts import highest
from matu_jax.simulation.participation import participants, trained_slots
from matu_jax.simulation.placement import on_cpu, own_devices, rows_by_process, slots_at_once
from matu_jax.simulation.programs import intake_shapes, shards_server

AnyConfig = TypeVar("AnyConfig", bound=SimulationConfig)


def predicted_bytes(
    config: SimulationConfig, model: Model, algorithm: Algorithm, federation: Federation, mesh: Mesh
) -> dict[str, int]:
    """Predicts device memory before anything is compiled, over all devices, in bytes.

    Activations are the residuals of one gradient's backward pass, as its abstract evaluation
    lists them, less the frozen parameters among them, for as many slots as train at once; with
    remat, those of one block that is computed again are added, but not what its backward pass holds
    besides: XLA was seen to need 1.6 times as much then (ViT-B/16, float32, on CPU).
    """
    slots, local = federation.slots, config.local
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((local.batch_examples, *x.shape), x.dtype),
        example_shapes(federation.tasks[0].train),
    )

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    def residuals(vector, frozen, batch):
        key = jax.random.key(0) if model.stochastic else None
        return jax.vjp(lambda v: model.loss(v, frozen, batch, jnp.int32(0), key), vector)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, model.base, model.frozen, batch))
    shared = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(model.frozen)]
    activations = 0
    for leaf in kept:
        if (leaf.shape, leaf.dtype) in shared:
            shared.remove((leaf.shape, leaf.dtype))
        elif not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            activations += size(leaf)
    if config.model.architecture not in MODELS:  # whose remat is their own affair
        activations += recomputed_bytes(config.model, local.batch_examples)
    cut = round_grid(config, federation, mesh, model)
    per_device = slots_at_once(mesh, cut.slots // mesh.size, local.parallel_slots)
    state = jax.eval_shape(lambda: algorithm.init(model.base, slots))
    vector = size(model.base)
    pieces = [s.piece_bytes for s in evaluation_sets(config, federation, mesh).values()]
    examples = local.batch_examples * example_bytes(federation.tasks[0].train)
    # One server per process, which all results reach by all its devices; or one over all devices.
    servers = 1 if shards_server(model, algorithm, mesh) else len(rows_by_process(mesh, mesh.size))
    copies = mesh.size if servers > 1 else 1
    kept = size(intake_shapes(config, algorithm, model.base, slots))
    return {
        "parameters": (size(model.frozen) + vector) * mesh.size,
        "activations": per_device * mesh.size * activations,
        "optimiser": 4 * cut.slots * vector,
        "task vectors": (1 + copies) * cut.slots * vector + 2 * servers * kept,
        "server state": 2 * servers * size(state),
        "batches": (1 if cut.groups * cut.chunks == 1 else 2) * cut.slots * cut.steps * examples,
        "evaluation examples": mesh.size * sum(pieces),
    }


def fitted(
    config: AnyConfig, model: Model, algorithm: Algorithm, federation: Federation, mesh: Mesh
) -> AnyConfig:
    """Chooses `config.local.parallel_slots` where it is 0: on accelerators, by predicted memory.

    As many slots at once as leave a tenth of the memory free, all if they fit; one if nothing fits.
    On CPU, and where a device does not tell its memory, 0 stays, see `placement.map_slots`.
    """
    there = memory_there(own_devices(mesh)[0])  # of equal devices in all processes
    if config.local.parallel_slots or on_cpu(mesh) or there is None:
        return config

    def choose(count: int) -> AnyConfig:
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


def memory_there(device: Any) -> int | None:
    """Bytes of memory that one device has, where that can be told."""
    if device.platform == "cpu":
        if "SC_PHYS_PAGES" not in os.sysconf_names:
            return None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")
