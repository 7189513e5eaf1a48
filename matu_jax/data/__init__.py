"""What every source of data hands over: tasks, each of three disjoint splits of numpy arrays.

A source is any function that returns `Task` objects, or `ImageTask`s for image classification, such
as one of `SOURCES`; nothing else in the package knows where the examples came from. Below this
contract stand, all numpy in, numpy out:

- sources: `embedded`, a benchmark of 30 tasks that is generated, out of the pictures of `sprites`,
  drawn by `rendering`; `prepared`, of TFDS and image folders; and, where data belongs to sites,
  `manifest`, a CSV file, and `sites`, folders;
- `partition`, which says which client holds which task, and which training examples;
- `batching`, which draws the batches of a round and gathers them, stacked over slots.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, UInt8

from matu_jax import trees
from matu_jax.data.choices import DataConfig
from matu_jax.trees import PyTree, check_dtypes, check_like, leaf_items

__all__ = [
    "SOURCES",
    "SPLITS",
    "ImageTask",
    "Split",
    "Task",
    "Transform",
    "check_alike",
    "check_tasks",
    "example_bytes",
    "example_shapes",
    "fingerprint",
    "image_tasks",
    "num_examples",
]

SPLITS = ("train", "validation", "test")


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
    """One task: what its examples are is between it and the model.

    A split is a tree of numpy arrays `[examples, ...]`, such as `{"x": ..., "y": ...}`, with one
    structure, dtypes and shapes behind the first axis in all splits of all tasks of a run.

    Attributes:
        name: Unique among the tasks of a run, for instance `"hue/noise"`.
        train: The only split that is divided among clients.
        validation: For choosing rules, rates and rounds.
        test: For reporting.
        label_space: What is asked. Tasks that agree on it are related, and share the meaning of
            their labels; `""` = nothing is known.
        domain: What the examples are like. Tasks that agree on it ask about examples of one kind.
        fingerprint: Hash of the data, where its source keeps one.
        notes: What people should know of the data, a sentence each.
        metrics: Names of the model's metrics that measure this task; the first is the one by which
            rounds are chosen and methods compared. () = all of them.
        chance: By metric, what guessing would reach, where that is known.
        sites: By split, whose each example is: names, one per example. A site is a client then,
            and is measured on its own examples. {} = nobody's; they are dealt out at random.

    Raises:
        ValueError: If a split has no array or no example, its arrays differ in their number of
            examples, one of them holds no numbers, or such as are not finite or cannot be told
            apart in 32 bits, the splits differ in what an example is, or not every example has a
            site, by name.
    """

    name: str
    train: PyTree
    validation: PyTree
    test: PyTree
    label_space: str = field(default="", kw_only=True)
    domain: str = field(default="", kw_only=True)
    fingerprint: str = field(default="", kw_only=True)
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    metrics: tuple[str, ...] = field(default=(), kw_only=True)
    chance: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    sites: Mapping[str, Sequence[str]] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        for part in SPLITS:
            self._check_split(f"task {self.name!r}, split {part!r}", getattr(self, part))
        for part in SPLITS[1:]:
            where = f"task {self.name!r}: an example of split {part!r} against one of 'train'"
            _check_examples(getattr(self, part), self.train, where)
        for name, value in self.chance.items():
            if isinstance(value, str) or not np.isfinite(value):
                raise ValueError(
                    f"task {self.name!r}: chance[{name!r}]: found {value!r}, expected a finite "
                    "number; leave it out where it is not known"
                )
        for part in SPLITS if self.sites else ():
            for site in self.sites.get(part, ()):
                if not isinstance(site, str):
                    raise ValueError(
                        f"task {self.name!r}: sites: found {site!r} for the split {part!r}, "
                        "expected a name, a str"
                    )
            found, expected = len(self.sites.get(part, ())), num_examples(getattr(self, part))
            if found != expected:
                raise ValueError(
                    f"task {self.name!r}: sites: found {found} for the split {part!r}, expected "
                    f"{expected}, one per example"
                )

    def _check_split(self, where: str, split: PyTree) -> None:
        leaves = leaf_items(split)
        if not leaves:
            raise ValueError(f"{where}: there is no array; expected arrays [examples, ...]")
        counts = {}
        for path, leaf in leaves:
            if (
                not isinstance(leaf, np.ndarray)
                or isinstance(leaf, np.ma.MaskedArray)
                or not leaf.ndim
            ):
                found = f"{type(leaf).__name__} of shape {list(np.shape(leaf))}"
                raise ValueError(
                    f"{where}: {path} is {found}; expected a numpy array [examples, ...]"
                )
            numbers = any(jnp.issubdtype(leaf.dtype, kind) for kind in (jnp.number, jnp.bool_))
            if not numbers or leaf.dtype.itemsize > 8 or not leaf.dtype.isnative:
                raise ValueError(
                    f"{where}: {path} holds {leaf.dtype}, expected numbers of at most 64 bits in "
                    "this machine's order of bytes; give each text a number"
                )
            if leaf.dtype in (np.int64, np.uint64) and _overflows(leaf):
                raise ValueError(
                    f"{where}: {path} runs from {leaf.min()} to {leaf.max()}, beyond the 32 bits "
                    "that devices keep of integers; number them from 0, or make them floats"
                )
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                _check_floats(f"{where}: {path}", leaf)
            counts[path] = len(leaf)
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{path} {count}" for path, count in counts.items())
            raise ValueError(f"{where}: arrays differ in their number of examples: {found}")
        if not num_examples(split):
            raise ValueError(f"{where}: there is no example; a task needs some in every split")


@dataclass(frozen=True, eq=False)
class ImageTask(Task):
    """One task of image classification; splits are of the type `Split`.

    Where `chance` says nothing of accuracy, it is 1 / classes.

    Attributes:
        class_names: One name per label, in the order of the labels.
        templates: Prompts with `{}` where the class name goes, for frozen heads made of text.

    Raises:
        ValueError: If a split has the wrong dtype or shape, no example, or a label that no class
            name stands for.
    """

    class_names: tuple[str, ...] = field(kw_only=True)
    templates: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        chance = {"accuracy": 1 / self.num_classes, **self.chance}
        object.__setattr__(self, "chance", chance)

    @property
    def num_classes(self) -> int:
        """Number of classes, which is the number of class names."""
        return len(self.class_names)

    def _check_split(self, where: str, split: Split) -> None:
        _check_images(where, split, self.class_names)


SOURCES: dict[str, Callable[[DataConfig], Sequence[Task]]] = {}
"""Sources of one's own, by the name that `config.data.source` has; an experiment file adds them."""


