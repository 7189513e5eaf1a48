"""Stacking trees, task vectors (tuned − base), and putting them back."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import matu_jax as matu
from matu_jax import trees


def _tree(seed=0, dtype=np.float32, xp=np):
    """Odd shapes, a scalar, a tuple and a branch with nothing in it; multiples of 1/8."""
    generator = np.random.default_rng(seed)

    def values(*shape):
        return xp.asarray((generator.integers(-32, 33, shape) / 8).astype(dtype))

    return {
        "block": {"kernel": values(3, 5), "bias": values(5)},
        "empty": {},
        "pair": (values(1, 1, 7), values()),
    }


def _equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_stack_puts_slots_first(xp, dtype):
    trees = [_tree(seed, dtype, xp) for seed in range(3)]
    stacked = matu.stack(trees)
    assert jax.tree.structure(stacked) == jax.tree.structure(trees[0])
    for slot, tree in enumerate(trees):
        _equal(jax.tree.map(lambda leaf, slot=slot: leaf[slot], stacked), tree)


def test_stack_of_one_tree_has_one_slot():
    assert matu.stack([_tree()])["pair"][1].shape == (1,)


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_task_vectors_are_tuned_minus_base(xp, dtype):
    base, tuned = _tree(0, dtype, xp), [_tree(seed, dtype, xp) for seed in (1, 2)]
    vectors = matu.task_vectors(matu.stack(tuned), base)
    for slot in range(2):
        expected = jax.tree.map(
            lambda t, b: (np.asarray(t, np.float64) - np.asarray(b, np.float64)).astype(dtype),
            tuned[slot],
            base,
        )
        _equal(jax.tree.map(lambda leaf, slot=slot: leaf[slot], vectors), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_apply_vectors_undoes_task_vectors(dtype):
    base = _tree(0, dtype)
    tuned = matu.stack([_tree(seed, dtype) for seed in (1, 2)])
    _equal(matu.apply_vectors(base, matu.task_vectors(tuned, base)), tuned)


def test_work_inside_jit():
    base, tuned = _tree(0), [_tree(seed) for seed in (1, 2)]

    @jax.jit
    def there_and_back(base, tuned):
        return matu.apply_vectors(base, matu.task_vectors(matu.stack(tuned), base))

    _equal(there_and_back(base, tuned), matu.stack(tuned))


def test_a_bare_array_is_a_tree():
    vectors = matu.task_vectors(np.ones((2, 3), np.float32), np.full(3, 0.25, np.float32))
    np.testing.assert_array_equal(np.asarray(vectors), np.full((2, 3), 0.75))


def _message(function, *arguments, **keywords):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers look at the message)
        function(*arguments, **keywords)
    return str(caught.value)


def test_stack_refuses_nothing():
    assert _message(matu.stack, [])


def test_stack_names_the_leaf_whose_shape_differs():
    other = _tree(1)
    other["block"]["kernel"] = np.zeros((3, 4), np.float32)
    message = _message(matu.stack, [_tree(), other])
    assert "block" in message
    assert "kernel" in message
    assert "(3, 4)" in message
    assert "(3, 5)" in message


def test_stack_names_the_leaf_whose_dtype_differs():
    other = _tree(1)
    other["block"]["bias"] = other["block"]["bias"].astype(np.float16)
    message = _message(matu.stack, [_tree(), other])
    assert "bias" in message
    assert "float16" in message
    assert "float32" in message


def test_stack_names_what_is_missing():
    other = _tree(1)
    del other["block"]["bias"]
    assert "bias" in _message(matu.stack, [_tree(), other])


def test_task_vectors_gather_every_bad_leaf():
    base, tuned = _tree(), matu.stack([_tree(1), _tree(2)])
    base["block"]["kernel"] = np.zeros((3, 4), np.float32)
    base["block"]["bias"] = np.zeros(6, np.float32)
    message = _message(matu.task_vectors, tuned, base)
    for part in ("kernel", "(2, 3, 5)", "(3, 4)", "bias", "(2, 5)", "(6,)"):
        assert part in message
    assert "pair" not in message


def test_task_vectors_of_an_unstacked_tree_are_refused():
    assert "kernel" in _message(matu.task_vectors, _tree(1), _tree(0))


def test_task_vectors_name_a_leaf_with_another_number_of_slots():
    tuned = matu.stack([_tree(1), _tree(2)])
    tuned["block"]["kernel"] = np.zeros((3, 3, 5), np.float32)
    message = _message(matu.task_vectors, tuned, _tree())
    assert "kernel" in message
    assert "(3, 3, 5)" in message


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.complex64])
def test_leaves_that_are_not_real_floats_are_refused(dtype):
    base, tuned = _tree(), matu.stack([_tree(1), _tree(2)])
    base["block"]["bias"] = base["block"]["bias"].astype(dtype)
    tuned["block"]["bias"] = np.asarray(tuned["block"]["bias"]).astype(dtype)
    for message in (
        _message(matu.task_vectors, tuned, base),
        _message(matu.apply_vectors, base, tuned),
    ):
        assert "bias" in message
        assert np.dtype(dtype).name in message
        assert "float" in message.replace(np.dtype(dtype).name, "")


def test_apply_vectors_names_the_leaf_whose_shape_differs():
    vectors = matu.stack([_tree(1), _tree(2)])
    vectors["pair"] = (np.zeros((2, 1, 1, 6), np.float32), vectors["pair"][1])
    message = _message(matu.apply_vectors, _tree(), vectors)
    assert "pair" in message
    assert "(2, 1, 1, 6)" in message
    assert "(1, 1, 7)" in message


def test_structures_that_differ_are_named():
    vectors = matu.stack([_tree(1), _tree(2)])
    vectors["extra"] = np.zeros((2, 3), np.float32)
    assert "extra" in _message(matu.apply_vectors, _tree(), vectors)
    assert "extra" in _message(matu.task_vectors, vectors, _tree())


def test_task_vectors_name_leaves_of_another_dtype():
    tuned = matu.stack([_tree(1), _tree(2)])
    tuned["block"]["kernel"] = tuned["block"]["kernel"].astype("bfloat16")
    message = _message(matu.task_vectors, tuned, _tree())
    for part in ("kernel", "bfloat16", "float32", "Cast"):
        assert part in message
    assert "bias" not in message


def test_numbers_and_random_keys_have_a_fingerprint():
    one = {"scale": 2.0, "key": jax.random.key(0), "w": np.ones(3)}
    assert trees.fingerprint(one) == trees.fingerprint(dict(one))
    assert trees.fingerprint(one) != trees.fingerprint(one | {"scale": 3.0})
    assert trees.fingerprint(one) != trees.fingerprint(one | {"key": jax.random.key(1)})
