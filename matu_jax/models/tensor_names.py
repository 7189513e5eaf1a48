"""What our parameters are called in Hugging Face checkpoints, and how they are laid out there.

One table per kind of tower, read in both directions. Hugging Face keeps weights as (out, in), patch
kernels as convolutions, and each block's parameters apart; here kernels are `[in, out]`, patches
are a dense layer over (row, column, channel), and blocks are stacked over depth.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from matu_jax.trees import PyTree, leaf_items


class Layout(NamedTuple):
    """How one kind of array is turned; `load` and `save` are each other's inverse."""

    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


def _save_patches(kernel: np.ndarray) -> np.ndarray:
    size = math.isqrt(kernel.shape[0] // 3)
    return kernel.reshape(size, size, 3, -1).transpose(3, 2, 0, 1)


SAME = Layout(lambda x: x, lambda x: x)
TRANSPOSED = Layout(np.transpose, np.transpose)
PATCHES = Layout(lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]), _save_patches)
ONE_AXIS = Layout(lambda x: x[0], lambda x: x[None])
TWO_AXES = Layout(lambda x: x[0, 0], lambda x: x[None, None])


class Entry(NamedTuple):
    """One parameter: its path here, its name there ("{}" = the block's number), its layout."""

    path: str
    name: str
    layout: Layout


# What the projections of a block (`transformer.PROJECTIONS`) are called in checkpoint files.
CLIP_PROJECTIONS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
VIT_PROJECTIONS = {
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "out": "attention.output.dense",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
}


def _norm(path: str, name: str) -> list[Entry]:
    return [
        Entry(f"{path}/scale", f"{name}.weight", SAME),
        Entry(f"{path}/bias", f"{name}.bias", SAME),
    ]


def _blocks(prefix: str, projections: Mapping[str, str], norms: tuple[str, str]) -> list[Entry]:
    entries = _norm("blocks/norm_attention", prefix + norms[0])
    entries += _norm("blocks/norm_mlp", prefix + norms[1])
    for ours, theirs in projections.items():
        entries.append(Entry(f"blocks/{ours}/kernel", f"{prefix}{theirs}.weight", TRANSPOSED))
        entries.append(Entry(f"blocks/{ours}/bias", f"{prefix}{theirs}.bias", SAME))
    return entries


_CLIP_NORMS, _VIT_NORMS = ("layer_norm1", "layer_norm2"), ("layernorm_before", "layernorm_after")

TABLES: dict[str, list[Entry]] = {
    "clip_vision": [
        Entry("patches/kernel", "vision_model.embeddings.patch_embedding.weight", PATCHES),
        Entry("class_token", "vision_model.embeddings.class_embedding", SAME),
        Entry("positions", "vision_model.embeddings.position_embedding.weight", SAME),
        *_norm("norm_pre", "vision_model.pre_layrnorm"),
        *_blocks("vision_model.encoder.layers.{}.", CLIP_PROJECTIONS, _CLIP_NORMS),
        *_norm("norm", "vision_model.post_layernorm"),
        Entry("projection/kernel", "visual_projection.weight", TRANSPOSED),
    ],
    "clip_text": [
        Entry("tokens", "text_model.embeddings.token_embedding.weight", SAME),
        Entry("positions", "text_model.embeddings.position_embedding.weight", SAME),
        *_blocks("text_model.encoder.layers.{}.", CLIP_PROJECTIONS, _CLIP_NORMS),
        *_norm("norm", "text_model.final_layer_norm"),
        Entry("projection/kernel", "text_projection.weight", TRANSPOSED),
    ],
    "vit": [
        Entry("patches/kernel", "vit.embeddings.patch_embeddings.projection.weight", PATCHES),
        Entry("patches/bias", "vit.embeddings.patch_embeddings.projection.bias", SAME),
        Entry("class_token", "vit.embeddings.cls_token", TWO_AXES),
        Entry("positions", "vit.embeddings.position_embeddings", ONE_AXIS),
        *_blocks("vit.encoder.layer.{}.", VIT_PROJECTIONS, _VIT_NORMS),
        *_norm("norm", "vit.layernorm"),
    ],
}

