"""What a user is told of near misses."""

import pytest

from matu_jax.errors import look_alike


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["north", "nroth", "south"], [("north", "nroth")]),
        (["Site 1", "site-1", "site 2"], [("Site 1", "site-1")]),
        (["Berlin", "berlin", "Bonn"], [("Berlin", "berlin")]),
        (
            ["University Hospitl", "University Hospital"],
            [("University Hospital", "University Hospitl")],
        ),
        (["clinic A", "clinic B"], []),
        (["siteA", "siteB"], []),
        (["site1", "site2", "site10"], []),
        (["east", "west"], []),
        (["a", "aa", "b"], []),
    ],
)
def test_names_that_may_be_one_misspelled(names, pairs):
    assert look_alike(names) == pairs
