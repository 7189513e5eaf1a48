"""Architectures that are read from a checkpoint's own files, which need no weights for this."""

import dataclasses
import json

import pytest

from matu_jax.config import ModelConfig
from matu_jax.data import Transform
from matu_jax.models import checkpoint_config, transformer
from matu_jax.models.architectures import (
    ARCHITECTURES,
    CLIP_MEAN,
    TowerShape,
)
from matu_jax.models.checkpoint_config import architecture_of, read_architecture
from matu_jax.models.images import transform_of

VISION = {"hidden_size": 24, "num_attention_heads": 3, "image_size": 30, "patch_size": 7}
CLIP = {"model_type": "clip", "vision_config": VISION, "projection_dim": 11}
VIT = {"model_type": "vit", "num_hidden_layers": 2, **VISION}
IMAGES = {"size": 30, "resample": 3, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 0.5, 0.25]}


@pytest.fixture
def folder(tmp_path):
    def write(config, **files):
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").write_bytes(b"")
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return write


def refusal(folder, family):
    with pytest.raises(ValueError, match=r".") as error:
        read_architecture(folder, family)
    return str(error.value)


def test_sizes_are_config_jsons_and_the_rest_are_transformers_defaults(folder):
    clip = read_architecture(folder({**CLIP, "text_config": {"vocab_size": 99}}), "clip")
    assert (clip.image_size, clip.patch_size, clip.projection, clip.features) == (30, 7, 11, 11)
    assert clip.vision == TowerShape(24, 12, 3, 3072, "quick_gelu", 1e-5)
    assert clip.text == TowerShape(512, 12, 8, 2048, "quick_gelu", 1e-5)
    assert (clip.vocabulary, clip.context, clip.end_token) == (99, 77, 49407)
    assert clip.transform == Transform(30, "shortest_side", "bicubic")
    assert clip.image_mean == CLIP_MEAN
    vit = read_architecture(folder({**VIT, "layer_norm_eps": 1e-6}), "vit")
    assert vit.vision == TowerShape(24, 2, 3, 3072, "gelu", 1e-6)
    assert (vit.text, vit.projection, vit.features) == (None, None, 24)
    assert vit.transform == Transform(30, "squash", "bilinear")
    assert vit.image_mean == vit.image_std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("name", ["clip_vit_b32", "vit_b16"])
def test_the_defaults_are_the_published_checkpoints(folder, name):
    """Which leave most of their sizes out."""
    family = ARCHITECTURES[name].family
    found = read_architecture(folder({"model_type": family}), family)
    end = 49407 if family == "clip" else 2
    expected = dataclasses.replace(ARCHITECTURES[name], name=family, end_token=end)
    assert found == expected


@pytest.mark.parametrize("wrapped", [False, True])
def test_images_are_the_preprocessors(folder, wrapped):
    processor = {"processor_config": {"image_processor": IMAGES}}
    files = processor if wrapped else {"preprocessor_config": IMAGES}
    clip = read_architecture(folder(CLIP, **files), "clip")
    assert clip.transform == Transform(30, "shortest_side", "bicubic")
    assert (clip.image_mean, clip.image_std) == ((0.1, 0.2, 0.3), (1.0, 0.5, 0.25))


