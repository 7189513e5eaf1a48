"""Imports only go down, and the library imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import matu_jax

PACKAGE = Path(matu_jax.__file__).parent
LAYER = {
    "errors": 0,
    "json_files": 0,
    "trees": 0,
    "fields": 1,
    "aggregation": 2,
    "messages": 3,
    "algorithms": 4,
    "data": 5,
    "models": 6,
    "scenarios": 7,
    "simulation": 8,
    "config": 9,
    "runs": 10,
    "merging": 11,
    "train": 11,
    "comparison": 11,
    "compare": 12,
    "prepare": 12,
    "export": 12,
    "doctor": 12,
    "merge": 12,
}
DOORS = {"train", "compare", "prepare", "doctor", "export", "merge"}
GROUND = {"config", "errors", "fields", "json_files", "trees"}


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


def test_the_top_of_the_package_holds_doors_and_ground():
    top = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"}
    assert top == DOORS | GROUND


def test_library_imports_nothing_heavy():
    heavy = "flax,absl,orbax,transformers,tensorflow,optax,matplotlib,sklearn"
    code = f"import sys, matu_jax;print([m for m in {heavy.split(',')!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_is_documented():
    for name in matu_jax.__all__:
        assert getattr(matu_jax, name).__doc__, name
