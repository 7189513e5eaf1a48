"""The drivers of the equations' blocks: the kernels of GPU and TPU, interpreted, are the scan."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import matu_jax as matu
from matu_jax.aggregation import finish, fold, kernels, same_task, server_kernels, signs
from matu_jax.aggregation.fold_block import grouped
from matu_jax.aggregation.platforms import where_lowered
from matu_jax.aggregation.same_task_block import Holders

TRITON = "__gpu$xla.gpu.triton"  # whose compiled form JAX does not promise to keep

# slots, clients, tasks, parameters, dtype
SHAPES = [
    (1, 1, 1, 1024, "float32"),
    (9, 3, 4, 9 * 1024 + 3, "bfloat16"),  # a tail; more tiles than a TPU's program takes at once
    (130, 40, 17, 1024, "float32"),
]
HALF = (6, 2, 3, 2048, "float16")


def drawn(shape, dtype, rng):
    """Numbers with exact zeros among them."""
    values = rng.normal(size=shape) * (rng.random(shape) < 0.8)
    return jnp.asarray(values, dtype)


def membership(slots, clients, tasks, rng):
    """Ragged: clients with more slots than others, and one with none where there are several."""
    client = rng.integers(0, max(clients - 1, 1), slots)
    return jnp.asarray(client, jnp.int32), jnp.asarray(rng.integers(0, tasks, slots), jnp.int32)


def assert_tiles(found, expected, size, exact=True):
    """Compares vectors `[rows, n]`, masks `[rows, bytes]` or sums, where there are whole tiles."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if found.ndim == 2 and found.shape[1] == size:
        whole = size // 1024 * 1024
        found, expected = (x[:, :whole].astype(np.float64) for x in (found, expected))
    elif found.dtype == np.uint8:
        found, expected = (x[:, : size // 1024 * 128] for x in (found, expected))
    else:
        exact = False
    if exact:
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def platforms(dtype) -> list[Literal["cuda", "tpu"]]:
    return ["cuda"] if dtype == "float16" else ["cuda", "tpu"]  # which TPUs do not have


@pytest.mark.parametrize("magnitude", ["max", "mean"])
@pytest.mark.parametrize(("slots", "clients", "tasks", "size", "dtype"), [*SHAPES, HALF])
def test_kernels_fold_as_the_scan_does(slots, clients, tasks, size, dtype, magnitude):
    rng = np.random.default_rng(0)
    client, task = membership(slots, clients, tasks, rng)
    source, present = drawn((tasks, size), dtype, rng), jnp.asarray(rng.random(slots) < 0.8)
    given = (source, task, grouped(client, slots, clients), present)
    expected = fold.scanned(*given, magnitude)
    for platform in platforms(dtype):
        assert kernels.fold_fits(source, slots, clients, platform)
        kernel = {"cuda": kernels.fold_on_gpu, "tpu": kernels.fold_on_tpu}[platform]
        found = kernel(*given, magnitude=magnitude, interpret=True)
        for part, wanted in zip(found, expected, strict=True):
            assert_tiles(part, wanted, size)


def test_sums_of_magnitudes_beyond_float32_have_a_scale():
    rng = np.random.default_rng(0)
    source = jnp.asarray(rng.normal(size=(2, 4096)) * 1e37, jnp.float32)
    given = (source, jnp.arange(2), grouped(None, 2, 1), jnp.ones(2, bool))
    *_, expected = fold.scanned(*given, "max")
    assert not np.isfinite(expected[:, 0]).any()
    assert np.isfinite(expected[:, 2:]).all()
    for kernel in (kernels.fold_on_gpu, kernels.fold_on_tpu):
        *_, found = kernel(*given, magnitude="max", interpret=True)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    scales = np.asarray(matu.unify(source, magnitude="max").scales)
    exact = np.asarray(matu.unify(source * 1e-20, magnitude="max").scales)
    np.testing.assert_allclose(scales, exact, rtol=1e-5)


@pytest.mark.parametrize(("slots", "clients", "tasks", "size", "dtype"), SHAPES)
def test_kernels_compare_signs_as_the_scan_does(slots, clients, tasks, size, dtype):
    rng = np.random.default_rng(1)
    client, task = membership(slots, clients, tasks, rng)
    vector = drawn((clients, size), dtype, rng)
    masks = jnp.asarray(rng.integers(0, 256, (slots, -(-size // 8))), jnp.uint8)
    live = jnp.asarray(rng.random(slots) < 0.8)
    expected = signs.by_scan(vector, masks, client, task, live, tasks=tasks, clients=clients)
    for platform in platforms(dtype):
        kernel = {
            "cuda": server_kernels.sign_products_on_gpu,
            "tpu": server_kernels.sign_products_on_tpu,
        }[platform]
        products = kernel(vector, masks, client, live, interpret=True)
        found = signs.of_products(products, client, task, tasks)
        for name, part, wanted in zip(expected._fields, found, expected, strict=True):
            np.testing.assert_array_equal(part, wanted, err_msg=name)


@pytest.mark.parametrize(("trim", "keeps"), [(0, False), (2, True)])
@pytest.mark.parametrize(("slots", "clients", "tasks", "size", "dtype"), SHAPES)
def test_kernels_average_a_task_as_the_scan_does(slots, clients, tasks, size, dtype, keeps, trim):
    rng = np.random.default_rng(2)
    client, task = membership(slots, clients, tasks, rng)
    vector = drawn((clients, size), dtype, rng)
    masks = jnp.asarray(rng.integers(0, 256, (slots, -(-size // 8))), jnp.uint8)
    accepted = jnp.asarray(rng.random(slots) < 0.7, jnp.int32)
    scales, fraction = (jnp.asarray(rng.random(slots), jnp.float32) for _ in range(2))
    held = jnp.zeros(tasks, jnp.int32).at[task].add(accepted)
    holders = Holders(grouped(task, slots, tasks), client, accepted, scales, fraction, held)
    old = drawn((tasks, size), dtype, rng) if keeps else None
    given = (vector, masks, holders, old)
    expected = same_task.by_scan(*given, threshold=0.4, trim=trim)
    for platform in platforms(dtype):
        kernel = {
            "cuda": server_kernels.same_task_on_gpu,
            "tpu": server_kernels.same_task_on_tpu,
        }[platform]
        found = kernel(*given, threshold=0.4, trim=trim, interpret=True)
        for part, wanted in zip(found, expected, strict=True):
            assert_tiles(part, wanted, size, exact=False)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("slots", "clients", "tasks", "size", "dtype"), SHAPES)
def test_kernels_finish_as_the_scan_does(slots, clients, tasks, size, dtype, adds):
    rng = np.random.default_rng(3)
    client, task = membership(slots, clients, tasks, rng)
    own = drawn((tasks, size), dtype, rng)
    start = drawn((tasks, size), dtype, rng) if adds else None
    # Powers of 2: products and sums are exact in whatever order they are added up.
    mixing = jnp.eye(tasks) + 0.5 * jnp.eye(tasks, k=1)
    given = (own, mixing, start, grouped(client, slots, clients), task)
    expected = finish.by_scan(*given, magnitude="mean")
    for platform in platforms(dtype):
        kernel = {"cuda": server_kernels.finish_on_gpu, "tpu": server_kernels.finish_on_tpu}
        found = kernel[platform](*given, magnitude="mean", interpret=True)
        for part, wanted in zip(found, expected, strict=True):
            assert_tiles(part, wanted, size)


def test_what_has_no_kernel_is_scanned():
    def shape(*axes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(axes, dtype)

    assert not kernels.fold_fits(shape(3, 1000), 3, 1, "cuda")  # no whole tile
    assert not kernels.fold_fits(shape(3, 2048, dtype=jnp.float16), 3, 1, "tpu")
    assert not kernels.fold_fits(shape(2000, 2048), 2000, 1, "tpu")  # more than fits at once
    assert kernels.fold_fits(shape(2000, 2048), 2000, 1, "cuda")
    assert not server_kernels.fits(shape(3, 2048), 3, 5000, 3, "cuda")  # quadratic in the slots


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_programs_are_exported_for_each_platform_from_any(platform):
    slots = matu.Slots(jnp.array([0, 0, 1]), jnp.array([0, 1, 1]), jnp.ones(3), 2, 2)

    def server_round(vectors):
        return matu.aggregate(matu.unify(vectors, slots), slots).downloads

    shape = jax.ShapeDtypeStruct((3, 2100), jnp.float32)
    checks = [jax.export.DisabledSafetyCheck.custom_call(TRITON)]
    exported = jax.export.export(
        jax.jit(server_round), platforms=[platform], disabled_checks=checks
    )({"w": shape})
    module = exported.mlir_module()
    assert (TRITON in module) == (platform == "cuda")
    assert ("tpu_custom_call" in module) == (platform == "tpu")
    if platform == "cpu":
        vectors = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 2100)), jnp.float32)}
        found, expected = exported.call(vectors), server_round(vectors)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_one_export_serves_several_platforms():
    checks = [jax.export.DisabledSafetyCheck.custom_call(TRITON)]
    platforms = ["cpu", "cuda", "tpu"]
    exported = jax.export.export(jax.jit(matu.unify), platforms=platforms, disabled_checks=checks)(
        jax.ShapeDtypeStruct((3, 2048), jnp.float32)
    )
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2048)), jnp.float32)
    found = exported.call(vectors)
    jax.tree.map(np.testing.assert_array_equal, found, matu.unify(vectors))


def test_a_form_is_chosen_where_a_program_is_lowered():
    traced = []

    def form(name):
        def compute(x, *, add):
            traced.append(name)
            return [x + add]

        return compute

    chosen = where_lowered(
        "chosen", lambda x, *, add: [x], form("default"), cuda=form("cuda"), cpu=form("cpu")
    )
    program = jax.jit(lambda x: chosen(x, add=1.0)[0])
    assert program(jnp.zeros(2)).tolist() == [1, 1]
    assert traced == ["cpu"]
    jax.export.export(program, platforms=["cuda"])(jnp.zeros(2))
    assert traced == ["cpu", "cuda"]
    assert jax.vmap(program)(jnp.zeros((3, 2))).tolist() == [[1, 1]] * 3
    assert chosen(jnp.zeros(2), add=2.0)[0].tolist() == [2, 2]  # outside of a program


def test_clients_may_be_mapped_over():
    rng = np.random.default_rng(0)
    vectors = jnp.asarray(rng.normal(size=(2, 4, 1500)), jnp.float32)
    client = jnp.array([[0, 0, 1, 1], [1, 0, 1, 0]])

    def folded(vectors, client):
        slots = matu.Slots(client, jnp.array([0, 1, 0, 1]), jnp.ones(4), 2, 2)
        return matu.aggregate(matu.unify(vectors, slots), slots).downloads

    found = jax.vmap(folded)(vectors, client)
    for i in range(2):
        expected = folded(vectors[i], client[i])
        mine = jax.tree.map(lambda x, i=i: x[i], found)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), mine, expected)
