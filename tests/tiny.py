"""A checkpoint of one narrow layer, so that tests of everything around it compile in a second."""

import dataclasses
import json

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from matu_jax.models.vit import VisionTransformer, ViTShape
from matu_jax.trees import leaf_items


def kept(result):
    """A round's result with its state as numpy arrays: the next round takes the state's buffers."""
    state = jax.tree.map(np.array, result.state)
    return dataclasses.replace(result, make_state=lambda: state)


def write_checkpoint(path, depth=1):
    shape = ViTShape(width=16, depth=depth, heads=2, mlp_width=32)
    state = nnx.state(VisionTransformer(shape, rngs=nnx.Rngs(0)), nnx.Param)
    tensors = {name: np.asarray(leaf) for name, leaf in leaf_items(nnx.to_pure_dict(state))}
    tensors["label_vectors"] = np.asarray(jax.numpy.eye(10, 16))
    save_file(tensors, path, {"shape": json.dumps(vars(shape))})
    return str(path)
