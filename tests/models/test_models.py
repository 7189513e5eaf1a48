import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_clip
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from matu_jax import models
from matu_jax.config import ModelConfig
from matu_jax.data import ImageTask, Split
from matu_jax.models import architectures, embedded
from matu_jax.models.transformer import LoRASpec
from matu_jax.models.vit import StridedConvolution, VisionTransformer, ViTShape
from matu_jax.trees import leaf_items

IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8))


def test_strided_convolution_is_a_convolution():
    layer = StridedConvolution(5, 7, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 6, 5)), jnp.float32)
    kernel = layer.project.kernel[...].reshape(3, 3, 5, 7)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


def test_lora_starts_as_the_base_model_and_adds_a_low_rank_product():
    shape = ViTShape(depth=1)
    plain = VisionTransformer(shape, rngs=nnx.Rngs(0))
    adapted = VisionTransformer(shape, LoRASpec(("value",), 2, 6.0), rngs=nnx.Rngs(0))
    for name in ("query", "key", "value", "out", "mlp_in", "mlp_out"):
        for part in ("kernel", "bias"):
            source = getattr(getattr(plain.blocks[0], name), part)
            getattr(getattr(adapted.blocks[0], name), part)[...] = source[...]
    adapted.stem, adapted.class_token, adapted.positions = (
        plain.stem,
        plain.class_token,
        plain.positions,
    )
    np.testing.assert_allclose(adapted(IMAGES), plain(IMAGES), rtol=1e-5)
    layer = adapted.blocks[0].value
    layer.lora_b[...] = jnp.ones_like(layer.lora_b[...])
    merged = plain.blocks[0].value
    merged.kernel[...] = merged.kernel[...] + 3.0 * layer.lora_a[...] @ layer.lora_b[...]
    np.testing.assert_allclose(adapted(IMAGES), plain(IMAGES), rtol=1e-4, atol=1e-4)


def task(name="digits", classes=10, size=32):
    split = Split(np.zeros((1, size, size, 3), np.uint8), np.zeros(1, np.int32))
    names = tuple(f"class {i}" for i in range(classes))
    return ImageTask(
        name, split, split, split, label_space="labels", domain="domain", class_names=names
    )


def build(*tasks, seed=0, **changes):
    return models.build_classifier(ModelConfig(**changes), list(tasks or [task()]), seed=seed)


def logits(model, params=None, index=0, key=None):
    params = model.base if params is None else params
    if isinstance(model, models.Classifier):
        return jax.jit(model.logits)(params, model.frozen, IMAGES, jnp.int32(index), key)
    batch = Split(np.asarray(IMAGES), np.zeros(len(IMAGES), np.int32))
    return jax.jit(model.outputs)(params, model.frozen, batch, jnp.int32(index), key)


def noisy(tree, scale=0.1):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    return structure.unflatten([x + scale * jax.random.normal(key, x.shape) for x, key in pairs])


@pytest.fixture
def tiny_file(tmp_path):
    return tiny.write_checkpoint(tmp_path / "tiny.safetensors")


def test_embedded_checkpoint_is_small_and_complete():
    assert embedded.CHECKPOINT.stat().st_size < 4e6
    vectors = load_file(embedded.CHECKPOINT)["label_vectors"]
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(10), atol=1e-5)


def test_lora_and_full_start_from_the_same_function():
    lora, full = build(), build(trainable="full")
    np.testing.assert_allclose(logits(lora), logits(full), rtol=1e-5)
    assert {path.split("/")[-1] for path, _ in leaf_items(lora.base)} == {"lora_a", "lora_b"}
    assert sum(x.size for x in jax.tree.leaves(full.base)) > 400_000
    assert "blocks/0/query/kernel" in dict(leaf_items(full.base))


def test_frozen_heads_are_cosines_with_the_label_vectors():
    model = build(task(), task("few", 4), logit_scale=7.0)
    assert model.frozen["heads"].shape == (2, 10, 96)
    np.testing.assert_array_equal(model.frozen["heads"][0, :4], model.frozen["heads"][1, :4])
    np.testing.assert_array_equal(model.frozen["heads"][1, 4:], 0)
    features = np.asarray(jax.jit(model.features)(model.base, model.frozen, IMAGES))
    vectors = load_file(embedded.CHECKPOINT)["label_vectors"]
    expected = 7 * features @ vectors.T / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(logits(model), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits(model, index=1)[:, :4], expected[:, :4], rtol=1e-4, atol=1e-5)


