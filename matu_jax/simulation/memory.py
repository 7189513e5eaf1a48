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
from matu_jax.models import Model
from matu_jax.simulation.batches import round_grid
from matu_jax.simulation.choices import SimulationConfig
from matu_jax.simulation.evaluate import evaluation_sets
from matu_jax.simulation.federation import Federation
from matu_jax.simulation.hosts import highest
from matu_jax.simulation.liveness import peak_bytes
from matu_jax.simulation.participation import participants, trained_slots
from matu_jax.simulation.placement import on_cpu, own_devices, rows_by_process, slots_at_once
from matu_jax.simulation.programs import intake_shapes, shards_server

AnyConfig = TypeVar("AnyConfig", bound=SimulationConfig)


def predicted_bytes(
    config: SimulationConfig,
    model: Model,
    algorithm: Algorithm,
    federation: Federation,
    mesh: Mesh,
    step: int | None = None,
) -> dict[str, int]:
    """Predicts device memory before anything is compiled, over all devices, in bytes.

    The program of local training holds parameters, activations, optimiser and batches; of these,
    the next ones are on their way while the present ones are trained on. Step: what `step_bytes`
    has found, which takes a second or two for a large model; None = it is asked.
    """
    slots, local = federation.slots, config.local
    step = step_bytes(config, model, federation, mesh) if step is None else step

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

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
        "activations": per_device * mesh.size * step,
        "optimiser": 4 * cut.slots * vector,
        "task vectors": (1 + copies) * cut.slots * vector + 2 * servers * kept,
        "server state": 2 * servers * size(state),
        "batches": (1 if cut.groups * cut.chunks == 1 else 2) * cut.slots * cut.steps * examples,
        "evaluation examples": mesh.size * sum(pieces),
    }


def step_bytes(config: SimulationConfig, model: Model, federation: Federation, mesh: Mesh) -> int:
    """What a step of one slot holds at once, at most, its gradient included; see `liveness`.

    So many slots as train at once hold so many times as much, or a little less: rows of frozen
    parameters that a loop reads are counted, and read once for all.
    """
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((config.local.batch_examples, *x.shape), x.dtype),
        example_shapes(federation.tasks[0].train),
    )

    def step(vector, frozen, batch):
        key = jax.random.key(0) if model.stochastic else None
        return jax.grad(lambda v: model.loss(v, frozen, batch, jnp.int32(0), key))(vector)

    platform = str(own_devices(mesh)[0].platform)
    program = jax.make_jaxpr(step)(model.base, model.frozen, batch)
    return peak_bytes(program, "cuda" if platform == "gpu" else platform)


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

    step = step_bytes(config, model, federation, mesh)

    def needed(count: int) -> float:
        parts = predicted_bytes(choose(count), model, algorithm, federation, mesh, step)
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
