"""The embedded benchmark: 30 image-classification tasks, generated, seeded and cached.

A task is an *attribute* asked about a *domain*, named `attribute/domain`: `hue/noise` asks for the
hue of the sprite in images of the domain `noise`. Six attributes times five domains make 30 tasks
of 8 to 10 classes, 32×32×3. Every image is a sprite standing on a bar, before a texture:

| domain | sprite | background |
|---|---|---|
| `handwritten` | scikit-learn's real handwritten digits | smooth swell of light |
| `grating` | digits of many fonts | sinusoidal grating |
| `clutter` | ten capital letters | bright strokes on dark ground |
| `noise` | the same letters, dark | bright streaky noise |
| `plaid` | ten shapes, pastel | hard-edged plaid |

| attribute | question | classes |
|---|---|---|
| `digit`, `letter` or `shape` | which sprite is it? | 10 |
| `hue` | what colour is the sprite? | 10 |
| `position` | in which of 3×3 places does it stand? | 9 |
| `tilt` | how far is it turned? (the bar tells where its foot is) | 8 |
| `ground` | what colour is the background? | 8 |
| `flow` | which way do the lines of the background run? | 8 |

All attributes are drawn independently of each other and in equal shares, so no attribute tells
anything about another. Tasks of one domain label *the same images* differently: one model cannot
serve both, which is what makes the benchmark hard. Tasks of one attribute share the meaning of
their labels across domains, which is what there is to gain (`relatedness`).

The real digits, and the fonts, are divided among train, validation and test before anything is
drawn. `pretraining_images` draws other glyphs and shapes in other styles, for training a backbone.
"""

import difflib
import hashlib
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from matu_jax.data import Split, Task
from matu_jax.data.rendering import SIZE, Scene, render, texture_tiles
from matu_jax.data.sprites import (
    DIGITS,
    LETTERS,
    PRETRAINING_GLYPHS,
    PRETRAINING_SHAPES,
    SHAPES,
    SPRITES,
)
from matu_jax.json_files import regular_file

__all__ = [
    "DOMAINS",
    "EIGHT",
    "SETS",
    "TASKS",
    "PretrainingImages",
    "TaskSpec",
    "fingerprint",
    "load",
    "pretraining_images",
    "relatedness",
]

VERSION = 1
"""Of the generator: part of the cache's key, to be raised by any change to what is drawn."""
TRAIN_EXAMPLES, VALIDATION_EXAMPLES, TEST_EXAMPLES = 2048, 512, 512
"""Examples per domain, and so per task."""

# --- The table of tasks -------------------------------------------------------------------------

HUES = ("red", "orange", "yellow", "green", "mint", "cyan", "blue", "indigo", "purple", "pink")
GROUNDS = ("red", "amber", "lime", "green", "cyan", "blue", "violet", "rose")
POSITIONS = tuple(
    f"{y} {x}" for y in ("top", "middle", "bottom") for x in ("left", "centre", "right")
)
TILTS = tuple(f"{degrees:+d}°" for degrees in range(-49, 50, 14))
FLOWS = tuple(f"{degrees:g}°" for degrees in np.arange(8) * 22.5)
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "hue": HUES,
    "position": POSITIONS,
    "tilt": TILTS,
    "ground": GROUNDS,
    "flow": FLOWS,
}
_IDENTITIES = {"digit": DIGITS, "letter": LETTERS, "shape": SHAPES}


class _Style(NamedTuple):
    """How a domain looks. Pairs are the ends of a uniform draw per image; values are 0 to 1."""

    texture: str
    ink_saturation: tuple[float, float]
    ink_value: tuple[float, float]
    ground_saturation: tuple[float, float]
    ground_value: tuple[float, float]
    contrast: tuple[float, float]


class _Domain(NamedTuple):
    identity: str
    sprites: str
    style: _Style


DOMAINS: dict[str, _Domain] = {
    "handwritten": _Domain(
        "digit",
        "handwritten",
        _Style("swell", (0.65, 0.85), (0.9, 1.0), (0.6, 0.8), (0.5, 0.6), (0.75, 0.9)),
    ),
    "grating": _Domain(
        "digit",
        "digits",
        _Style("grating", (0.8, 1.0), (0.9, 1.0), (0.6, 0.9), (0.5, 0.6), (0.6, 0.8)),
    ),
    "clutter": _Domain(
        "letter",
        "letters",
        _Style("clutter", (0.75, 0.95), (0.95, 1.0), (0.7, 0.9), (0.55, 0.65), (0.8, 0.9)),
    ),
    "noise": _Domain(
        "letter",
        "letters",
        _Style("noise", (0.9, 1.0), (0.35, 0.5), (0.35, 0.5), (0.95, 1.0), (0.45, 0.55)),
    ),
    "plaid": _Domain(
        "shape",
        "shapes",
        _Style("plaid", (0.45, 0.6), (0.95, 1.0), (0.8, 1.0), (0.45, 0.55), (0.6, 0.8)),
    ),
}


