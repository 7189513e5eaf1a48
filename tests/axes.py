"""The axes in the annotations of the library's functions, checked at every call of a test."""

import inspect
from collections.abc import Callable
from typing import Any

from beartype import beartype

ROOMS = (
    "matu_jax.trees",
    "matu_jax.aggregation",
    "matu_jax.algorithms",
    "matu_jax.data.batching",
    "matu_jax.data.partition",
    "matu_jax.messages",
    "matu_jax.models.attention",
    "matu_jax.models.heads",
    "matu_jax.models.towers",
    "matu_jax.models.transformer",
    "matu_jax.models.vit",
    "matu_jax.merging",
    "matu_jax.scenarios.attacks",
    "matu_jax.scenarios.failures",
    "matu_jax.scenarios.privacy",
    "matu_jax.simulation.attendance",
    "matu_jax.simulation.batches",
    "matu_jax.simulation.evaluate",
    "matu_jax.simulation.federation",
    "matu_jax.simulation.local",
    "matu_jax.simulation.participation",
    "matu_jax.simulation.placement",
    "matu_jax.simulation.relatedness",
    "matu_jax.simulation.rounds",
)
"""Where functions take or return arrays. Not among them are modules of choices alone, whose
constructors' errors are read by `matu_jax.runs.advice`: the hook would take the class's name away.
"""


def once_it_returned(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the arrays that a function was given and has returned; nothing before it returns.

    What the library refuses by itself is thus refused in its own words. All but arrays is left to
    pyright. Constructors are passed over, since JAX makes pytrees of a class with whatever stands
    in the place of arrays, such as shardings.

    Args:
      function: a stand-in from jaxtyping for one of the library's functions: with its parameters
        alone, for before the call, which returns Any; or with its result too, for after it.
    """
    hints = function.__annotations__
    arrays = {name: hint for name, hint in hints.items() if "jaxtyping." in str(hint)}
    before = inspect.signature(function).return_annotation is Any
    if before or not arrays or function.__name__ == "__init__":
        return function
    function.__annotations__ = arrays
    return beartype(function)
