"""The programs of an experiment, from its file and shapes alone: no checkpoint, no data."""

import bisect
import dataclasses
import math
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from compiled.programs import Program
from matu_jax import models
from matu_jax.algorithms import Algorithm
from matu_jax.config import Config
from matu_jax.data import ImageTask, Split, example_shapes, selection
from matu_jax.data.feed import Grid
from matu_jax.models import Model
from matu_jax.models.images import transform_of
from matu_jax.simulation.batches import round_grid, round_groups
from matu_jax.simulation.federation import Federation, algorithm_for, dealt_out, task_names
from matu_jax.simulation.memory import predicted_bytes
from matu_jax.simulation.placement import ROWS, WHOLE, server_shardings, slot_mesh
from matu_jax.simulation.programs import Programs, programs_of
from matu_jax.trees import PyTree

FOLDER = Path(__file__).resolve().parents[2]
EXAMPLES = 2048
"""Of every task's stand-in: more than one batch."""


class Experiment(NamedTuple):
    """An experiment on devices that are not there.

    Attributes:
      config: as the file has it.
      model: with shapes in place of parameters.
      algorithm: that it names.
      federation: its clients and tasks, of images that take no memory.
      mesh: the devices.
      cut: how a round's training is cut.
      programs: of a round.
    """

    config: Config
    model: Model
    algorithm: Algorithm
    federation: Federation
    mesh: Mesh
    cut: Grid
    programs: Programs


def experiment(name: str, devices: Sequence[Any], memory_bytes: float) -> Experiment:
    """The experiment `experiments/NAME.py` on devices.

    Args:
      name: such as "vitb32".
      devices: see `devices.topology`.
      memory_bytes: that each of them has: no more slots train at once than leave a tenth of it
        free, as the plan predicts, however many the file asks for.
    """
    config = runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"]()
    config = config.with_fields({"model.checkpoint": "random", "data.source": "synthetic"})
    tasks = [_stand_in(name, transform_of(config.model).size) for name in task_names(config)]
    federation = dealt_out(config, tasks)
    model = _shapes_of(lambda: models.build(config.model, federation.tasks, seed=config.seed))
    algorithm, mesh = algorithm_for(config, model), slot_mesh(devices)

    def with_slots(count: int) -> Config:
        return config.with_fields({"local.parallel_slots": count})

    def needed(count: int) -> float:
        parts = predicted_bytes(with_slots(count), model, algorithm, federation, mesh)
        return sum(parts.values()) / mesh.size

    asked = config.local.parallel_slots
    if needed(asked) > 0.9 * memory_bytes:
        fits = bisect.bisect_right(range(1, asked), 0.9 * memory_bytes, key=needed)
        config = with_slots(max(1, fits))
    cut = round_grid(config, federation, mesh, model)
    programs = programs_of(config, algorithm, model, federation, mesh)
    return Experiment(config, model, algorithm, federation, mesh, cut, programs)


def _stand_in(name: str, size: int) -> ImageTask:
    """A task as large as a dataset's images are, all of which are one and the same byte."""
    dataset = selection.find(name)
    classes = dataset.num_classes or 100
    images = np.broadcast_to(np.uint8(0), (EXAMPLES, size, size, 3))
    split = Split(images, np.arange(EXAMPLES, dtype=np.int32) % classes)
    return ImageTask(
        name=name,
        label_space=name,
        domain=name,
        class_names=tuple(f"class {number}" for number in range(classes)),
        fingerprint="shapes",
        train=split,
        validation=split,
        test=split,
    )


def _shapes_of(build: Callable[[], Model]) -> Model:
    """A model whose parameters were never drawn."""
    built = []

    def parameters():
        built.append(build())
        return built[0].base, built[0].frozen

    base, frozen = jax.eval_shape(parameters)
    return dataclasses.replace(built[0], base=base, frozen=frozen)


def _placed(tree: PyTree, mesh: Mesh, spec: PartitionSpec) -> PyTree:
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def training(of: Experiment) -> Program:
    """Local training of one piece of a round: so many slots, so many steps."""
    mesh, cut, model = of.mesh, of.cut, of.model
    vectors = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((cut.slots, *x.shape), x.dtype), model.base
    )
    batches = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (cut.slots, cut.steps, of.config.local.batch_examples, *x.shape), x.dtype
        ),
        example_shapes(of.federation.tasks[0].train),
    )
    downloads = _placed(vectors, mesh, ROWS)
    carry = _placed(jax.eval_shape(of.programs.begin, downloads), mesh, ROWS)
    position = jax.ShapeDtypeStruct((cut.slots, 3), jnp.int32)
    arguments = (
        _placed((model.base, model.frozen), mesh, WHOLE),
        carry,
        downloads,
        _placed(position, mesh, ROWS),
        _placed(batches, mesh, ROWS),
    )
    predicted = predicted_bytes(of.config, model, of.algorithm, of.federation, mesh)
    return Program(
        of.programs.advance,
        arguments,
        times=cut.steps,
        more={
            "slots": cut.slots // mesh.size,
            "images": of.config.local.batch_examples,
            "steps": cut.steps,
            "predicted GB": sum(predicted.values()) / mesh.size / 1e9,
            "parts GB": {name: size / mesh.size / 1e9 for name, size in predicted.items()},
            "trained": sum(math.prod(x.shape) for x in jax.tree.leaves(model.base)),
        },
    )


def parts_of_round(of: Experiment) -> dict[str, Callable[[], Program]]:
    """All programs of a round on several devices, in their order.

    Raises:
      ValueError: where the server is not sharded, so that one device computes what is asked for.
    """
    mesh, cut, programs, slots = of.mesh, of.cut, of.programs, of.federation.slots
    server = programs.server
    if server.size != mesh.size:
        raise ValueError(f"the server has {server.size} of {mesh.size} devices; too few parameters")
    groups = round_groups(of.config, of.federation, cut)(0)
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.size,), x.dtype), of.model.base)

    def at_server(tree):
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            tree,
            server_shardings(tree, server),
        )

    state = at_server(jax.eval_shape(programs.algorithm.init, base, slots))
    parameters, carry, downloads, *rest = training(of).arguments
    trained = jax.eval_shape(programs.finish, carry, downloads)
    intake = at_server(jax.eval_shape(programs.open, state, slots))

    def exchanged(tree):
        return jax.lax.with_sharding_constraint(tree, server_shardings(tree, server))

    def part(function: Any, *arguments: Any, times: int = len(groups)) -> Callable[[], Program]:
        more = {
            "trained": sum(x.size for x in jax.tree.leaves(base)),
            "all slots": len(groups) * cut.slots,
            "clients": slots.num_clients,
            "a round": times,
        }
        return lambda: Program(function, arguments, more=more)

    return {
        "download": part(lambda state: programs.download(state, groups[0].rows), state),
        "training": part(
            programs.advance, parameters, carry, downloads, *rest, times=len(groups) * cut.chunks
        ),
        "exchange": part(exchanged, _placed(trained, mesh, ROWS)),
        "clients' unify": part(
            jax.jit(
                lambda intake, trained: programs.take(intake, trained, slots, groups[0]),
                donate_argnums=0,
            ),
            intake,
            at_server(trained),
        ),
        "aggregation": part(programs.aggregate, state, intake, slots, times=1),
    }
