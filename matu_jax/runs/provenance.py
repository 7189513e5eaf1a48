"""What a result depends on besides its config: versions, the machine, the commit."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax


def versions() -> dict[str, str | None]:
    """Versions of what a result depends on; None for a package that is not installed."""
    found: dict[str, str | None] = {}
    for name in ("matu_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"python": platform.python_version()}


def machine() -> dict[str, Any]:
    """What this process runs on, as far as it can be told."""
    devices = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "python": platform.python_version(),
    }


@functools.cache
def commit() -> str | None:
    """The commit of this package's source when first asked; None without git or a repository.

    It ends with "-dirty" where files differ from the commit's.
    """
    file = Path(__file__)

    def git(*words: str) -> str:
        out = subprocess.run(
            ["git", *words], cwd=file.parent, capture_output=True, text=True, check=True
        )
        return out.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # an installed copy may lie in any repository
        return git("describe", "--always", "--dirty", "--abbrev=10") or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line[:10] == "model name")
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