def test_trained_heads_start_at_zero_and_are_linear(tiny_file):
    model = build(task(classes=3), task("more", 5), head="trained", checkpoint=tiny_file)
    np.testing.assert_array_equal(logits(model), np.zeros((2, 5)))
    np.testing.assert_array_equal(model.frozen["heads"], np.zeros((2, 5, 16)))
    assert set(model.base) == {"shared", "head"}
    params = noisy(model.base)
    features = jax.jit(model.features)(params, model.frozen, IMAGES)
    expected = np.asarray(features) @ params["head"]["kernel"] + params["head"]["bias"][None]
    np.testing.assert_allclose(logits(model, params), expected, rtol=1e-5, atol=1e-5)


def test_tasks_choose_their_heads(tiny_file):
    tasks = [task("a", 3), task("b", 10), task("c", 4)]
    mixed = build(*tasks, checkpoint=tiny_file, task_heads=(("b", "trained"),))
    trained = build(*tasks, checkpoint=tiny_file, head="trained")
    frozen = build(*tasks, checkpoint=tiny_file)
    params = noisy(mixed.base)
    np.testing.assert_array_equal(mixed.frozen["trained"], [False, True, False])
    np.testing.assert_array_equal(mixed.frozen["heads"][1], 0)
    for index, alone in ((0, frozen), (1, trained), (2, frozen)):
        own = params if alone is trained else params["shared"]
        np.testing.assert_allclose(
            logits(mixed, params, index), logits(alone, own, index), rtol=1e-5, atol=1e-5
        )

    def loss(params, index):
        return jnp.sum(jnp.sin(mixed.logits(params, mixed.frozen, IMAGES, index)))

    of_frozen, of_trained = (jax.jit(jax.grad(loss))(params, jnp.int32(i)) for i in (0, 1))
    for leaf in jax.tree.leaves(of_frozen["head"]):
        np.testing.assert_array_equal(leaf, 0)
    for leaf in jax.tree.leaves((of_frozen["shared"], of_trained)):
        assert np.abs(np.asarray(leaf)).max() > 0


def test_dropout_follows_the_key(tiny_file):
    model = build(checkpoint=tiny_file, lora_dropout=0.5)
    assert model.stochastic
    assert not build(checkpoint=tiny_file).stochastic
    params, key = noisy(model.base), jax.random.key(1)
    exact = logits(build(checkpoint=tiny_file), params)
    np.testing.assert_array_equal(logits(model, params), exact)
    dropped = logits(model, params, key=key)
    assert np.abs(np.asarray(dropped - exact)).max() > 1e-3
    np.testing.assert_array_equal(logits(model, params, key=key), dropped)


def test_the_embedded_backbone_computes_in_bfloat16_and_with_remat(tiny_file):
    exact = build(checkpoint=tiny_file)
    half = build(checkpoint=tiny_file, compute_dtype="bfloat16")
    assert half.frozen["backbone"]["blocks"][0]["query"]["kernel"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(half.base)} == {np.dtype(np.float32)}
    params = noisy(exact.base)
    difference = np.abs(np.asarray(logits(half, params) - logits(exact, params))).max()
    assert 1e-5 < difference < 0.5  # of logits within 20
    remat = build(checkpoint=tiny_file, remat=True)
    np.testing.assert_allclose(logits(remat, params), logits(exact, params), rtol=1e-5, atol=1e-5)


