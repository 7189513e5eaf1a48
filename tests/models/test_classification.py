"""Counting right answers, and those that rounding decides."""

import jax.numpy as jnp
import numpy as np

from matu_jax.data import Split
from matu_jax.models.classification import METRICS, class_mask, near_ties

LOGITS = jnp.array(
    [
        [10.0, 9.0, -8.0, 99.0],  # far from a tie; the last column is no class
        [10.0, 9.995, -8.0, 99.0],  # won by less than 2^-10 of the 12 that -8 is off the mean
        [9.995, 10.0, -8.0, 99.0],  # lost by as little
        [-8.0, 10.0, 9.995, 99.0],  # a tie of two others: wrong either way
        [4.0, 4.0625, -8.0, 0.0],  # lost by more
    ]
)
BATCH = Split(np.zeros((5, 1, 1, 1), np.uint8), np.zeros(5, np.int32))


def test_near_ties_are_those_whose_own_class_is_close_to_the_best_of_the_others():
    near = near_ties(2.0**-10)
    mask = class_mask(jnp.int32(3), 4)[None]
    found = near.sums(LOGITS + mask, BATCH)
    np.testing.assert_array_equal(found, [False, True, True, False, False])
    # What all classes have in common, as cosines of one cone have, makes no tie.
    np.testing.assert_array_equal(near.sums(LOGITS + 1024 + mask, BATCH), found)


def test_accuracy_is_of_the_classes_that_a_task_has():
    sums = METRICS["accuracy"].sums(LOGITS + class_mask(jnp.int32(3), 4)[None], BATCH)
    totals = {name: np.asarray(x, np.int64).sum() for name, x in sums.items()}
    assert METRICS["accuracy"].value(totals) == 2 / 5
