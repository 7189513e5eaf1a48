"""Who holds what: the tasks of an experiment, dealt out to clients."""

import dataclasses
import hashlib
import operator
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, Int64

from matu_jax import algorithms
from matu_jax.aggregation import Slots
from matu_jax.algorithms import Algorithm
from matu_jax.data import (
    SOURCES,
    SPLITS,
    ImageTask,
    Task,
    check_tasks,
    embedded,
    fingerprint,
    num_examples,
    prepared,
    selection,
    synthetic,
)
from matu_jax.data.choices import IMAGE_SOURCES, DataConfig
from matu_jax.data.partition import assign, partition
from matu_jax.data.rendering import SIZE
from matu_jax.errors import did_you_mean, look_alike
from matu_jax.models import Model, base_fingerprint
from matu_jax.models.architectures import check_architecture
from matu_jax.models.checks import told
from matu_jax.models.images import transform_of
from matu_jax.scenarios import attacks, failures
from matu_jax.simulation.choices import SimulationConfig
from matu_jax.simulation.measures import main_measure
from matu_jax.trees import PyTree


class Federation(NamedTuple):
    """Who holds what.

    Attributes:
      tasks: all tasks, with their data.
      slots: client, task and number of training examples of every slot, as numpy arrays.
      indices: per slot, positions in its task's train split.
      sites: names of the clients, where data belongs to sites; else none.
      trace: who sends nothing when, from `config.failures.trace`: {round: {client: reason}}.
    """

    tasks: tuple[Task, ...]
    slots: Slots
    indices: list[Int64[np.ndarray, "_"]]
    trace: Mapping[int, Mapping[int, str]] = MappingProxyType({})
    sites: tuple[str, ...] = ()


def task_names(config: SimulationConfig) -> tuple[str, ...]:
    """Names of the images' tasks that `config.data.tasks` stands for.

    Raises:
      ValueError: for tasks of the embedded benchmark and a model that takes other images, or an
        unknown architecture, source or dataset.
    """
    check_architecture(config.model.architecture)
    data = config.data
    if data.source not in IMAGE_SOURCES:
        raise ValueError(
            f"config.data.source: found {data.source!r}, no such source."
            + did_you_mean(data.source, [*IMAGE_SOURCES, *SOURCES])
        )
    generated = selection.is_generated(data.tasks, data.folders)
    if generated and transform_of(config.model).size != SIZE:
        raise ValueError(
            f"config.model.architecture: found {config.model.architecture!r}; the tasks "
            f"{data.tasks or 'embedded8'!r} have images of {SIZE} pixels, and it "
            "takes others. Give config.data.tasks = 'vision8', or config.model.architecture = "
            "'embedded'."
        )
    return selection.resolve(data.tasks, data.folders)


def check_names(config: SimulationConfig) -> None:
    """Checks that the model and the tasks which a config names are known.

    Raises:
      ValueError: as `task_names`.
    """
    if config.data.source in SOURCES or config.data.sites or config.data.manifest:
        check_architecture(config.model.architecture)
    else:
        task_names(config)


def load_tasks(config: SimulationConfig) -> tuple[Task, ...]:
    """Loads the tasks of an experiment, with their data.

    Raises:
      ValueError: for an unknown name, or a dataset that is not prepared.
    """
    if config.data.source in SOURCES:
        check_names(config)
        return _own_tasks(config.data)
    if config.data.sites or config.data.manifest:
        return _tasks_of_sites(config)
    names, data = task_names(config), config.data
    if selection.is_generated(data.tasks, data.folders):
        return embedded.load(names)
    transform = transform_of(config.model)
    if data.source == "synthetic":
        return synthetic.load(
            names, transform=transform, image_folders=data.folders, seed=data.seed
        )
    return prepared.load(
        names,
        transform=transform,
        folders=data.folders,
        validation_fraction=data.validation_fraction,
        how=_how_to_prepare(config),
    )


def _own_tasks(data: DataConfig) -> tuple[Task, ...]:
    """The tasks of one of `SOURCES`, or those of them that are named."""
    if data.source in IMAGE_SOURCES:
        raise ValueError(
            f"SOURCES[{data.source!r}]: is the name of a source of the package; choose another."
        )
    where = f"config.data.source {data.source!r}: its function in SOURCES"
    try:
        tasks = tuple(SOURCES[data.source](data))
    except ValueError:
        raise
    except Exception as error:  # of a function of the user's
        raise ValueError(
            f"{told(where, error)}; expected a function that takes config.data and returns tasks."
        ) from error
    check_tasks(tasks, f"{where} returned")
    by_name = {task.name: task for task in tasks}
    asked = [name.strip() for name in data.tasks.split(",") if name.strip()] or list(by_name)
    for name in asked:
        if name not in by_name or asked.count(name) > 1:
            what = "more than once" if name in by_name else "no such task of this source"
            hint = "" if name in by_name else did_you_mean(name, by_name)
            raise ValueError(f"config.data.tasks: found {name!r}, {what}.{hint}")
    return tuple(by_name[name] for name in asked)


