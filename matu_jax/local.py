"""One slot's local training, mapped over slots."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from matu_jax.algorithms.base import LocalRule
from matu_jax.config import LocalConfig
from matu_jax.models import Model
from matu_jax.parallel import map_slots
from matu_jax.trees import PyTree


class Trained(NamedTuple):
    """Results of a round's local training.

    Attributes:
      vectors: task vectors, leaves `[slots, ...]`; zeros where training went wrong.
      loss: float32 `[slots]`, mean over the round's steps.
      finite: bool `[slots]`, False where the loss or a parameter is no longer a finite number.
    """

    vectors: PyTree
    loss: jax.Array
    finite: jax.Array


def optimizer(config: LocalConfig) -> optax.GradientTransformation:
    """The optax optimiser that the config names."""
    if config.optimizer == "adam":
        return optax.adam(config.learning_rate)
    if config.optimizer == "adamw":
        return optax.adamw(config.learning_rate, weight_decay=config.weight_decay)
    return optax.sgd(config.learning_rate, momentum=config.momentum)


def class_mask(num_classes: jax.Array, width: int) -> jax.Array:
    """0 for a task's classes, a large negative number for those it lacks: float32 `[width]`."""
    return jnp.where(jnp.arange(width) < num_classes, 0.0, -1e9)


def local_training(
    model: Model, config: LocalConfig, rule: LocalRule, mesh: Mesh
) -> Callable[..., Trained]:
    """Makes the function that trains all slots of a round.

    Args:
      model: what is trained.
      config: steps, optimiser, and how many slots at once.
      rule: the algorithm's penalty.
      mesh: the devices.

    Returns:
      `(parameters, downloads, num_classes, images, labels) -> Trained`, to be jitted: parameters
      is `(model.base, model.frozen)`, downloads are task vectors with leaves `[slots, ...]`,
      num_classes int32 `[slots]`, images uint8 `[slots, steps, batch, height, width, channels]`,
      labels int32 `[slots, steps, batch]`. The optimiser starts afresh.
    """
    tx = optimizer(config)

    def train_slot(
        parameters: tuple[PyTree, PyTree],
        download: PyTree,
        num_classes: jax.Array,
        images: jax.Array,
        labels: jax.Array,
    ) -> Trained:
        base, frozen = parameters

        def loss(vector, batch, targets):
            logits = model.logits(jax.tree.map(jnp.add, base, vector), frozen, batch)
            logits = logits + class_mask(num_classes, logits.shape[-1])[None]
            value = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
            return value + rule.penalty(vector, download) if rule.penalty else value

        def step(carry: tuple[PyTree, Any], batch):
            vector, state = carry
            value, gradient = jax.value_and_grad(loss)(vector, *batch)
            with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and counts
                updates, state = tx.update(gradient, state, vector)
            return (optax.apply_updates(vector, updates), state), value

        (vector, _), losses = jax.lax.scan(step, (download, tx.init(download)), (images, labels))
        leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(vector)]
        finite = jnp.stack([*leaves, jnp.isfinite(losses).all()]).all()
        vector = jax.tree.map(lambda leaf: jnp.where(finite, leaf, 0.0), vector)
        return Trained(vector, losses.mean(), finite)

    return map_slots(train_slot, mesh, parallel_slots=config.parallel_slots)
