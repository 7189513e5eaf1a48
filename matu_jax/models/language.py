"""Adapters of language models in Flax NNX, as PEFT adapters of the same model in transformers.

For models of the shape of Llama, Qwen2 and their like: decoder layers with the projections q_proj,
k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj, called so on both sides, whose kernels
have the same values. LoRA as `qwix` adds it to any NNX module.
"""

import re
from pathlib import Path

import numpy as np

from matu_jax.models.exporting import base_model, write_peft
from matu_jax.trees import PyTree, leaf_items

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = dict.fromkeys(_ATTENTION, "self_attn") | dict.fromkeys(_MLP, "mlp")
"""The projections of a decoder layer, and the part of it in which transformers has each."""

_LEAF = re.compile(r"(?:.*/)?layers/(\d+)/(?:.*/)?([a-z]+_proj)/\w+_lora_([ab])")


def write_adapter(folder: Path, adapters: PyTree, *, base: str, alpha: float) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads on a `...ForCausalLM`.

    Args:
      folder: where adapter_config.json and adapter_model.safetensors go; it has to be there.
      adapters: base plus task vector of what trained, leaves by path
        `layers/<number>/.../<projection>/<weight>_lora_a` `[..., in, rank]`, of which all axes but
        the last are inputs, and `..._lora_b` `[rank, out, ...]`, of which all but the first are
        outputs.
      base: the base model's folder or hub name.
      alpha: as given to `qwix.LoraProvider`: adapters are scaled by alpha / rank.

    Raises:
      ValueError: for a leaf of another path, a matrix without its partner or of another rank, a
        trained adapter that is no float, or as `exporting.write_peft`.
    """
    pairs: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    for path, leaf in leaf_items(adapters):
        found = _LEAF.fullmatch(path)
        if found is None or found[2] not in PROJECTIONS:
            raise ValueError(
                f"adapters: {path}: expected layers/<number>/.../<projection>/<weight>_lora_a or "
                f"_lora_b, of one of {', '.join(PROJECTIONS)}. What PEFT shall load on a model of "
                "transformers has to train these alone: filter with nnx.LoRAParam."
            )
        matrix, side = np.asarray(leaf, np.float32), found[3]
        shape = (-1, matrix.shape[-1]) if side == "a" else (matrix.shape[0], -1)
        pairs.setdefault((int(found[1]), found[2]), {})[side] = matrix.reshape(shape).T
    ranks = {}
    for (layer, name), pair in pairs.items():
        where = f"adapters: layer {layer}, {name}"
        if set(pair) != {"a", "b"}:
            raise ValueError(f"{where}: found lora_{min(pair)} alone, expected lora_a and lora_b.")
        ranks[where] = rank = pair["a"].shape[0]
        if rank != pair["b"].shape[1]:
            raise ValueError(
                f"{where}: lora_a is of rank {rank}, lora_b of rank {pair['b'].shape[1]}."
            )
        if rank != next(iter(ranks.values())):
            raise ValueError(
                f"{where}: is of rank {rank}, and {next(iter(ranks))} of rank "
                f"{next(iter(ranks.values()))}; expected one rank."
            )
    tensors = {
        f"base_model.model.model.layers.{layer}.{PROJECTIONS[name]}.{name}.lora_{side.upper()}"
        ".weight": matrix
        for (layer, name), pair in pairs.items()
        for side, matrix in pair.items()
    }
    checkpoint, revision = base_model(base)
    modules = sorted({f"{layer}\\.{PROJECTIONS[name]}\\.{name}" for layer, name in pairs})
    settings = {
        "base_model_name_or_path": checkpoint,
        "revision": revision,
        "r": next(iter(ranks.values()), 0),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": rf"model\.layers\.({'|'.join(modules)})",
        "task_type": "CAUSAL_LM",
    }
    write_peft(folder, tensors, settings)