def _tasks_of_sites(config: SimulationConfig) -> tuple[Task, ...]:
    """The tasks of folders of sites, or of a manifest."""
    from matu_jax.data import manifest, rows, sites  # here, since they load Pillow

    check_names(config)
    data = config.data
    return rows.tasks_of(
        manifest.read(data.manifest) if data.manifest else sites.read(data.sites),
        wanted="" if data.tasks == selection.ALL_FOLDERS else data.tasks,
        transform=transform_of(config.model),
        validation_fraction=data.validation_fraction,
        seed=data.seed,
    )


def _how_to_prepare(config: SimulationConfig) -> str:
    """What prepares an experiment's datasets, whichever experiment file is given."""
    words = [f"--config.data.{name}={getattr(config.data, name)}" for name in ("tasks", "folders")]
    fields = ("architecture", "checkpoint", "head", "task_heads")
    words += [f"--config.model.{name}={getattr(config.model, name)}" for name in fields]
    return (
        "run python -m matu_jax.prepare with --config and the run's experiment file, and with "
        f"{shlex.join(words)}"
    )


def federate(config: SimulationConfig) -> Federation:
    """Loads the tasks and deals them out to clients.

    Raises:
      ValueError: for an unknown task, data that is not there, an assignment or partition that
        cannot be made, an attack of nobody, or a trace that cannot be read; it names the setting
        to change.
    """
    trace = _trace(config)  # before data is loaded, which takes longer
    return dealt_out(config, load_tasks(config), trace)


def _trace(config: SimulationConfig) -> dict[int, dict[int, str]]:
    file = config.failures.trace
    return failures.read_trace(file, config.data.clients) if file else {}


def dealt_out(
    config: SimulationConfig,
    tasks: Sequence[Task],
    trace: Mapping[int, Mapping[int, str]] | None = None,
) -> Federation:
    """Deals tasks out to clients.

    Args:
      config: how, in `config.data`; and who fails and lies.
      tasks: with their data.
      trace: as in `Federation`; None = of the config.

    Raises:
      ValueError: for tasks of two forms, an assignment or partition that cannot be made, an attack
        of nobody, or a trace that cannot be read; it names the setting to change.
    """
    data = config.data
    trace = _trace(config) if trace is None else trace
    check_tasks(tasks)
    if any(task.sites for task in tasks):
        return _of_sites(config, tasks, trace)
    try:
        client, task = assign(
            data.clients, data.tasks_per_client, len(tasks), data.seed, data.assignment or None
        )
        indices = partition(
            [_labels(config, t) for t in tasks],
            client,
            task,
            examples_per_slot=data.examples_per_slot or None,
            alpha=data.dirichlet_alpha or None,
            seed=data.seed,
        )
    except ValueError as error:
        names = ", ".join(f"{i} = {t.name}" for i, t in enumerate(tasks))
        raise ValueError(
            f"config.data (clients, tasks_per_client, assignment, examples_per_slot, "
            f"dirichlet_alpha) cannot be dealt out: {error}. Tasks: {names}."
        ) from None
    return _held(config, tasks, client, task, indices, trace)


def _of_sites(
    config: SimulationConfig, tasks: Sequence[Task], trace: Mapping[int, Mapping[int, str]]
) -> Federation:
    """A client per site, which holds what it has."""
    data, default = config.data, DataConfig()
    for task in tasks:
        if not task.sites:
            raise ValueError(
                f"task {task.name!r}: has no sites, and other tasks have; give all of them some."
            )
    sites = tuple(sorted({site for task in tasks for site in task.sites["train"]}))
    for task in tasks:
        for part in SPLITS[1:]:
            if unknown := sorted({*task.sites[part]} - {*task.sites["train"]}):
                raise ValueError(
                    f"task {task.name!r}: site {unknown[0]!r} has examples in {part!r} and none in "
                    "'train'. Give it some, or leave these out."
                )
    if data.clients != len(sites):
        raise ValueError(
            f"config.data.clients: found {data.clients}, but the data belongs to {len(sites)} "
            f"sites ({', '.join(sites)}), each of which is a client. "
            + _what_to_do(data.clients, sites, tasks)
        )
    for name in ("assignment", "examples_per_slot", "dirichlet_alpha"):
        if getattr(data, name) != getattr(default, name):
            raise ValueError(
                f"config.data.{name}: found {getattr(data, name)!r}, which is about dealing out, "
                f"but the data belongs to sites; leave it at {getattr(default, name)!r}."
            )
    for task in tasks:
        _labels(config, task)  # there have to be some where an attack flips them
    held = [np.array(list(task.sites["train"])) for task in tasks]
    pairs = [
        (client, task)
        for client, site in enumerate(sites)
        for task in range(len(tasks))
        if (held[task] == site).any()
    ]
    client, task = (np.array(numbers) for numbers in zip(*pairs, strict=True))
    indices = [np.flatnonzero(held[task] == sites[client]) for client, task in pairs]
    return _held(config, tasks, client, task, indices, trace)._replace(sites=sites)