def test_models_map_over_slots(tiny_file):
    model = build(task("a"), task("b", 3), checkpoint=tiny_file, task_heads=(("b", "trained"),))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), noisy(model.base), noisy(model.base, 0.3))
    tasks = jnp.asarray([0, 1], jnp.int32)
    found = jax.jit(jax.vmap(lambda p, t: model.logits(p, model.frozen, IMAGES, t)))(stacked, tasks)
    for i in range(2):
        one = logits(model, jax.tree.map(lambda leaf, i=i: leaf[i], stacked), i)
        np.testing.assert_allclose(found[i], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_linearised_is_the_first_order_expansion_around_the_base(tiny_file, trainable):
    model = build(checkpoint=tiny_file, trainable=trainable, lora_rank=2)
    tangent = models.linearised(model)
    assert tangent.base is model.base
    np.testing.assert_allclose(logits(tangent), logits(model), rtol=1e-6)
    step = jax.tree.map(lambda a, b: a - b, noisy(model.base), model.base)

    def at(scale, which: models.Model = model):
        return np.asarray(
            logits(which, jax.tree.map(lambda b, s: b + scale * s, model.base, step)), np.float64
        )

    jacobian = jax.jit(jax.jacrev(lambda p: model.logits(p, model.frozen, IMAGES, jnp.int32(0))))
    change = sum(
        np.tensordot(np.asarray(j, np.float64), np.asarray(s, np.float64), s.ndim)
        for j, s in zip(jax.tree.leaves(jacobian(model.base)), jax.tree.leaves(step), strict=True)
    )
    scale = np.abs(change).max()
    assert scale > 0.1
    np.testing.assert_allclose(at(1.0, tangent), at(0.0) + change, atol=1e-3 * scale)
    # Central differences: an error of the second order in their width, and one of rounding.
    differences = (at(0.01) - at(-0.01)) / 0.02
    np.testing.assert_allclose(at(1.0, tangent) - at(0.0), differences, atol=2e-2 * scale)
    np.testing.assert_allclose(at(-2.0, tangent), at(0.0) - 2 * change, atol=2e-3 * scale)
    if trainable == "lora":  # B is zero at the base, so that A has no part in it
        only_a = jax.tree_util.tree_map_with_path(
            lambda path, b, s: b + s if path[-1].key == "lora_a" else b, model.base, step
        )
        np.testing.assert_allclose(logits(tangent, only_a), at(0.0), rtol=1e-5)


@pytest.mark.parametrize("name", ["tiny_clip", "tiny_vit"])
def test_random_checkpoints_of_real_architectures(name, monkeypatch):
    tiny_clip.register(monkeypatch)
    heads = {"head": "trained"} if name == "tiny_vit" else {}
    options = {"architecture": name, "checkpoint": "random", "logit_scale": 0.0, **heads}
    tasks = [task("a", 3, tiny_clip.SIZE), task("b", 4, tiny_clip.SIZE)]
    model = build(*tasks, **options)
    pictures = tiny_clip.images()
    out = jax.jit(model.logits)(model.base, model.frozen, pictures, jnp.int32(1))
    assert out.shape == (6, 4)
    assert np.isfinite(out).all()
    same, other = build(*tasks, **options), build(*tasks, seed=1, **options)
    for (path, first), (_, second) in zip(
        leaf_items((model.base, model.frozen)), leaf_items((same.base, same.frozen)), strict=True
    ):
        np.testing.assert_array_equal(first, second, err_msg=path)
    kernels = [m.frozen["backbone"]["blocks"]["query"]["kernel"] for m in (model, other)]
    assert np.abs(np.asarray(kernels[0] - kernels[1])).max() > 0.1
    if name == "tiny_clip":
        norms = np.linalg.norm(model.frozen["heads"], axis=2)
        np.testing.assert_allclose(norms, [[1, 1, 1, 0], [1, 1, 1, 1]], atol=1e-6)
        reordered = build(*reversed(tasks), **options)
        np.testing.assert_array_equal(reordered.frozen["heads"][0], model.frozen["heads"][1])
        features = np.asarray(jax.jit(model.features)(model.base, model.frozen, pictures))
        cosines = features @ np.asarray(model.frozen["heads"][1]).T
        cosines /= np.linalg.norm(features, axis=1, keepdims=True)
        np.testing.assert_allclose(out, 100 * cosines, rtol=1e-3, atol=1e-3)


def refusal(*tasks, **changes):
    with pytest.raises(ValueError, match=r"config\.model") as error:
        build(*tasks, **changes)
    return str(error.value)


def test_mistakes_are_named(tmp_path):
    assert 'Did you mean "query"' in refusal(lora_targets=("querry",))
    assert "expected at least one" in refusal(lora_targets=())
    assert "there are no adapters" in refusal(trainable="full", lora_dropout=0.1)
    assert "cannot be read" in refusal(checkpoint=str(tmp_path / "none.safetensors"))
    assert "config.model.architecture too" in refusal(checkpoint="openai/clip-vit-base-patch32")
    assert 'Did you mean "clip_vit_b32"' in refusal(architecture="clip_vitb32")
    assert "text tower" in refusal(architecture="vit_b16", checkpoint="random")
    assert "logit_scale: found 0" in refusal(logit_scale=0.0)
    (tmp_path / "broken").write_bytes(b"not safetensors")
    assert "cannot be read" in refusal(checkpoint=str(tmp_path / "broken"))
    tensors = load_file(embedded.CHECKPOINT)
    with safe_open(embedded.CHECKPOINT, framework="numpy") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "bare")
    assert "the model's shape is not noted" in refusal(checkpoint=str(tmp_path / "bare"))
    gone = {k: v for k, v in tensors.items() if k != "norm/scale"}
    save_file(gone, tmp_path / "gone", metadata)
    assert "norm/scale: found none" in refusal(checkpoint=str(tmp_path / "gone"))
    save_file({**tensors, "extra": tensors["norm/scale"]}, tmp_path / "more", metadata)
    assert "unknown tensors extra" in refusal(checkpoint=str(tmp_path / "more"))