@pytest.mark.parametrize(
    ("family", "size", "resize"),
    [
        ("clip", {"shortest_edge": 30}, "shortest_side"),
        ("clip", {"height": 30, "width": 30}, "squash"),
        ("vit", 30, "squash"),
        ("vit", {"height": 30, "width": 30}, "squash"),
        ("vit", {"shortest_edge": 30, "longest_edge": None}, "shortest_side"),
    ],
)
def test_resizing_is_what_size_says(folder, family, size, resize):
    config = CLIP if family == "clip" else VIT
    images = {**IMAGES, "size": size, "resample": 2}
    found = read_architecture(folder(config, preprocessor_config=images), family)
    assert found.transform == Transform(30, resize, "bilinear")


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("vit", {"num_attention_heads": 5}, "num_attention_heads: found 5: hidden_size, 24, is no"),
        ("vit", {"head_dim": 9}, "head_dim: found 9: only hidden_size / heads, 8,"),
        ("vit", {"image_size": [30, 20]}, "image_size: found [30, 20]: only square"),
        ("vit", {"patch_size": 31}, "patch_size: found 31: image_size is only 30"),
        ("vit", {"qkv_bias": False}, "qkv_bias: found False"),
        ("vit", {"num_channels": 1}, "num_channels: found 1"),
        ("vit", {"num_hidden_layers": 10**9}, "num_hidden_layers: found 1000000000"),
        ("vit", {"hidden_act": "mish"}, "hidden_act: found 'mish': expected one of gelu, "),
        ("vit", {"model_type": "siglip"}, "model_type is 'siglip', but config.model.architecture"),
        ("vit", {"model_type": "clip"}, "there are: clip_vit_b32"),
        ("clip", {"projection_dim": None}, "projection_dim: found None"),
        ("clip", {"text_config": {"num_attention_heads": 7}}, "hidden_size, 512, is no multiple"),
        ("clip", {"text_config": 3}, "text_config: found 3"),
    ],
)
def test_what_is_not_supported_is_named(folder, family, change, words):
    config = CLIP if family == "clip" else VIT
    message = refusal(folder({**config, **change}), family)
    assert words in message
    assert str(folder({}) / "config.json") in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 224}, "size is 224, but config.json's image_size 30"),
        ({"size": {"height": 30, "width": 20}}, "size is {'height': 30, 'width': 20}"),
        ({"crop_size": {"height": 28, "width": 28}}, "crop_size is"),
        ({"resample": 1}, "resample: found 1"),
        ({"do_normalize": False}, "do_normalize: found False"),
        ({"do_center_crop": False}, "do_center_crop: found False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078"),
        ({"image_std": [1, 0, 1]}, "image_std.1: found 0"),
        ({"image_mean": [0.5]}, "image_mean: found [0.5]"),
    ],
)
def test_other_images_are_named_and_removing_the_file_helps(folder, change, words):
    where = folder(CLIP, preprocessor_config={**IMAGES, **change})
    message = refusal(where, "clip")
    assert words in message
    assert f"{where / 'preprocessor_config.json'}" in message
    assert "remove it" in message
    (where / "preprocessor_config.json").unlink()
    read_architecture(where, "clip")


def test_null_counts_as_absent(folder):
    usual = read_architecture(folder({"model_type": "clip"}), "clip")
    config = {"model_type": "clip", "vision_config": None, "text_config": None}
    where = folder(config, processor_config={"image_processor": None})
    assert read_architecture(where, "clip") == usual


@pytest.mark.parametrize("value", [0, False, [], "", 0.0])
def test_other_empty_values_are_named(folder, value):
    for field in ("vision_config", "text_config"):
        assert f"  {field}: found {value!r}" in refusal(folder({**CLIP, field: value}), "clip")
    where = folder(CLIP, processor_config={"image_processor": value})
    message = refusal(where, "clip")
    assert f"{where / 'processor_config.json'}: images of this kind are not supported" in message
    assert f"(image_processor):\n  value: found {value!r}" in message


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ({"eos_token_id": 99}, 99),
        ({"eos_token_id": 2**31}, 2**31),
        ({"eos_token_id": 10**30}, "1000"),
        ({"eos_token_id": -1}, -1),
    ],
)
def test_the_end_token_is_of_the_vocabulary(folder, text, found):
    config = {**CLIP, "text_config": {"vocab_size": 99, **text}}
    assert f"text_config.eos_token_id: found {found}" in refusal(folder(config), "clip")
    for end in (0, 2, 98):
        config["text_config"]["eos_token_id"] = end
        assert read_architecture(folder(config), "clip").end_token == end


def test_every_activation_that_is_accepted_is_computed():
    assert set(checkpoint_config._ACTIVATIONS.values()) == set(transformer.ACTIVATIONS)


def test_one_function_for_names_and_families(folder):
    where = str(folder(CLIP))
    assert architecture_of(ModelConfig("clip", where)).patch_size == 7
    assert architecture_of(ModelConfig("vit_b16", "random")) is ARCHITECTURES["vit_b16"]
    with pytest.raises(ValueError, match="does not fit"):
        architecture_of(ModelConfig("clip_vit_b32", where))
    with pytest.raises(ValueError, match=r"'random', but .* takes its sizes from a checkpoint"):
        architecture_of(ModelConfig("clip", "random"))
    with pytest.raises(ValueError, match=r'no such architecture\. Did you mean "vit"'):
        architecture_of(ModelConfig("vitt", where))
    with pytest.raises(ValueError, match=r"no such folder.*'google/vit-base-patch16-224'"):
        architecture_of(ModelConfig("vit", "./nowhere"))


def test_the_transform_of_a_model(folder):
    where = str(folder(CLIP, preprocessor_config=IMAGES))
    assert transform_of(ModelConfig("clip", where)) == Transform(30)
    # Data can be prepared for a named architecture where its checkpoint is not.
    assert transform_of(ModelConfig("vit_b16", "./nowhere")) == Transform(224, "squash", "bilinear")
    for checkpoint in ("embedded", "random"):
        assert transform_of(ModelConfig("embedded", checkpoint)) == Transform(32)
    with pytest.raises(ValueError, match="no such architecture"):
        transform_of(ModelConfig("embeded", "embedded"))
