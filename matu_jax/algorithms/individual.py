"""Every slot trains alone and nothing is sent: the reference that federation must beat."""

from matu_jax.algorithms.contract import Algorithm, Groups
from matu_jax.algorithms.means import keep_where_absent, zeros
from matu_jax.messages.traffic import Message, Traffic


def individual() -> Algorithm:
    """Local fine-tuning per slot; the state is every slot's own vector, leaves `[slots, ...]`."""
    return Algorithm(
        init=lambda base, slots: zeros(base, slots.client.shape[0]),
        download=lambda state, slots: state,
        upload=lambda vectors, slots: vectors,
        aggregate=lambda state, uploads, slots: (
            keep_where_absent(uploads, state, slots.weight > 0),
            {},
        ),
        traffic=Traffic(lambda state, uploads: (Message(), Message()), kept=lambda state: ()),
        heads=None,
        groups=Groups("slots", "slots"),
    )
