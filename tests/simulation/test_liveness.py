"""What programs hold at once, counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from matu_jax.simulation.liveness import peak_bytes

X = jnp.zeros((100, 10))
WIDE, NARROW = jnp.zeros((10, 40)), jnp.zeros((40, 10))
ROWS = 4 * 100  # bytes of a column of rows


def peak(function, *arguments, platform="cpu"):
    return peak_bytes(jax.make_jaxpr(function)(*arguments), platform)


def test_a_product_is_held_until_it_is_read_and_arguments_are_not_counted():
    assert peak(lambda x, a: x @ a, X, WIDE) == 40 * ROWS
    assert peak(lambda x, a, b: x @ a @ b, X, WIDE, NARROW) == 50 * ROWS
    # The wide one is gone when the last product is there.
    assert peak(lambda x, a, b: x @ a @ b @ a[:, :5], X, WIDE, NARROW) == 50 * ROWS


def test_what_is_elementwise_is_held_once_where_a_product_reads_it():
    def perceptron(x, a, b):
        hidden = x @ a
        return jnp.tanh(hidden * 2 + 1) @ b

    assert peak(perceptron, X, WIDE, NARROW) == (40 + 40) * ROWS


def test_what_is_read_behind_a_product_is_computed_again_from_what_is_still_there():
    def gated(x, a, b):
        hidden = x @ a
        gate = jnp.tanh(hidden)
        return gate.sum() + (hidden @ b).sum() + gate.max()

    assert 50 * ROWS <= peak(gated, X, WIDE, NARROW) < 51 * ROWS


@pytest.mark.parametrize("remat", [False, True])
def test_a_loop_holds_what_it_stacks_and_one_turn(remat):
    def layer(x, kernel):
        return jnp.sin(x @ kernel[0]) @ kernel[1], None

    kernels = (jnp.zeros((8, 10, 40)), jnp.zeros((8, 40, 10)))
    step = jax.checkpoint(layer, prevent_cse=False) if remat else layer

    def loss(x, kernels):
        return jnp.sum(jax.lax.scan(step, x, kernels)[0])

    found = peak(jax.grad(loss), X, kernels)
    kept = 8 * (10 if remat else 40)
    assert kept * ROWS < found < (kept + 8 * 40 * (not remat) + 200) * ROWS


def test_of_what_differs_by_platform_that_of_the_platform_counts():
    def chosen(x):
        return jax.lax.platform_dependent(
            x,
            cuda=lambda x: (x @ x.T).sum(),
            tpu=lambda x: (2 * x).sum(),
            default=lambda x: x.sum(),
        )

    assert peak(chosen, X, platform="cuda") >= 100 * ROWS
    assert peak(chosen, X, platform="tpu") < 10 * ROWS
    assert peak(chosen, X, platform="cpu") < 10 * ROWS


def test_of_other_branches_the_largest_counts():
    def chosen(x, first):
        return jax.lax.cond(first, lambda x: (x @ x.T).sum(), lambda x: x.sum(), x)

    assert peak(chosen, X, True) >= 100 * ROWS
