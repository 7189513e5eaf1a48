"""What the tests keep between runs does no harm."""

import os
import zlib

import conftest


def test_programs_that_a_kill_cut_short_are_not_kept(tmp_path, monkeypatch):
    for name in ("DIR", "MAX_SIZE"):
        monkeypatch.setenv(f"JAX_COMPILATION_CACHE_{name}", "")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "")
    packed = zlib.compress(os.urandom(1000))
    contents = {
        "whole": (packed, b"12345678"),
        "half": (packed[:500], b"12345678"),
        "empty": (b"", b"12345678"),
        "no time": (packed, None),
        "half a time": (packed, b"123"),
    }
    for name, (program, time) in contents.items():
        (tmp_path / f"{name}-cache").write_bytes(program)
        if time is not None:
            (tmp_path / f"{name}-atime").write_bytes(time)
    conftest._keep_programs(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} - {".lockfile"} == {"whole-cache", "whole-atime"}
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path)
