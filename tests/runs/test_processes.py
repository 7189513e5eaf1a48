"""What is kept of compiled programs."""

import os
import subprocess
import sys

COMPILE = """
import jax
from matu_jax.runs import processes

processes._PROGRAMS_BYTES = 30_000
processes.keep_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
for size in range(1, 7):
    jax.jit(lambda x: jax.numpy.sin(x) @ x.T)(jax.numpy.ones((size, size)))
"""


def compiled(cache, **environment):
    names = {key: value for key, value in os.environ.items() if "COMPILATION_CACHE" not in key}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILE],
        env={**names, "MATU_JAX_CACHE": str(cache), **environment},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")
    return {file.name: file.stat().st_size for file in (cache / "compiled").glob("*-cache")}


def test_programs_are_kept_up_to_a_size(tmp_path):
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled/of_old-cache").write_bytes(b"kept without a limit, or half")
    found = compiled(tmp_path)
    assert "of_old-cache" not in found
    assert 0 < sum(found.values()) <= 30_000
    sizes = compiled(tmp_path, JAX_COMPILATION_CACHE_MAX_SIZE="1000000")
    assert sum(sizes.values()) > 30_000, "JAX's own setting wins"
    sizes = compiled(tmp_path, JAX_COMPILATION_CACHE_MAX_SIZE="-1")
    assert sum(sizes.values()) > 30_000, "no limit"


def test_a_cache_that_cannot_be_made_keeps_nothing(tmp_path):
    (tmp_path / "compiled").touch()
    assert compiled(tmp_path) == {}
