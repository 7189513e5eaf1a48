"""Merging fine-tuned models block by block: unify, TIES and task arithmetic.

All parameters of a model make one long vector, visited in blocks of a fixed size, each padded
with zeros, whose task vector is zero and changes nothing. Memory holds one block of every model,
and blocks are the shorter the more models there are; sums over all parameters are kept in float64.

    unify       EMR-Merging (Huang et al. 2024, arXiv 2405.17461), as `matu_jax.unify` with
                magnitude "max"
    ties        TIES-Merging (Yadav et al. 2023, arXiv 2306.01708): trim each task vector to its
                largest entries, elect a sign per parameter, take the mean of those that agree. The
                last two steps are `matu_jax.unify` with magnitude "mean".
    arithmetic  task arithmetic (Ilharco et al. 2023, arXiv 2212.04089): the sum of task vectors
"""

from matu_jax.merging.alignment import Alignment, align
from matu_jax.merging.methods import (
    PASSES,
    Method,
    given_name,
    merge_models,
    unify_models,
)
from matu_jax.merging.rebuilding import UnifiedTasks, rebuild_model, unified_tasks
from matu_jax.merging.sums import Summary

__all__ = [
    "PASSES",
    "Alignment",
    "Method",
    "Summary",
    "UnifiedTasks",
    "align",
    "given_name",
    "merge_models",
    "rebuild_model",
    "unified_tasks",
    "unify_models",
]
