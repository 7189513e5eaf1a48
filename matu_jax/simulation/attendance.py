"""Who takes part in one round, who is left out of it, and why."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from matu_jax.aggregation import Slots
from matu_jax.scenarios import failures
from matu_jax.simulation.choices import SimulationConfig
from matu_jax.simulation.federation import Federation
from matu_jax.simulation.participation import participants, trained_slots, weighted


class StoppedError(RuntimeError):
    """A run that cannot sensibly go on; says why, and what to do."""


class Attendance:
    """The slots of one round, from those that train to those that count.

    Its methods follow the round, and each leaves fewer: clients are `chosen`; the slots in `rows`
    train, of which `takes_part` are of chosen clients; those that are `expected` are not of clients
    that vanish; those that are `present` send what they have trained; those that are `counted` are
    aggregated. A slot that falls out is `dropped`, for the last reason that is found.

    Args:
      config: participation and failures.
      federation: who holds what.
      index: the round, 0 for the first.

    Attributes:
      chosen: bool `[clients]`, who takes part.
      rows: int64 `[trained]`, the slots that are trained.
      takes_part: bool `[trained]`, those of them whose client takes part.
      expected: the slots that will send something, unless their training fails; the others have
        weight 0.
    """

    def __init__(self, config: SimulationConfig, federation: Federation, index: int):
        self._config, self._federation, self._index = config, federation, index
        slots = federation.slots
        self._reasons: dict[int, str] = {}
        self.chosen: np.ndarray = participants(config, slots, index)
        self.rows: np.ndarray = trained_slots(config, slots, self.chosen)
        self.takes_part: np.ndarray = self.chosen[slots.client[self.rows]]
        self._absent = failures.absent_clients(
            config.failures, federation.trace, self.chosen, seed=config.seed, round_index=index
        )
        self._gone: np.ndarray = np.isin(slots.client, list(self._absent))
        self.expected: Slots = self._of_trained(self.takes_part)

    def after_training(self, finite: Bool[np.ndarray, "trained"]) -> Slots:
        """The slots whose clients send what they have trained; the others have weight 0.

        Args:
          finite: bool `[trained]`, False where the loss or a parameter is not a finite number.

        Raises:
          StoppedError: if training fails in too many slots.
        """
        slots, rows = self._federation.slots, self.rows
        failed = rows[self.takes_part & ~finite]
        self._check_failed(failed)
        away = rows[self.takes_part & self._gone[rows]]
        self._reasons |= {row: self._absent[slots.client[row]] for row in away}
        self._note(failed, "training loss or a parameter is not a finite number")
        return self._of_trained(self.takes_part & finite)

    def after_upload(self, present: Slots, taken: Float[np.ndarray, "slots"]) -> Slots:
        """The slots whose uploads the server is given: finite, and as many of a task as the quorum.

        Args:
          present: from `after_training`.
          taken: float32 `[slots]`, the weights of what is taken.
        """
        quorum = self._config.failures.quorum
        counted = weighted(self._federation.slots, taken > 0)
        refused = np.flatnonzero((present.weight > 0) & (counted.weight == 0))
        self._note(refused, "upload refused: a number is not finite")
        few = failures.without_quorum(counted, quorum)
        self._note(np.flatnonzero(few), f"fewer than {quorum} holders of the task reported")
        return weighted(self._federation.slots, (counted.weight > 0) & ~few)

    def after_aggregation(self, counted: Slots, metrics: dict[str, Any]) -> None:
        """Notes which of the slots that are aggregated the server has refused."""
        if "accepted" in metrics:
            wrong = np.flatnonzero((counted.weight > 0) & ~np.asarray(metrics["accepted"]))
            self._note(wrong, "upload refused: a number is not finite, or a scale < 0")

    def exchanging(self, present: Slots, one_shot: bool) -> tuple[Slots, Slots]:
        """The slots whose clients send, and those whose clients receive; others have weight 0."""
        slots = self._federation.slots
        if one_shot:  # everybody, after the last round
            last = self._index + 1 == self._config.rounds
            everybody = weighted(slots, np.full(len(slots.client), last))
            return everybody, everybody
        return present, weighted(slots, self.chosen[slots.client])

    def dropped(self) -> list[dict[str, Any]]:
        """Client, task and reason of every slot that was left out, as the record has them."""
        slots, tasks = self._federation.slots, self._federation.tasks
        return [
            {
                "client": int(slots.client[row]),
                "task": tasks[slots.task[row]].name,
                "reason": self._reasons[row],
            }
            for row in sorted(self._reasons)
        ]

    def _of_trained(self, those: np.ndarray) -> Slots:
        """The slots with weight 0 for all but those of the trained ones that have not vanished."""
        there = np.zeros(len(self._gone), bool)
        there[self.rows[those]] = True
        return weighted(self._federation.slots, there & ~self._gone)

    def _note(self, rows: np.ndarray, reason: str) -> None:
        self._reasons |= dict.fromkeys(rows, reason)

    def _check_failed(self, failed: np.ndarray) -> None:
        """Stops a run in which the training of too many slots fails."""
        allowed = self._config.failures.max_nonfinite_share
        trained = int(self.takes_part.sum())
        if len(failed) <= allowed * trained:
            return
        slots, tasks = self._federation.slots, self._federation.tasks
        client, task = slots.client[failed[0]], slots.task[failed[0]]
        raise StoppedError(
            f"round {self._index + 1}: training failed in {len(failed)} of {trained} slots (client "
            f"{client}, task {tasks[task].name}, and so on): the loss or a parameter is not a "
            f"finite number. config.failures.max_nonfinite_share = {allowed:g} allows no more. "
            "Lower config.local.learning_rate, or compute in float32, and start in another "
            "directory; the rounds before are as they were."
        )
