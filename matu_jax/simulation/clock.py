"""Seconds of each phase of a round, with compilation kept apart."""

import time
from typing import Any

import jax


class Clock:
    """Seconds of each phase of a round, with the time spent compiling kept apart."""

    _compiling = 0.0

    def __init__(self):
        self.seconds: dict[str, float] = {"compile": 0.0}
        self._last = time.perf_counter()
        self._compiled = Clock._compiling

    def lap(self, phase: str, result: Any = None) -> None:
        """Adds the time since the last lap to a phase, once `result` is computed."""
        jax.block_until_ready(result)
        now, compiled = time.perf_counter(), Clock._compiling
        compiling, self._compiled = compiled - self._compiled, compiled
        self.seconds["compile"] += compiling
        self.seconds[phase] = self.seconds.get(phase, 0.0) + max(now - self._last - compiling, 0.0)
        self._last = now

    @staticmethod
    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        """Is told by JAX how long it compiled."""
        if event in (
            "/jax/core/compile/jaxpr_trace_duration",
            "/jax/core/compile/jaxpr_to_mlir_module_duration",
            "/jax/core/compile/backend_compile_duration",
        ):
            Clock._compiling += duration_secs


jax.monitoring.register_event_duration_secs_listener(Clock.listen)
