"""Imports only go down, and the library imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import matu_jax

PACKAGE = Path(matu_jax.__file__).parent
LAYER = {
    "json_files": -1,
    "trees": 0,
    "config": 0,
    "data": 0,
    "tensors": 0,
    "provenance": 0,
    "progress": 0,
    "rounding": 1,
    "commandline": 1,
    "aggregation": 1,
    "wire": 2,
    "models": 1,
    "metrics": 1,
    "checkpoint": 1,
    "report": 1,
    "algorithms": 3,
    "parallel": 2,
    "merging": 2,
    "comparison": 2,
    "compare": 8,
    "interruption": 0,
    "workdir": 2,
    "hosts": 2,
    "local": 4,
    "failures": 3,
    "privacy": 4,
    "attacks": 5,
    "evaluate": 5,
    "rounds": 6,
    "train": 7,
    "prepare": 7,
    "export": 7,
    "doctor": 8,
    "merge": 7,
}


def imported_rooms(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("matu_jax"):
            parts = (node.module or "").split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("matu_jax."):
                    yield alias.name.split(".")[1]


def test_imports_only_go_down():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in LAYER, f"{room} has no layer; add it to LAYER"
        for other in imported_rooms(file):
            if other != room and LAYER[other] >= LAYER[room]:
                wrong.append(f"{file.relative_to(PACKAGE)} imports {other}")
    assert not wrong


def test_library_imports_nothing_heavy():
    heavy = "flax,absl,orbax,transformers,tensorflow,optax,ml_collections,matplotlib,sklearn"
    code = f"import sys, matu_jax;print([m for m in {heavy.split(',')!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_is_documented():
    for name in matu_jax.__all__:
        assert getattr(matu_jax, name).__doc__, name