@pytest.mark.parametrize(
    ("shape", "change", "words"),
    [
        ("{", {}, "shape cannot be read: not JSON"),
        ("[" * 5000, {}, "nested more than"),
        ("[]", {}, "shape cannot be read: fields"),
        ('{"depth": 100000000}', {}, "depth: found 100000000"),
        ('{"patch_size": 0}', {}, "patch_size: found 0"),
        ('{"width": "96"}', {}, "width: found '96'"),
        ('{"stem_widths": 3}', {}, "stem_widths: found 3"),
        (None, {"label_vectors": np.eye(10, 17, dtype=np.float32)}, "found [10, 17], expected [cl"),
        (None, {"norm/bias": np.full(16, np.nan, np.float32)}, "not all of it is finite"),
        (None, {"norm/bias": np.zeros(16, np.int32)}, "tensor norm/bias is int32"),
    ],
)
def test_damaged_checkpoints_are_one_message(tiny_file, tmp_path, shape, change, words):
    with safe_open(tiny_file, framework="numpy") as file:
        metadata = file.metadata()
    file = str(tmp_path / "damaged")
    save_file(load_file(tiny_file) | change, file, metadata if shape is None else {"shape": shape})
    message = refusal(checkpoint=file)
    assert words in message
    assert file in message


def test_frozen_heads_of_tasks_with_prompts_need_a_text_tower(tiny_file):
    """The label vectors mean nothing to classes of one's own; no head is made of them silently."""
    own = dataclasses.replace(task("ward", 3), templates=("a photo of a {}.",))
    message = refusal(own, checkpoint=tiny_file)
    assert "found 'frozen' for ward, a head made of class names by a text tower" in message
    assert "Set config.model.head = 'trained', or" in message
    build(own, checkpoint=tiny_file, head="trained")


def test_frozen_heads_without_a_text_tower_are_one_message(tiny_file):
    """Before images are prepared, and when a model is built; what it says to set is what helps."""
    own = dataclasses.replace(task("ward", 3), templates=("a photo of a {}.",))
    other = dataclasses.replace(own, name="other")
    named = (("ward", "frozen"),)
    where = (
        "put 'trained' in place of 'frozen' in config.model.task_heads, where ('ward', 'frozen')"
    )
    for changes, remedy, mended in (
        ({}, "Set config.model.head = 'trained', or", {"head": "trained"}),
        (
            {"head": "trained", "task_heads": named},
            f"P{where[1:]}",
            {"task_heads": (("ward", "trained"),)},
        ),
        (
            {"task_heads": named},
            f"Set config.model.head = 'trained' and {where}",
            {"head": "trained", "task_heads": (("ward", "trained"),)},
        ),
    ):
        for which in ({"checkpoint": tiny_file}, {"architecture": "vit_b16"}):
            message = refusal(own, other, **{"checkpoint": "random", **which, **changes})
            assert remedy in message
            asked = ModelConfig(**{"checkpoint": "random", **which, **changes})
            with pytest.raises(ValueError, match=r"config\.model\.head") as before:
                architectures.check_heads(asked, ["ward", "other"])
            assert str(before.value) == message
        build(own, other, checkpoint=tiny_file, **{**changes, **mended})


def test_mistakes_in_heads_and_tasks_are_named(tiny_file):
    def refused(*tasks, **changes):
        return refusal(*tasks, checkpoint=tiny_file, **changes)

    assert 'Did you mean "digits"' in refused(task_heads=(("digit", "trained"),))
    assert "expected 'frozen' or 'trained'" in refused(task_heads=(("digits", "linear"),))
    assert "expected pairs" in refused(task_heads=("digits", "trained"))
    assert "twice" in refused(task_heads=(("digits", "trained"), ("digits", "frozen")))
    assert "task 'eleven' has 11 classes" in refused(task("eleven", 11))
    build(task("eleven", 11), checkpoint=tiny_file, task_heads=(("eleven", "trained"),))
    message = refused(task(), task("large", size=64))
    assert "task 'large': images are [64, 64, 3]" in message
    with pytest.raises(ValueError, match="tasks: found none"):
        models.build_classifier(ModelConfig(), [])
