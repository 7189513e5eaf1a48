"""Attention by itself: against a float64 loop, its gradients, and the form each platform gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matu_jax.models import attention as module
from matu_jax.models.attention import attention, differentiable_forwards

KEYS = jax.random.split(jax.random.key(0), 3)


def inputs(tokens=5, dtype=jnp.float32):
    return [jax.random.normal(key, (2, tokens, 3, 8)).astype(dtype) for key in KEYS]


def oracle(query, key, value, causal):
    """float64, one query of one head of one example after the other."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.empty_like(query)
    for example, token, head in np.ndindex(query.shape[:3]):
        seen = slice(0, token + 1 if causal else None)
        scores = key[example, seen, head] @ query[example, token, head] / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max())
        out[example, token, head] = weights @ value[example, seen, head] / weights.sum()
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-7)])
def test_attention_is_that_of_a_float64_loop(dtype, bound, causal):
    query, key, value = inputs(dtype=dtype)
    found = attention(query, key, value, causal=causal)
    assert found.dtype == dtype
    expected = oracle(query, key, value, causal)
    assert np.abs(np.asarray(found, np.float64) - expected).max() < bound * np.abs(expected).max()


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_jax_in_float32(dtype, bound, causal):
    given = inputs(dtype=dtype)
    weight = jnp.sin(jnp.arange(given[0].size).reshape(given[0].shape))

    def gradient(function, given):
        def loss(*x):
            return jnp.sum(weight * function(*x, causal).astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1, 2))(*given)

    found = gradient(lambda q, k, v, causal: attention(q, k, v, causal=causal), given)
    expected = gradient(
        lambda q, k, v, causal: jax.nn.dot_product_attention(q, k, v, is_causal=causal),
        [x.astype(jnp.float32) for x in given],
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        error = np.abs(np.asarray(ours, np.float32) - theirs).max()
        assert error < bound * np.abs(theirs).max()


def lowered(given, platform):
    """The program of a gradient through attention that is computed again, mapped over slots."""

    def loss(*x):
        return jax.checkpoint(lambda *x: attention(*x))(*x).astype(jnp.float32).sum()

    step = jax.jit(jax.vmap(jax.grad(loss)))
    slots = [x[None] for x in given]
    return step.trace(*slots).lower(lowering_platforms=(platform,)).as_text()


def test_a_program_has_the_form_of_the_platform_that_it_is_lowered_for(monkeypatch):
    def fused(query, key, value, *, causal):
        return jnp.cos(query) * key * value

    monkeypatch.setattr(module, "_fused", fused)
    monkeypatch.setattr(module, "_has_fused", lambda *_: True)
    given = inputs(dtype=jnp.bfloat16)
    assert "sine" in lowered(given, "cuda")
    for platform in ("cpu", "tpu"):
        text = lowered(given, platform)
        assert "sine" not in text
        assert "exponential" in text
    with differentiable_forwards():
        assert "sine" not in lowered(given, "cuda")


def test_without_cudnn_or_in_float32_a_program_for_cuda_is_the_plain_one(monkeypatch):
    def refuse(*_, implementation, **__):
        raise RuntimeError("cuDNN not found.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", refuse)
    module._has_fused.cache_clear()
    for dtype in (jnp.float32, jnp.bfloat16):
        assert "exponential" in lowered(inputs(dtype=dtype), "cuda")
    module._has_fused.cache_clear()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [4, 5])
def test_an_odd_number_of_tokens_is_padded_for_cudnn(monkeypatch, tokens, causal):
    """JAX's own form stands in for cuDNN's, which takes the same arguments."""
    own, seen = jax.nn.dot_product_attention, []

    def stand_in(*x, implementation, **options):
        assert implementation == "cudnn"
        seen.append(x[0].shape[1])
        return own(*x, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    given = [jnp.stack([x, 2 * x]) for x in inputs(tokens)]

    def gradient(function):
        def loss(*x):
            return jnp.sin(function(*x, causal=causal)).sum()

        return jax.vmap(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*given)

    found, expected = gradient(module._fused), gradient(attention)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    assert set(seen) == {4 if tokens == 4 else 6}


def test_it_is_differentiated_forwards_and_then_backwards():
    given = inputs(dtype=jnp.bfloat16)

    def change(step):
        return jax.jvp(attention, tuple(given), tuple(step))[1].astype(jnp.float32).sum()

    step = [jnp.ones_like(x) for x in given]
    backwards = jax.grad(lambda *x: attention(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    with differentiable_forwards():
        expected, found = backwards(*given), jax.grad(change)(step)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=2e-2
        )
