"""Counting right answers, and those that rounding decides."""

import jax.numpy as jnp
import numpy as np

from matu_jax.simulation.evaluate import near_ties


def test_near_ties_are_those_whose_own_class_is_close_to_the_best_of_the_others():
    logits = jnp.array(
        [
            [10.0, 9.0, -8.0, 99.0],  # far from a tie; the last column is no class
            [10.0, 9.995, -8.0, 99.0],  # won by less than 2^-10 of the 12 that -8 is off the mean
            [9.995, 10.0, -8.0, 99.0],  # lost by as little
            [-8.0, 10.0, 9.995, 99.0],  # a tie of two others: wrong either way
            [4.0, 4.0625, -8.0, 0.0],  # lost by more
        ]
    )
    found = near_ties(logits, jnp.zeros(5, jnp.int32), jnp.int32(3), 2.0**-10)
    np.testing.assert_array_equal(found, [False, True, True, False, False])
    # What all classes have in common, as cosines of one cone have, makes no tie.
    higher = near_ties(logits + 1024, jnp.zeros(5, jnp.int32), jnp.int32(3), 2.0**-10)
    np.testing.assert_array_equal(higher, found)
