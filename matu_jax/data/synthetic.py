"""Generated stand-ins for real datasets, to try an experiment where its data is not.

A stand-in has its dataset's name, number of classes, class names, prompts and image size, so that
shapes, memory and traffic are those of the real experiment. Its images are gratings before a
coloured ground, whose direction, width and colours tell the class; accuracies say nothing about
the real dataset.
"""

import dataclasses
import hashlib
import os
import zlib
from collections.abc import Sequence

import numpy as np

from matu_jax.data import ImageTask, Split, Transform, folders, selection
from matu_jax.data.datasets import Dataset

__all__ = ["load"]


def load(
    names: Sequence[str],
    *,
    transform: Transform,
    image_folders: str | os.PathLike[str] = "",
    cache_dir: str | os.PathLike[str] | None = None,
    train_examples: int = 256,
    validation_examples: int = 64,
    test_examples: int = 128,
    seed: int = 0,
) -> tuple[ImageTask, ...]:
    """Generates stand-ins; the same for the same arguments.

    Args:
        names: Names that `matu_jax.data.selection.find` knows. Classes of an image folder that is
            not in the table are read from the folder.
        transform: Its size is that of the images.
        image_folders: Where image folders are, see `selection.resolve`.
        cache_dir: See `selection.cache`.
        train_examples: Of each task; a task with more classes gets one per class.
        validation_examples: Of each task.
        test_examples: Of each task.
        seed: What everything is drawn from, together with the name.

    Returns:
        One task per name.

    Raises:
        ValueError: If a name is unknown, or an image folder that is needed cannot be listed.
    """
    counts = {"train": train_examples, "validation": validation_examples, "test": test_examples}
    tasks = []
    for name in names:
        dataset = selection.find(name, image_folders, cache_dir)
        if not dataset.num_classes:
            root = selection.image_folder(name, image_folders, cache_dir)
            assert root is not None, "only datasets of TFDS have none"
            found = folders.source(dataset, root).class_names
            dataset = dataclasses.replace(dataset, num_classes=len(found), class_names=found)
        tasks.append(_task(dataset, transform.size, counts, seed))
    return tuple(tasks)


def _task(dataset: Dataset, size: int, counts: dict[str, int], seed: int) -> ImageTask:
    name, classes = dataset.name, dataset.num_classes
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
    return ImageTask(
        name=name,
        label_space=name,
        domain=name,
        class_names=dataset.class_names or tuple(f"class {i}" for i in range(classes)),
        templates=dataset.templates,
        fingerprint=f"synthetic-{digest.hexdigest()[:16]}",
        notes=("generated stand-ins, not the dataset's own images; accuracies say nothing",),
        **splits,
    )
