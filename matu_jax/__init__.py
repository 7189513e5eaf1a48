"""MaTU, many-task federated fine-tuning with unified task vectors, in JAX and Flax.

Most names below are the aggregator library: pure functions on any pytree of floating arrays.
`Task`, `Model`, `Metric` and `simulate` are for a federation of one's own tasks and model; they are
imported when they are asked for, since they need Flax and optax. The experiment program is `python
-m matu_jax.train`.
"""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from matu_jax.data import Task
    from matu_jax.models.contract import Metric, Model
    from matu_jax.simulation.simulate import simulate

_LATER = {
    "Metric": "matu_jax.models.contract",
    "Model": "matu_jax.models.contract",
    "Task": "matu_jax.data",
    "simulate": "matu_jax.simulation.simulate",
}

__all__ = [
    "Aggregated",
    "AggregationConfig",
    "Metric",
    "Model",
    "ServerState",
    "Slots",
    "Task",
    "Unified",
    "aggregate",
    "apply_vectors",
    "direction_similarity",
    "modulate",
    "nonfinite",
    "simulate",
    "stack",
    "task_vectors",
    "unify",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
