"""What a run leaves in its workdir as it goes: a record a round, and checkpoints."""

import contextlib
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from matu_jax.config import Config
from matu_jax.errors import UserError
from matu_jax.runs.checkpoints import Checkpoints
from matu_jax.runs.log import MetricsLog, selected
from matu_jax.runs.workdir import check_identity
from matu_jax.simulation import hosts
from matu_jax.simulation.rounds import RoundResult


class Recorder:
    """Writes a run's rounds into its workdir, and finds where an interrupted run goes on.

    Of several processes all call it alike; the first alone reads and writes.

    Args:
      workdir: where everything goes.
      config: when to save, and how many checkpoints to keep.
      meta: what the run is of, from `federation.identity`; noted in every checkpoint.
      num_tasks: of the run.

    Attributes:
      log: the records of the rounds.
      similarity_sum: float32 `[tasks, tasks]`, the sum over rounds of the measured similarities.
    """

    def __init__(self, workdir: Path, config: Config, meta: dict[str, Any], num_tasks: int):
        self._folder, self._config, self._meta = workdir / "checkpoints", config, meta
        self._stack = contextlib.ExitStack()
        self._checkpoints: Checkpoints | None = None
        self._best: Any = None  # the record of the best round on validation so far
        # Seconds of the round before, whose line was written before it was saved.
        self._saving = 0.0
        self.log: MetricsLog = MetricsLog(workdir / "metrics.jsonl")
        self.similarity_sum: np.ndarray = np.zeros((num_tasks, num_tasks), np.float32)

    def __enter__(self) -> "Recorder":
        with hosts.together():
            if hosts.is_first():
                self._checkpoints = self._stack.enter_context(
                    Checkpoints(self._folder, keep=self._config.checkpoint.keep)
                )
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.__exit__(*raised)

    def restored(self, target: Any) -> tuple[int, Any] | None:
        """Where the run goes on: (rounds done, state), or None for a run that starts afresh.

        Args:
          target: shapes and dtypes of the state.

        Raises:
          UserError: if the checkpoint is another run's, or its records are not there as written.
        """
        whole, found = {"state": target, "similarity_sum": self.similarity_sum}, None
        with hosts.together():
            try:
                if self._checkpoints:
                    found = self._checkpoints.restore(whole)
                    if found:
                        check_identity(self._folder, found[2], self._config, self._meta)
                    _keep_records(self.log, self._checkpoints, found)
                    self._best = selected(self.log.records())
            except ValueError as error:
                raise UserError(str(error)) from None
        done = hosts.highest(found[0] if found else 0)
        if not done:
            return None
        state = found[1] if found else jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), whole)
        state = hosts.agreed(state)
        self.similarity_sum = np.asarray(state["similarity_sum"])
        return done, state["state"]

    def keep(self, result: RoundResult, *, stopping: bool) -> None:
        """Writes a round's record and, where it is time or the run stops, a checkpoint."""
        config = self._config
        if result.similarity is not None:
            self.similarity_sum = self.similarity_sum + result.similarity
        self._best = selected([*([self._best] if self._best else []), result.record])
        due = stopping or result.round % config.checkpoint.every_rounds == 0
        if hosts.is_first() and self._best is result.record:
            due = True  # results speak of this round, and exports read it
        due = bool(hosts.highest(due or result.round == config.rounds))
        clock = time.perf_counter()
        state = result.state if due else None
        with hosts.together():
            if self._checkpoints:
                # The line first: a kill in between leaves a line too many, which resuming drops.
                result.record["seconds"]["checkpoint"] = self._saving
                self.log.append(result.record)
                if due:
                    kept = {"state": state, "similarity_sum": self.similarity_sum}
                    notes = self._meta | {"metrics": self.log.fingerprint}
                    spare = self._best["round"] if self._best else None
                    self._checkpoints.save(result.round, kept, notes, spare=spare)
                self._saving = time.perf_counter() - clock


def _keep_records(log: MetricsLog, checkpoints: Checkpoints, found: tuple | None) -> None:
    """Drops records of rounds after the checkpoint's; those up to it have to be there as written.

    Everything that is summed up over rounds, such as epsilon, comes from them.

    Raises:
      ValueError: says what is wrong with them, and where the run can go on.
    """
    done, meta = (found[0], found[2]) if found else (0, {})
    try:
        log.truncate_after(done, meta.get("metrics"))
    except ValueError as error:
        if not done:
            raise ValueError(f"{error}. Remove it: nothing of it is needed.") from None
        ways = ["Bring the file back from a copy"]
        for number in reversed(checkpoints.complete()):
            with contextlib.suppress(ValueError):
                if number < done:
                    log.check(number, checkpoints.meta(number).get("metrics"))
                    ways.append(
                        f"or, to go on after round {number}, remove the newer ones in "
                        f"{checkpoints.directory}"
                    )
                    break
        raise ValueError(
            f"{error}. What is summed up over rounds, such as epsilon, would be wrong. "
            f"{'; '.join(ways)}; or, to start from round 0, remove {checkpoints.directory}, or "
            "give another --workdir."
        ) from None
