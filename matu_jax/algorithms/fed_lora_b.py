"""Fed-LoRA-B: only the B of every adapter is shared, averaged as in FedAvg.

FFA-LoRA (Sun et al. 2024, arXiv 2403.12313): A stays at its random start, the same for everybody,
so that the mean of products is the product of the mean, at half the traffic:

    mean_s (A B_s) = A mean_s B_s,    B = sum_s w_s B_s / sum_s w_s

With `trains_a` (a variant that is not in the paper), A trains too and stays with its slot.

Unlike the paper, where clients hold data of one task: tasks differ, a client with several sends the
mean of what its slots have trained, and without a personal A a task shows in its head alone, which
is frozen (zero-shot), or trained and averaged among the task's holders.
"""

import dataclasses

import jax

from matu_jax.aggregation.choices import DefenceConfig
from matu_jax.algorithms.contract import Algorithm, LocalRule
from matu_jax.algorithms.parts import partly_shared
from matu_jax.trees import leaf_items


@dataclasses.dataclass(frozen=True)
class FedLoraBConfig:
    """Fed-LoRA-B's choices.

    Attributes:
      trains_a: whether A trains too, as a personal part, or is frozen.
    """

    trains_a: bool = False


def fed_lora_b(choices: FedLoraBConfig, defence: DefenceConfig, trainable: str) -> Algorithm:
    """FedAvg of B; see `parts.partly_shared` for the state.

    Args:
      choices: its own.
      defence: of the mean of B.
      trainable: what of the model trains; "lora" is what it needs.

    Raises:
      ValueError: where there are no adapters; from `init`, of a model of one's own.
    """
    if trainable != "lora":
        raise ValueError(
            f"config.algorithm: 'fed_lora_b' shares the B of LoRA adapters, but "
            f"config.model.trainable is {trainable!r}. Set it to 'lora', or choose "
            "another algorithm."
        )

    def is_a(tree):
        paths = [path for path, _ in leaf_items(tree)]
        flags = [path.endswith("lora_a") for path in paths]
        if not any(flags):
            raise ValueError(
                "config.algorithm: 'fed_lora_b' shares the B of LoRA adapters, but of the model's "
                f"arrays ({', '.join(paths[:5])}{', ...' * (len(paths) > 5)}) none has a path that "
                "ends with lora_a, as an adapter's A has. Let the model train adapters, or choose "
                "another algorithm."
            )
        return jax.tree.unflatten(jax.tree.structure(tree), flags)

    def cut(tree, lead):
        return jax.tree.map(lambda x, a: 0 if a else x.shape[lead], tree, is_a(tree))

    def trains(vector, progress):
        del progress
        return jax.tree.map(lambda a: 0.0 if a else 1.0, is_a(vector))

    rule = LocalRule() if choices.trains_a else LocalRule(trains=trains)
    return partly_shared(cut, defence)._replace(local=rule, heads=defence)
