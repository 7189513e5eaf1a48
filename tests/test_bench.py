"""The benchmarks run, agree with their rivals, and write what they print."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "experiments" / "bench"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bench_unify", ["--rows", "3", "--parameters", "5e3", "--dtypes", "float32"]),
        (
            "bench_aggregate",
            ["--clients", "3", "--tasks", "4", "--held", "2", "--parameters", "5e3"],
        ),
    ],
)
def test_an_aggregator_benchmark(name, options, tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "out.json"
    command = [sys.executable, BENCH / f"{name}.py", *options, "--repeats", "1", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["machine"]["jax"]
    for row in result["rows"]:
        assert row["library ms"] > 0
        assert row["first call s"] > 0
        assert row["x torch loop"] == pytest.approx(row["torch loop ms"] / row["library ms"])
