"""Generated stand-ins for real datasets, to try an experiment where its data is not.

A stand-in has its dataset's name, number of classes, class names, prompts and image size, so that
shapes, memory and traffic are those of the real experiment. Its images are gratings before a
coloured ground, whose direction, width and colours tell the class; accuracies say nothing about
the real dataset.
"""

import hashlib
import zlib
from collections.abc import Sequence

import numpy as np

from matu_jax.data import Split, Task, Transform
from matu_jax.data.datasets import DATASETS

__all__ = ["load"]


def load(
    names: Sequence[str],
    *,
    transform: Transform,
    train_examples: int = 256,
    validation_examples: int = 64,
    test_examples: int = 128,
    seed: int = 0,
) -> tuple[Task, ...]:
    """Generates stand-ins; the same for the same arguments.

    Args:
        names: Names of datasets of `matu_jax.data.datasets`.
        transform: Its size is that of the images.
        train_examples: Of each task; a task with more classes gets one per class.
        validation_examples: Of each task.
        test_examples: Of each task.
        seed: What everything is drawn from, together with the name.

    Returns:
        One task per name.
    """
    counts = {"train": train_examples, "validation": validation_examples, "test": test_examples}
    return tuple(_task(name, transform.size, counts, seed) for name in names)


def _task(name: str, size: int, counts: dict[str, int], seed: int) -> Task:
    dataset = DATASETS[name]
    classes = dataset.num_classes
    looks = np.random.default_rng((seed, zlib.crc32(name.encode())))
    angle, frequency = looks.uniform(0, np.pi, classes), looks.uniform(2, 12, classes)
    colours = looks.uniform(0, 255, (classes, 2, 3)).astype(np.float32)
    splits = {}
    for number, (split, count) in enumerate(counts.items()):
        rng = np.random.default_rng((seed, zlib.crc32(name.encode()), number))
        count = max(count, classes) if split == "train" else count
        labels = rng.permutation(np.arange(count, dtype=np.int32) % classes)
        images = np.empty((count, size, size, 3), np.uint8)
        row, column = np.meshgrid(*2 * [np.linspace(0, 1, size, dtype=np.float32)], indexing="ij")
        for image, label in zip(images, labels, strict=True):
            turn = angle[label] + rng.normal(0, 0.05)
            across, along, start = (2 * np.pi * frequency[label] * part for part in (
                np.cos(turn), np.sin(turn), rng.uniform()
            ))  # fmt: skip
            wave = np.sin(row * np.float32(across) + column * np.float32(along) + np.float32(start))
            high, low = np.clip(colours[label] + rng.normal(0, 8, 3), 0, 255).astype(np.float32)
            for channel in range(3):
                middle, half = (high + low)[channel] / 2, (high - low)[channel] / 2
                image[..., channel] = middle + half * wave
        splits[split] = Split(images, labels)
    digest = hashlib.sha256()
    for split in splits.values():
        digest.update(split.images)
        digest.update(split.labels)
    return Task(
        name=name,
        label_space=name,
        domain=name,
        class_names=dataset.class_names or tuple(f"class {i}" for i in range(classes)),
        templates=dataset.templates,
        fingerprint=f"synthetic-{digest.hexdigest()[:16]}",
        **splits,
    )
