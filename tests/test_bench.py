"""The benchmarks run, agree with their rivals, and write what they print."""

import dataclasses
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matu_jax.config import ModelConfig
from matu_jax.models.architectures import ARCHITECTURES, TowerShape
from matu_jax.models.pretrained import load

BENCH = Path(__file__).parent.parent / "experiments" / "bench"


def run(name, options, out):
    command = [sys.executable, BENCH / f"{name}.py", *options, "--out", out]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def results(name, options, tmp_path):
    done = run(name, options, tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["machine"]["jax"] == jax.__version__
    assert result["machine"]["packages"]["numpy"] == np.__version__
    assert f"{name}.py {' '.join(options)}" in result["machine"]["command"]
    return result


@pytest.fixture
def peft_loop(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setitem(ARCHITECTURES, "small", None)  # which it registers; gone after the test
    monkeypatch.delitem(sys.modules, "peft_loop", raising=False)
    return importlib.import_module("peft_loop")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bench_unify", ["--rows", "3", "--parameters", "5e3", "--dtypes", "float32"]),
        (
            "bench_aggregate",
            [
                *("--clients", "3", "--tasks", "4", "--held", "2"),
                *("--parameters", "5e3", "--dtypes", "float32"),
            ],
        ),
    ],
)
def test_an_aggregator_benchmark(name, options, tmp_path):
    pytest.importorskip("torch")
    options = [*options, "--repeats", "1", "--trace", str(tmp_path / "trace")]
    rows = results(name, options, tmp_path)["rows"]
    assert list((tmp_path / "trace").rglob("*perfetto*"))
    for row in rows:
        assert row["library ms"] > 0
        assert row["first call s"] > 0
        assert row["x torch loop"] == pytest.approx(row["torch loop ms"] / row["library ms"])


