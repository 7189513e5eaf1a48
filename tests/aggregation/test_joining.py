"""Small leaves put together: what comes out is what went in; programs hardly grow with leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import equations

import matu_jax as matu
from matu_jax.aggregation.joining import joining
from matu_jax.aggregation.storage import pack


def leaves(sizes, rows=3, dtypes=("float32",)):
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.normal(size=(rows, n)), dtypes[i % len(dtypes)])
        for i, n in enumerate(sizes)
    ]


@pytest.mark.parametrize("dtypes", [("float32",), ("float32", "bfloat16")])
def test_leaves_and_masks_come_back(dtypes):
    sizes = (5, 70_000, 8, 0, 17, 1, 65_536)
    flat = leaves(sizes, dtypes=dtypes)
    masks = [pack(x > 0) for x in flat]
    join = joining(flat)
    together = join.vectors(flat)
    assert len(together) == 1 + len(dtypes)  # the large leaf is alone, its tail among the others
    assert all(x.shape[1] % 1024 == 0 for x in together[1:])
    assert join.size == sum(sizes)
    for found, expected in zip(join.leaves(together), flat, strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
        assert found.dtype == expected.dtype
    joined = join.masks(masks)
    for x, bits in zip(together, joined, strict=True):
        np.testing.assert_array_equal(bits, pack(x > 0))
    for found, expected in zip(join.leaf_masks(joined), masks, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_trees_that_differ_in_dtype_are_put_together_alike():
    first, second = leaves((3, 4, 5)), leaves((3, 4, 5), 2, ("float32", "bfloat16"))
    join = joining(first, second)
    assert join.groups == ((0, 2), (1,))
    assert [x.dtype for x in join.vectors(second)] == [jnp.float32, jnp.bfloat16]


def test_a_large_leaf_is_not_copied():
    flat = leaves((5, 70_000, 70_001))
    assert all(any(x is y for y in joining(flat).vectors(flat)) for x in flat[1:])


def test_programs_hardly_grow_with_small_leaves():
    # Slices and reshapes alone: a handful of equations for each leaf, not its own fold.
    slots = matu.Slots(jnp.array([0, 0, 1]), jnp.array([0, 1, 1]), jnp.ones(3), 2, 2)

    def program(count):
        vectors = {f"{i}": jnp.ones((3, 12)) for i in range(count)}
        uploads = matu.unify(vectors, slots)
        return [
            equations(jax.make_jaxpr(function)(*given).jaxpr)
            for function, given in (
                (matu.unify, (vectors, slots)),
                (matu.aggregate, (uploads, slots)),
                (matu.direction_similarity, (vectors,)),
            )
        ]

    few, many = program(10), program(60)
    for name, a, b in zip(("unify", "aggregate", "similarity"), few, many, strict=True):
        assert (b - a) / 50 < 25, name
