"""NTK-FedAvg (Muhamed et al. 2024): FedAvg on the model linearised around its pretrained weights.

"Fed Up with Complexity: Simplifying Many-Task Federated Learning with NTKFedAvg", PML workshop at
ICLR.

    f(x; theta_0 + tau) = f(x; theta_0) + J(x; theta_0) tau,    tau = sum_s w_s tau_s / sum_s w_s

in training and in evaluation, so that tasks interfere less when their vectors are averaged (weight
disentanglement, Ortiz-Jimenez et al. 2023, arXiv 2305.12827). One adapter for all clients and
tasks, as in FedAvg: a client with several sends the mean of what its slots have trained.

Unlike the paper, whose networks train whole: with LoRA the expansion is around B = 0, it is linear
in B, and A keeps its random start (it is sent all the same, as FedAvg would). Frozen zero-shot
heads are expanded with the rest, the normalisation of features included. A trained head is zero at
the base, where the backbone's derivative vanishes with it: the head alone learns then.
"""

from matu_jax.aggregation.choices import DefenceConfig
from matu_jax.algorithms.contract import Algorithm, LocalRule
from matu_jax.algorithms.fedavg import fedavg


def ntk_fedavg(defence: DefenceConfig) -> Algorithm:
    """FedAvg with `LocalRule.linearised`."""
    return fedavg(defence)._replace(local=LocalRule(linearised=True))
