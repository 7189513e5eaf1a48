"""Whether devices, memory, packages, data, disk and workdir are as an experiment needs them."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from matu_jax import models
from matu_jax.config import Config
from matu_jax.errors import UserError
from matu_jax.models import Model
from matu_jax.runs import workdir as workdirs
from matu_jax.runs.checkpoints import Checkpoints, unreadable
from matu_jax.runs.commandline import Source, without_devices
from matu_jax.runs.plan import check_inputs, data_notes
from matu_jax.runs.provenance import versions
from matu_jax.runs.tables import human_bytes
from matu_jax.scenarios import privacy
from matu_jax.simulation.federation import Federation, algorithm_for, federate, identity
from matu_jax.simulation.memory import fitted, memory_there, predicted_bytes
from matu_jax.simulation.placement import slot_mesh

# Where the drivers of accelerators show themselves, and the package that lets JAX use them.
_ACCELERATORS = {
    "NVIDIA GPU": (("/proc/driver/nvidia/version",), "pip install -r requirements-cuda.txt"),
    "Cloud TPU": (("/dev/accel0", "/dev/vfio/0"), "pip install 'jax[tpu]'"),
}
_EXTRAS = {
    "prepare": (
        ("tensorflow", "tensorflow_datasets", "array_record"),
        "to download and prepare datasets",
    ),
    "privacy": (privacy.PACKAGES, "for config.privacy"),
}


class Finding(NamedTuple):
    """What was found about one subject.

    Attributes:
      level: "ok", "note" (the run can be made) or "problem" (it cannot).
      subject: what was looked at.
      text: what was found, and what to do.
    """

    level: str
    subject: str
    text: str


def examine(config: Config, source: Source, workdir: Path | None) -> Iterator[Finding]:
    """Looks at everything that a run needs.

    Args:
      config: the experiment.
      source: where it is from, for the commands in messages.
      workdir: where the run shall go, or is; None = not decided.
    """
    yield _packages()
    yield _extras()
    ready = True
    try:
        yield from _devices()
    except Exception as error:
        text = without_devices(error)
        if text is None:
            raise
        yield Finding("problem", "devices", text)
        return
    try:
        check_inputs(config, source)
        yield Finding("ok", "data and checkpoint", "all are there")
    except UserError as error:
        ready = False
        yield Finding("problem", "data and checkpoint", str(error))
        if importlib.util.find_spec("tensorflow") is None:
            text = "TensorFlow is not installed; only datasets from image folders can be prepared."
            yield Finding("note", "packages", f"{text} Else: pip install 'matu_jax[prepare]'")
    needed, federation, model = None, None, None
    if ready:
        try:
            federation = federate(config)
            for line in data_notes(federation.tasks):
                yield Finding("note", "data", line.removeprefix("data: "))
            model = models.build(config.model, federation.tasks, seed=config.seed)
            found, needed = _memory(config, federation, model)
            yield found
        except ValueError as error:
            yield Finding("problem", "experiment", str(error))
    if workdir:
        yield _workdir(workdir, config, federation, model)
    yield _disk(workdir or Path(), (needed or 0) * (config.checkpoint.keep + 2))


def _packages() -> Finding:
    found = versions()
    missing = [name for name, version in found.items() if version is None]
    text = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    if missing:
        text += f"; not installed: {', '.join(missing)}. Install with: pip install -e ."
    return Finding("problem" if missing else "ok", "packages", text)


def _extras() -> Finding:
    """Which extras a run may need are there; `plan.check_inputs` says which a config needs."""
    there, absent = [], []
    for name, (modules, purpose) in _EXTRAS.items():
        found = all(importlib.util.find_spec(module) for module in modules)
        (there if found else absent).append(f"{name} ({purpose})")
    lines = [f"{word}: {', '.join(x)}" for word, x in (("there", there), ("not", absent)) if x]
    text = "; ".join(lines)
    if absent:
        text += ". Where they are needed: pip install 'matu_jax[NAME]'"
    return Finding("ok", "extras", text)


def _devices() -> Iterator[Finding]:
    devices = jax.devices()
    platform = devices[0].platform
    text = f"{len(devices)} x {devices[0].device_kind} ({platform})"
    yield Finding("ok", "devices", text)
    if platform == "cpu":
        for name, (signs, command) in _ACCELERATORS.items():
            if any(Path(sign).exists() for sign in signs):
                yield Finding(
                    "note", "devices", f"there is an {name} that JAX does not use: {command}"
                )


def _memory(config: Config, federation: Federation, model: Model) -> tuple[Finding, int]:
    """Memory needed against memory there; and the bytes of a checkpoint."""
    algorithm, mesh = algorithm_for(config, model), slot_mesh()
    config = fitted(config, model, algorithm, federation, mesh)
    needed = sum(predicted_bytes(config, model, algorithm, federation, mesh).values())
    there = memory_there(mesh.devices.flat[0])
    text = f"about {human_bytes(needed / mesh.size)} per device are needed"
    level = "ok"
    if there:
        text += f", {human_bytes(there)} are there"
        if needed / mesh.size > there:
            level = "note"
            text += (
                ". Lower config.local.parallel_slots, or set config.model.remat=True or "
                "config.model.compute_dtype=bfloat16"
            )
    state = jax.eval_shape(lambda: algorithm.init(model.base, federation.slots))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return Finding(level, "memory", text), size


def _workdir(
    workdir: Path, config: Config, federation: Federation | None, model: Model | None
) -> Finding:
    try:
        if not workdir.exists():
            return Finding("ok", "workdir", f"{workdir} will be made")
        workdirs.check(workdir, config)
        if workdirs.is_locked(workdir):
            return Finding("problem", "workdir", f"{workdir}: a process is at work in it")
        if (workdir / "summary.json").exists():
            return Finding("note", "workdir", f"{workdir}: this run is finished")
        if not (workdir / "checkpoints").exists():
            return Finding("ok", "workdir", f"{workdir}: a run starts from round 0")
        with Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
            last, damaged = checkpoints.whole()
            if damaged and last is None:
                return Finding("problem", "workdir", unreadable(checkpoints.directory, damaged))
            if last is not None:
                directory, meta = checkpoints.directory, checkpoints.meta(last)
                if federation is None or model is None:
                    workdirs.check_origin(directory, meta, config)
                else:
                    wanted = identity(config, federation, model)
                    workdirs.check_identity(directory, meta, config, wanted)
        text = f"{workdir}: the run goes on after round {last or 0} of {config.rounds}"
        for number, damage in damaged.items():
            text += f". The checkpoint of round {number} is damaged ({damage}) and left out"
        return Finding("note" if damaged else "ok", "workdir", text)
    except (UserError, ValueError) as error:  # the latter: of a base that cannot be read
        return Finding("problem", "workdir", str(error))
    except OSError as error:
        return Finding("problem", "workdir", f"{workdir}: {error.strerror}. Give another --workdir")


def _disk(folder: Path, needed: int) -> Finding:
    """Whether checkpoints fit on the disk of a folder, or of where it will be made."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{human_bytes(free)} are free at {folder}"
    if needed:
        text += f", {human_bytes(needed)} are needed for checkpoints"
    if needed > free:
        return Finding("problem", "disk", f"{text}. Give a --workdir on another disk")
    if not os.access(folder, os.W_OK):
        return Finding("problem", "disk", f"{folder} cannot be written. Give another --workdir")
    return Finding("ok", "disk", text)
