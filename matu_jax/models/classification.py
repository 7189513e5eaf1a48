"""Classification of images as a `Model`: class masks, cross-entropy and accuracy."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int32

from matu_jax.data import ImageTask, Split
from matu_jax.models.attention import differentiable_forwards
from matu_jax.models.contract import Metric, Model, first_order, loss_of_outputs
from matu_jax.trees import PyTree

LACKING = -1e9
"""What is added to the logits of classes that a task lacks."""


@dataclasses.dataclass(frozen=True)
class Classifier(Model):
    """A model of `matu_jax.data.ImageTask`s, whose batches are `Split`s.

    Attributes:
      base: where tasks may have a trained head (`ModelConfig.trains_heads`) it is `{"shared": ...,
        "head": {"kernel": [features, classes], "bias": [classes]}}`; leaves float32.
      frozen: "backbone"; "heads" float32 `[tasks, classes, features]` (zeros for tasks with a
        trained head, and beyond a task's own classes); "num_classes" int32 `[tasks]`; and, where
        tasks may have a trained head, "trained" bool `[tasks]`.
      outputs: logits float32 `[examples, classes]`, those of the classes that the task lacks lower
        than all others.
      logits: `(params, frozen, images [batch, height, width, channels], task, key=None) -> float32
        [batch, classes]`. Classes are those of the largest task, whichever the task has.
      features: `(params, frozen, images, key=None) -> float32 [batch, features]`.
      logit_scale: what the cosines of frozen heads are multiplied by.
    """

    logits: Callable[..., jax.Array] = dataclasses.field(kw_only=True)
    features: Callable[..., jax.Array] = dataclasses.field(kw_only=True)
    logit_scale: float = dataclasses.field(kw_only=True)


def classifier(
    base: PyTree,
    frozen: dict[str, PyTree],
    tasks: Sequence[ImageTask],
    *,
    logits: Callable[..., jax.Array],
    features: Callable[..., jax.Array],
    stochastic: bool = False,
    logit_scale: float = 1.0,
) -> Classifier:
    """Makes a classifier out of its logits.

    Args:
      base: what trains, as in `Model`.
      frozen: what does not, as in `Classifier` but for "num_classes".
      tasks: for their numbers of classes.
      logits: as in `Classifier`.
      features: as in `Classifier`.
      stochastic: as in `Model`.
      logit_scale: as in `Classifier`.
    """
    classes = np.array([task.num_classes for task in tasks], np.int32)

    def outputs(params, frozen, batch, task, key=None):
        found = logits(params, frozen, batch.images, task, key)
        return found + class_mask(frozen["num_classes"][task], found.shape[-1])[None]

    def expandable(*inputs):
        with differentiable_forwards():
            return outputs(*inputs)

    def linearise() -> Model:
        expanded, frozen_of = first_order(base, expandable)
        return Model(
            base,
            frozen_of(whole),
            loss_of_outputs(expanded, cross_entropy),
            expanded,
            METRICS,
            stochastic,
            "trained" in frozen,
        )

    whole = frozen | {"num_classes": jnp.asarray(classes)}
    return Classifier(
        base,
        whole,
        loss_of_outputs(outputs, cross_entropy),
        outputs,
        METRICS,
        stochastic,
        "trained" in frozen,
        linearise,
        logits=logits,
        features=features,
        logit_scale=logit_scale,
    )


def class_mask(num_classes: Int32[Array, ""], width: int) -> Float32[Array, "{width}"]:
    """0 for a task's classes, a large negative number for those it lacks: float32 `[width]`."""
    return jnp.where(jnp.arange(width) < num_classes, 0.0, LACKING)


def cross_entropy(logits: Float[Array, "examples width"], batch: Split) -> Float[Array, ""]:
    """Mean cross-entropy of logits and a batch's labels, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


def _right(logits, batch):
    right = logits.argmax(axis=-1).astype(jnp.int32) == batch.labels
    return {"right": right, "examples": jnp.ones_like(right)}


def _quotient(sums):
    return sums["right"] / sums["examples"] if sums["examples"] else math.nan


METRICS = {"accuracy": Metric(_right, _quotient, percent=True)}
"""How classifiers are measured: the part of the examples that is classified rightly."""


def near_ties(rounding: float) -> Metric:
    """How many examples another order of the same sums may put on the other side.

    Those whose own class's logit is less than `rounding` times the example's largest magnitude away
    from the best of the other classes; logits less their mean, since what all classes have in
    common decides nothing.

    Args:
      rounding: as in `ROUNDING`.
    """

    def near(logits, batch):
        column = jnp.arange(logits.shape[-1])[None]
        own, there = column == batch.labels[:, None], logits > LACKING / 2
        classes = there.sum(axis=-1, keepdims=True).astype(logits.dtype)
        mean = jnp.where(there, logits, 0).sum(axis=-1, keepdims=True)
        logits = logits - mean / classes
        target = jnp.where(own, logits, 0).sum(axis=-1)
        best = jnp.where(own | ~there, -jnp.inf, logits).max(axis=-1)
        largest = jnp.where(there, jnp.abs(logits), 0).max(axis=-1)
        return jnp.abs(target - best) < rounding * largest

    return Metric(near, int)


ROUNDING = {"float32": 2.0**-10, "bfloat16": 2.0**-7}
"""How far apart logits of the same parameters may be, by the dtype they are computed in, as a part
of an example's largest: the spacing of bfloat16, and of the numbers (TF32) that accelerators
multiply float32 as. CPUs are a thousand times nearer in float32."""
