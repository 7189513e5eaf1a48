"""What a federation asks of a model: what trains, a loss, outputs and what measures them.

All functions are pure and take `params` (the base plus a task vector), `frozen`, a batch (a tree of
arrays, leaves `[examples, ...]`, in the form of the tasks' splits) and `task`, an int32 scalar.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from matu_jax.trees import PyTree


class ContractError(ValueError):
    """What a model of one's own does otherwise than it has to, and what to do about it."""


class Metric(NamedTuple):
    """A measure of outputs, by sums that add up over examples, batches and devices.

    Attributes:
      sums: `(outputs, batch) -> tree`, leaves `[examples, ...]` of numbers or bools: what each
        example adds to the sums. Examples that only pad a batch are left out by the caller.
      value: `sums -> number`, of a tree of numpy arrays `[...]` (float64 or int64): the last step,
        such as a quotient; NaN where nothing was measured.
      higher_is_better: whether a higher value is the better one.
      percent: whether people read it in percent, as a part of 1.
    """

    sums: Callable[[Any, Any], PyTree]
    value: Callable[[Any], float]
    higher_is_better: bool = True
    percent: bool = False


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as pure functions.

    Attributes:
      base: what trains, as it is before fine-tuning, leaves `[...]` of floats.
      frozen: what does not train, leaves `[...]`.
      loss: `(params, frozen, batch, task, key=None) -> scalar`, the mean over the batch; key is
        what dropout is drawn from, None = no dropout.
      outputs: `(params, frozen, batch, task, key=None) -> tree`, leaves `[examples, ...]`; what
        metrics are measured on.
      metrics: by name; the first is the one by which rounds and methods are chosen. A round's
        record holds each of them under its name.
      stochastic: whether loss and outputs use the key.
      trains_heads: whether base is `{"shared": ..., "head": ...}`, of which the head is the task's
        own: it is averaged among the holders of a task alone, or not at all.
      linearise: makes the model's first-order expansion around its base, see `linearised`; None
        where the model does not say how.
    """

    base: PyTree
    frozen: PyTree
    loss: Callable[..., jax.Array]
    outputs: Callable[..., Any]
    metrics: Mapping[str, Metric]
    stochastic: bool = False
    trains_heads: bool = False
    linearise: Callable[[], "Model"] | None = None


def linearised(model: Model) -> Model:
    """A model's first-order expansion around its base, see `first_order`; the base is the same.

    Raises:
      ContractError: if the model does not say how.
    """
    if model.linearise is None:
        raise ContractError(
            "model: an algorithm that trains a model's first-order expansion, such as "
            "'ntk_fedavg', needs Model(..., linearise=...), and this one has none; give it, or "
            "choose another algorithm."
        )
    return model.linearise()


def loss_of_outputs(
    outputs: Callable[..., Any], loss: Callable[[Any, Any], jax.Array]
) -> Callable[..., jax.Array]:
    """A model's loss, from what a batch's outputs cost.

    Args:
      outputs: as in `Model`.
      loss: `(outputs, batch) -> scalar`.
    """

    def of_params(params, frozen, batch, task, key=None):
        return loss(outputs(params, frozen, batch, task, key), batch)

    return of_params


def first_order(base: PyTree, outputs: Callable[..., Any]) -> tuple[Callable[..., Any], Any]:
    """First-order expansion of outputs around a base, for training and evaluation alike.

    f(base) + J(base) (params - base), the neural tangent model (Jacot et al. 2018, arXiv
    1806.07572); one Jacobian-vector product per call. With LoRA, whose B is zero at the base, the
    expansion does not depend on A.

    Args:
      base: what trains, leaves `[...]`.
      outputs: as in `Model`.

    Returns:
      The expansion, and a function of what is frozen to what is frozen with it: `{"frozen": ...,
      "origin": base}`.
    """

    def expanded(params, frozen, batch, task, key=None):
        origin = frozen["origin"]

        def function(point):
            return outputs(point, frozen["frozen"], batch, task, key)

        step = jax.tree.map(jnp.subtract, params, origin)
        value, change = jax.jvp(function, (origin,), (step,))

        def moved(x, by):  # labels and counts among the outputs have no derivative
            return x + by if jnp.issubdtype(x.dtype, jnp.inexact) else x

        return jax.tree.map(moved, value, change)

    return expanded, lambda frozen: {"frozen": frozen, "origin": base}
