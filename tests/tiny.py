"""A checkpoint of one narrow layer, so that tests of everything around it compile in a second."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from matu_jax.models import embedded
from matu_jax.models.vit import VisionTransformer, ViTShape


def kept(result):
    """A round's result with its state as numpy arrays: the next round takes the state's buffers."""
    state = jax.tree.map(np.array, result.state)
    return dataclasses.replace(result, make_state=lambda: state)


def write_checkpoint(path, depth=1):
    shape = ViTShape(width=16, depth=depth, heads=2, mlp_width=32)
    embedded.write(path, shape, VisionTransformer(shape, rngs=nnx.Rngs(0)), np.eye(10, 16))
    return str(path)
