"""What a Hugging Face checkpoint says of itself: its sizes, and the images it takes.

Importing this file does not load Flax, so that data preparation can read it.
"""

import dataclasses
import math
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, Field, ValidationInfo, field_validator

from matu_jax.data import Transform
from matu_jax.json_files import checked
from matu_jax.models.architectures import (
    ARCHITECTURES,
    CLIP_MEAN,
    CLIP_STD,
    FAMILIES,
    Architecture,
    TowerShape,
    check_architecture,
)
from matu_jax.models.choices import ModelConfig
from matu_jax.models.huggingface import IMAGE_FILES, folder_of, read_json

_USUAL_END = 49407  # the end token of OpenAI's vocabulary, and transformers' default
# transformers' numbers of resampling filters, and its names of activations.
_RESAMPLE = {2: "bilinear", 3: "bicubic"}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def _square(value: Any) -> Any:
    """One number for height and width, which some files give as two."""
    if isinstance(value, list) and len(value) == 2:
        if value[0] != value[1]:
            raise ValueError("only square images and patches are supported")
        return value[0]
    return value


def _given(value: Any) -> Any:
    """An empty object for null, as for what is absent; whatever else was given is checked."""
    return {} if value is None else value


def _known_activation(value: Any) -> Any:
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise ValueError(f"expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


# Sizes beyond every checkpoint's are refused before anything is made of them.
_Size = Annotated[int, Field(ge=1, le=10_000_000)]
_Depth = Annotated[int, Field(ge=1, le=1000)]
_Pixels = Annotated[int, BeforeValidator(_square), Field(ge=1, le=10_000)]
_Epsilon = Annotated[float, Field(gt=0, lt=1)]
_Activation = Annotated[str, BeforeValidator(_known_activation)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Mean = Annotated[list[_Finite], Field(min_length=3, max_length=3)]
_Std = Annotated[
    list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=3, max_length=3)
]


class _Tower(BaseModel):
    """A tower in config.json. Here and below, defaults are transformers'."""

    hidden_size: _Size
    num_attention_heads: _Size
    num_hidden_layers: _Depth = 12
    intermediate_size: _Size
    hidden_act: _Activation
    layer_norm_eps: _Epsilon = 1e-5
    head_dim: int | None = None

    @field_validator("num_attention_heads", "head_dim")
    @classmethod
    def _divides(cls, value: int | None, info: ValidationInfo) -> int | None:
        width, heads = info.data.get("hidden_size"), info.data.get("num_attention_heads", value)
        if width is None or not heads or value is None:
            return value
        if width % heads:
            raise ValueError(f"hidden_size, {width}, is no multiple of it")
        if info.field_name == "head_dim" and value * heads != width:
            raise ValueError(f"only hidden_size / heads, {width // heads}, is supported")
        return value

    @property
    def shape(self) -> TowerShape:
        """The tower's shape."""
        return TowerShape(
            self.hidden_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.intermediate_size,
            self.hidden_act,
            self.layer_norm_eps,
        )


class _Vision(_Tower):
    """An image tower."""

    hidden_size: _Size = 768
    num_attention_heads: _Size = 12
    intermediate_size: _Size = 3072
    image_size: _Pixels = 224
    patch_size: _Pixels
    num_channels: Literal[3] = 3

    @field_validator("patch_size")
    @classmethod
    def _fits(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("image_size", value):
            raise ValueError(f"image_size is only {info.data['image_size']}")
        return value


class _ViT(_Vision):
    patch_size: _Pixels = 16
    hidden_act: _Activation = "gelu"
    layer_norm_eps: _Epsilon = 1e-12
    qkv_bias: Literal[True] = True


class _CLIPVision(_Vision):
    patch_size: _Pixels = 32
    hidden_act: _Activation = "quick_gelu"
    projection_dim: _Size = 512


class _CLIPText(_Tower):
    hidden_size: _Size = 512
    num_attention_heads: _Size = 8
    intermediate_size: _Size = 2048
    hidden_act: _Activation = "quick_gelu"
    vocab_size: _Size = 49408
    max_position_embeddings: _Size = 77
    eos_token_id: Annotated[int, Field(ge=0)] = _USUAL_END

    @field_validator("eos_token_id")
    @classmethod
    def _in_vocabulary(cls, value: int, info: ValidationInfo) -> int:
        size = info.data.get("vocab_size")
        # 2 stands for the highest token of a text: see TextTower. The default, which transformers
        # writes for any vocabulary, matters only to frozen heads: zero_shot_heads refuses it there.
        if size is not None and value not in (2, _USUAL_END) and value >= size:
            raise ValueError(
                f"expected a token of the vocabulary, 0 to {size - 1} (vocab_size is {size})"
            )
        return value


class _CLIP(BaseModel):
    vision_config: Annotated[_CLIPVision, BeforeValidator(_given)] = _CLIPVision()
    text_config: Annotated[_CLIPText, BeforeValidator(_given)] = _CLIPText()
    projection_dim: _Size = 512


class _Images(BaseModel):
    """preprocessor_config.json."""

    size: int | dict[str, int | None]
    crop_size: int | dict[str, int | None]
    image_mean: _Mean
    image_std: _Std
    resample: Literal[2, 3]
    do_resize: Literal[True] = True
    do_center_crop: Literal[True] = True
    do_rescale: Literal[True] = True
    do_normalize: Literal[True] = True
    rescale_factor: float = 1 / 255


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture of an experiment, as its checkpoint has it.

    Args:
      config: architecture, one of `ARCHITECTURES` (which the checkpoint must agree with) or of
        `FAMILIES` (all is taken from the checkpoint), and checkpoint, which is fetched if need be.

    Raises:
      ValueError: for an unknown architecture, a checkpoint that cannot be found or read or is of
        another architecture, or a family without a checkpoint.
    """
    name = config.architecture
    check_architecture(name)
    if name == "embedded":
        raise ValueError("config.model.architecture: 'embedded' is no Hugging Face checkpoint.")
    folder = folder_of(config)
    if folder is not None:
        if name in ARCHITECTURES:
            return checked_architecture(folder, ARCHITECTURES[name])
        return read_architecture(folder, name)
    if name in FAMILIES:
        raise ValueError(
            f"config.model.checkpoint: found 'random', but config.model.architecture = {name!r} "
            f"takes its sizes from a checkpoint. Give one, such as {FAMILIES[name]!r}, or an "
            f"architecture with sizes: {', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[name]


def read_architecture(folder: Path, family: str, name: str = "") -> Architecture:
    """Reads a checkpoint's config.json and what it says of its images.

    What config.json leaves out is what transformers takes it to be. What preprocessor_config.json
    (or processor_config.json) leaves out, or where there is none, is the family's own: for CLIP
    the shortest side resized bicubically and OpenAI's mean and standard deviation, for ViT both
    sides resized bilinearly and pixels from -1 to 1.

    Args:
      folder: of the checkpoint.
      family: one of `FAMILIES`.
      name: what messages call the architecture that was asked for; "" = the family.

    Returns:
      The architecture; without a text tower where the checkpoint has none, and without a
      projection where it is a CLIPVisionModel.

    Raises:
      ValueError: for another family, or lists every field that is not supported.
    """
    file, name = folder / "config.json", name or family
    config = read_json(file)
    kinds = {"clip": ("clip", "clip_vision_model"), "vit": ("vit",)}[family]
    kind = config.get("model_type")
    if kind not in kinds:
        raise ValueError(
            f"{file}: model_type is {reprlib.repr(kind)}, but config.model.architecture {name} "
            f"needs {' or '.join(map(repr, kinds))}. Choose the architecture that fits the "
            f"checkpoint; there are: {', '.join([*ARCHITECTURES, *FAMILIES])}."
        )
    where = f"{file}: this checkpoint cannot be used"
    text = projection = None
    if kind == "clip":
        whole = checked(_CLIP, config, where)
        vision, text, projection = whole.vision_config, whole.text_config, whole.projection_dim
    elif kind == "clip_vision_model":
        vision = checked(_CLIPVision, config, where)
        if config.get("architectures") != ["CLIPVisionModel"]:
            projection = vision.projection_dim
    else:
        vision = checked(_ViT, config, where)
    transform, mean, std = _images(folder, family, vision.image_size)
    return Architecture(
        name=family,
        family=family,
        hub_name=FAMILIES[family],
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        vision=vision.shape,
        text=text.shape if text else None,
        projection=projection,
        image_mean=mean,
        image_std=std,
        transform=transform,
        vocabulary=text.vocab_size if text else 0,
        context=text.max_position_embeddings if text else 0,
        end_token=text.eos_token_id if text else 2,
    )


def checked_architecture(folder: Path, architecture: Architecture) -> Architecture:
    """Compares what a checkpoint says of itself with an architecture.

    Args:
      folder: of the checkpoint.
      architecture: what the experiment asks for.

    Returns:
      The architecture with the checkpoint's own activations, epsilons and end token; without a text
      tower where the checkpoint has none, and without a projection where it is a CLIPVisionModel.

    Raises:
      ValueError: lists every field that differs, or as `read_architecture`.
    """
    name, expected = architecture.name, architecture
    found = read_architecture(folder, expected.family, name)
    pairs = [
        ("image_size", expected.image_size, found.image_size),
        ("patch_size", expected.patch_size, found.patch_size),
        *_sizes("vision", expected.vision, found.vision),
    ]
    if found.projection is not None:
        pairs.append(("projection", expected.projection, found.projection))
    if found.text is not None and expected.text is not None:
        pairs += _sizes("text", expected.text, found.text)
        pairs.append(("vocabulary", expected.vocabulary, found.vocabulary))
        pairs.append(("context", expected.context, found.context))
    images = [
        ("image_mean", expected.image_mean, found.image_mean),
        ("image_std", expected.image_std, found.image_std),
        ("resize", expected.transform.resize, found.transform.resize),
        ("resample", expected.transform.resample, found.transform.resample),
    ]
    for subject, compared in (
        (f"config.model.architecture {name} does not fit {folder / 'config.json'}", pairs),
        (f"{folder} asks for other images than config.model.architecture {name}", images),
    ):
        wrong = [
            f"  {field}: {name} has {wanted}, the checkpoint {here}"
            for field, wanted, here in compared
            if not _same(wanted, here)
        ]
        if wrong:
            raise ValueError(
                f"{subject}:\n" + "\n".join(wrong) + "\nChoose the architecture that the "
                f"checkpoint was made with, or {expected.family!r}, which takes its sizes from the "
                "checkpoint."
            )
    return dataclasses.replace(found, name=name, hub_name=expected.hub_name)


def _sizes(tower: str, expected: TowerShape, found: TowerShape) -> list[tuple[str, Any, Any]]:
    return [
        (f"{tower}.{field}", getattr(expected, field), getattr(found, field))
        for field in ("width", "depth", "heads", "mlp_width")
    ]


def _images(
    folder: Path, family: str, image_size: int
) -> tuple[Transform, tuple[float, float, float], tuple[float, float, float]]:
    """The transform, mean and standard deviation of a checkpoint's images."""
    file = next((folder / x for x in IMAGE_FILES if (folder / x).is_file()), folder)
    found = {} if file == folder else read_json(file)
    where = f"{file}: images of this kind are not supported"
    if file.name == IMAGE_FILES[1]:  # a whole processor's: the part for images is inside
        found = _given(found.get("image_processor"))
        where = f"{where} (image_processor)"
    remedy = f"Mend the file, or remove it: then {family}'s usual images are taken."
    clip = family == "clip"
    mean, std = (CLIP_MEAN, CLIP_STD) if clip else ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    usual = {
        "size": image_size,
        "crop_size": image_size,
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": 3 if clip else 2,
    }
    if isinstance(found, dict):
        found = usual | {key: value for key, value in found.items() if value is not None}
        if not clip:  # which has no crop; some files name one all the same
            found |= {"crop_size": image_size, "do_center_crop": True}
    try:
        images = checked(_Images, found, where)
    except ValueError as error:
        raise ValueError(f"{error}\n{remedy}") from None
    for field, size in (("size", images.size), ("crop_size", images.crop_size)):
        sizes = set(size.values()) - {None} if isinstance(size, dict) else {size}
        if sizes != {image_size}:
            raise ValueError(
                f"{file}: {field} is {size}, but config.json's image_size {image_size}. {remedy}"
            )
    if not math.isclose(images.rescale_factor, 1 / 255, rel_tol=1e-4):
        raise ValueError(
            f"{file}: rescale_factor is {images.rescale_factor}, expected 1/255. {remedy}"
        )
    resize = "shortest_side" if clip else "squash"
    if isinstance(images.size, dict):
        resize = "shortest_side" if "shortest_edge" in images.size else "squash"
    transform = Transform(image_size, resize, _RESAMPLE[images.resample])
    return transform, _three(images.image_mean), _three(images.image_std)


def _three(values: list[float]) -> tuple[float, float, float]:
    first, second, third = values
    return first, second, third


def _same(expected: Any, found: Any) -> bool:
    if expected is None or isinstance(expected, str):
        return expected == found
    return bool(np.allclose(expected, found, atol=1e-6))
