"""Small checkpoints of real kinds, written by torch and transformers, with random weights."""

import dataclasses
import json
import warnings
from typing import Any

import numpy as np

from matu_jax.data import ImageTask, Split, Transform
from matu_jax.models.architectures import ARCHITECTURES, TowerShape

SIZE = 16
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,-'"
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("p", "h"), ("ph", "o")]
TOKENS = [
    *ALPHABET,
    *(letter + "</w>" for letter in ALPHABET),
    *map("".join, MERGES),
    "<|startoftext|>",
    "<|endoftext|>",
]

TINY_CLIP = dataclasses.replace(
    ARCHITECTURES["clip_vit_b32"],
    name="tiny_clip",
    image_size=SIZE,
    patch_size=4,
    vision=TowerShape(32, 3, 2, 64),
    text=TowerShape(24, 2, 3, 48),
    projection=20,
    transform=Transform(SIZE),
    vocabulary=len(TOKENS),
    context=48,
)
TINY_VIT = dataclasses.replace(
    ARCHITECTURES["vit_b16"],
    name="tiny_vit",
    image_size=SIZE,
    patch_size=4,
    vision=TowerShape(32, 3, 2, 64, "gelu", 1e-12),
    transform=Transform(SIZE, "squash", "bilinear"),
)


def register(monkeypatch):
    for architecture in (TINY_CLIP, TINY_VIT):
        monkeypatch.setitem(ARCHITECTURES, architecture.name, architecture)


def vision_sizes(**changes):
    shape = TINY_CLIP.vision
    return {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.mlp_width,
        "image_size": SIZE,
        "patch_size": TINY_CLIP.patch_size,
        **changes,
    }


def text_sizes(**changes):
    shape = TINY_CLIP.text
    assert shape is not None
    return {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.mlp_width,
        "vocab_size": TINY_CLIP.vocabulary,
        "max_position_embeddings": TINY_CLIP.context,
        "bos_token_id": len(TOKENS) - 2,
        "eos_token_id": len(TOKENS) - 1,
        **changes,
    }


def clip_model(activation="quick_gelu", seed=0, **text) -> Any:
    import transformers

    config = transformers.CLIPConfig(
        vision_config=vision_sizes(hidden_act=activation, projection_dim=TINY_CLIP.projection),
        text_config=text_sizes(hidden_act=activation, **text),
        projection_dim=TINY_CLIP.projection,
    )
    return randomised(transformers.CLIPModel(config), seed)


def randomised(model, seed=0):
    """Weights large enough for every part to matter; in torch's evaluation mode."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
    return model.eval()


def save(model, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def write_tokenizer(folder):
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def images(count=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, SIZE, SIZE, 3)).astype(np.uint8)


def pixel_values(pictures, architecture):
    """What the checkpoint's own image processor makes of images of the right size."""
    import torch

    values = pictures.astype(np.float64) / 255
    values = (values - architecture.image_mean) / architecture.image_std
    return torch.tensor(values.transpose(0, 3, 1, 2), dtype=torch.float32)


def task(name="pets", classes=("cat", "dog", "photo 3"), templates=("a photo of a {}.", "{}, 7")):
    split = Split(images(2), np.zeros(2, np.int32))
    return ImageTask(
        name,
        split,
        split,
        split,
        label_space=name,
        domain=name,
        class_names=classes,
        templates=templates,
    )