class TaskSpec(NamedTuple):
    """One row of `TASKS`."""

    name: str
    label_space: str
    domain: str
    class_names: tuple[str, ...]


def _table() -> dict[str, TaskSpec]:
    specs = {}
    for domain, (identity, *_) in DOMAINS.items():
        for space, names in ({identity: _IDENTITIES[identity]} | ATTRIBUTES).items():
            specs[f"{space}/{domain}"] = TaskSpec(f"{space}/{domain}", space, domain, names)
    return specs


TASKS: dict[str, TaskSpec] = _table()
"""All 30 tasks by name, domain by domain."""

EIGHT: tuple[str, ...] = tuple(
    f"{space}/{domain}"
    for domain in ("handwritten", "grating")
    for space in ("hue", "position", "tilt", "flow")
)
"""Four attributes of two domains: 4 pairs share a label space, 12 a domain, 12 neither."""
SETS: dict[str, tuple[str, ...]] = {"embedded8": EIGHT, "embedded30": tuple(TASKS)}
"""Named sets of tasks."""


def relatedness(a: str, b: str) -> Literal["both", "label_space", "domain", "neither"]:
    """Says how two tasks are related; this is the ground truth of the benchmark.

    Args:
        a: Name of a task of `TASKS`.
        b: Name of a task of `TASKS`.

    Returns:
        `"label_space"`: the same question about images of another kind. Such tasks can help each
        other, and only they count as *related* when a similarity is scored.
        `"domain"`: another question about the very same images, so the two contradict each other.
        `"neither"`: another question about other images.
        `"both"`: a task and itself.

    Raises:
        ValueError: If a name is unknown.
    """
    one, other = _spec(a), _spec(b)
    if one.label_space == other.label_space:
        return "both" if one.domain == other.domain else "label_space"
    return "domain" if one.domain == other.domain else "neither"


def _spec(name: str) -> TaskSpec:
    if name in TASKS:
        return TASKS[name]
    close = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"the tasks are {', '.join(TASKS)}"
    raise ValueError(f"unknown task {name!r}; {hint}")


# --- Loading ------------------------------------------------------------------------------------

_Pool = dict[str, np.ndarray]
"""Images and the labels of all attributes of one domain, under the keys `split/what`."""


def load(
    names: Iterable[str],
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    train_examples: int = TRAIN_EXAMPLES,
    validation_examples: int = VALIDATION_EXAMPLES,
    test_examples: int = TEST_EXAMPLES,
) -> tuple[Task, ...]:
    """Loads tasks, generating what the cache does not hold.

    Tasks of one domain share their image arrays; do not write into them.

    Args:
        names: Keys of `TASKS`, each at most once.
        seed: The same seed gives the same images; another gives other images of the same tasks.
            The division of the real digits and of the fonts among splits never changes.
        cache_dir: Where to keep one `.npz` per domain, 10 MB at the default sizes. By default the
            environment's `MATU_JAX_CACHE`, else `~/.cache/matu_jax`. If it cannot be written the
            images are generated in memory, with a warning.
        train_examples: Per domain.
        validation_examples: Per domain.
        test_examples: Per domain.

    Returns:
        The tasks, in the order of `names`.

    Raises:
        ValueError: If a name is unknown or given twice, `names` is one string, a number of
            examples is below 1, or the seed is negative.
    """
    if isinstance(names, str):
        raise ValueError(f"names must be several names, such as [{names!r}], got the one string")
    specs = [_spec(name) for name in names]
    for spec in specs:
        if specs.count(spec) > 1:
            raise ValueError(f"task {spec.name!r} is named more than once")
    counts = {"train": train_examples, "validation": validation_examples, "test": test_examples}
    for part, count in counts.items():
        if count < 1:
            raise ValueError(f"{part}_examples must be at least 1, got {count}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    folder: Path | None = Path(
        cache_dir or os.environ.get("MATU_JAX_CACHE") or Path.home() / ".cache" / "matu_jax"
    )
    pools: dict[str, _Pool] = {}
    for domain in dict.fromkeys(spec.domain for spec in specs):
        sizes = "x".join(map(str, counts.values()))
        file = folder and folder / f"embedded-v{VERSION}-{domain}-seed{seed}-{sizes}.npz"
        pool = _read(file, domain, counts) if file else None
        if pool is None:
            pool = _generate(domain, seed, counts)
            if file is not None and not _write(file, pool):
                folder = None  # one warning is enough
        _check_disjoint(domain, pool)
        pools[domain] = pool

    def split(spec: TaskSpec, part: str) -> Split:
        pool = pools[spec.domain]
        return Split(pool[f"{part}/images"], pool[f"{part}/{spec.label_space}"])

    return tuple(
        Task(*spec, split(spec, "train"), split(spec, "validation"), split(spec, "test"))
        for spec in specs
    )


