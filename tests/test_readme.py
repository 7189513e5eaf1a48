"""What the README says is run, or looked up."""

import dataclasses
import doctest
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import contract
import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors.numpy import load_file, save_file

import matu_jax
from matu_jax import algorithms, compare, export, train
from matu_jax.aggregation import client
from matu_jax.algorithms import ALGORITHMS, build
from matu_jax.data import SOURCES
from matu_jax.models import MODELS, modules
from matu_jax.simulation import simulate

ROOT = Path(matu_jax.__file__).parents[1]
README = (ROOT / "README.md").read_text()


def example(words):
    """The block of Python in which these words are."""
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", README, re.S) if words in block
    ]
    return code


OWN, IN_A_FILE = example("matu_jax.simulate("), example("return Config(data=data")
COMPARED = example("return Comparison(")
ALGORITHM = example("def half_step")


def test_the_example_of_own_tasks_and_model_runs(capsys):
    code = OWN
    assert len([line for line in code.splitlines() if line]) <= 25
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) == 10
    explained = names["result"].record["r2"]["test_per_task"]
    assert explained.keys() == names["columns"].keys()
    assert min(explained.values()) > 0.15


def test_own_tasks_and_model_in_a_file_are_an_experiment(tmp_path, monkeypatch):
    for registry, name in ((SOURCES, "patients"), (MODELS, "linear")):
        monkeypatch.setitem(registry, name, None)  # gone after the test
    file, run = tmp_path / "patients.py", tmp_path / "run"
    file.write_text(OWN.split("for result in")[0] + IN_A_FILE)
    words = [f"--config={file}", "--config.rounds=2", f"--workdir={run}"]
    # In a process of its own, since the file uses JAX before anybody else does.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    program = [sys.executable, "-m", "matu_jax.train", *words]
    done = subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = ["--format=safetensors", f"--out={tmp_path / 'out'}", f"--config={file}"]
    assert export.main(["export", f"--workdir={run}", "--task=bmi", *out]) == 0
    assert (tmp_path / "out" / "task_vector.safetensors").exists()


def test_own_tasks_and_model_are_compared_by_the_command(tmp_path):
    registered = IN_A_FILE.split("def get_config")[0]
    (tmp_path / "patients.py").write_text(OWN.split("for result in")[0] + registered + COMPARED)
    (line,) = (x for x in README.splitlines() if x.startswith("python ") and "patients.py" in x)
    python, *words = shlex.split(line)
    assert python == "python"
    small = ["--config.rounds=1", "--config.local.steps=1", "--seeds=1"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(ROOT)
    program = [sys.executable, *words, *small]
    done = subprocess.run(program, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "runs" / "patients" / "comparison.json").read_text())
    assert [arm["label"] for arm in found["settings"][0]["arms"]] == [
        "matu",
        "per_task",
        "untrained",
    ]
    assert (tmp_path / "runs" / "patients" / "report.html").exists()


