"""Parameters sharded over devices: what comes out is what one device computes."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import matu_jax as matu
from matu_jax.aggregation import client, server

CLIENT = np.array([0, 0, 1, 1, 2, 2, 3, 4, 5, 5])
TASK = np.array([0, 1, 0, 2, 1, 2, 0, 0, 0, 3])
WEIGHT = np.array([5, 4, 3, 2, 6, 7, 1, 2, 3, 4], np.float32)
SLOTS = matu.Slots(CLIENT, TASK, WEIGHT, 6, 4)
# Of a multiple of 8 parameters per device, of fewer than devices, of none, and large with a rest.
SHAPES = {"even": (16, 12), "few": (3,), "none": (0, 2), "large": (67, 1009), "scalar": ()}
PAPER = matu.AggregationConfig.paper()
UNDEFENDED = matu.AggregationConfig(clip=0.0, weighting="examples")
CONFIGS = {
    "default": matu.AggregationConfig(),
    "undefended": UNDEFENDED,
    "trimmed": dataclasses.replace(UNDEFENDED, clip=1.5, trim=1),
    "as in the paper": PAPER,
    "aggregated": dataclasses.replace(PAPER, similarity="aggregated", transfer="mean"),
}


def mesh_of(count):
    return Mesh(np.array(jax.devices()[:count]), ("parameters",))


def tree(seed, rows, dtype="float32", size=1.0):
    rng = np.random.default_rng(seed)
    common = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    return {
        name: jnp.asarray(size * (rng.normal(size=(rows, *shape)) + common[name]), dtype)
        for name, shape in SHAPES.items()
    }


def assert_close(found, expected, rtol=2e-6):
    """Whole numbers exactly, floats up to the rounding of sums.

    One mask bit in 100,000 may differ: of a number that is 0 but for that rounding.
    """

    floats = [x for x in jax.tree.leaves(expected) if jnp.issubdtype(x.dtype, jnp.floating)]
    largest = max(float(jnp.nanmax(jnp.abs(x), initial=0.0)) for x in floats)

    def compare(x, y):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        x, y = (np.asarray(jax.device_get(z)) for z in (x, y))
        if x.dtype == np.uint8:
            assert np.unpackbits(x ^ y).sum() <= 8e-5 * x.size
        elif not jnp.issubdtype(x.dtype, jnp.floating):
            np.testing.assert_array_equal(x, y)
        else:
            loose = rtol if x.dtype == np.float32 else 1e-2
            x, y = (np.asarray(z, np.float32) for z in (x, y))
            np.testing.assert_allclose(x, y, rtol=loose, atol=loose * largest)

    jax.tree.map(compare, found, expected)


@pytest.mark.parametrize(
    ("devices", "magnitude", "dtype"),
    [(2, "max", "float32"), (3, "mean", "float32"), (8, "max", "bfloat16"), (8, "mean", "float32")],
)
def test_unify(devices, magnitude, dtype):
    for slots, rows in ((SLOTS, 10), (None, 5)):
        vectors = tree(0, rows, dtype)
        expected = matu.unify(vectors, slots, magnitude=magnitude)
        found = matu.unify(vectors, slots, magnitude=magnitude, mesh=mesh_of(devices))
        chex.assert_trees_all_equal(
            jax.device_get((found.vector, found.masks)),
            jax.device_get((expected.vector, expected.masks)),
        )
        assert_close(found.scales, expected.scales)


@pytest.mark.parametrize("size", [1e38, 1e-38])
def test_sums_that_overflow_on_all_devices_together(size):
    """Each device's own sum of magnitudes may be finite where the sum over all is not."""
    vectors = jax.tree.map(lambda x: jnp.clip(x, -3, 3) * size, tree(1, 10))
    expected = matu.unify(vectors, SLOTS)
    found = matu.unify(vectors, SLOTS, mesh=mesh_of(8))
    assert np.isfinite(expected.scales).all()
    assert_close(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "devices"), [(name, 3 if name == "library" else 8) for name in CONFIGS]
)
def test_rounds_of_the_server(name, devices):
    config, mesh = CONFIGS[name], mesh_of(devices)
    alone = sharded = None
    for seed in range(3):
        slots = dataclasses.replace(SLOTS, weight=WEIGHT * (np.arange(10) != 3 * seed))
        uploads = matu.unify(tree(seed, 10), slots, magnitude=config.magnitude)
        if seed == 1:  # a client that is refused
            broken = jax.tree.map(lambda x: x.at[4].set(jnp.nan), uploads.vector)
            uploads = uploads._replace(vector=broken)
        results = []
        for previous, on in ((alone, None), (sharded, mesh)):
            results.append(matu.aggregate(uploads, slots, config, previous, mesh=on))
        expected, found = results
        assert np.asarray(expected.accepted).sum() == 9 - (seed == 1)
        assert_close(found, expected, rtol=3e-6)
        alone, sharded = (
            x.state if config.uploads == "change" else x.unified for x in (expected, found)
        )


def test_a_mesh_that_cannot_serve_is_refused():
    mesh = jax.make_mesh((8,), ("p",), axis_types=(AxisType.Explicit,))
    vectors = tree(0, 10)
    for call in (
        lambda: matu.unify(vectors, SLOTS, mesh=mesh),
        lambda: matu.aggregate(matu.unify(vectors, SLOTS), SLOTS, mesh=mesh),
    ):
        with pytest.raises(ValueError, match="mesh: axis p is Explicit, expected Auto"):
            call()


def test_arrays_that_are_sharded_stay_where_they_are():
    """No device ever holds all parameters: what goes between them is as small as the sums."""
    mesh = mesh_of(8)
    along = NamedSharding(mesh, PartitionSpec(None, "parameters"))
    vectors = {"w": jax.device_put(np.ones((10, 64, 1024), np.float32), along)}
    slots = jax.tree.map(jnp.asarray, SLOTS)
    state = jax.eval_shape(
        lambda v, s: matu.aggregate(matu.unify(v, s), s, UNDEFENDED).state, vectors, slots
    )
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    state = state._replace(
        task_vectors=jax.tree.map(lambda x: jax.device_put(x, along), state.task_vectors)
    )

    def round_of(vectors, slots, state):
        uploads = client._unify(vectors, slots, "mean", mesh)
        return server._aggregate(uploads, slots, UNDEFENDED, state, mesh)

    compiled = jax.jit(round_of).lower(vectors, slots, state).compile()
    text = compiled.as_text() or ""
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "all-reduce" in text
    result = compiled(vectors, slots, state)
    for leaf in (result.state.task_vectors["w"], result.downloads.vector["w"]):
        assert leaf.sharding.shard_shape(leaf.shape) == (leaf.shape[0], 8, 1024)
    masks = result.downloads.masks["w"]
    assert masks.sharding.shard_shape(masks.shape) == (10, 64 * 1024 // 8 // 8)
