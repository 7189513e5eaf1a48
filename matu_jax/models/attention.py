"""Attention of a few tokens to each other, in the form that a platform is fastest with.

On NVIDIA GPUs cuDNN's fused kernel, which keeps the scores out of memory; elsewhere the products as
they stand, whose scores and softmax are float32 and whose operands have the compute dtype.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

_forbidden = contextvars.ContextVar("fused attention is forbidden", default=False)


def attention(
    query: Float[Array, "batch tokens heads features"],
    key: Float[Array, "batch tokens heads features"],
    value: Float[Array, "batch tokens heads features"],
    *,
    causal: bool = False,
) -> Float[Array, "batch tokens heads features"]:
    """Softmax attention with scale 1 / sqrt(features).

    Which form a program contains is settled where it is lowered, by the platform it is for. cuDNN's
    has to be there when the program is traced, since JAX then asks for its version.

    Args:
      query: `[batch, tokens, heads, features]`.
      key: likewise.
      value: likewise.
      causal: whether a token attends to itself and those before it only.

    Returns:
      `[batch, tokens, heads, features]` in the dtype of the arguments.
    """
    plain = functools.partial(_plain, causal=causal)
    if _forbidden.get() or not _has_fused(query.shape, query.dtype, causal):
        return plain(query, key, value)
    fused = functools.partial(_fused, causal=causal)
    return jax.lax.platform_dependent(query, key, value, cuda=fused, default=plain)


@contextlib.contextmanager
def differentiable_forwards() -> Iterator[None]:
    """Within, what is traced can be differentiated forwards too, which fused attention cannot."""
    token = _forbidden.set(True)
    try:
        yield
    finally:
        _forbidden.reset(token)


def _fused(query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool) -> jax.Array:
    """Attention by cuDNN; an odd number of tokens, whose gradient JAX refuses, is padded by one."""
    attend = functools.partial(
        jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn"
    )
    tokens = query.shape[1]
    if tokens % 2 == 0:
        return attend(query, key, value)
    padded = [jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value)]
    # Of the same value for all, but under `vmap` JAX wants lengths mapped where queries are.
    lengths = jnp.where(query[:, 0, 0, 0] == 0, jnp.int32(tokens), jnp.int32(tokens))
    out = attend(*padded, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    return out[:, :tokens]


@functools.cache
def _has_fused(shape: tuple[int, ...], dtype: Any, causal: bool) -> bool:
    """Whether cuDNN is there, and has attention of such sizes and its gradient."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return False
    x = jax.ShapeDtypeStruct(shape, dtype)
    try:
        jax.eval_shape(lambda *x: jax.vjp(functools.partial(_fused, causal=causal), *x)[1], x, x, x)
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return True


def _plain(query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool) -> jax.Array:
    scores = _scores(query, key) / math.sqrt(query.shape[-1])
    if causal:
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
        scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhf->bqhf", weights, value)


@jax.custom_jvp
def _scores(query: jax.Array, key: jax.Array) -> Float32[Array, "batch heads tokens tokens"]:
    """Products of queries and keys, summed in float32 and left there."""
    return jnp.einsum("bqhf,bkhf->bhqk", query, key, preferred_element_type=jnp.float32)


@_scores.defjvp
def _scores_change(primals, tangents):
    """In the compute dtype, so that its transposition multiplies in it too."""
    (query, key), (by_query, by_key) = primals, tangents
    change = jnp.einsum("bqhf,bkhf->bhqk", by_query, key)
    change = change + jnp.einsum("bqhf,bkhf->bhqk", query, by_key)
    return _scores(query, key), change.astype(jnp.float32)
