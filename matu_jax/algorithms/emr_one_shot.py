"""EMR-Merging (Huang et al. 2024, arXiv 2405.17461): one merge after local training, no rounds.

Every slot trains alone for all rounds. Then the holders of a task are averaged, weighted by the
examples n_s of those that have trained, and all tasks are folded into one vector u with a mask and
a scale per task (eqs. 1 to 4 of `matu_jax.aggregation`, with the maximum, as in the paper):

    tau_t = sum_{s of t} n_s v_s / sum_{s of t} n_s,    sigma = sgn(sum_t tau_t)
    u = sigma max{ |tau_t| : sgn(tau_t) = sigma },      m_t = [tau_t u > 0]
    lambda_t = sum |tau_t| / sum |m_t u|,               every slot of t gets lambda_t m_t u

Accuracy along the way is that of a merge made then. Vectors cross the network once, after the last
round: a slot's own up, u with the masks and scales of a client's tasks down.

Unlike the paper, which merges one model per task: a task has several holders, averaged first; what
is merged are adapters, factor by factor; and a slot that never took part weighs nothing, and gets
what the merge holds for its task. A trained head stays with its slot, as classifiers do there.
"""

import jax
import jax.numpy as jnp

from matu_jax.aggregation import modulate, unify
from matu_jax.algorithms.contract import Algorithm, Groups
from matu_jax.algorithms.means import keep_where_absent, weighted_mean, zeros
from matu_jax.messages.traffic import Message, Traffic


def emr_one_shot() -> Algorithm:
    """EMR-Merging; the state is every slot's vector and weight, `[slots, ...]`, at the clients."""

    def aggregate(state, uploads, slots):
        present = slots.weight > 0
        vectors = keep_where_absent(uploads, state[0], present)
        return (vectors, jnp.where(present, slots.weight, state[1])), {}

    def evaluated(state, slots):
        vectors, weight = state
        per_task, _ = weighted_mean(vectors, weight, slots.task, slots.num_tasks)
        merged = modulate(unify(per_task, magnitude="max"))
        return jax.tree.map(lambda leaf: leaf[slots.task], merged)

    def sent(state, uploads):
        del state
        vector = jax.tree.map(lambda leaf: leaf[:1], uploads)
        masks = jax.tree.map(lambda leaf: jnp.zeros((1, -(-leaf.size // 8)), jnp.uint8), vector)
        folded = Message(per_client=vector, per_slot=(masks, jnp.zeros(1, jnp.float32)))
        return Message(per_slot=uploads), folded

    return Algorithm(
        init=lambda base, slots: (
            zeros(base, slots.client.shape[0]),
            jnp.zeros(slots.client.shape[0], jnp.float32),
        ),
        download=lambda state, slots: state[0],
        upload=lambda vectors, slots: vectors,
        aggregate=aggregate,
        traffic=Traffic(sent, one_shot=True, kept=lambda state: ()),
        heads=None,
        groups=Groups("slots", "slots"),
        evaluated=evaluated,
    )
