"""Metrics that models of one's own may be measured by; each makes a `Metric`.

All take `pair`, a function `(outputs, batch) -> (found, expected)` that says what is compared.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from matu_jax.models.contract import Metric
from matu_jax.trees import PyTree

__all__ = [
    "accuracy",
    "auc",
    "balanced_accuracy",
    "mean_iou",
    "mean_squared_error",
    "perplexity",
    "r2",
]

_SLACK = 1e-5  # of rounded probabilities

Pair = Callable[[Any, Any], tuple[jax.Array, jax.Array]]


def accuracy(pair: Pair) -> Metric:
    """The part of the labels that is found.

    Args:
      pair: found and expected labels, integers `[examples, ...]`.
    """

    def sums(outputs, batch):
        found, expected = _compared(pair, outputs, batch)
        right = found == expected
        return {"right": right.sum(axis=1), "all": _ones(right)}

    return Metric(sums, lambda sums: _quotient(sums["right"], sums["all"]), percent=True)


def balanced_accuracy(pair: Pair, classes: int) -> Metric:
    """The mean over classes of the part of a class's examples that is found (its recall).

    Args:
      pair: found and expected labels, integers `[examples, ...]` from 0 to `classes - 1`.
      classes: how many there are; those without an example do not count.
    """

    def sums(outputs, batch):
        found, expected = map(_integers, _compared(pair, outputs, batch))

        def of_class(label):
            there = expected == label
            return {"right": there & (found == label), "all": there}

        return _by_class(of_class, classes)

    return Metric(sums, lambda sums: _mean_quotient(sums["right"], sums["all"]), percent=True)


def mean_iou(pair: Pair, classes: int) -> Metric:
    """The mean over classes of intersection over union, counted over all examples at once.

    Args:
      pair: found and expected labels, integers `[examples, ...]` such as one per pixel, from 0 to
        `classes - 1`.
      classes: how many there are; those neither found nor expected anywhere do not count, and
        neither does what is expected to be of none, such as void pixels, often 255.
    """

    def sums(outputs, batch):
        found, expected = map(_integers, _compared(pair, outputs, batch))

        known = (expected >= 0) & (expected < classes)

        def of_class(label):
            one, other = known & (found == label), expected == label
            return {"both": one & other, "any": one | other}

        return _by_class(of_class, classes)

    return Metric(sums, lambda sums: _mean_quotient(sums["both"], sums["any"]), percent=True)


def auc(pair: Pair, bins: int = 1000) -> Metric:
    """Area under the ROC curve: how often a positive has a higher score than a negative.

    Scores are counted in equally wide bins, and two of one bin are a tie, which counts one half:
    the exact area of the scores rounded to bins.

    Args:
      pair: scores in [0, 1], such as probabilities, and whether it is a positive; `[examples]`.
      bins: how many there are; scores that are all within one of them tell nothing.

    Raises:
      ValueError: from its value, if scores are not in [0, 1].
    """

    def sums(outputs, batch):
        score, positive = _of_examples(pair, outputs, batch)
        score = score.astype(jnp.float32)
        position = jnp.clip((score * bins).astype(jnp.int32), 0, bins - 1)
        there = jax.nn.one_hot(position, bins, dtype=jnp.bool_)
        is_positive = positive.astype(jnp.bool_)[:, None]
        outside = (score < -_SLACK) | (score > 1 + _SLACK)
        return {
            "positive": there & is_positive,
            "negative": there & ~is_positive,
            "outside": outside,
        }

    def value(sums):
        if sums["outside"]:
            raise ValueError(
                f"{int(sums['outside'])} scores are not in [0, 1]: give probabilities, such as "
                "jax.nn.sigmoid of logits"
            )
        positive, negative = sums["positive"], sums["negative"]
        below = np.cumsum(negative) - negative
        return _quotient((positive * (below + negative / 2)).sum(), positive.sum() * negative.sum())

    return Metric(sums, value)


def r2(pair: Pair) -> Metric:
    """R², the part of the variance that is explained: 1 - squared errors / squared deviations.

    NaN where expected numbers do not vary beyond the rounding of their squares, as where there is
    one alone.

    Args:
      pair: found and expected numbers, floats `[examples, ...]`. Squares are summed in float32: of
        numbers whose mean is a hundred times their spread or more, subtract a constant near that
        mean from both, which changes nothing else.
    """

    def sums(outputs, batch):
        found, expected = _compared(pair, outputs, batch)
        return {
            "errors": jnp.square(found - expected).sum(axis=1),
            "squares": jnp.square(expected).sum(axis=1),
            "expected": expected.sum(axis=1),
            "all": _ones(expected),
        }

    def value(sums):
        squares, number = float(sums["squares"]), float(sums["all"])
        deviations = squares - _quotient(sums["expected"] ** 2, number)
        rounding = np.finfo(np.float32).eps * max(8, math.sqrt(number)) * squares
        return 1 - float(sums["errors"]) / deviations if deviations > rounding else math.nan

    return Metric(sums, value)


def mean_squared_error(pair: Pair) -> Metric:
    """Mean squared error; lower is better.

    Args:
      pair: found and expected numbers, floats `[examples, ...]`.
    """

    def sums(outputs, batch):
        found, expected = _compared(pair, outputs, batch)
        return {"errors": jnp.square(found - expected).sum(axis=1), "all": _ones(expected)}

    return Metric(sums, lambda sums: _quotient(sums["errors"], sums["all"]), False)


def perplexity(pair: Pair) -> Metric:
    """Perplexity: e to the mean negative log-likelihood; lower is better.

    Args:
      pair: the sum over an example's tokens of their negative log-likelihood in nats, and how many
        of them count; `[examples]`.
    """

    def sums(outputs, batch):
        loss, tokens = _of_examples(pair, outputs, batch)
        return {"loss": loss, "tokens": tokens}

    def value(sums):
        mean = _quotient(sums["loss"], sums["tokens"])
        return math.inf if mean > 700 else math.exp(mean)  # beyond float64

    return Metric(sums, value, False)


def _compared(pair: Pair, outputs: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """What is compared, of one shape, as `[examples, n]`.

    Raises:
      ValueError: if the two differ in shape, which broadcasting would hide.
    """
    found, expected = map(jnp.asarray, pair(outputs, batch))
    if found.shape != expected.shape or not found.ndim:
        raise ValueError(
            f"pair gives found {list(found.shape)} and expected {list(expected.shape)}, expected "
            "two arrays [examples, ...] of one shape: take labels by argmax(axis=-1), and an axis "
            "of length 1 away by [..., 0]."
        )
    return found.reshape(len(found), -1), expected.reshape(len(expected), -1)


def _of_examples(pair: Pair, outputs: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """What is compared, one number per example each."""
    found, expected = _compared(pair, outputs, batch)
    if found.shape[1] != 1:
        raise ValueError(
            f"pair gives {found.shape[1]} numbers for each example, expected one: [examples]."
        )
    return found[:, 0], expected[:, 0]


def _integers(x: jax.Array) -> jax.Array:
    return x.astype(jnp.int32)


def _by_class(of_class: Callable[[jax.Array], PyTree], classes: int) -> PyTree:
    """Counts of every class, one class after the other to save memory: int32 `[examples, classes]`.

    Args:
      of_class: `label -> tree`, leaves bool `[examples, n]`.
      classes: how many there are.
    """

    def counts(label):
        return jax.tree.map(lambda x: x.sum(axis=1, dtype=jnp.int32), of_class(label))

    by_class = jax.lax.map(counts, jnp.arange(classes))
    return jax.tree.map(lambda x: x.T, by_class)


def _ones(flat: jax.Array) -> jax.Array:
    """How many numbers each example has: int32 `[examples]`."""
    return jnp.full(flat.shape[0], flat.shape[1], jnp.int32)


def _quotient(over: Any, under: Any) -> float:
    return float(over) / float(under) if under else math.nan


def _mean_quotient(over: np.ndarray, under: np.ndarray) -> float:
    there = under > 0
    return float(np.mean(over[there] / under[there])) if there.any() else math.nan