def test_an_exported_language_model_becomes_an_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    leaf = "layers/0/attention/q_proj/kernel_lora_"
    parameters = {f"{leaf}a": np.ones((4, 2), np.float32), f"{leaf}b": np.ones((2, 4), np.float32)}
    folder = tmp_path / "runs" / "exported"
    folder.mkdir(parents=True)
    save_file(parameters, folder / "parameters.safetensors")
    exec(compile(example("write_adapter("), "README.md", "exec"), {})
    found = load_file(tmp_path / "runs" / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    assert set(found) == {f"{prefix}A.weight", f"{prefix}B.weight"}


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """A directory with the experiments in it, where README's commands are given."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MATU_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(MODELS, "linear", None)  # gone after the test
    with jax.numpy_rank_promotion("allow"):
        yield tmp_path


def test_the_commands_for_sites_and_tables_run(at_home, capsys):
    section = README.split("## Sites and tables of your own")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    assert len(lines) == 5
    table = re.findall(r"```\n(path,.*?)```", section, re.S)[0].splitlines()
    paths = [line.split(",")[0] for line in table[1:]]
    kinds = [line.partition(",")[2].rpartition(" ")[0] for line in table[1:]]
    rng = np.random.default_rng(0)
    (at_home / paths[0]).parent.mkdir()
    with (at_home / "my-images.csv").open("w") as stream:
        print(table[0], *table[1:], sep="\n", file=stream)
        for i in range(40):  # rows more, like those
            name = f"scans/{i + 30}.png"
            print(f"{name},{kinds[i % 2]} {i}", file=stream)
            paths.append(name)
    for path in paths:
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(at_home / path)
    small = ["--config.rounds=1", "--config.local.steps=1"]
    images = [f"--config.model.checkpoint={tiny.write_checkpoint(at_home / 'tiny.safetensors')}"]
    for line in lines:
        python, first, *words = shlex.split(line)
        assert python == "python"
        if first == "-m":
            assert words[0] == "matu_jax.train"
            more = [] if "experiments/own_table.py" in words else images
            assert train.main([*words, *small, *more]) == 0
        else:
            names = runpy.run_path(first)
            names["main"].__globals__.get("COUNTS", {}).update(train=150, test=30)
            assert names["main"]([first, *words]) == 0
    printed = capsys.readouterr().out
    assert all(f"site lab {i}" in printed for i in (1, 2, 3))
    assert "site east" in printed
    features = "features, in the order of x: age, sex, bmi, bp, s1, s2, s3, s4"
    assert f"blood sugar, progression, triglycerides: {features}" in printed
    for name in ("my-sites", "my-images", "my-table"):
        assert (at_home / "runs" / name / "summary.json").exists()


def test_the_library_example_runs():
    code = example("matu.unify(")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["new"]["w"].shape == (3, 4, 3)
    similarity = np.asarray(names["result"].similarity)
    assert similarity.shape == (2, 2)
    # Client 0's task 0 and client 1's task 1 moved every parameter the same way.
    np.testing.assert_allclose(similarity, 1.0)


def ruff(*words):
    done = subprocess.run([sys.executable, "-m", "ruff", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def half_step(tmp_path, monkeypatch):
    """README's example of an algorithm, in the table as a new user's would be."""
    package = tmp_path / "matu_jax"
    shutil.copytree(ROOT / "matu_jax", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    folder = package / "algorithms"
    (folder / "half_step.py").write_text(ALGORITHM)
    imported = "from matu_jax.algorithms.half_step import half_step"
    entry = '"half_step": lambda config: half_step(config.defence),'
    assert imported in README
    assert entry in README
    table = Path(algorithms.__file__).read_text()
    above = "from matu_jax.algorithms.individual"
    table = table.replace(above, f"{imported}\n{above}", 1)
    table = table.replace('    "individual"', f'    {entry}\n    "individual"', 1)
    (folder / "__init__.py").write_text(table)
    # What a contributor's change is checked by.
    ruff("format", "--check", str(tmp_path))
    ruff("check", str(tmp_path))
    module = types.ModuleType("matu_jax.algorithms.half_step")
    exec(compile(ALGORITHM, "README.md", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names: dict = {}
    exec(f"{imported}\nadded = {{{entry}}}", names)
    for name, function in names["added"].items():
        monkeypatch.setitem(ALGORITHMS, name, function)


def test_the_how_to_for_an_algorithm_keeps_the_contract(half_step):
    algorithm = build(dataclasses.replace(contract.OPEN, algorithm="half_step"))
    for check in contract.CHECKS:
        check(algorithm)
    contract.trained_heads_belong_to_tasks("half_step")


def test_the_how_to_for_an_algorithm_shows_it_in_the_report(half_step, tmp_path, monkeypatch):
    """In a copy of the comparison with one arm more, by the commands that README prints."""
    comparison = tmp_path / "experiments" / "compare8.py"
    tuned = "results/compare8/tuned.json"
    (comparison.parent / tuned).parent.mkdir(parents=True)
    shutil.copy(ROOT / "experiments" / tuned, comparison.parent / tuned)
    arm = '    "half_step": {"algorithm": "half_step"},'
    assert arm.strip() in " ".join(README.split())
    shipped = (ROOT / "experiments" / "compare8.py").read_text()
    comparison.write_text(shipped.replace("ARMS = {", "ARMS = {\n" + arm, 1))
    ruff("format", "--check", str(comparison))
    ruff("check", str(comparison))
    assert "trials=6," in shipped
    quick = comparison.read_text().replace("trials=6,", "trials=2,", 1)  # so many are enough here
    comparison.write_text(quick)
    checkpoint = tiny.write_checkpoint(tmp_path / "tiny.safetensors")
    fields = {
        "rounds": 2,
        "local.steps": 2,
        "data.examples_per_slot": 16,
        "model.checkpoint": checkpoint,
        "model.lora_targets": "('query',)",
        "evaluation.max_examples": 8,
    }
    small = [f"--config.{name}={value}" for name, value in fields.items()]
    printed = README[README.index("python -m matu_jax.compare", README.index("half_step.py`")) :]
    printed = printed[: printed.index("```")].replace("\\\n", " ").splitlines()
    assert [("--tune" in line, "--arms half_step" in line) for line in printed] == [
        (True, True),
        (False, True),
    ]
    monkeypatch.chdir(tmp_path)
    for line in printed:
        python, _, program, *words = shlex.split(line)
        assert (python, program) == ("python", "matu_jax.compare")
        assert compare.main([program, *words, *small]) == 0
    report = tmp_path / "runs" / "compare8"
    for file in ("report.md", "report.html"):
        assert all(arm in (report / file).read_text() for arm in ("half_step", "matu", "fedavg"))


def test_the_table_of_methods_has_every_algorithm(monkeypatch):
    def missing(readme):
        return {name for name in ALGORITHMS if f"`{name}`" not in readme}

    assert not missing(README)
    monkeypatch.setitem(ALGORITHMS, "mine", None)
    assert missing(README) == {"mine"}
    row = "| `mine` | FedAvg, half the way |\n| `fed_lora_b` |"
    assert not missing(README.replace("| `fed_lora_b` |", row, 1))


def test_what_the_readme_names_exists():
    for name in re.findall(r"`((?:matu_jax|experiments|tests)/[\w./]+)`", README):
        assert name == "matu_jax/algorithms/half_step.py" or (ROOT / name).exists(), name
    for name in re.findall(r"\]\((experiments/[\w./-]+)\)", README):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("module", [client, modules, simulate])
def test_docstring_examples_run(module):
    found = doctest.testmod(module)
    assert found.failed == 0
    assert found.attempted > 0
