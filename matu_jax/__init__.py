"""MaTU, many-task federated fine-tuning with unified task vectors, in JAX and Flax.

The names below are the aggregator library: pure functions on any pytree of floating arrays. The
experiment program is `python -m matu_jax.train`.
"""

from matu_jax.aggregation import (
    Aggregated,
    AggregationConfig,
    ServerState,
    Slots,
    Unified,
    aggregate,
    direction_similarity,
    modulate,
    nonfinite,
    unify,
)
from matu_jax.trees import apply_vectors, stack, task_vectors

__all__ = [
    "Aggregated",
    "AggregationConfig",
    "ServerState",
    "Slots",
    "Unified",
    "aggregate",
    "apply_vectors",
    "direction_similarity",
    "modulate",
    "nonfinite",
    "stack",
    "task_vectors",
    "unify",
]
