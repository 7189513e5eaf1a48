"""Accuracy per slot and per task."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from matu_jax.data import Split
from matu_jax.local import class_mask
from matu_jax.models import Model
from matu_jax.parallel import map_slots


class EvaluationSet(NamedTuple):
    """A split of every task, padded to one size and cut into batches.

    Attributes:
      images: uint8 `[tasks, batches, batch, height, width, channels]`.
      labels: int32 `[tasks, batches, batch]`, -1 where padded.
    """

    images: jax.Array
    labels: jax.Array


def evaluation_set(splits: Sequence[Split], batch_examples: int) -> EvaluationSet:
    """Stacks one split per task into batches.

    Raises:
      ValueError: if a split is empty.
    """
    empty = [i for i, split in enumerate(splits) if not len(split.labels)]
    if empty:
        raise ValueError(f"evaluation: task {empty[0]} has no examples in this split.")
    longest = max(len(split.labels) for split in splits)
    batch = min(batch_examples, longest)
    size = -(-longest // batch) * batch
    images = np.zeros((len(splits), size, *splits[0].images.shape[1:]), np.uint8)
    labels = np.full((len(splits), size), -1, np.int32)
    for i, split in enumerate(splits):
        images[i, : len(split.images)], labels[i, : len(split.labels)] = split.images, split.labels
    return EvaluationSet(
        jnp.asarray(images.reshape(len(splits), -1, batch, *images.shape[2:])),
        jnp.asarray(labels.reshape(len(splits), -1, batch)),
    )


def evaluation(model: Model, mesh: Mesh, *, parallel_slots: int = 0) -> Callable[..., jax.Array]:
    """Makes the function that measures every slot on its own task's examples.

    Args:
      model: what is evaluated.
      mesh: the devices.
      parallel_slots: as in `parallel.map_slots`.

    Returns:
      `((base, frozen, EvaluationSet), vectors, task, num_classes) -> accuracy`, to be jitted:
      vectors leaves `[slots, ...]`, task and num_classes int32 `[slots]`, accuracy float32
      `[slots]` from 0 to 1.
    """

    def slot_accuracy(shared, vector, task, num_classes):
        base, frozen, examples = shared
        params = jax.tree.map(jnp.add, base, vector)

        def hits(batch):
            images, labels = batch
            logits = model.logits(params, frozen, images)
            logits = logits + class_mask(num_classes, logits.shape[-1])[None]
            return (logits.argmax(axis=-1) == labels).sum(), (labels >= 0).sum()

        right, counted = jax.lax.map(hits, (examples.images[task], examples.labels[task]))
        return right.sum() / counted.sum()

    return map_slots(slot_accuracy, mesh, parallel_slots=parallel_slots)


def per_task(per_slot: np.ndarray, task: np.ndarray, num_tasks: int) -> np.ndarray:
    """Mean over the slots of each task: float64 `[tasks]`; NaN for a task without a slot."""
    total = np.bincount(task, weights=per_slot, minlength=num_tasks)
    count = np.bincount(task, minlength=num_tasks)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
