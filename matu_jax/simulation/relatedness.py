"""Which tasks are related, and how well a similarity tells."""

import numpy as np
from jaxtyping import Array, Bool, Float

from matu_jax.data import Task


def relatedness_auc(
    similarity: Float[Array | np.ndarray, "tasks tasks"],
    related: Bool[Array | np.ndarray, "tasks tasks"],
) -> float | None:
    """How well similarity tells related from unrelated pairs of tasks: 1 fully, 1/2 by chance.

    The probability that a related pair, drawn at random, has a higher similarity than an unrelated
    one; ties count one half (the area under the ROC curve; Mann and Whitney 1947). Pairs are
    unordered and of two different tasks.

    Args:
      similarity: symmetric, finite off the diagonal, `[tasks, tasks]`.
      related: symmetric, bool `[tasks, tasks]`; the diagonal does not matter.

    Returns:
      A number in [0, 1], or None where there is no related or no unrelated pair.

    Raises:
      ValueError: if shapes differ, or an array is not symmetric, or a similarity is not finite.
    """
    similarity, related = np.asarray(similarity, np.float64), np.asarray(related)
    if (
        similarity.ndim != 2
        or not len(similarity) == similarity.shape[1]
        or (related.shape != similarity.shape)
    ):
        raise ValueError(
            f"relatedness_auc: found similarity {similarity.shape} and related {related.shape}; "
            "expected two matrices [tasks, tasks]."
        )
    if related.dtype != np.bool_:
        raise ValueError(f"relatedness_auc: related is {related.dtype}; expected bool.")
    pairs = np.triu_indices(len(similarity), k=1)
    score, label = similarity[pairs], related[pairs]
    if not np.isfinite(score).all():
        first, second = (int(axis[~np.isfinite(score)][0]) for axis in pairs)
        raise ValueError(
            f"relatedness_auc: the similarity of tasks {first} and {second} is "
            f"{similarity[first, second]}; expected finite numbers."
        )
    if not (np.allclose(score, similarity.T[pairs]) and (label == related.T[pairs]).all()):
        raise ValueError(
            "relatedness_auc: found a matrix that is not symmetric; pairs have no order, so make "
            "it symmetric first, for instance (a + a.T) / 2."
        )
    if label.all() or not label.any():
        return None
    difference = score[label][:, None] - score[~label][None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def related(tasks: tuple[Task, ...]) -> Bool[np.ndarray, "tasks tasks"]:
    """Ground truth of relatedness: two tasks with one label space; bool `[tasks, tasks]`."""
    spaces = np.array([task.label_space for task in tasks])
    return spaces[:, None] == spaces[None, :]
