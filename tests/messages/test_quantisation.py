"""Vectors with fewer bits: how far numbers move, what is counted, what a run makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matu_jax.messages.quantisation import BLOCK, Blocks, restored, rounded


def _vectors(seed=0):
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(size=(3, 1, 700)))
    return {
        "a": jnp.asarray(rng.normal(size=(3, 1, 700)) * spread, jnp.float32),
        "b": jnp.asarray(rng.normal(size=(3, 5)), jnp.float32).at[1].set(0.0),
    }


def _bits(sent):
    return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(sent))


def test_int8_moves_nothing_by_more_than_half_a_scale():
    vectors = _vectors()
    found = restored(rounded(vectors, "int8"), vectors)
    for name, leaf in vectors.items():
        exact, back = (np.asarray(x).reshape(3, -1) for x in (leaf, found[name]))
        assert found[name].shape == leaf.shape
        for start in range(0, exact.shape[1], BLOCK):
            block = slice(start, start + BLOCK)
            scale = np.abs(exact[:, block]).max(axis=1, keepdims=True) / 127
            assert (np.abs(back[:, block] - exact[:, block]) <= 0.5001 * scale).all()
        np.testing.assert_array_equal(back[exact == 0], 0)
        largest = np.abs(exact).argmax(axis=1)
        np.testing.assert_allclose(back[range(3), largest], exact[range(3), largest], rtol=1e-6)


def test_int8_of_what_was_rounded_is_the_same_again():
    vectors = _vectors()
    once = restored(rounded(vectors, "int8"), vectors)
    twice = restored(rounded(once, "int8"), vectors)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), once, twice)


@pytest.mark.parametrize(
    ("precision", "bits"),
    [("float32", 32 * 705), ("bfloat16", 16 * 705), ("int8", 8 * 705 + 32 * (3 + 1))],
)
def test_bits_are_those_of_the_arrays_that_are_sent(precision, bits):
    assert _bits(rounded(_vectors(), precision)) == 3 * bits


def test_float32_is_left_alone_and_bfloat16_is_its_rounding():
    vectors = _vectors()
    assert rounded(vectors, "float32") is vectors
    found = restored(rounded(vectors, "bfloat16"), vectors)
    expected = vectors["a"].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(found["a"], expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_what_is_not_finite_stays_so_and_stays_where_it_is(bad, precision):
    vectors = _vectors()
    broken = {"a": vectors["a"].at[1, 0, 300].set(bad), "b": vectors["b"]}
    found = restored(rounded(broken, precision), broken)["a"]
    assert not np.isfinite(found[1, 0, 300])
    np.testing.assert_array_equal(np.isfinite(found[0]), True)
    np.testing.assert_array_equal(np.isfinite(found[1, 0, :BLOCK]), True)


def test_blocks_hold_whole_numbers_in_range():
    part = rounded(_vectors(), "int8")["a"]
    assert isinstance(part, Blocks)
    assert part.values.dtype == jnp.int8
    assert int(jnp.abs(part.values.astype(jnp.int32)).max()) == 127
