"""What every source of data hands over: tasks, each of three disjoint splits of uint8 images.

A source is any function that returns `Task` objects; nothing else in the package knows where the
images came from. Below this contract stand three modules, all numpy in, numpy out:

- `matu_jax.data.embedded` generates a benchmark of 30 tasks, without a download, out of the
  pictures of `matu_jax.data.sprites`, drawn by `matu_jax.data.rendering`;
- `matu_jax.data.partition` says which client holds which task, and which training examples;
- `matu_jax.data.batching` draws the batches of a round and gathers them, stacked over slots.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

__all__ = ["Split", "Task", "Transform"]


class Split(NamedTuple):
    """The labelled images of one split.

    Attributes:
        images: uint8 `[examples, height, width, channels]`, 0 to 255.
        labels: int32 `[examples]`, each from 0 to `num_classes - 1` of its task.
    """

    images: UInt8[np.ndarray, "examples height width channels"]
    labels: Int32[np.ndarray, "examples"]


@dataclass(frozen=True)
class Transform:
    """How an image file becomes the square uint8 image that a model takes.

    Attributes:
        size: Height and width of the result, in pixels.
        resize: "shortest_side" (to `size`, then a crop of the centre) or "squash" (both sides to
            `size`).
        resample: "bicubic" or "bilinear".
    """

    size: int = 224
    resize: str = "shortest_side"
    resample: str = "bicubic"


@dataclass(frozen=True, eq=False)
class Task:
    """One classification task.

    Attributes:
        name: Unique among the tasks of a run, for instance `"hue/noise"`.
        label_space: What is asked. Tasks that agree on it share the meaning of their labels, and so
            may share a frozen head.
        domain: How the images look. Tasks that agree on it ask about images of the same kind.
        class_names: One name per label, in the order of the labels.
        train: The only split that is divided among clients.
        validation: For choosing rules, rates and rounds.
        test: For reporting.
        templates: Prompts with `{}` where the class name goes, for frozen heads made of text.
        fingerprint: Hash of the data, where its source keeps one.
        notes: What people should know of the data, a sentence each.

    Raises:
        ValueError: If a split has the wrong dtype or shape, no example, or a label that no class
            name stands for.
    """

    name: str
    label_space: str
    domain: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    templates: tuple[str, ...] = ()
    fingerprint: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in ("train", "validation", "test"):
            _check_split(
                f"task {self.name!r}, split {part!r}", getattr(self, part), self.class_names
            )

    @property
    def num_classes(self) -> int:
        """Number of classes, which is the number of class names."""
        return len(self.class_names)


def _check_split(where: str, split: Split, class_names: tuple[str, ...]) -> None:
    images, labels = split
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            f"{where}: images must be uint8 [examples, height, width, channels], "
            f"got {images.dtype} {list(images.shape)}"
        )
    if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{where}: labels must be int32 [{len(images)}], one per image, "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    if not len(labels):
        raise ValueError(f"{where}: there is no example; a task needs some in every split")
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise ValueError(
            f"{where}: labels run from {labels.min()} to {labels.max()}, but there are "
            f"{len(class_names)} class names, so they must lie in 0 to {len(class_names) - 1}"
        )