def _what_to_do(clients: int, sites: Sequence[str], tasks: Sequence[Task]) -> str:
    """Where there are not as many sites as clients: to set so many, or to spell one as another."""
    pairs = look_alike(sites)
    held = Counter(site for task in tasks for site in task.sites["train"])
    alike = [
        " and ".join(f"{site!r} ({held[site]} to train on)" for site in pair) for pair in pairs
    ]
    set_clients = f"et config.data.clients = {len(sites)}."
    if not alike:
        return f"S{set_clients}"
    correct = f"{'; '.join(alike)} look like one site: correct the name where the data has it"
    return f"{correct}." if clients == len(sites) - len(pairs) else f"{correct}, or s{set_clients}"


def _held(
    config: SimulationConfig,
    tasks: Sequence[Task],
    client: Int[np.ndarray, "slots"],
    task: Int[np.ndarray, "slots"],
    indices: list[Int64[np.ndarray, "_"]],
    trace: Mapping[int, Mapping[int, str]],
) -> Federation:
    """The federation in which every slot has so many examples."""
    weight = np.array([len(rows) for rows in indices], np.float32)
    slots = Slots(client, task, weight, config.data.clients, len(tasks))
    holders = np.bincount(slots.task, minlength=slots.num_tasks)
    if config.attack.kind != "none" and not attacks.liars(config.attack, slots, config.seed).any():
        raise ValueError(
            f"config.attack.share: found {config.attack.share:g}, of which nobody lies: a task has "
            f"at most {holders.max()} holders. Set at least {1 / holders.max():.2f} or so, or "
            "config.attack.kind = 'none'."
        )
    return Federation(tuple(tasks), slots, indices, trace)


def _labels(config: SimulationConfig, task: Task) -> Int[np.ndarray, "examples"]:
    """What skew and flipped labels are of; zeros for a task of another kind, which has neither."""
    if isinstance(task, ImageTask):
        return task.train.labels
    for field, asked in (
        ("data.dirichlet_alpha", config.data.dirichlet_alpha > 0),
        ("attack.kind", config.attack.kind == "label_flip"),
    ):
        if asked:
            found = operator.attrgetter(field)(config)
            raise ValueError(
                f"config.{field}: found {found!r}, which is about labels, but task {task.name!r} "
                "is no ImageTask and says of none; leave it as it is by default"
            )
    return np.zeros(num_examples(task.train), np.int32)


def algorithm_for(config: SimulationConfig, model: Model) -> Algorithm:
    """Builds the algorithm that a config names, with heads where the model trains some.

    Raises:
      ValueError: as `algorithms.build`.
    """
    algorithm = algorithms.build(config)
    if model.trains_heads and not config.model.trains_heads:
        algorithm = algorithms.with_heads(algorithm)
    return algorithm


def measured(federation: Federation, split: str) -> tuple[list[PyTree], Int[np.ndarray, "slots"]]:
    """What slots are measured on: splits, and which of them is each slot's.

    A task's split is that of all its slots; where data belongs to sites, each has its own part.

    Args:
      federation: who holds what.
      split: "validation" or "test".
    """
    tasks, slots = federation.tasks, federation.slots
    splits = [getattr(task, split) for task in tasks]
    if not federation.sites:
        return splits, slots.task
    owners = [np.array(list(task.sites[split])) for task in tasks]
    own = []
    for client, task in zip(slots.client, slots.task, strict=True):
        rows = owners[task] == federation.sites[client]
        own.append(jax.tree.map(lambda x, rows=rows: x[rows], splits[task]))
    return own, np.arange(len(own))


def fingerprints(federation: Federation) -> dict[str, Any]:
    """What tells one state of each task's data from another, as JSON holds it."""
    return {task.name: task.fingerprint or fingerprint(task) for task in federation.tasks}


def _held_by(federation: Federation) -> str:
    """A hash of the order of tasks and slots, and of the examples of each."""
    slots, tasks = federation.slots, federation.tasks
    digest = hashlib.sha256(repr([task.name for task in tasks]).encode())
    for client, task, rows in zip(slots.client, slots.task, federation.indices, strict=True):
        digest.update(repr((int(client), int(task), len(rows))).encode())
        digest.update(np.asarray(rows, np.int64).tobytes())
    for task in tasks if federation.sites else ():
        digest.update(repr([list(task.sites[part]) for part in SPLITS]).encode())
    return digest.hexdigest()


def identity(config: SimulationConfig, federation: Federation, model: Model) -> dict[str, Any]:
    """What a run is of, as its checkpoints keep it: "config", and what "data" and "base" hold.

    "measured_by" are its metrics, the main one first; "lower_is_better" says of which; "held" tells
    who holds which examples of which task.

    `workdir.check_identity` compares with it.

    Raises:
      ValueError: if the base checkpoint cannot be found or read.
    """
    return {
        "config": dataclasses.asdict(config),
        "data": fingerprints(federation),
        "base": base_fingerprint(config.model, model),
        "measured_by": [main_measure(model.metrics, federation.tasks).name, *model.metrics],
        "lower_is_better": [n for n, m in model.metrics.items() if not m.higher_is_better],
        "held": _held_by(federation),
    }
