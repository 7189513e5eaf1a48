"""One slot's local training, mapped over slots."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int32

from matu_jax.algorithms.contract import LocalRule
from matu_jax.models import Model
from matu_jax.models.checks import check_loss
from matu_jax.simulation.choices import LocalConfig
from matu_jax.simulation.placement import map_slots
from matu_jax.trees import PyTree


class Trained(NamedTuple):
    """Results of a round's local training.

    Attributes:
      vectors: task vectors, leaves `[slots, ...]`; zeros where training went wrong.
      loss: float32 `[slots]`, mean over the round's steps.
      finite: bool `[slots]`, False where the loss or a parameter is no longer a finite number.
    """

    vectors: PyTree[Float[Array, "slots ..."]]
    loss: Float32[Array, "slots"]
    finite: Bool[Array, "slots"]


def optimizer(config: LocalConfig) -> optax.GradientTransformation:
    """The optax optimiser that the config names."""
    if config.optimizer == "adam":
        return optax.adam(config.learning_rate)
    if config.optimizer == "adamw":
        return optax.adamw(config.learning_rate, weight_decay=config.weight_decay)
    return optax.sgd(config.learning_rate, momentum=config.momentum or None)


class Carry(NamedTuple):
    """A slot's training in the middle; leaves `[slots, ...]`.

    Attributes:
      vector: the task vector so far.
      optimizer: the optimiser's state.
      loss: sum over steps.
      steps: how many there were.
    """

    vector: PyTree[Float[Array, "slots ..."]]
    optimizer: Any
    loss: Float32[Array, "slots"]
    steps: Int32[Array, "slots"]


class LocalTraining(NamedTuple):
    """Local training in three functions, each to be jitted by the caller.

    Attributes:
      begin: `downloads -> Carry`; downloads are task vectors with leaves `[slots, ...]`. The
        optimiser starts afresh.
      advance: `(parameters, carry, downloads, position, batches) -> Carry`: parameters is
        `(model.base, model.frozen)`, where what trains starts and what does not train, position
        int32 `[slots, 3]` (round, client, task), batches in the form of the tasks' splits, leaves
        `[slots, steps, batch, ...]`.
      finish: `carry -> Trained`.
      whole: `(parameters, downloads, position, batches) -> Trained`, the three in one, slot by
        slot: what is in between is not written to memory for all of them.
    """

    begin: Callable[[PyTree], Carry]
    advance: Callable[..., Carry]
    finish: Callable[[Carry], Trained]
    whole: Callable[..., Trained]


def local_training(
    model: Model, config: LocalConfig, rule: LocalRule, mesh: Mesh, *, seed: int = 0
) -> LocalTraining:
    """Makes the functions that train all slots of a round, or some of them, in one go or in parts.

    Args:
      model: what is trained.
      config: steps, optimiser, and how many slots at once.
      rule: the algorithm's penalty.
      mesh: the devices.
      seed: what dropout is drawn from, with round, client, task and step.
    """
    tx = optimizer(config)

    def begin(_, download: PyTree) -> Carry:
        return Carry(download, tx.init(download), jnp.float32(0), jnp.int32(0))

    def advance(
        parameters: tuple[PyTree, PyTree],
        carry: Carry,
        download: PyTree,
        position: jax.Array,
        batches: PyTree,
    ) -> Carry:
        base, frozen = parameters
        key = jax.random.key(seed)
        for axis in range(3):
            key = jax.random.fold_in(key, position[axis])

        def loss(vector, batch, key):
            params = jax.tree.map(jnp.add, base, vector)
            value = check_loss(model.loss(params, frozen, batch, position[2], key))
            return value + rule.penalty(vector, download) if rule.penalty else value

        def trained(tree: PyTree, carry: Carry) -> PyTree:
            """Zeros where a parameter does not train: neither the optimiser nor it shall move."""
            if rule.trains is None:
                return tree
            progress = carry.steps.astype(jnp.float32) / config.steps
            factors = rule.trains(carry.vector, progress)
            return jax.tree.map(lambda x, f: x * jnp.asarray(f, x.dtype), tree, factors)

        def step(carry: Carry, batch):
            drawn = jax.random.fold_in(key, carry.steps) if model.stochastic else None
            value, gradient = jax.value_and_grad(loss)(carry.vector, batch, drawn)
            gradient = trained(gradient, carry)
            with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and counts
                updates, state = tx.update(gradient, carry.optimizer, carry.vector)
            vector = optax.apply_updates(carry.vector, trained(updates, carry))
            return Carry(vector, state, carry.loss + value, carry.steps + 1), None

        return jax.lax.scan(step, carry, batches)[0]

    def finish(_, carry: Carry) -> Trained:
        leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(carry.vector)]
        finite = jnp.stack([*leaves, jnp.isfinite(carry.loss)]).all()
        vector = jax.tree.map(lambda leaf: jnp.where(finite, leaf, 0.0), carry.vector)
        return Trained(vector, carry.loss / carry.steps.astype(jnp.float32), finite)

    def whole(
        parameters: tuple[PyTree, PyTree], download: PyTree, position: jax.Array, batches: PyTree
    ) -> Trained:
        carry = begin((), download)
        return finish((), advance(parameters, carry, download, position, batches))

    def over_slots(function):
        return map_slots(function, mesh, parallel_slots=config.parallel_slots)

    def begin_all(downloads: PyTree) -> Carry:
        return over_slots(begin)((), downloads)

    def finish_all(carry: Carry) -> Trained:
        return over_slots(finish)((), carry)

    return LocalTraining(begin_all, over_slots(advance), finish_all, over_slots(whole))
