import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from matu_jax import models
from matu_jax.config import ModelConfig
from matu_jax.models.vit import LoRASpec, StridedConvolution, VisionTransformer, ViTShape
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


def test_embedded_checkpoint_is_small_and_complete():
    assert models.EMBEDDED_CHECKPOINT.stat().st_size < 4e6
    vectors = load_file(models.EMBEDDED_CHECKPOINT)["label_vectors"]
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(10), atol=1e-5)


def test_lora_and_full_start_from_the_same_function():
    lora = models.build(ModelConfig(), num_classes=10)
    full = models.build(ModelConfig(trainable="full"), num_classes=10)
    np.testing.assert_allclose(
        lora.logits(lora.base, lora.frozen, IMAGES),
        full.logits(full.base, full.frozen, IMAGES),
        rtol=1e-5,
    )
    assert {path.split("/")[-1] for path, _ in leaf_items(lora.base)} == {"lora_a", "lora_b"}
    assert sum(x.size for x in jax.tree.leaves(full.base)) > 400_000


def test_frozen_heads_are_cosines_with_the_label_vectors():
    model = models.build(ModelConfig(logit_scale=7.0), num_classes=10)
    logits = model.logits(model.base, model.frozen, IMAGES)
    assert logits.shape == (2, 10)
    assert float(jnp.abs(logits).max()) <= 7.0
    # Ten orthonormal vectors cannot hold more than the whole of a unit feature.
    assert float(jnp.square(logits / 7.0).sum(axis=1).max()) <= 1.0 + 1e-5


def test_trained_heads_start_at_zero_and_train():
    model = models.build(ModelConfig(head="trained"), num_classes=3)
    np.testing.assert_array_equal(model.logits(model.base, model.frozen, IMAGES), np.zeros((2, 3)))
    assert set(model.base) == {"shared", "head"}


def refusal(**changes):
    with pytest.raises(ValueError, match=r"config\.model") as error:
        models.build(ModelConfig(**changes), num_classes=10)
    return str(error.value)


def test_mistakes_are_named(tmp_path):
    assert 'Did you mean "query"' in refusal(lora_targets=("querry",))
    assert "expected at least one" in refusal(lora_targets=())
    assert "cannot be read" in refusal(checkpoint=str(tmp_path / "none.safetensors"))
    (tmp_path / "broken").write_bytes(b"not safetensors")
    assert "cannot be read" in refusal(checkpoint=str(tmp_path / "broken"))
    tensors = load_file(models.EMBEDDED_CHECKPOINT)
    with models.safe_open(models.EMBEDDED_CHECKPOINT, framework="numpy") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "bare")
    assert "no model shape" in refusal(checkpoint=str(tmp_path / "bare"))
    gone = {k: v for k, v in tensors.items() if k != "norm/scale"}
    save_file(gone, tmp_path / "gone", metadata)
    assert "norm/scale: found none" in refusal(checkpoint=str(tmp_path / "gone"))
    save_file({**tensors, "extra": tensors["norm/scale"]}, tmp_path / "more", metadata)
    assert "unknown tensors extra" in refusal(checkpoint=str(tmp_path / "more"))


def test_too_many_classes_for_the_label_vectors_are_refused():
    with pytest.raises(ValueError, match="11 classes"):
        models.build(ModelConfig(), num_classes=11)
