"""Metrics over parts that add up, against scikit-learn over the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sklearn

from matu_jax.models import metrics

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, (2, 60))  # the fourth class neither found nor expected
LABELS[LABELS == 3] = 0
PIXELS = RNG.integers(0, 3, (2, 60, 4, 5))
NUMBERS = RNG.normal(size=(2, 60)).astype(np.float32)
SCORES = (RNG.random(60).astype(np.float32), RNG.integers(0, 2, 60))


def pair(outputs, batch):
    return outputs, batch


def measured(metric, found, expected, parts=3):
    """The value of sums over batches, added in float64 or int64."""
    added = None
    for one, other in zip(np.split(found, parts), np.split(expected, parts), strict=True):
        sums = metric.sums(jnp.asarray(one), jnp.asarray(other))
        assert all(leaf.shape[0] == len(one) for leaf in jax.tree.leaves(sums))
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64).sum(axis=0), sums)
        added = sums if added is None else jax.tree.map(np.add, added, sums)
    return metric.value(added)


@pytest.mark.parametrize(
    ("metric", "found", "expected", "theirs"),
    [
        (metrics.accuracy(pair), *LABELS, sklearn.accuracy_score),
        (metrics.balanced_accuracy(pair, 4), *LABELS, sklearn.balanced_accuracy_score),
        (metrics.r2(pair), *NUMBERS, sklearn.r2_score),
        (metrics.mean_squared_error(pair), *NUMBERS, sklearn.mean_squared_error),
        (
            metrics.mean_iou(pair, 4),
            *PIXELS,
            lambda y, x: sklearn.jaccard_score(y.ravel(), x.ravel(), average="macro"),
        ),
        (metrics.auc(pair, bins=10**5), *SCORES, sklearn.roc_auc_score),
        (
            metrics.auc(pair, bins=10),
            *SCORES,
            lambda y, x: sklearn.roc_auc_score(y, np.floor(x * 10)),
        ),
    ],
)
def test_metrics_are_those_of_scikit_learn(metric, found, expected, theirs):
    if metric.higher_is_better:
        assert theirs(expected, expected) == pytest.approx(1)
    assert measured(metric, found, expected) == pytest.approx(theirs(expected, found), rel=1e-5)


def test_perplexity_is_of_tokens_and_lower_is_better():
    metric = metrics.perplexity(pair)
    loss, tokens = np.abs(NUMBERS[0]), RNG.integers(1, 9, 60)
    assert measured(metric, loss, tokens) == pytest.approx(np.exp(loss.sum() / tokens.sum()))
    assert measured(metric, loss * 1e6, tokens) == np.inf
    assert not metric.higher_is_better


ALL = [
    metrics.accuracy(pair),
    metrics.auc(pair),
    metrics.balanced_accuracy(pair, 3),
    metrics.mean_iou(pair, 3),
    metrics.mean_squared_error(pair),
    metrics.perplexity(pair),
    metrics.r2(pair),
]


@pytest.mark.parametrize("metric", ALL)
def test_what_was_not_measured_is_not_a_number(metric):
    sums = metric.sums(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    assert np.isnan(metric.value(jax.tree.map(lambda x: np.zeros(x.shape[1:]), sums)))


@pytest.mark.parametrize("expected", [[3.3], [3.3] * 5000, [1e4 + 1e-3, 1e4] * 500, [0.0] * 9])
def test_targets_that_do_not_vary_have_no_r2(expected):
    expected = np.array(expected, np.float32)
    assert np.isnan(measured(metrics.r2(pair), expected + 1, expected, parts=1))


def test_targets_that_vary_a_little_have_an_r2():
    expected = (50 + NUMBERS[0]).astype(np.float32)
    found = expected + NUMBERS[1]
    theirs = sklearn.r2_score(expected, found)
    assert measured(metrics.r2(pair), found, expected) == pytest.approx(theirs, rel=1e-2)


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize("promotion", ["allow", "raise"])
def test_shapes_that_broadcasting_would_hide_are_refused(metric, promotion):
    with jax.numpy_rank_promotion(promotion), pytest.raises(ValueError, match=r"\[5, 1\] and exp"):
        metric.sums(jnp.zeros((5, 1)), jnp.zeros(5))


def test_scores_that_are_no_probabilities_are_refused():
    metric = metrics.auc(pair)
    with pytest.raises(ValueError, match=r"2 scores are not in \[0, 1\]: give probabilities"):
        measured(metric, np.array([-3.0, 0.2, 5.0]), np.array([0, 1, 1]))
    assert measured(metric, np.array([0.0, 1.000001, 1.0]), np.array([0, 1, 1])) == 1
    with pytest.raises(ValueError, match="pair gives 2 numbers for each example, expected one"):
        metric.sums(jnp.zeros((5, 2)), jnp.zeros((5, 2)))


def test_void_pixels_do_not_count():
    found, expected = PIXELS.copy()
    void = RNG.random(found.shape) < 0.3
    theirs = sklearn.jaccard_score(expected[~void], found[~void], average="macro")
    expected[void] = 255
    assert measured(metrics.mean_iou(pair, 4), found, expected) == pytest.approx(theirs)


@pytest.mark.parametrize("make", [metrics.mean_iou, metrics.balanced_accuracy])
def test_memory_does_not_grow_with_classes(make):
    pixels = jnp.zeros((16, 64, 64), jnp.int32)

    def temporary(classes):
        sums = jax.jit(make(pair, classes).sums).lower(pixels, pixels).compile()
        analysis = sums.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary(64) < 2 * temporary(2) + pixels.nbytes
