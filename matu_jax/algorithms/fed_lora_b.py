"""Fed-LoRA-B: only the B of every adapter is shared, averaged as in FedAvg.

FFA-LoRA (Sun et al. 2024, arXiv 2403.12313): A stays at its random start, the same for everybody, so
that the mean of the products B A is the product of the mean; half the traffic. With
`lora_b_trains_a`, A trains too and stays with its slot.
"""

import jax

from matu_jax.algorithms.base import Algorithm, LocalRule, partly_shared
from matu_jax.config import Config
from matu_jax.trees import leaf_items


def fed_lora_b(config: Config) -> Algorithm:
    """FedAvg of B; see `base.partly_shared` for the state.

    Raises:
      ValueError: where there are no adapters.
    """
    if config.model.trainable != "lora":
        raise ValueError(
            f"config.algorithm: 'fed_lora_b' shares the B of LoRA adapters, but "
            f"config.model.trainable is {config.model.trainable!r}. Set it to 'lora', or choose "
            "another algorithm."
        )

    def is_a(tree):
        flags = [path.endswith("lora_a") for path, _ in leaf_items(tree)]
        return jax.tree.unflatten(jax.tree.structure(tree), flags)

    def cut(tree, lead):
        return jax.tree.map(lambda x, a: 0 if a else x.shape[lead], tree, is_a(tree))

    def trains(vector, progress):
        del progress
        return jax.tree.map(lambda a: 0.0 if a else 1.0, is_a(vector))

    rule = LocalRule() if config.lora_b_trains_a else LocalRule(trains=trains)
    return partly_shared(cut)._replace(local=rule, shares_heads=True)
