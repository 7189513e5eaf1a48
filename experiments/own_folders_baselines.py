"""What an experiment with trained heads is to be compared with: chance, no training, regression.

    python experiments/own_folders_baselines.py --config experiments/own_folders.py \
        --config.data.folders=my-images

Takes an experiment and its fields as matu_jax.train does, and prints the test accuracy on every
task of

    chance       the most frequent class of the training images
    untrained    the model before the first round
    pixels       multinomial logistic regression on the pixels that the model sees, from -1 to 1
    features     the same on the backbone's features before any training, standardised

Regressions see the training images of all holders of the task together, which no client does, and
choose the strength of their penalty by accuracy on the validation split, the strongest of equals.
"""

import functools
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from matu_jax import models
from matu_jax.config import Config
from matu_jax.data import Split, image_tasks
from matu_jax.runs.commandline import read_config
from matu_jax.simulation.federation import federate

BATCH_EXAMPLES = 128
PENALTIES = tuple(10.0**power for power in range(-5, 3))  # values of C: the smaller, the stronger


def baselines(config: Config) -> Iterator[tuple[str, dict[str, float]]]:
    """Yields each task's name and its accuracies from 0 to 1, by baseline."""
    federation = federate(config)
    model = models.build_classifier(config.model, federation.tasks, seed=config.seed)
    features = jax.jit(lambda images: model.features(model.base, model.frozen, images))
    logits = jax.jit(lambda images, task: model.logits(model.base, model.frozen, images, task))
    for number, task in enumerate(image_tasks(federation.tasks)):
        slots = np.flatnonzero(federation.slots.task == number)
        held = np.unique(np.concatenate([federation.indices[slot] for slot in slots]))
        train = Split(task.train.images[held], task.train.labels[held])
        splits = (train, task.validation, task.test)
        frequent = np.bincount(train.labels).argmax()
        guesses = batches(functools.partial(logits, task=np.int32(number)), task.test.images)
        pixels = [
            split.images.reshape(len(split.labels), -1) / np.float32(127.5) - 1 for split in splits
        ]
        vectors = [batches(features, split.images) for split in splits]
        mean, deviation = vectors[0].mean(axis=0), vectors[0].std(axis=0) + 1e-6
        vectors = [(x - mean) / deviation for x in vectors]
        labels = [split.labels for split in splits]
        found = guesses[:, : task.num_classes].argmax(axis=1)
        yield (
            task.name,
            {
                "chance": float((task.test.labels == frequent).mean()),
                "untrained": float((task.test.labels == found).mean()),
                "pixels": regression(pixels, labels),
                "features": regression(vectors, labels),
            },
        )


def batches(function: Callable, images: np.ndarray) -> np.ndarray:
    """A function of images, in batches of one size, so that it is compiled once."""
    rows = []
    for start in range(0, len(images), BATCH_EXAMPLES):
        part = images[start : start + BATCH_EXAMPLES]
        padding = [(0, BATCH_EXAMPLES - len(part)), (0, 0), (0, 0), (0, 0)]
        rows.append(np.asarray(function(np.pad(part, padding)))[: len(part)])
    return np.concatenate(rows)


def regression(inputs: list[np.ndarray], labels: list[np.ndarray]) -> float:
    """Test accuracy of the best regression; inputs and labels of train, validation and test."""
    if len(np.unique(labels[0])) == 1:
        return float((labels[2] == labels[0][0]).mean())
    with threadpool_limits(1):  # more only wait for each other where the machine is busy
        fitted = [
            LogisticRegression(C=penalty, max_iter=2000).fit(inputs[0], labels[0])
            for penalty in PENALTIES
        ]
    best = max(fitted, key=lambda one: one.score(inputs[1], labels[1]))
    return float(best.score(inputs[2], labels[2]))


def main(argv: list[str]) -> int:
    """Runs the program; returns the exit code."""
    config, _, _ = read_config(argv, __doc__ or "")
    rows = dict(baselines(config))
    names = list(next(iter(rows.values())))
    print(f"| test accuracy, % | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    rows["mean"] = {name: float(np.mean([row[name] for row in rows.values()])) for name in names}
    for task, row in rows.items():
        print(f"| {task} | {' | '.join(f'{100 * row[name]:.1f}' for name in names)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
