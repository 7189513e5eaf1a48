"""What the README says is run, or looked up."""

import doctest
import re
from pathlib import Path

import numpy as np

import matu_jax
from matu_jax.aggregation import fold
from matu_jax.algorithms import ALGORITHMS

ROOT = Path(matu_jax.__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_library_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["new"]["w"].shape == (3, 4, 3)
    similarity = np.asarray(names["result"].similarity)
    assert similarity.shape == (2, 2)
    # Client 0's task 0 and client 1's task 1 moved every parameter the same way.
    np.testing.assert_allclose(similarity, 1.0)


def test_what_the_readme_names_exists():
    for name in re.findall(r"`((?:matu_jax|experiments|tests)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((experiments/[\w./-]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in ALGORITHMS:
        assert f"`{name}`" in README


def test_docstring_examples_run():
    assert doctest.testmod(fold).failed == 0
    assert doctest.testmod(fold).attempted > 0
