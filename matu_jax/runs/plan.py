"""What a run is going to do, and whether all that it needs is there."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from matu_jax import algorithms
from matu_jax.config import Config
from matu_jax.data import SOURCES, Task, prepared, selection
from matu_jax.errors import UserError
from matu_jax.messages.traffic import message_bits
from matu_jax.models import MODELS, Model
from matu_jax.models.architectures import check_heads
from matu_jax.models.checkpoint_config import architecture_of
from matu_jax.models.images import transform_of
from matu_jax.runs.commandline import Source
from matu_jax.runs.tables import human_bits, human_bytes, plan_table
from matu_jax.scenarios import privacy
from matu_jax.simulation.federation import Federation, check_names, task_names
from matu_jax.simulation.memory import memory_there, predicted_bytes
from matu_jax.simulation.placement import own_devices

_SIMULATION = (
    "predicted for the whole simulation on these devices: all clients, their data and the server"
)


def check_inputs(config: Config, source: Source) -> None:
    """Checks that the datasets and the checkpoint are there, fetching the latter if need be.

    Args:
      config: the experiment.
      source: where it is from, for the commands in messages.

    Raises:
      UserError: one message with everything that is missing, and how to get it.
    """
    problems = []
    if config.privacy.clip_norm and config.privacy.seed < 0:
        absent = [name for name in privacy.PACKAGES if not importlib.util.find_spec(name)]
        if absent:
            problems.append(
                f"config.privacy: not installed, of what draws noise and computes epsilon: "
                f"{' and '.join(absent)}. Install with\n    pip install 'matu_jax[privacy]'"
            )
    try:
        problems += _lacking_data(config, source)
        own = config.model.architecture in (*MODELS, "embedded")
        if not own and config.model.checkpoint != "random":
            architecture_of(config.model)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def _lacking_data(config: Config, source: Source) -> Iterator[str]:
    """Yields what to say of data that is not there."""
    data = config.data
    check_names(config)
    if data.source in SOURCES or data.sites or data.manifest:
        return
    names = task_names(config)
    if selection.is_generated(data.tasks, data.folders):
        return
    check_heads(config.model, names)
    if data.source == "prepared":
        transform = transform_of(config.model)
        absent = prepared.missing(names, transform=transform, folders=data.folders)
        if absent:
            yield (
                f"data: {len(absent)} of {len(names)} datasets are not prepared "
                f"({', '.join(absent)}). Prepare them with\n"
                f"    {source.command('prepare')}\n"
                "  or try the experiment with stand-ins: --config.data=synthetic"
            )


def print_plan(
    config: Config,
    algorithm: algorithms.Algorithm,
    model: Model,
    federation: Federation,
    mesh: Mesh,
    workdir: Path,
    console: Console,
) -> None:
    """Prints what a run is going to do, its traffic and its memory."""
    slots = federation.slots
    state = jax.eval_shape(algorithm.init, model.base, slots)
    stacked = jax.eval_shape(algorithm.download, state, slots)
    uplink, downlink = jax.eval_shape(
        algorithm.traffic.sent, state, jax.eval_shape(algorithm.upload, stacked, slots)
    )
    memory = predicted_bytes(config, model, algorithm, federation, mesh)
    trained = sum(leaf.size for leaf in jax.tree.leaves(model.base))
    frozen = sum(
        leaf.size  # and not numbers of classes and the like
        for leaf in jax.tree.leaves(model.frozen)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    )
    device, processes = own_devices(mesh)[0], jax.process_count()
    bits = [message_bits(message, slots).mean() for message in (uplink, downlink)]
    plan = {
        "devices": f"{mesh.size} x {device.device_kind} ({device.platform})"
        + (f" of {processes} processes" if processes > 1 else ""),
        "algorithm": config.algorithm,
        "clients": f"{slots.num_clients}, {config.clients_per_round or slots.num_clients} a round",
        "tasks": len(federation.tasks),
        "slots (client, task)": f"{len(slots.client)}, {int(slots.weight.sum())} examples",
        "parameters trained": f"{trained:,} of {trained + frozen:,}",
        "rounds": f"{config.rounds} of {config.local.steps} steps of "
        f"{config.local.batch_examples} examples",
        "uplink per client and round": human_bits(float(bits[0])),
        "downlink per client and round": human_bits(float(bits[1])),
        "memory": f"{human_bytes(sum(memory.values()))} ({_SIMULATION})",
        "workdir": str(workdir),
    }
    console.print(plan_table(plan))
    for line in data_notes(federation.tasks):
        console.print(line)
    there, needed = memory_there(device), sum(memory.values()) // mesh.size
    if there and needed > there:
        console.print(
            f"warning: about {human_bytes(needed)} of memory are needed per device, and "
            f"{human_bytes(there)} are there. Most go into "
            f"{max(memory, key=lambda part: memory[part])}. Lower config.local.parallel_slots, or "
            "set config.model.remat=True or config.model.compute_dtype=bfloat16."
        )


def data_notes(tasks: Sequence[Task]) -> Iterator[str]:
    """What people should know of the data, a line for each note, with the tasks that share it."""
    named: dict[str, list[str]] = {}
    for task in tasks:
        for note in task.notes:
            named.setdefault(note, []).append(task.name)
    for note, names in named.items():
        yield f"data: {', '.join(names)}: {note}"
