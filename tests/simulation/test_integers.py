"""Sums of integers in halves, against numpy's in 64 bits."""

import jax.numpy as jnp
import numpy as np
import pytest

from matu_jax.simulation import integers


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int8, np.uint8, np.int16, np.bool_])
def test_sums_of_any_integers_are_those_of_64_bits(dtype):
    rng = np.random.default_rng(0)
    low, high = (0, 1) if dtype == np.bool_ else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    x = rng.integers(low, high, size=(7, 100, 3), endpoint=True).astype(dtype)
    x[:, :10], x[:, 10:20] = low, high
    sums = jnp.stack([integers.halved(jnp.asarray(batch)).sum(axis=1) for batch in x])
    found = integers.joined(np.asarray(integers.over_batches(sums))[None])
    np.testing.assert_array_equal(found[0], x.astype(np.int64).sum(axis=(0, 1)))


def test_floats_are_added_as_they_are():
    x = np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(integers.over_batches(jnp.asarray(x)), [3.0] * 4)
    assert integers.joined(x) is x
