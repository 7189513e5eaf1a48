"""What a Hugging Face checkpoint says of itself, compared with the architecture asked for."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field

from matu_jax.json_files import checked
from matu_jax.models.architectures import Architecture, TowerShape
from matu_jax.models.huggingface import read_json
from matu_jax.models.transformer import ACTIVATIONS

_RESAMPLE: dict[Any, str] = {2: "bilinear", 3: "bicubic"}

# What transformers takes a field to be where config.json leaves it out.
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
}
_DEFAULTS = {
    "clip_vision": {**_VISION_DEFAULTS, "patch_size": 32, "hidden_act": "quick_gelu"},
    "vit": {**_VISION_DEFAULTS, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    "clip_text": {
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "hidden_act": "quick_gelu",
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "eos_token_id": 49407,
    },
}

# The largest numbers are far beyond any model, and keep a damaged file from asking for all memory.
_Width = Annotated[int, Field(ge=1, le=1 << 20)]
_Depth = Annotated[int, Field(ge=1, le=10_000)]
_Numbers = list[Annotated[float, Field(allow_inf_nan=False)]]


class _Tower(BaseModel):
    """What both towers have."""

    hidden_size: _Width
    num_hidden_layers: _Depth
    num_attention_heads: _Depth
    intermediate_size: _Width
    hidden_act: str
    layer_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5


class _Vision(_Tower):
    """A plain vision transformer, or the vision_config of a CLIP."""

    image_size: _Depth
    patch_size: _Depth


class _Text(_Tower):
    """The text_config of a CLIP."""

    vocab_size: Annotated[int, Field(ge=1, le=1 << 24)]
    max_position_embeddings: _Width
    eos_token_id: Annotated[int, Field(ge=0)]


class _Whole(BaseModel):
    """What config.json says outside its towers."""

    model_type: str | None = None
    architectures: list[str] | None = None
    projection_dim: _Width = 512
    vision_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None


class _Preprocessor(BaseModel):
    """preprocessor_config.json."""

    size: int | dict[str, int | float | None] | None = None
    resample: int | str | None = None
    image_mean: _Numbers | None = None
    image_std: _Numbers | None = None


def checked_architecture(folder: Path, architecture: Architecture) -> Architecture:
    """Compares a checkpoint's config.json and preprocessor_config.json with an architecture.

    Args:
      folder: of the checkpoint.
      architecture: what the experiment asks for.

    Returns:
      The architecture with the checkpoint's own activations, epsilons and end token; without a text
      tower where the checkpoint has none, and without a projection where it is a CLIPVisionModel.

    Raises:
      ValueError: lists every field that differs.
    """
    file = folder / "config.json"
    config, name = read_json(file), architecture.name
    known = checked(_Whole, config, f"{file} is damaged, or of another kind")
    kinds = {"clip": ("clip", "clip_vision_model"), "vit": ("vit",)}[architecture.family]
    kind = known.model_type
    if kind not in kinds:
        raise ValueError(
            f"{file}: model_type is {kind!r}, but config.model.architecture {name} needs "
            f"{' or '.join(map(repr, kinds))}. Choose the architecture that fits the checkpoint."
        )
    whole = kind == "clip"
    inner = (known.vision_config or {}) if whole else config
    defaults = _DEFAULTS["vit" if kind == "vit" else "clip_vision"]
    vision = checked(_Vision, defaults | inner, f"{file}, {'vision_config' if whole else 'vision'}")
    pairs = [
        ("image_size", architecture.image_size, vision.image_size),
        ("patch_size", architecture.patch_size, vision.patch_size),
        *_sizes("vision", architecture.vision, vision),
    ]
    found = dataclasses.replace(architecture, vision=_tower(file, architecture.vision, vision))
    if architecture.family == "clip":
        if known.architectures == ["CLIPVisionModel"]:
            found = dataclasses.replace(found, projection=None)
        else:
            pairs.append(("projection", architecture.projection, known.projection_dim))
    if whole and architecture.text is not None:
        text = _DEFAULTS["clip_text"] | (known.text_config or {})
        text = checked(_Text, text, f"{file}, text_config")
        pairs += _sizes("text", architecture.text, text)
        pairs.append(("vocabulary", architecture.vocabulary, text.vocab_size))
        pairs.append(("context", architecture.context, text.max_position_embeddings))
        tower = _tower(file, architecture.text, text)
        found = dataclasses.replace(found, text=tower, end_token=text.eos_token_id)
    else:
        found = dataclasses.replace(found, text=None)
    wrong = [
        f"  {field}: {name} has {expected}, the checkpoint {here}"
        for field, expected, here in pairs
        if expected != here
    ]
    if wrong:
        raise ValueError(
            f"config.model.architecture {name} does not fit {file}:\n"
            + "\n".join(wrong)
            + "\nChoose the architecture that the checkpoint was made with."
        )
    _check_preprocessor(folder, architecture)
    return found


def _sizes(tower: str, shape: TowerShape, config: _Tower) -> list[tuple[str, Any, Any]]:
    return [
        (f"{tower}.width", shape.width, config.hidden_size),
        (f"{tower}.depth", shape.depth, config.num_hidden_layers),
        (f"{tower}.heads", shape.heads, config.num_attention_heads),
        (f"{tower}.mlp_width", shape.mlp_width, config.intermediate_size),
    ]


def _tower(file: Path, shape: TowerShape, config: _Tower) -> TowerShape:
    activation = config.hidden_act
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{file}: hidden_act is {activation!r}, expected one of {', '.join(ACTIVATIONS)}."
        )
    return dataclasses.replace(shape, activation=activation, epsilon=config.layer_norm_eps)


def _check_preprocessor(folder: Path, architecture: Architecture) -> None:
    """Compares what the checkpoint says of its images, if it does."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return
    found, transform = checked(_Preprocessor, read_json(file), str(file)), architecture.transform
    size, resample = found.size, found.resample
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    pairs = [
        ("image_mean", list(architecture.image_mean), found.image_mean),
        ("image_std", list(architecture.image_std), found.image_std),
        ("size", architecture.image_size, size),
        ("resample", transform.resample, _RESAMPLE.get(resample, resample)),
    ]
    wrong = [
        f"  {field}: {architecture.name} has {expected}, the checkpoint {here}"
        for field, expected, here in pairs
        if here is not None and not _same(expected, here)
    ]
    if wrong:
        raise ValueError(
            f"{file} asks for other images than config.model.architecture {architecture.name}:\n"
            + "\n".join(wrong)
            + "\nChoose the architecture that the checkpoint was made with."
        )


def _same(expected: Any, found: Any) -> bool:
    if isinstance(expected, str) or isinstance(found, str):
        return expected == found
    return np.shape(expected) == np.shape(found) and np.allclose(expected, found, atol=1e-6)