# In files of a tower alone, names lack the tower's prefix: a name that tells, and the prefix.
_BARE = {"embeddings.class_embedding": "vision_model.", "embeddings.cls_token": "vit."}
_PREFIXED = ("vision_model.", "text_model.", "vit.", "visual_", "text_", "logit_", "classifier.")


def full_names(names: Iterable[str]) -> dict[str, str]:
    """Maps names with the tower's prefix, as in `TABLES`, to the names found in a file.

    CLIPVisionModel and ViTModel write their tensors without "vision_model." or "vit.".
    """
    names = list(names)
    prefix = next((prefix for tell, prefix in _BARE.items() if tell in names), "")
    return {name if name.startswith(_PREFIXED) else prefix + name: name for name in names}


def tensor_names(kind: str, shapes: PyTree) -> list[str]:
    """Names of all tensors of a tower.

    Args:
      kind: a key of `TABLES`.
      shapes: the tower's parameters or their shapes, blocks stacked.
    """
    return [name for entry, leaf in _matched(kind, shapes) for name in _names(entry, leaf)]


def from_huggingface(tensors: Mapping[str, np.ndarray], kind: str, shapes: PyTree) -> PyTree:
    """A tower's parameters out of the tensors of a checkpoint.

    Args:
      tensors: by name, with the tower's prefix (see `full_names`); further ones are not looked at.
      kind: "clip_vision", "clip_text" or "vit".
      shapes: of the parameters, blocks stacked `[depth, ...]`; a tree of nested dicts.

    Returns:
      The same tree, with NumPy arrays as leaves.

    Raises:
      ValueError: lists every tensor that is missing or has another shape, and every parameter that
        no tensor stands for.
    """
    wrong, leaves = [], []
    for entry, leaf in _matched(kind, shapes):
        names, shape = _names(entry, leaf), tuple(leaf.shape)
        row = shape[1:] if _stacked(entry) else shape
        expected = entry.layout.save(np.broadcast_to(np.float32(0), row)).shape
        found = [tensors.get(name) for name in names]
        for name, tensor in zip(names, found, strict=True):
            if tensor is None:
                wrong.append(f"  {name}: missing, expected {list(expected)}")
            elif tensor.shape != expected:
                wrong.append(f"  {name}: found {list(tensor.shape)}, expected {list(expected)}")
        if not wrong:
            rows = [entry.layout.load(tensor) for tensor in found if tensor is not None]
            leaves.append(np.stack(rows) if _stacked(entry) else rows[0])
    if wrong:
        raise ValueError("tensors missing or of another shape\n" + "\n".join(wrong))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def to_huggingface(tree: PyTree, kind: str) -> dict[str, np.ndarray]:
    """The tensors of a tower as a checkpoint of the hub holds them; `from_huggingface` reversed.

    Args:
      tree: the tower's parameters, nested dicts, blocks stacked `[depth, ...]`, without adapters.
      kind: "clip_vision", "clip_text" or "vit".

    Returns:
      Contiguous arrays by name, with the tower's prefix, as in CLIPModel's and
      ViTForImageClassification's files.

    Raises:
      ValueError: lists every parameter that has no name there, such as an adapter's.
    """
    tensors = {}
    for entry, leaf in _matched(kind, tree):
        array = np.asarray(leaf)
        rows = array if _stacked(entry) else [array]
        for name, row in zip(_names(entry, leaf), rows, strict=True):
            tensors[name] = entry.layout.save(row).copy(order="C")
    return tensors


def _stacked(entry: Entry) -> bool:
    return "{}" in entry.name


def _names(entry: Entry, leaf: Any) -> list[str]:
    if not _stacked(entry):
        return [entry.name]
    return [entry.name.format(i) for i in range(leaf.shape[0])]


def _matched(kind: str, tree: PyTree) -> list[tuple[Entry, Any]]:
    entries = {entry.path: entry for entry in TABLES[kind]}
    items = leaf_items(tree)
    unknown = [path for path, _ in items if path not in entries]
    if unknown:
        raise ValueError(
            f"parameters without a name in Hugging Face's {kind} checkpoints: "
            f"{', '.join(unknown)}. Merge adapters into their kernels first."
        )
    return [(entries[path], leaf) for path, leaf in items]
