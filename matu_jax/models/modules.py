"""Modules of one's own as a `Model`: of Flax NNX by `of_nnx`, others by their plain trees.

Of Flax Linen:

    >>> import jax, jax.numpy as jnp
    >>> from flax import linen
    >>> from matu_jax.models import Model, metrics
    >>> r2 = metrics.r2(lambda outputs, batch: (outputs, batch["y"]))
    >>> net = linen.Dense(1)
    >>> base = net.init(jax.random.key(0), jnp.zeros((1, 3)))["params"]
    >>> def outputs(params, frozen, batch, task, key=None):
    ...     return net.apply({"params": params}, batch["x"])[:, 0]
    >>> def loss(params, frozen, batch, task, key=None):
    ...     return jnp.square(outputs(params, frozen, batch, task) - batch["y"]).mean()
    >>> model = Model(base, {}, loss, outputs, {"r2": r2})
    >>> sorted(model.base)
    ['bias', 'kernel']

Of Equinox, whose modules are trees themselves; a dict of their arrays is what checkpoints keep:

    >>> import equinox
    >>> net = equinox.nn.Linear(3, 1, key=jax.random.key(0))
    >>> arrays, rest = equinox.partition(net, equinox.is_inexact_array)
    >>> leaves, tree = jax.tree.flatten(arrays)
    >>> def outputs(params, frozen, batch, task, key=None):
    ...     arrays = jax.tree.unflatten(tree, list(params.values()))
    ...     return jax.vmap(equinox.combine(arrays, rest))(batch["x"])[:, 0]
    >>> def loss(params, frozen, batch, task, key=None):
    ...     return jnp.square(outputs(params, frozen, batch, task) - batch["y"]).mean()
    >>> base = {f"leaf{i:03d}": leaf for i, leaf in enumerate(leaves)}
    >>> model = Model(base, {}, loss, outputs, {"r2": r2})
    >>> batch = {"x": jnp.ones((5, 3)), "y": jnp.ones(5)}
    >>> model.outputs(model.base, {}, batch, jnp.int32(0)).shape
    (5,)
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from matu_jax.models.contract import ContractError, Metric, Model, first_order, loss_of_outputs
from matu_jax.trees import PyTree, leaf_items


def of_nnx(
    module: nnx.Module,
    trains: Any,
    *,
    outputs: Callable[..., Any],
    loss: Callable[[Any, Any], jax.Array],
    metrics: Mapping[str, Metric],
    stochastic: bool = False,
) -> Model:
    """Takes a module apart, once, into what trains and what does not.

    Args:
      module: with its parameters as they are before fine-tuning, and as it shall be evaluated, such
        as after `module.eval()`. What it changes of itself when it is called, such as running means
        in training with a key, is not kept.
      trains: a filter of NNX for what trains, such as `nnx.LoRAParam` or `nnx.Param`, or
        `(path, variable) -> bool`; floats alone.
      outputs: `(module, batch, task, key) -> tree`, leaves `[examples, ...]`: a forward pass; task
        is an int32 scalar, key what dropout may be drawn from, such as
        `module(batch["x"], deterministic=False, rngs=nnx.Rngs(dropout=key))`; None in evaluation.
      loss: `(outputs, batch) -> scalar`, of one term or several.
      metrics: as in `Model`.
      stochastic: whether outputs use the key, which is None in training, too, if not.

    Raises:
      ValueError: if the filter selects nothing, or what is no float.
      ContractError: from loss and outputs, if the module is in the mode for training: draws from a
        random stream of its own, or changes its statistics in evaluation.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from matu_jax.models import metrics
      >>> from matu_jax.models.modules import of_nnx
      >>> model = of_nnx(
      ...     nnx.Linear(3, 1, rngs=nnx.Rngs(0)),
      ...     nnx.Param,
      ...     outputs=lambda module, batch, task, key: module(batch["x"])[:, 0],
      ...     loss=lambda outputs, batch: jnp.square(outputs - batch["y"]).mean(),
      ...     metrics={"r2": metrics.r2(lambda outputs, batch: (outputs, batch["y"]))},
      ... )
      >>> sorted(model.base)
      ['bias', 'kernel']
    """
    graph, training, rest = nnx.split(module, trains, ...)
    base, frozen = nnx.to_pure_dict(training), nnx.to_pure_dict(rest)
    held = [path for path, _ in leaf_items(frozen)]
    if not jax.tree.leaves(base) and not held:
        raise ValueError(
            f"of_nnx: Flax sees no array in {type(module).__name__}. Of a class with pytree=False, "
            "such as Tunix's, qwix derives one that has forgotten it: set "
            "type(module)._pytree__is_pytree = False."
        )
    if not jax.tree.leaves(base):
        raise ValueError(
            f"of_nnx: trains: {trains!r} selects nothing of {type(module).__name__}, which has "
            f"{', '.join(held[:5])}{', ...' * (len(held) > 5)}; give a filter such as nnx.Param."
        )
    for path, leaf in leaf_items(base):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"of_nnx: trains: {trains!r} selects {path}, which is {leaf.dtype}; only floats "
                "train: give a filter such as nnx.Param, which leaves counts and random streams."
            )

    def forward(params, frozen, batch, task, key=None):
        merged = nnx.merge(graph, restored(training, params), restored(rest, frozen))
        found = outputs(merged, batch, task, key)
        _check_unchanged(merged, frozen, nnx.RngState)
        if key is None:
            _check_unchanged(merged, frozen, nnx.BatchStat)
        return found

    def model(forward, frozen, linearise) -> Model:
        of_params = loss_of_outputs(forward, loss)
        return Model(base, frozen, of_params, forward, metrics, stochastic, linearise=linearise)

    def linearise() -> Model:
        expanded, frozen_of = first_order(base, forward)
        return model(expanded, frozen_of(frozen), None)

    return model(forward, frozen, linearise)


def _check_unchanged(module: nnx.Module, frozen: PyTree, kind: type) -> None:
    """Checks that a forward pass has left the variables of a kind as they were."""
    before = dict(leaf_items(frozen))
    for path, leaf in leaf_items(nnx.to_pure_dict(nnx.state(module, kind))):
        if path in before and leaf is not before[path]:
            raise ContractError(
                f"of_nnx: outputs change {path} ({kind.__name__}) of {type(module).__name__}, "
                "which is in the mode for training; nothing of that is kept: call module.eval() "
                "before. For dropout in training set stochastic=True, and where key is not None "
                "give deterministic=False and rngs=nnx.Rngs(dropout=key) to the call."
            )


def restored(state: nnx.State, values: PyTree) -> nnx.State:
    """A state with other values, as `nnx.to_pure_dict` gives them; the state stays as it is."""
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, values)
    return state