def fingerprint(task: Task) -> dict[str, str]:
    """Returns the SHA-256 of each split's images and labels, to be stored beside results.

    Two runs that report the same fingerprints saw the same examples in the same order.

    Args:
        task: Any task, embedded or not.

    Returns:
        Hexadecimal digests under `"train"`, `"validation"` and `"test"`.
    """
    digests = {}
    for part in ("train", "validation", "test"):
        images, labels = getattr(task, part)
        digest = hashlib.sha256(repr((images.shape, task.class_names)).encode())
        digest.update(np.ascontiguousarray(images).tobytes())
        digest.update(np.ascontiguousarray(labels).tobytes())
        digests[part] = digest.hexdigest()
    return digests


def _attributes(domain: str) -> tuple[str, ...]:
    return (DOMAINS[domain].identity, *ATTRIBUTES)


def _read(file: Path, domain: str, counts: dict[str, int]) -> _Pool | None:
    """Returns the cached pool, or None, with a warning if there is a file that is no such pool."""
    expected = {}
    for part, count in counts.items():
        expected[f"{part}/images"] = ("uint8", (count, SIZE, SIZE, 3))
        expected |= {f"{part}/{space}": ("int32", (count,)) for space in _attributes(domain)}
    try:
        with regular_file(file).open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            pool = {key: stored[key] for key in expected}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        found = {key: (str(array.dtype), array.shape) for key, array in pool.items()}
        wrong = [key for key in expected if found[key] != expected[key]]
        if not wrong:
            return pool
        reason = f"{wrong[0]} is {found[wrong[0]]}, expected {expected[wrong[0]]}"
    warnings.warn(
        f"cache file {file} cannot be used and is generated anew ({reason})", stacklevel=3
    )
    return None


def _write(file: Path, pool: _Pool) -> bool:
    """Writes the pool whole or not at all; warns and returns False where that is impossible."""
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=file.parent, prefix=file.stem, suffix=".tmp", delete=False
        ) as stream:
            temporary = Path(stream.name)
            np.savez(stream, **pool)  # pyright: ignore[reportArgumentType]
        temporary.replace(file)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        warnings.warn(
            f"the cache {file.parent} cannot be written ({error}); images are generated in memory "
            "each time. Set MATU_JAX_CACHE to a folder that can be written.",
            stacklevel=3,
        )
        return False
    return True


def _check_disjoint(domain: str, pool: _Pool) -> None:
    seen: dict[bytes, str] = {}
    for part in ("train", "validation", "test"):
        for image in pool[f"{part}/images"]:
            other = seen.setdefault(hashlib.sha256(image).digest(), part)
            if other != part:
                raise RuntimeError(
                    f"domain {domain!r}: an image stands in both {other} and {part}; this is a "
                    "defect of the generator, please report it"
                )


