"""The modules by themselves: shapes, the loop over blocks, remat, dropout and dtypes."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_clip
from flax import nnx

from matu_jax.models import transformer
from matu_jax.models.architectures import ARCHITECTURES, TowerShape
from matu_jax.models.backbone import parameter_shapes
from matu_jax.models.towers import TextTower, VisionTower
from matu_jax.models.transformer import (
    PROJECTIONS,
    Block,
    Computing,
    Linear,
    LoRAParam,
    LoRASpec,
    apply_blocks,
    stacked_blocks,
)
from matu_jax.models.vit import VisionTransformer, ViTShape

IMAGES = tiny_clip.images(2)
SHAPE = TowerShape(16, 3, 2, 32)
ALL = LoRASpec(PROJECTIONS, 4, 6.0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 16)), jnp.float32)


def drawn(make, adapters=0.3):
    """A module whose parameters, adapters included, are drawn by NumPy: nothing to compile."""
    graph, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(7)

    def draw(path, leaf):
        name, noise = str(path[-2].key), rng.normal(size=leaf.shape)
        if name == "scale":
            noise = 1 + 0.2 * noise
        elif name in ("kernel", "lora_a", "lora_b"):
            noise *= (adapters if name == "lora_b" else 1) / math.sqrt(leaf.shape[-2])
        return jnp.asarray(noise, jnp.float32)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def blocks_with(lora, **options):
    return drawn(lambda: stacked_blocks(SHAPE, lora, rngs=nnx.Rngs(0), **options))


def gradients(module, forward):
    graph, trains, rest = nnx.split(module, LoRAParam, ...)

    def loss(trains):
        return jnp.sum(jnp.sin(forward(nnx.merge(graph, trains, rest))))

    return nnx.to_pure_dict(jax.jit(jax.grad(loss))(trains))


def run(module, *inputs):
    """Calls a module under jit."""
    graph, state = nnx.split(module)
    return jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs))(state, *inputs)


def run_blocks(blocks, key=None):
    graph, state = nnx.split(blocks)
    return jax.jit(lambda s, key: apply_blocks(nnx.merge(graph, s), X, key))(state, key)


def close(first, second, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), first, second)


@pytest.mark.parametrize("module", ["architectures", "checkpoint_config"])
def test_architectures_are_read_without_flax_or_transformers(module):
    code = (
        f"import sys, matu_jax.models.{module}\n"
        "print([m for m in ('flax', 'transformers', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("clip_vit_b32", 151_277_313),
        ("clip_vit_b16", 149_620_737),
        ("clip_vit_l14", 427_616_513),
        ("vit_b16", 85_798_656),
    ],
)
def test_full_size_towers_have_the_published_number_of_parameters(name, published):
    architecture = ARCHITECTURES[name]
    assert architecture.name == name
    assert architecture.transform.size == architecture.image_size
    shapes = [parameter_shapes(lambda rngs: VisionTower(architecture, rngs=rngs))]
    if architecture.text:
        shapes.append(parameter_shapes(lambda rngs: TextTower(architecture, rngs=rngs)))
        published -= 1  # the logit scale
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == published


@pytest.mark.parametrize("architecture", [tiny_clip.TINY_CLIP, tiny_clip.TINY_VIT])
def test_vision_tower_shapes(architecture):
    tower = drawn(lambda: VisionTower(architecture, rngs=nnx.Rngs(0)))
    features = run(tower, IMAGES)
    assert features.shape == (2, architecture.features)
    assert features.dtype == jnp.float32
    np.testing.assert_allclose(run(tower, IMAGES.astype(np.float32)), features)
    with pytest.raises(ValueError, match=r"found \[2, 8, 8, 3\], expected \[batch, 16, 16, 3\]"):
        tower(jnp.asarray(IMAGES[:, :8, :8]))


def test_text_tower_is_causal_and_takes_texts_padded_to_any_length():
    tower = drawn(lambda: TextTower(tiny_clip.TINY_CLIP, rngs=nnx.Rngs(0)))
    end = tiny_clip.TINY_CLIP.vocabulary - 1
    context = tiny_clip.TINY_CLIP.context
    tokens = np.full((2, context), end, np.int32)
    tokens[:, :6] = np.arange(12).reshape(2, 6)
    features = run(tower, tokens)
    assert features.shape == (2, tiny_clip.TINY_CLIP.projection)
    np.testing.assert_allclose(run(tower, tokens[:, :8]), features, rtol=1e-4, atol=1e-5)
    tokens[:, 9:] = 3
    np.testing.assert_allclose(run(tower, tokens), features, rtol=1e-4, atol=1e-5)
    tokens[:, 2] += 1
    assert np.abs(np.asarray(run(tower, tokens) - features)).max() > 1e-2
    with pytest.raises(ValueError, match=rf"expected \[batch, at most {context}\]"):
        tower(jnp.zeros((2, context + 1), jnp.int32))


@pytest.fixture(params=["loop", "one by one"])
def form(request, monkeypatch):
    """Blocks as platforms have them: in a loop, and one by one as on NVIDIA GPUs."""

    def chosen(*x, cuda, default):
        return (default if request.param == "loop" else cuda)(*x)

    monkeypatch.setattr(transformer.jax.lax, "platform_dependent", chosen)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("causal", [False, True])
def test_the_loop_over_blocks_is_one_block_after_the_other(causal):
    blocks = blocks_with(ALL, causal=causal)
    graph, state = nnx.split(blocks)
    assert all(leaf.shape[0] == SHAPE.depth for leaf in jax.tree.leaves(state))
    expected = X
    for layer in range(SHAPE.depth):
        rows = jax.tree.map(lambda leaf, i=layer: leaf[i], state)
        expected = run(nnx.merge(graph, rows), expected)
    np.testing.assert_allclose(run_blocks(blocks), expected, rtol=1e-5, atol=1e-5)


def test_stacked_blocks_are_drawn_one_by_one_and_adapters_start_as_nothing():
    blocks = stacked_blocks(SHAPE, ALL, rngs=nnx.Rngs(0))
    for name in PROJECTIONS:
        layer = getattr(blocks, name)
        kernel, lora_a = np.asarray(layer.kernel[...]), np.asarray(layer.lora_a[...])
        assert np.abs(kernel[0] - kernel[2]).max() > 0.1
        assert np.abs(lora_a[0] - lora_a[2]).max() > 0.1
        np.testing.assert_allclose(kernel.std() * math.sqrt(kernel.shape[1]), 1, atol=0.1)
        np.testing.assert_array_equal(layer.lora_b[...], 0)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("key", [None, jax.random.key(3)])
def test_remat_computes_again_and_changes_no_gradient(key):
    spec = LoRASpec(PROJECTIONS, 4, 6.0, 0.4)
    blocks = blocks_with(spec)
    shape = ViTShape(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_width=32)

    def embedded(remat):
        how = Computing(remat=remat)
        return drawn(lambda: VisionTransformer(shape, spec, computing=how, rngs=nnx.Rngs(0)))

    def both(remat):
        stacked = gradients(blocks, lambda b: apply_blocks(b, X, key, remat=remat))
        return stacked, gradients(embedded(remat), lambda t: t(IMAGES, key))

    close(both(True), both(False), rtol=1e-4, atol=1e-3)


def kept_features(forward, module, dtype, trains):
    """Features of each token that a backward pass keeps, and the dtypes they have."""
    graph, trained, rest = nnx.split(module, trains, ...)

    def backward(trained, rest, x):
        return jax.vjp(lambda t, x: forward(nnx.merge(graph, t, rest), x), trained, x)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, trained, rest, X.astype(dtype)))
    ours = [leaf for leaf in kept if leaf.size % (X.shape[0] * X.shape[1]) == 0]
    parameters = {leaf.shape for leaf in jax.tree.leaves((trained, rest))}
    ours = [leaf for leaf in ours if not {leaf.shape, (SHAPE.depth, *leaf.shape)} & parameters]
    return sum(leaf.size for leaf in ours) // X.shape[0] // X.shape[1], {x.dtype for x in ours}


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("trains", [LoRAParam, nnx.Param])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_what_a_block_keeps_for_the_backward_pass(dtype, trains):
    """Once, in the compute dtype: inputs and projections; of norms and attention nothing else."""
    lora, of_a_block = None, 6 * SHAPE.width + SHAPE.mlp_width
    if trains is LoRAParam:  # what attention yields is the input of a frozen projection only
        lora, of_a_block = LoRASpec(("query", "value"), 4, 6.0), of_a_block - SHAPE.width + 2 * 4
    blocks = blocks_with(lora, dtype=dtype)
    kept = kept_features(apply_blocks, blocks, dtype, trains)
    assert kept == (SHAPE.depth * of_a_block, {np.dtype(dtype)})
    remat = kept_features(lambda b, x: apply_blocks(b, x, remat=True), blocks, dtype, trains)
    assert remat == (SHAPE.depth * SHAPE.width, {np.dtype(dtype)})


def test_dropout_zeroes_an_adapters_inputs_and_scales_the_rest():
    layer = Linear(4000, 4000, LoRASpec(("query",), 4000, 4000.0, 0.25), rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.zeros((4000, 4000))
    layer.lora_a[...] = layer.lora_b[...] = jnp.eye(4000)
    x = jnp.arange(1.0, 4001.0)[None]
    np.testing.assert_allclose(layer(x), x)
    ratio = np.asarray(layer(x, jax.random.key(0)) / x)
    dropped = np.isclose(ratio, 0)
    np.testing.assert_allclose(ratio[~dropped], 4 / 3, rtol=1e-5)
    assert abs(dropped.mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)


def test_dropout_leaves_the_frozen_product_alone():
    spec = LoRASpec(PROJECTIONS, 4, 6.0, 0.5)
    blocks, key = (
        drawn(lambda: stacked_blocks(SHAPE, spec, rngs=nnx.Rngs(0)), 0.0),
        jax.random.key(0),
    )
    np.testing.assert_array_equal(run_blocks(blocks, key), run_blocks(blocks))
    blocks = blocks_with(spec)
    out = run_blocks(blocks, key)
    np.testing.assert_array_equal(run_blocks(blocks, key), out)
    assert np.abs(np.asarray(out - run_blocks(blocks))).max() > 0.1
    assert np.abs(np.asarray(out - run_blocks(blocks, jax.random.key(1)))).max() > 0.1


def test_every_projection_and_every_block_draws_its_own_mask(monkeypatch):
    drawn, masks = jax.random.bernoulli, []

    def record(key, p, shape):
        mask = drawn(key, p, shape)
        jax.debug.callback(lambda m: masks.append(np.asarray(m).tobytes()), mask)
        return mask

    monkeypatch.setattr(transformer.jax.random, "bernoulli", record)
    spec = LoRASpec(PROJECTIONS, 4, 6.0, 0.5)
    apply_blocks(blocks_with(spec), X, jax.random.key(0))
    jax.effects_barrier()
    assert len(masks) == SHAPE.depth * len(PROJECTIONS)
    assert len(set(masks)) == len(masks)


def test_the_mean_over_masks_is_the_output_without_dropout():
    spec = LoRASpec(("query",), 4, 6.0, 0.3)
    layer = drawn(lambda: Linear(16, 8, spec, rngs=nnx.Rngs(0)))
    keys = jax.random.split(jax.random.key(0), 4000)
    graph, state = nnx.split(layer)
    outs = jax.vmap(lambda key: nnx.merge(graph, state)(X[0], key))(keys)
    error = np.abs(np.asarray(outs.mean(axis=0) - layer(X[0])))
    assert (error < 5 * np.asarray(outs.std(axis=0)) / math.sqrt(4000)).all()


def test_bfloat16_is_close_and_trains_in_float32():
    def tower(dtype):
        how = Computing(dtype)
        return drawn(
            lambda: VisionTower(tiny_clip.TINY_CLIP, ALL, computing=how, rngs=nnx.Rngs(0)), 0.1
        )

    exact, half = tower(jnp.float32), tower(jnp.bfloat16)
    features, reference = run(half, IMAGES), np.asarray(run(exact, IMAGES))
    assert features.dtype == jnp.float32
    difference = np.abs(np.asarray(features) - reference).max()
    assert 1e-5 < difference < 0.05 * np.abs(reference).max()
    found = gradients(half, lambda t: t(IMAGES))
    expected = gradients(exact, lambda t: t(IMAGES))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        assert np.vdot(a, b) > 0.98 * norms


def test_a_block_in_bfloat16_multiplies_in_bfloat16():
    block = Block(SHAPE, ALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    text = str(jax.make_jaxpr(lambda x: block(x))(X.astype(jnp.bfloat16)))
    products = [line for line in text.splitlines() if "dot_general" in line]
    # Only the scores of attention are float32.
    assert sum(":bf16[" in line for line in products) == 3 * len(PROJECTIONS) + 1
    assert sum(":f32[" in line for line in products) == 1
