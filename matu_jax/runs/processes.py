"""What a process sets before JAX is used: its devices, and where compiled programs are kept."""

import collections
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout

from matu_jax.errors import UserError
from matu_jax.runs.interruption import end_on_sigterm

_PROGRAMS_BYTES = 2 * 1024**3


def use_cores() -> None:
    """Gives the CPU one virtual device per core; to be called before JAX is used.

    They train slots side by side; a single device would leave cores idle, since a slot's matrix
    products are too small to share. A number set in XLA_FLAGS stays.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", cores or 1)


def keep_programs() -> None:
    """Keeps compiled programs on disk, so that runs with the same shapes compile once.

    In `compiled` under the environment's MATU_JAX_CACHE, else under `~/.cache/matu_jax`; at most 2
    GiB, of which the programs go first that were used least recently. JAX's own settings,
    JAX_COMPILATION_CACHE_DIR and JAX_COMPILATION_CACHE_MAX_SIZE, win. Nothing is kept where the
    folder cannot be written.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    cache = Path(os.environ.get("MATU_JAX_CACHE") or Path.home() / ".cache" / "matu_jax")
    folder, size = cache / "compiled", getattr(jax.config, "jax_compilation_cache_max_size", -1)
    if size == -1 and "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:  # JAX's default
        size = _PROGRAMS_BYTES
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lockfile", timeout=10):  # JAX's own
            _remove_unlisted(folder)
    except (OSError, Timeout):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", size)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _remove_unlisted(folder: Path) -> None:
    """Removes programs without the time of their last use.

    They were kept without a limit, or their process was killed while it wrote them; JAX would keep
    no other program for their sake.
    """
    for program in folder.glob("*-cache"):
        used = program.with_name(f"{program.name.removesuffix('-cache')}-atime")
        if not used.is_file() or used.stat().st_size != 8:
            program.unlink()
            used.unlink(missing_ok=True)


OPTIONS = ("coordinator", "processes", "process")


def join(options: Mapping[str, str]) -> None:
    """Joins the other processes of the run, if there are any; to be called before JAX is used.

    Args:
      options: of the command line: "distributed", or all of `OPTIONS`, or none of them.

    Raises:
      UserError: for options that make no sense, processes that do not find each other, or that
        have different numbers of devices.
    """
    given = [name for name in OPTIONS if name in options]
    if not given and "distributed" not in options:
        return
    try:
        jax.distributed.initialize(**(_explicit(options) if given else {}))
    except (ValueError, RuntimeError) as error:
        if given:
            raise UserError(
                f"--coordinator={options['coordinator']}: the processes do not find each other: "
                f"{error}"
            ) from None
        raise UserError(
            f"--distributed: JAX finds no cluster here ({error}). Give --coordinator=HOST:PORT, "
            "--processes=N and --process=I."
        ) from None
    end_on_sigterm()  # again: JAX has put a handler of its own there
    devices = collections.Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        raise UserError(
            f"the processes have different numbers of devices ({dict(sorted(devices.items()))}); "
            "expected the same. On CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N sets it."
        )


def _explicit(options: Mapping[str, str]) -> dict[str, Any]:
    missing = [f"--{name}" for name in OPTIONS if name not in options]
    if missing:
        raise UserError(
            "--coordinator, --processes and --process go together; missing: " + ", ".join(missing)
        )
    address = options["coordinator"]
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(
            f"--coordinator: found {address!r}, expected HOST:PORT of process 0, a port that is "
            "free there, such as 10.0.0.1:8476."
        )
    for name in ("processes", "process"):
        if not options[name].isdecimal():
            raise UserError(f"--{name}: found {options[name]!r}, expected a number.")
    processes, process = int(options["processes"]), int(options["process"])
    if process >= processes:
        raise UserError(
            f"--process: found {process} of {processes} processes; they are counted from 0."
        )
    return {"coordinator_address": address, "num_processes": processes, "process_id": process}