def _generate(domain: str, seed: int, counts: dict[str, int]) -> _Pool:
    """Draws the pool of one domain; each split has a random stream of its own."""
    identity, kind, style = DOMAINS[domain]
    sprites, textures = SPRITES[kind](), texture_tiles(style.texture)
    pool: _Pool = {}
    for index, (part, count) in enumerate(counts.items()):
        key = (VERSION, list(DOMAINS).index(domain), index)
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
        spaces = {identity: _IDENTITIES[identity]} | ATTRIBUTES
        labels = {
            space: rng.permutation(np.arange(count, dtype=np.int32) % len(names))
            for space, names in spaces.items()
        }
        sources = np.empty(count, np.int64)
        for label in range(len(_IDENTITIES[identity])):
            candidates = np.flatnonzero((sprites.identity == label) & (sprites.split == index))
            chosen = np.flatnonzero(labels[identity] == label)
            sources[chosen] = rng.choice(candidates, len(chosen))
        scene = Scene(
            hue=_jittered(rng, labels["hue"], 0.25) / len(HUES),
            position=np.stack(
                [
                    _jittered(rng, labels["position"] % 3 - 1, 0.15),
                    _jittered(rng, labels["position"] // 3 - 1, 0.15),
                ],
                axis=-1,
            )
            * 4.5,
            tilt=np.deg2rad(-49 + 14 * _jittered(rng, labels["tilt"], 0.2)),
            size=rng.uniform(20.5, 22, count),
            ground=_jittered(rng, labels["ground"], 0.25) / len(GROUNDS),
            flow=np.deg2rad(22.5 * _jittered(rng, labels["flow"], 0.2)),
            ink_saturation=rng.uniform(*style.ink_saturation, count),
            ink_value=rng.uniform(*style.ink_value, count),
            ground_saturation=rng.uniform(*style.ground_saturation, count),
            ground_value=rng.uniform(*style.ground_value, count),
            contrast=rng.uniform(*style.contrast, count),
        )
        pool[f"{part}/images"] = render(rng, sprites.atlas, sources, textures, scene)
        pool |= {f"{part}/{space}": array for space, array in labels.items()}
    return pool


def _jittered(rng: np.random.Generator, labels: np.ndarray, width: float) -> np.ndarray:
    """Moves each label by up to `width` bins; below one half, bins stay apart."""
    return labels + rng.uniform(-width, width, len(labels))


# --- Pretraining --------------------------------------------------------------------------------


class PretrainingImages(NamedTuple):
    """Images for a backbone, with everything that is known about them.

    Angles and places are continuous: whoever pretrains chooses bins or a regression of their own.

    Attributes:
        images: uint8 `[count, 32, 32, 3]`.
        identity: int32 `[count]`, an index into `PRETRAINING_GLYPHS + PRETRAINING_SHAPES`.
        hue: float32 `[count]`, of the sprite, from 0 to 1, periodic (0 is red).
        position: float32 `[count, 2]`, x and y of the sprite's centre, pixels right of and below
            the image's centre, -6 to 6.
        tilt: float32 `[count]`, radians clockwise, -1 to 1.
        size: float32 `[count]`, height of the sprite with its bar, 17 to 24 pixels.
        ground: float32 `[count]`, hue of the background, from 0 to 1, periodic.
        flow: float32 `[count]`, direction of the background's lines, radians clockwise from
            horizontal, 0 to pi, periodic.
    """

    images: np.ndarray
    identity: np.ndarray
    hue: np.ndarray
    position: np.ndarray
    tilt: np.ndarray
    size: np.ndarray
    ground: np.ndarray
    flow: np.ndarray


def pretraining_images(count: int, seed: int | Sequence[int]) -> PretrainingImages:
    """Draws images for pretraining a backbone: other glyphs, other shapes, other textures.

    No digit, no capital letter of the benchmark, no shape of it, none of its textures, and no real
    digit takes part. Tens of thousands of images a second on one core.

    Args:
        count: Number of images, at least 1.
        seed: One number, or several, such as a seed and the number of the step.

    Returns:
        The images and all attributes, each drawn independently and uniformly.

    Raises:
        ValueError: If `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    rng = np.random.default_rng(seed)
    sprites, textures = SPRITES["pretraining"](), texture_tiles("pretraining")
    num_classes = len(PRETRAINING_GLYPHS) + len(PRETRAINING_SHAPES)
    identity = rng.integers(num_classes, size=count, dtype=np.int32)
    # Dark or bright ground, each with ink of the other kind.
    bright = rng.random(count) < 0.4
    scene = Scene(
        hue=rng.random(count),
        position=rng.uniform(-6, 6, (count, 2)),
        tilt=rng.uniform(-1, 1, count),
        size=rng.uniform(17, 24, count),
        ground=rng.random(count),
        flow=rng.uniform(0, np.pi, count),
        ink_saturation=np.where(bright, rng.uniform(0.7, 1, count), rng.uniform(0.4, 1, count)),
        ink_value=np.where(bright, rng.uniform(0.25, 0.55, count), rng.uniform(0.85, 1, count)),
        ground_saturation=np.where(
            bright, rng.uniform(0.25, 0.6, count), rng.uniform(0.5, 1, count)
        ),
        ground_value=np.where(bright, rng.uniform(0.85, 1, count), rng.uniform(0.35, 0.65, count)),
        contrast=np.where(bright, rng.uniform(0.25, 0.5, count), rng.uniform(0.4, 0.9, count)),
    )
    per_class = len(sprites.atlas) // num_classes
    sources = identity.astype(np.int64) * per_class + rng.integers(per_class, size=count)
    return PretrainingImages(
        render(rng, sprites.atlas, sources, textures, scene),
        identity,
        *(getattr(scene, name).astype(np.float32) for name in PretrainingImages._fields[2:]),
    )
