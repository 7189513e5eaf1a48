"""Fine-tuned parameters as the ecosystem keeps them: PEFT adapters and merged checkpoints.

PEFT (Mangrulkar et al. 2022) keeps lora_A as (rank, in) and lora_B as (out, rank), and adds
lora_alpha / r times their product, which is what `transformer.Linear` computes.
"""

import dataclasses
import json
import re
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from matu_jax.json_files import is_own
from matu_jax.models import huggingface
from matu_jax.models.architectures import Architecture
from matu_jax.models.choices import ModelConfig
from matu_jax.models.tensor_names import (
    CLIP_PROJECTIONS,
    from_huggingface,
    tensor_names,
    to_huggingface,
)
from matu_jax.models.tensors import some_of
from matu_jax.trees import PyTree, leaf_items

# PEFT names the modules as transformers 5 has them in memory, which for plain vision transformers
# is not what checkpoint files call them.
_VIT_MODULES = {
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "out": "attention.o_proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
_MODULES = {
    "clip": ("vision_model.encoder.layers", CLIP_PROJECTIONS, "CLIPVisionModelWithProjection"),
    "vit": ("vit.layers", _VIT_MODULES, "ViTForImageClassification"),
}


def _modules(architecture: Architecture) -> tuple[str, dict[str, str], str]:
    """Prefix and names of the modules, and the transformers class that has them."""
    if architecture.family == "clip" and architecture.projection is None:
        return "encoder.layers", CLIP_PROJECTIONS, "CLIPVisionModel"
    return _MODULES[architecture.family]


def features_code(architecture: Architecture, kind: str) -> str:
    """Python code that gives `features`, what a head takes, of a `model` that was exported.

    Args:
      architecture: the model's.
      kind: "merged" or "peft".
    """
    model_class = _modules(architecture)[2]
    if model_class == "ViTForImageClassification":
        # Called as a whole it classifies, an adapted one with the head of its base.
        tower = "model.base_model.model.vit" if kind == "peft" else "model.vit"
        return f"{tower}(pixel_values).last_hidden_state[:, 0]"
    output = "pooler_output" if model_class == "CLIPVisionModel" else "image_embeds"
    return f"model(pixel_values).{output}"


def images_text(architecture: Architecture) -> str:
    """In words, how an image file becomes the `pixel_values` that a model takes."""
    transform = architecture.transform
    size = f"{transform.size} x {transform.size}"
    if transform.resize == "squash":
        resized = f"resized to {size} pixels ({transform.resample})"
    else:
        resized = f"shortest side to {transform.size} pixels ({transform.resample}), centre {size}"
    mean, std = (
        ", ".join(f"{value:.6g}" for value in values)
        for values in (architecture.image_mean, architecture.image_std)
    )
    return (
        "turned as their EXIF says, what is transparent over white, samples of more than 8 bits "
        f"scaled to 8, RGB, {resized}, divided by 255, minus ({mean}), divided by ({std})"
    )


def base_model(checkpoint: str) -> tuple[str, str | None]:
    """A base model as others find it: an absolute folder, or a hub name and its revision.

    Links are named as they were given, not by what they point to.
    """
    if Path(checkpoint).expanduser().is_dir():
        return str(Path(checkpoint).expanduser().absolute()), None
    name, _, revision = checkpoint.partition("@")
    return name, revision or None


def write_adapter(
    folder: Path, adapters: PyTree, config: ModelConfig, architecture: Architecture
) -> str:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads.

    Args:
      folder: where adapter_config.json and adapter_model.safetensors go.
      adapters: `{"blocks": {projection: {"lora_a": [depth, in, rank], "lora_b": [depth, rank,
        out]}}}`.
      config: rank, alpha, targets and dropout.
      architecture: the base model's.

    Returns:
      The name of the transformers class that the adapter fits.

    Raises:
      ValueError: if every lora_b is zero, so that the adapter would change nothing; or as
        `save_checked`.
    """
    prefix, names, model_class = _modules(architecture)
    tensors = {}
    for projection, pair in adapters["blocks"].items():
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            for layer, matrix in enumerate(np.asarray(pair[ours], np.float32)):
                name = f"{prefix}.{layer}.{names[projection]}.{theirs}.weight"
                tensors[f"base_model.model.{name}"] = matrix.T
    targets = "|".join(re.escape(names[projection]) for projection in adapters["blocks"])
    settings = {
        "base_model_name_or_path": base_model(config.checkpoint)[0],
        "revision": base_model(config.checkpoint)[1],
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": rf"{re.escape(prefix)}\.\d+\.({targets})",
        "task_type": None,
    }
    write_peft(folder, tensors, settings)
    return model_class


def write_peft(
    folder: Path, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json.

    Args:
      folder: where they go.
      tensors: by PEFT's names, such as "base_model.model.....lora_A.weight".
      settings: of the config, besides what every LoRA adapter has.

    Raises:
      ValueError: if every lora_B is zero, so that the adapter would change nothing; or as
        `save_checked`.
    """
    if not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name):
        raise ValueError(
            "every lora_B is zero: the adapter would change nothing. The run has not trained it."
        )
    save_checked(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    common = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    text = json.dumps(common | dict(settings), indent=2)
    (folder / "adapter_config.json").write_text(text + "\n")


def merged_tower(params: PyTree, frozen: PyTree, config: ModelConfig) -> PyTree:
    """The image tower with its adapters added into the kernels, float32, blocks stacked.

    Args:
      params: what was trained, without heads: adapters, or the whole tower.
      frozen: the rest of the tower; not used where everything was trained.
      config: rank and alpha.
    """
    if config.trainable == "full":
        return params
    tower = {**frozen, "blocks": dict(frozen["blocks"])}
    for projection, pair in params["blocks"].items():
        a, b = (np.asarray(pair[name], np.float64) for name in ("lora_a", "lora_b"))
        layer = tower["blocks"][projection]
        kernel = np.asarray(layer["kernel"], np.float64)
        kernel = kernel + config.lora_alpha / config.lora_rank * (a @ b)
        tower["blocks"][projection] = {**layer, "kernel": kernel.astype(np.float32)}
    return tower


def write_merged(
    folder: Path,
    tower: PyTree,
    architecture: Architecture,
    source: Path | None,
    *,
    class_names: Sequence[str],
    head: dict[str, np.ndarray],
) -> str:
    """Writes a checkpoint that transformers' `from_pretrained` loads.

    Args:
      folder: where config.json and model.safetensors go, and the tokenizer's and preprocessor's
        files of the source.
      tower: the image tower's parameters, adapters merged.
      architecture: the tower's.
      source: the checkpoint that was fine-tuned, whose other tensors are kept (CLIP's text tower);
        None = the image tower alone is written.
      class_names: of the head.
      head: "weight" `[classes, features]`, and "bias" `[classes]` of a trained one. A plain vision
        transformer takes it as its classifier.

    Returns:
      The name of the transformers class to load it with.

    Raises:
      ValueError: as `save_checked`, or if the files give another image tower than the one written.
    """
    kind = "clip_vision" if architecture.family == "clip" else "vit"
    tensors = to_huggingface(tower, kind)
    model_class = _modules(architecture)[2]
    config = _config_json(architecture) if source is None else None
    if source is not None:
        config = huggingface.read_json(source / "config.json")
        for name in (*huggingface.IMAGE_FILES, *huggingface.TOKENIZER_FILES):
            if (source / name).is_file() and is_own(source / name):
                shutil.copyfile(source / name, folder / name)
    assert config is not None
    if kind == "vit":
        bias = head.get("bias", np.zeros(len(class_names), np.float32))
        tensors |= {"classifier.weight": head["weight"], "classifier.bias": bias}
        config["architectures"] = [model_class]
        config["id2label"] = {str(i): name for i, name in enumerate(class_names)}
        config["label2id"] = {name: i for i, name in enumerate(class_names)}
    elif source is not None:
        files = huggingface.tensor_files(source)
        others = [name for name in files if name not in tensors and "position_ids" not in name]
        kept = huggingface.read_tensors(files, others)
        tensors = {files[name][1] if name in files else name: x for name, x in tensors.items()}
        tensors |= {files[name][1]: tensor for name, tensor in kept.items()}
        if architecture.projection is not None and "vision_config" in config:
            # Where CLIPVisionModelWithProjection looks for it; some checkpoints leave it out there.
            config["vision_config"]["projection_dim"] = architecture.projection
    save_checked(tensors, folder / huggingface.WEIGHTS, {"format": "pt"})
    _check_tower(folder, tower, kind)
    config = without_dtypes(config) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return model_class


def links_left_out(source: Path | None) -> list[str]:
    """Files that `write_merged` does not copy, being links out of the source's folder."""
    if source is None:
        return []
    files = [source / name for name in (*huggingface.IMAGE_FILES, *huggingface.TOKENIZER_FILES)]
    return [file.name for file in files if file.is_file() and not is_own(file)]


def save_checked(
    tensors: Mapping[str, Any], file: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file, readable by whom the process's umask says, and reads it back.

    Raises:
      ValueError: if it holds other names, dtypes, shapes or bits than it was given.
    """
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(tensors, file, metadata)  # for the owner alone
    file.chmod(mode)
    _check_same(file, load_file(file), tensors)


def _check_same(
    file: Path, found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> None:
    def bits(array: np.ndarray | None) -> Any:
        return None if array is None else (array.dtype, array.shape, array.tobytes())

    names = found.keys() | expected.keys()
    wrong = [name for name in names if bits(found.get(name)) != bits(expected.get(name))]
    if wrong:
        raise ValueError(
            f"{file}: reads back otherwise than it was written: {some_of(wrong)}. Nothing is kept; "
            "is the disk sound?"
        )


def _check_tower(folder: Path, tower: PyTree, kind: str) -> None:
    """Checks that a checkpoint, read as any other is, gives the image tower that was written."""
    files = huggingface.tensor_files(folder)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), tower)
    tensors = huggingface.read_tensors(files, tensor_names(kind, shapes))
    found = dict(leaf_items(from_huggingface(tensors, kind, shapes)))
    expected = {path: np.asarray(leaf, np.float32) for path, leaf in leaf_items(tower)}
    _check_same(folder / huggingface.WEIGHTS, found, expected)


def model_card(
    title: str,
    header: Mapping[str, str],
    rows: Mapping[str, str],
    *,
    code: Mapping[str, str],
    settings: Mapping[str, Any],
) -> str:
    """The text of a model card, README.md.

    Args:
      title: its heading.
      header: what the Hugging Face Hub reads, as YAML.
      rows: a table of two columns.
      code: in Python, by what it does.
      settings: the run's configuration.
    """

    def cell(text: str) -> str:
        return " ".join(text.replace("|", r"\|").split())

    def scalar(text: str) -> str:
        return text if re.fullmatch(r"[A-Za-z][\w./-]*", text) else json.dumps(text)

    head = "".join(f"{key}: {scalar(value)}\n" for key, value in header.items())
    table = "".join(f"| {key} | {cell(value)} |\n" for key, value in rows.items())
    return (
        f"---\n{head}---\n\n# {title}\n\n| | |\n|---|---|\n{table}\n"
        + "".join(f"{what}:\n\n```python\n{lines}\n```\n\n" for what, lines in code.items())
        + f"The run's configuration:\n\n```json\n{json.dumps(settings, indent=2)}\n```\n"
    )


def without_dtypes(config: Any) -> Any:
    """A config.json without "dtype" and "torch_dtype", at any depth.

    transformers writes them into the configs of parts too, and loads a part by its own; what says
    nothing is loaded as the whole says, or as float32.
    """
    if isinstance(config, dict):
        kept = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
        return {key: without_dtypes(value) for key, value in kept.items()}
    if isinstance(config, list):
        return [without_dtypes(value) for value in config]
    return config


def _config_json(architecture: Architecture) -> dict[str, Any]:
    """config.json of an image tower alone."""
    shape = dataclasses.asdict(architecture.vision)
    model_class = _modules(architecture)[2]
    return {
        "architectures": [model_class],
        "model_type": "clip_vision_model" if architecture.family == "clip" else "vit",
        "hidden_size": shape["width"],
        "num_hidden_layers": shape["depth"],
        "num_attention_heads": shape["heads"],
        "intermediate_size": shape["mlp_width"],
        "hidden_act": shape["activation"],
        "layer_norm_eps": shape["epsilon"],
        "image_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        **({"projection_dim": architecture.projection} if architecture.projection else {}),
    }
