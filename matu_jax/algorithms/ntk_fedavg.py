"""NTK-FedAvg (Muhamed et al. 2024): FedAvg on the model linearised around its pretrained weights.

f(x; theta_0 + tau) = f(x; theta_0) + J(x; theta_0) tau, in training and in evaluation, so that tasks
interfere less when their vectors are averaged (weight disentanglement, Ortiz-Jimenez et al. 2023,
arXiv 2305.12827). One adapter for all clients and tasks, as in FedAvg. With LoRA the expansion is
around B = 0: it is linear in B, and A keeps its random start.
"""

from matu_jax.algorithms.base import Algorithm, LocalRule
from matu_jax.algorithms.fedavg import fedavg
from matu_jax.config import Config


def ntk_fedavg(config: Config) -> Algorithm:
    """FedAvg with `LocalRule.linearised`."""
    return fedavg(config)._replace(local=LocalRule(linearised=True))
