"""Who takes part in a round, and which slots are trained."""

import numpy as np
from jaxtyping import Bool, Int64

from matu_jax.aggregation import Slots
from matu_jax.simulation.choices import SimulationConfig


def participants(
    config: SimulationConfig, slots: Slots, round_index: int
) -> Bool[np.ndarray, "clients"]:
    """Draws the clients of a round from (seed, round): bool `[clients]`."""
    count = config.clients_per_round or slots.num_clients
    chosen = np.zeros(slots.num_clients, bool)
    rng = np.random.default_rng((config.seed, round_index, 0x5E1EC7))
    chosen[rng.permutation(slots.num_clients)[:count]] = True
    return chosen


def trained_slots(
    config: SimulationConfig, slots: Slots, chosen: Bool[np.ndarray, "clients"]
) -> Int64[np.ndarray, "trained"]:
    """Which slots are trained in a round: as many every round, so that nothing recompiles.

    The chosen clients' slots come first; where clients differ in their number of tasks, slots of
    others fill up, of which nothing is sent. int64 `[trained]`.
    """
    held = np.sort(np.bincount(slots.client, minlength=slots.num_clients))
    size = int(held[-(config.clients_per_round or slots.num_clients) :].sum())
    order = np.argsort(~chosen[slots.client], kind="stable")
    return np.sort(order[:size])


def weighted(slots: Slots, there: Bool[np.ndarray, "slots"]) -> Slots:
    """The slots, with weight 0 for those that are not there, bool `[slots]`."""
    weight = np.where(there, slots.weight, 0).astype(np.float32)
    return Slots(slots.client, slots.task, weight, slots.num_clients, slots.num_tasks)
