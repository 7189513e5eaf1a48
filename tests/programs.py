"""Programs that several files compile, how many they are, and how large."""

from typing import Any

import jax
import jax.monitoring
import pytest

import matu_jax as matu

# Every rule of every equation; the other fields have one value each, to compile less. The least
# similarity is one that float32 holds exactly.


def _config(magnitude: Any, similarity: Any, transfer: Any) -> matu.AggregationConfig:
    return matu.AggregationConfig.paper(
        magnitude=magnitude,
        agreement_threshold=0.4,
        top_k=2,
        min_similarity=15 / 32,
        transfer=transfer,
        similarity=similarity,
    )


CONFIGS = [
    _config("max", "aggregated", "none"),
    _config("max", "cross_client", "none"),
    _config("mean", "aggregated", "mean"),
    _config("max", "cross_client", "additive"),
]


@pytest.fixture
def compilations():
    """Counts programs that XLA compiles while the test runs."""
    seen = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def equations(jaxpr):
    inner = [
        part
        for equation in jaxpr.eqns
        for part in jax.tree.leaves(list(equation.params.values()))
        if hasattr(part, "eqns")
    ]
    return len(jaxpr.eqns) + sum(map(equations, inner))
