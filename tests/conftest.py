"""Settings of every test: several CPU devices, strict dtypes and ranks, repeatable examples.

Programs that XLA has compiled are kept on disk between tests, their workers and the programs they
start, and between runs, since most of the tests' time is compilation.
"""

import contextlib
import os
import zlib
from pathlib import Path

from filelock import FileLock

_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} --xla_force_host_platform_device_count=8".strip()


def _keep_programs(folder: Path) -> None:
    """Has JAX keep compiled programs in a folder, here and in programs that tests start.

    With a size, JAX takes a lock to read and to write, so that no process sees half a program. A
    process killed while it writes leaves one all the same, over which JAX would warn for good: the
    process that starts the workers removes what is not whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lockfile"):
        for program in folder.glob("*-cache"):
            used = program.with_name(program.name.removesuffix("-cache") + "-atime")
            if not (_is_whole(program) and used.exists() and used.stat().st_size == 8):
                program.unlink()
                used.unlink(missing_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(512 * 1024**2)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


def _is_whole(program: Path) -> bool:
    """Whether a program can be unpacked to its end; of zstandard's, whether there is anything."""
    packed, unpacking = program.read_bytes(), zlib.decompressobj()
    if packed[:1] != b"\x78":  # zlib's first byte
        return bool(packed)
    with contextlib.suppress(zlib.error):
        unpacking.decompress(packed)
    return unpacking.eof


if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # as it is in workers
    with contextlib.suppress(OSError):  # a home that cannot be written: slower, no more
        _cache = Path(os.environ.get("MATU_JAX_CACHE") or Path.home() / ".cache" / "matu_jax")
        _keep_programs(_cache / "tests")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
from axes import ROOMS  # noqa: E402

jaxtyping.install_import_hook(ROOMS, "axes.once_it_returned")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=40,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")

pytest_plugins = ("federations", "programs")  # fixtures that several files share
