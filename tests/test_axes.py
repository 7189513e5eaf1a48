"""Axes in annotations are checked while the tests run."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from matu_jax.algorithms.means import weighted_mean
from matu_jax.trees import stack


def test_a_wrong_axis_is_an_error():
    rows, groups = {"w": jnp.ones((3, 2))}, jnp.array([0, 1, 1])
    weighted_mean(rows, jnp.ones(3), groups, 2)
    with pytest.raises(TypeCheckError, match=r"weighted_mean(.|\n)*rows=3"):
        weighted_mean(rows, jnp.ones(1), groups, 2)  # one weight would do for all rows


def test_the_library_refuses_in_its_own_words():
    with pytest.raises(ValueError, match="floating-point"):
        stack([{"w": np.zeros(2, np.int32)}])
