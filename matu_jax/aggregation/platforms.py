"""One function, computed by the form that the platform does best for which it is lowered."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir


def where_lowered(
    name: str,
    shapes: Callable[..., Sequence[jax.ShapeDtypeStruct]],
    default: Callable[..., Sequence[jax.Array]],
    **forms: Callable[..., Sequence[jax.Array]],
) -> Callable[..., tuple[jax.Array, ...]]:
    """Makes a function of which one form is in a program, chosen where that is lowered.

    So a program that is exported, or compiled ahead of time, gets the form of the platform that it
    is for, not of the one where it was traced; no other form is even traced. Other than
    `jax.lax.platform_dependent`, this works for several platforms in one export too, where a kernel
    cannot be lowered for all of them.

    Args:
      name: of the operation, in jaxprs.
      shapes: `(*arrays, **choices)`, of which shapes and dtypes count, to the results' shapes.
      default: `(*arrays, **choices) -> arrays`, on all other platforms.
      **forms: the same by platform, such as "cuda" or "tpu".

    Returns:
      `(*arrays, **choices) -> arrays`; choices are hashable. Under `vmap` it runs again and again.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    @primitive.def_abstract_eval
    def _(*arrays, **choices):
        return [ShapedArray(x.shape, x.dtype) for x in shapes(*arrays, **choices)]

    @primitive.def_impl
    def _(*arrays, **choices):
        return jax.jit(lambda *arrays: primitive.bind(*arrays, **choices))(*arrays)

    mlir.register_lowering(primitive, mlir.lower_fun(default, multiple_results=True))
    for platform, form in forms.items():
        mlir.register_lowering(
            primitive, mlir.lower_fun(form, multiple_results=True), platform=platform
        )

    def bound(*arrays: jax.Array, **choices: Any) -> tuple[jax.Array, ...]:
        @jax.custom_batching.sequential_vmap
        def run(*arrays):
            return tuple(primitive.bind(*arrays, **choices))

        return run(*arrays)

    return bound
