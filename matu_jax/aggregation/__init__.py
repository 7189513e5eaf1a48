"""MaTU's aggregator: unified task vectors, direction similarity, and the server's round.

Source: Tsouvalas, Ozcelebi, Meratnia, "Many-Task Federated Fine-Tuning via Unified Task Vectors"
(arXiv 2502.06376). Folding a client's task vectors into one vector with masks and scales is
EMR-Merging (Huang et al. 2024, arXiv 2405.17461; eqs. 1 to 4 below). The server's equations 5 to 9
are this project's reading of the paper, so every choice in them is a field of `AggregationConfig`.

Notation: slot s = one (client, task) pair with task vector tau_s of d parameters; S(n) the present
slots of client n, S(t) those of task t, with weights w_s > 0; sgn(0) = 0.

    1  elect       sigma_n = sgn(sum_{S(n)} tau_s)
    2  magnitude   mu_n = max (or mean) over S(n) of |tau_s| where sgn(tau_s) = sigma_n
                   u_n = sigma_n * mu_n
    3  mask        m_s = [tau_s * u_n > 0]
    4  rescale     lambda_s = sum |tau_s| / sum |m_s * u_n|;   modulate: lambda_s * m_s * u_n
    5  agreement   alpha_t = |mean_{S(t)} sgn(tau_s)|;  gate g_t = 1 if alpha_t >= rho else alpha_t
    6  same task   tau_t = g_t * sum_{S(t)} w_s tau_s / sum w
    7  similarity  A_tt' = (1 + (1/d) sum sgn(tau_t) sgn(tau_t')) / 2
    8  cross task  the kappa most similar other tasks with A >= epsilon enter tau_t, or as many and
                   as much as the evidence warrants (`shrinkage`, this project's own)
    9  unified     U = unify over all tasks; downloads: per client, unify over its tasks

With `uploads = "change"`, this project's own too, clients fold what the round has changed (task
vector less download), eqs. 5 to 8 are of changes, and the server adds the outcome to the task
vectors that it keeps.

Where they are: 1 to 4 in `fold_block` (and `modulation`), 5 and 6 in `same_task_block`, 7 in
`directions` and `signs`, 8 in `transfer` and `shrinkage`, each for one block of parameters. `fold`,
`signs`, `same_task` and `finish` drive them over leaves: by a scan, or by the kernels of GPUs and
TPUs in `kernels` and `server_kernels`, chosen by the platform that a program is lowered for
(`platforms`). `client` and `server` apply them to pytrees; `reports` says who takes part in a
round, with the defences of `robust`.

Every function is pure and may be called under `jit`, `vmap` and `shard_map`; slots are visited by
loops, so that no second array of slots x parameters is ever made. A program exported for NVIDIA
GPUs holds kernels of Triton's, whose compiled form JAX does not promise to keep:
`jax.export.export` asks for
`disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]`.
"""

from matu_jax.aggregation.choices import AggregationConfig
from matu_jax.aggregation.client import modulate, unify
from matu_jax.aggregation.directions import direction_similarity
from matu_jax.aggregation.server import aggregate, nonfinite
from matu_jax.aggregation.types import Aggregated, ServerState, Slots, Unified

__all__ = [
    "Aggregated",
    "AggregationConfig",
    "ServerState",
    "Slots",
    "Unified",
    "aggregate",
    "direction_similarity",
    "modulate",
    "nonfinite",
    "unify",
]