def test_clients_against_a_loop_in_pytorch(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    options = "--clients 3 --steps 2 --batch 2 --repeats 1 --parallel 1,all --threads 1 --matrix 64"
    result = results("bench_clients", options.split(), tmp_path)
    row = result["rows"][0]
    assert 0 < row["difference"] < 0.02
    assert row["x rival"] == pytest.approx(row["rival s"] / row["auto s"])
    assert row["of best"] == pytest.approx(min(row["1 s"], row["all s"]) / row["auto s"])
    assert row["auto is"] == 1
    assert row["TFLOP/s"] > 0
    assert row["first call s"] > row["auto s"]
    fedjax = [row["rival"] for row in result["rows"][1:]]
    assert fedjax == ["fedjax"] * (importlib.util.find_spec("fedjax") is not None)


def test_a_rival_that_trains_something_else_is_not_timed(peft_loop):
    base = {"blocks": {"query": {"lora_a": jnp.ones((2, 3, 4))}}}
    vector = {"blocks": {"query": {"lora_a": jnp.full((2, 3, 4), 0.5)}}}
    theirs = {f"blocks/query/lora_a/{layer}": np.full((4, 3), 1.5, np.float32) for layer in (0, 1)}
    assert peft_loop.compare(vector, theirs, base, 1e-6) == 0
    theirs["blocks/query/lora_a/1"][2, 0] += 0.5
    expected = 0.5 / (24 * 0.5**2) ** 0.5
    assert peft_loop.compare(vector, theirs, base, 0.3) == pytest.approx(expected)
    for tolerance, wrong in ((0.2, 1.0), (0.3, np.nan)):
        broken = {name: wrong * x for name, x in theirs.items()}
        with pytest.raises(ValueError, match="nothing was timed"):
            peft_loop.compare(vector, broken, base, tolerance)


def test_operations_are_those_that_xla_counts(peft_loop, monkeypatch):
    # Wide, so that products are nearly all; one block, since XLA counts a loop's body once.
    shape = TowerShape(256, 1, 2, 512)
    architecture = dataclasses.replace(
        ARCHITECTURES["clip_vit_b32"], name="wide", image_size=32, patch_size=8, vision=shape
    )
    monkeypatch.setitem(ARCHITECTURES, "wide", architecture)
    targets = ("query", "value", "mlp_in")
    config = ModelConfig(
        architecture="wide", checkpoint="random", lora_rank=64, lora_targets=targets
    )
    backbone = load(config, [], seed=0)[0]

    def loss(vector, images):
        return jnp.square(backbone.apply(vector, backbone.frozen, images, None)).sum()

    images = jnp.zeros((4, 32, 32, 3), jnp.uint8)
    cost = jax.jit(jax.grad(loss)).lower(backbone.trainable, images).cost_analysis()
    assert isinstance(cost, dict)
    expected = 4 * peft_loop.training_operations(architecture, config)
    assert expected == pytest.approx(cost["flops"], rel=0.05)


@pytest.mark.slow
def test_scale_and_its_exponents(tmp_path):
    result = results("bench_scale", ["--quick", "--repeats", "1"], tmp_path)
    rows, fits = result["rows"], result["fits"]
    assert len(rows) == 6
    assert {(fit["axis"], fit["quantity"]) for fit in fits} == {
        (axis, quantity)
        for axis in ("clients", "held", "parameters")
        for quantity in ("unify s", "aggregate s", "grows MB")
    }
    for number, fit in enumerate(fits):
        first, last = rows[2 * (number // 3) : 2 * (number // 3) + 2]
        axis, quantity = fit["axis"], fit["quantity"]
        assert (fit["from"], fit["to"]) == (first[axis], last[axis])
        slope = np.log(last[quantity] / first[quantity]) / np.log(last[axis] / first[axis])
        assert fit["exponent"] == pytest.approx(slope)
    # Thirty times the parameters: what the round makes is several vectors, 4 bytes a number.
    made = 4e-6 * rows[5]["parameters"] * (2 * rows[5]["clients"] + rows[5]["tasks"])
    assert made < rows[5]["grows MB"] < 6 * made + 1


def test_scale_keeps_to_its_time(tmp_path):
    done = run("bench_scale", ["--quick", "--seconds", "0"], tmp_path / "out.json")
    assert done.returncode == 1
    assert done.stdout.count("left out") == 3
    assert "--seconds 0: too little" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("flwr") is not None, reason="Flower is there")
def test_rounds_without_flower(tmp_path):
    done = run("bench_round", [], tmp_path / "out.json")
    assert done.returncode == 1
    assert "flwr is not installed" in done.stderr
    assert "Traceback" not in done.stderr


def test_rounds_against_flower(tmp_path):
    pytest.importorskip("flwr")
    pytest.importorskip("ray")
    options = ["--clients", "3", "--steps", "2", "--batch", "2", "--repeats", "1"]
    (row,) = results("bench_round", options, tmp_path)["rows"]
    assert 0 < row["difference"] < 0.02
    assert row["x flower"] == pytest.approx(row["flower s"] / row["fedavg s"])
    assert row["idle s"] < row["flower s"]
    assert row["flower MB"] > row["ours MB"] / 10


def test_the_benchmarks_of_messages(tmp_path):
    for name, options in (
        ("bench_wire", ["--parameters", "5e3", "--tasks", "1,3", "--repeats", "1"]),
        ("bench_masks", ["--densities", "0.5,0.9", "--bits", "1e5", "--held", ""]),
    ):
        out = tmp_path / f"{name}.json"
        command = [sys.executable, BENCH / f"{name}.py", *options, "--out", out]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        rows = json.loads(out.read_text())["rows"]
        if name == "bench_wire":
            assert [row["vector"] for row in rows[::2]] == ["float32", "bfloat16", "int8"]
            # The vector, three masks of 625 bytes, and 36 + 4 + 8 k bytes; 20 blocks of int8.
            assert [round(1e6 * row["MB"]) for row in rows[1::2]] == [
                size + 3 * 625 + 40 + 8 * 3 for size in (20_000, 10_000, 5_000 + 4 * 20)
            ]
            assert all(row["zipped MB"] < row["MB"] for row in rows if row["k"] == 3)
        else:
            for row, entropy in zip(rows, (1.0, 0.4690), strict=True):
                assert row["entropy"] == pytest.approx(entropy, abs=1e-4)
                assert entropy - 0.01 < row["Huffman"] < 1.03 * entropy + 0.01


@pytest.mark.slow
def test_two_processes_with_a_server_of_each_kind(tmp_path):
    options = "--repeats 1 --rounds 3 --width 16 --depth 1"
    rows = results("bench_hosts", options.split(), tmp_path)["rows"]
    assert [row["server"] for row in rows] == ["each", "shared"]
    for row in rows:
        assert row["parameters"] > 5_000
        parts = ("exchange", "download", "unify", "aggregate", "checkpoint")
        assert row["round s"] == pytest.approx(sum(row[f"{part} s"] for part in parts))
        assert min(row[f"{part} s"] for part in parts) > 0