def image_tasks(tasks: Iterable[Task]) -> tuple[ImageTask, ...]:
    """The same tasks, all of them of image classification.

    Raises:
        ValueError: If one of them is not, with its name.
    """
    found = []
    for task in tasks:
        if not isinstance(task, ImageTask):
            raise ValueError(
                f"task {task.name!r}: found a {type(task).__name__}, expected an ImageTask "
                "(images, labels and class names), which is what a model of config.model "
                "classifies; for other tasks make a matu_jax.models.Model of your own"
            )
        found.append(task)
    return tuple(found)


def num_examples(split: PyTree) -> int:
    """Number of examples of a split."""
    return len(jax.tree.leaves(split)[0])


def example_shapes(split: PyTree) -> PyTree:
    """One example of a split: leaves `jax.ShapeDtypeStruct` without the axis of examples."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), split)


def check_tasks(tasks: Sequence[Task], where: str = "tasks: found") -> None:
    """Checks that there are tasks, each of a name of its own, and examples of all of one form.

    Args:
        tasks: What is checked.
        where: What errors begin with.

    Raises:
        ValueError: If not; where trees, shapes or dtypes differ, with the task and the arrays.
    """
    for task in tasks:
        if not isinstance(task, Task):
            raise ValueError(f"{where} {type(task).__name__} among tasks, expected matu_jax.Task.")
    if not tasks or len({task.name for task in tasks}) < len(tasks):
        names = ", ".join(task.name for task in tasks) or "none"
        raise ValueError(
            f"{where} the tasks {names}; expected at least one, each of a name of its own."
        )
    check_alike(tasks)


def check_alike(tasks: Sequence[Task]) -> None:
    """Checks that examples of all tasks are of one form.

    Raises:
        ValueError: If trees, shapes or dtypes differ, with the task and the arrays.
    """
    for task in tasks:
        where = f"an example of task {task.name!r} against one of {tasks[0].name!r}"
        _check_examples(task.train, tasks[0].train, where)


def _check_floats(where: str, leaf: np.ndarray) -> None:
    """Checks that numbers are finite, and differ, in the 32 bits that devices keep of them."""
    with np.errstate(over="ignore"):
        kept = leaf.astype(np.float32) if leaf.dtype.itemsize > 4 else leaf
    finite = np.isfinite(kept)
    if not finite.all():
        row = int(np.flatnonzero(~finite.reshape(len(leaf), -1).all(axis=1))[0])
        what = "NaN" if np.isnan(leaf[row]).any() else "a number that is infinite in float32"
        raise ValueError(
            f"{where} holds {what}, first in example {row}; leave such examples out, or put a "
            "number there"
        )
    if kept is not leaf and len(leaf):
        lost = np.abs(leaf - kept).max(axis=0) > leaf.std(axis=0) / 100
        if (lost & (leaf.std(axis=0) > 0)).any():
            raise ValueError(
                f"{where} has float64 numbers such as {leaf.ravel()[0]!r}, which differ by less "
                "than float32 can tell, and devices keep no more; subtract a constant near their "
                "mean"
            )


def _overflows(leaf: np.ndarray) -> bool:
    kept = np.iinfo(np.int32 if leaf.dtype == np.int64 else np.uint32)
    return bool(leaf.size and (leaf.min() < kept.min or leaf.max() > kept.max))


def _check_examples(split: PyTree, reference: PyTree, where: str) -> None:
    found, expected = example_shapes(split), example_shapes(reference)
    check_like(found, expected, where, leading=0)
    check_dtypes(found, expected, where)


def example_bytes(split: PyTree) -> int:
    """Bytes of one example of a split."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(example_shapes(split)))


def fingerprint(task: Task) -> dict[str, str]:
    """Returns the SHA-256 of each split's arrays, to be stored beside results.

    Two runs that report the same fingerprints saw the same examples in the same order.

    Args:
        task: Any task.

    Returns:
        Hexadecimal digests under `"train"`, `"validation"` and `"test"`.
    """
    digests = {}
    for part in SPLITS:
        split = getattr(task, part)
        if not isinstance(task, ImageTask):
            digests[part] = trees.fingerprint(split)
            continue
        digest = hashlib.sha256(repr((split.images.shape, task.class_names)).encode())
        for leaf in split:
            digest.update(np.ascontiguousarray(leaf).tobytes())
        digests[part] = digest.hexdigest()
    return digests


def _check_images(where: str, split: Split, class_names: tuple[str, ...]) -> None:
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
