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
import functools
import hashlib
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from matu_jax.data import Split, Task

__all__ = [
    "DOMAINS",
    "EIGHT",
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
SIZE = 32
"""Height and width of an image in pixels."""
TRAIN_EXAMPLES, VALIDATION_EXAMPLES, TEST_EXAMPLES = 2048, 512, 512
"""Examples per domain, and so per task."""

# --- Shapes -------------------------------------------------------------------------------------

_Inside = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Says where a shape is, given x to the right and y up, both from -1 to 1."""


def _star(x: np.ndarray, y: np.ndarray, points: int, inner: float) -> np.ndarray:
    sector = 2 * np.pi / points
    angle = np.abs((np.arctan2(x, y) + sector / 2) % sector - sector / 2)
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    tip_x, tip_y = inner * np.cos(sector / 2), inner * np.sin(sector / 2)
    return across * (1 - tip_x) <= tip_y * (1 - along)


_FIGURES: dict[str, _Inside] = {
    "disc": lambda x, y: np.hypot(x, y) < 1,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.77) < 0.23,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 1.1,
    "triangle": lambda x, y: abs(x) < (1 - y) / 2,
    "star": lambda x, y: _star(x, y, 5, 0.42),
    "plus": lambda x, y: np.minimum(abs(x), abs(y)) < 0.3,
    "crescent": lambda x, y: (np.hypot(x, y) < 1) & (np.hypot(x - 0.5, y) > 0.75),
    "heart": lambda x, y: (
        (1.15 * x) ** 2 + (1.2 * (y + 0.15) - 0.75 * np.sqrt(abs(1.15 * x))) ** 2 < 0.95
    ),
    "arrow": lambda x, y: np.where(y > 0, abs(x) < 1 - y, abs(x) < 0.28),
    "hourglass": lambda x, y: abs(x) < abs(y) * 0.9 + 0.08,
}
_PRETRAINING_FIGURES: dict[str, _Inside] = {
    "diamond": lambda x, y: abs(x) + abs(y) < 1,
    "half disc": lambda x, y: np.hypot(x, (y + 1) / 2) < 1,
    "corner": lambda x, y: np.minimum(x, y) < -0.4,
    "chevron": lambda x, y: abs(y + abs(x) - 0.35) < 0.35,
    "four-pointed star": lambda x, y: _star(x, y, 4, 0.35),
    "house": lambda x, y: np.where(y > 0, abs(x) < 1 - y, abs(x) < 0.7),
    "frame": lambda x, y: np.maximum(abs(x), abs(y)) > 0.6,
    "steps": lambda x, y: np.floor(1.5 * (x + 1)) < np.floor(1.5 * (1 - y)) + 0.5,
    "two discs": lambda x, y: np.hypot(abs(x) - 0.5, y) < 0.45,
    "three bars": lambda x, y: abs((1.5 * (y + 1)) % 1 - 0.5) < 0.3,
    "pie": lambda x, y: (np.hypot(x, y) < 1) & ((x < 0) | (y < 0)),
    "bow": lambda x, y: abs(y) < abs(x) * 0.9 + 0.08,
}

# --- The table of tasks -------------------------------------------------------------------------

HUES = ("red", "orange", "yellow", "green", "mint", "cyan", "blue", "indigo", "purple", "pink")
GROUNDS = ("red", "amber", "lime", "green", "cyan", "blue", "violet", "rose")
POSITIONS = tuple(
    f"{y} {x}" for y in ("top", "middle", "bottom") for x in ("left", "centre", "right")
)
TILTS = tuple(f"{degrees:+d}°" for degrees in range(-49, 50, 14))
FLOWS = tuple(f"{degrees:g}°" for degrees in np.arange(8) * 22.5)
DIGITS = tuple("0123456789")
LETTERS = tuple("ABFGHKRSTX")
SHAPES = tuple(_FIGURES)
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
    for space in ("digit", "hue", "position", "tilt")
)
"""Four attributes of two domains: 4 pairs share a label space, 12 a domain, 12 neither."""


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
    return tuple(
        Task(
            *spec,
            *(
                Split(
                    pools[spec.domain][f"{part}/images"],
                    pools[spec.domain][f"{part}/{spec.label_space}"],
                )
                for part in counts
            ),
        )
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
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
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
    sprites, textures = _SPRITES[kind](), _textures(style.texture)
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
        scene = _Scene(
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
        pool[f"{part}/images"] = _render(rng, sprites.atlas, sources, textures, scene)
        pool |= {f"{part}/{space}": array for space, array in labels.items()}
    return pool


def _jittered(rng: np.random.Generator, labels: np.ndarray, width: float) -> np.ndarray:
    """Moves each label by up to `width` bins; below one half, bins stay apart."""
    return labels + rng.uniform(-width, width, len(labels))


# --- Pretraining --------------------------------------------------------------------------------

PRETRAINING_GLYPHS = tuple("adehmnrty" + "ΓΔΛΞΠΣΦΨΩαεζηλμξπφψ" + "БДЖИЛЦШЭЮЯ" + "&?!%#@∞√∫")
PRETRAINING_SHAPES = tuple(_PRETRAINING_FIGURES)


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
    sprites, textures = _SPRITES["pretraining"](), _textures("pretraining")
    num_classes = len(PRETRAINING_GLYPHS) + len(PRETRAINING_SHAPES)
    identity = rng.integers(num_classes, size=count, dtype=np.int32)
    # Dark or bright ground, each with ink of the other kind.
    bright = rng.random(count) < 0.4
    scene = _Scene(
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
        _render(rng, sprites.atlas, sources, textures, scene),
        identity,
        *(getattr(scene, name).astype(np.float32) for name in PretrainingImages._fields[2:]),
    )


# --- Rendering ----------------------------------------------------------------------------------


class _Scene(NamedTuple):
    """What the images show, float64 `[count]` each; position is `[count, 2]`.

    Hues, saturations, values and contrast are 0 to 1, tilt and flow radians, position and size
    pixels.
    """

    hue: np.ndarray
    position: np.ndarray
    tilt: np.ndarray
    size: np.ndarray
    ground: np.ndarray
    flow: np.ndarray
    ink_saturation: np.ndarray
    ink_value: np.ndarray
    ground_saturation: np.ndarray
    ground_value: np.ndarray
    contrast: np.ndarray


_CELL = 64  # texels of a sprite's square in its atlas
_SPRITE_TEXELS = 52  # of which the sprite with its bar is so high
_TILE = 128  # texels of a texture, periodic in both directions
_TEXELS_PER_PIXEL = 2.0  # of a texture
_CHUNK = 256  # images drawn at once, so that intermediate arrays stay in the processor's cache


def _render(
    rng: np.random.Generator,
    sprites: np.ndarray,
    sprite_index: np.ndarray,
    textures: np.ndarray,
    scene: _Scene,
) -> np.ndarray:
    """Draws sprites before textures; nuisances of geometry and light come from `rng`."""
    count = len(sprite_index)
    texture_index = rng.integers(len(textures), size=count)
    sprite_map, sprite_origin = _affine(
        scene.tilt,
        _SPRITE_TEXELS / scene.size,
        stretch=np.exp(rng.uniform(-0.1, 0.1, count)),
        shear=rng.uniform(-0.15, 0.15, count),
        centre=scene.position + SIZE / 2 - 0.5,
        target=np.full((count, 2), _CELL / 2 - 0.5),
    )
    texture_map, texture_origin = _affine(
        scene.flow,
        _TEXELS_PER_PIXEL * np.exp(rng.uniform(-0.2, 0.2, count)),
        stretch=np.ones(count),
        shear=np.zeros(count),
        centre=np.zeros((count, 2)),
        target=rng.uniform(0, _TILE, (count, 2)) + 8 * _TILE,  # positive: astype truncates to zero
    )
    ink = _rgb(scene.hue, scene.ink_saturation, scene.ink_value)
    ground = _rgb(scene.ground, scene.ground_saturation, scene.ground_value)
    contrast = (scene.contrast / 255).astype(np.float32)[:, None, None]
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for start in range(0, count, _CHUNK):
        part = slice(start, min(start + _CHUNK, count))
        x, y = _texels(sprite_map[part], sprite_origin[part])
        for texel in (x, y):
            np.clip(texel, 0, _CELL - 1, out=texel)  # the border of a cell is empty
        opacity = _gather(sprites, sprite_index[part], x, y).astype(np.float32) / 255
        x, y = _texels(texture_map[part], texture_origin[part])
        texture = _gather(textures, texture_index[part], x & (_TILE - 1), y & (_TILE - 1))
        light = (1 - contrast[part] * texture) * (1 - opacity)
        grain = rng.random(light.shape, dtype=np.float32) * 16
        for channel in range(3):
            value = ground[part, channel, None, None] * light
            value += ink[part, channel, None, None] * opacity
            value *= 239
            value += grain
            images[part, ..., channel] = value
    return images


def _affine(
    angle: np.ndarray,
    scale: np.ndarray,
    *,
    stretch: np.ndarray,
    shear: np.ndarray,
    centre: np.ndarray,
    target: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the maps, float32 `[count, 2, 2]` and `[count, 2]`, from pixels (x, y) to texels.

    What is drawn appears turned clockwise by `angle`, about `centre`, which shows `target`.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    turned_x, turned_y = np.stack([cos, sin], -1), np.stack([-sin, cos], -1)
    turned_y = turned_y * (scale / stretch)[:, None]
    turned_x = turned_x * (scale * stretch)[:, None] + shear[:, None] * turned_y
    matrix = np.stack([turned_x, turned_y], axis=1)
    origin = target - np.einsum("nij,nj->ni", matrix, centre)
    return matrix.astype(np.float32), origin.astype(np.float32)


def _texels(matrix: np.ndarray, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the texel under each pixel, int32 x and y, each `[count, SIZE, SIZE]`."""
    pixels = np.arange(SIZE, dtype=np.float32)
    along = matrix[..., 0, None] * pixels
    down = matrix[..., 1, None] * pixels + origin[..., None]
    x, y = (
        (down[:, axis, :, None] + along[:, axis, None, :]).astype(np.int32) for axis in range(2)
    )
    return x, y


def _gather(atlas: np.ndarray, index: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    _, height, width = atlas.shape
    flat = y * np.int32(width) + x
    flat += (index * (height * width)).astype(np.int32)[:, None, None]
    return atlas.reshape(-1).take(flat)


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Converts HSV, each `[count]` and 0 to 1, to RGB, float32 `[count, 3]`."""
    sector = (np.array([5, 3, 1]) + 6 * hue[:, None]) % 6
    strength = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return (value[:, None] * (1 - saturation[:, None] * strength)).astype(np.float32)


# --- Sprites ------------------------------------------------------------------------------------


class _Sprites(NamedTuple):
    atlas: np.ndarray  # uint8 [sprites, _CELL, _CELL], opacity
    identity: np.ndarray  # int32 [sprites]
    split: np.ndarray  # int32 [sprites], 0 train, 1 validation, 2 test, -1 all of them


_FONTS = tuple(  # of train, of validation, of test
    tuple(fonts.split())
    for fonts in (
        "DejaVuSans DejaVuSans-Bold DejaVuSans-BoldOblique DejaVuSansMono DejaVuSansMono-Oblique "
        "DejaVuSerif DejaVuSerif-BoldItalic STIXGeneral STIXGeneralBolIta cmr10 cmtt10",
        "DejaVuSans-Oblique DejaVuSerif-Italic STIXGeneralItalic cmb10",
        "DejaVuSansMono-Bold DejaVuSerif-Bold STIXGeneralBol cmss10",
    )
)
_PRETRAINING_FONTS = _FONTS[0][:4] + _FONTS[0][5:7]


def _on_bar(figure: Image.Image) -> np.ndarray:
    """Fits a grey picture above a bar, uint8 `[_CELL, _CELL]`, blurred against aliasing.

    The bar gives every sprite a foot: a disc can be tilted, and 6 is no 9 upside down.
    """
    width, height, gap, bar = 46, 41, 4, 7
    margin = (_CELL - height - gap - bar) // 2
    scale = min(width / figure.width, height / figure.height)
    size = max(4, round(figure.width * scale)), max(4, round(figure.height * scale))
    cell = Image.new("L", (_CELL, _CELL))
    cell.paste(
        figure.resize(size, Image.Resampling.BICUBIC),
        ((_CELL - size[0]) // 2, margin + (height - size[1]) // 2),
    )
    top, left = margin + height + gap, (_CELL - width) // 2
    ImageDraw.Draw(cell).rectangle((left, top, left + width - 1, top + bar - 1), fill=255)
    opacity = np.asarray(cell.filter(ImageFilter.GaussianBlur(1.3))).copy()
    opacity[[0, -1]] = opacity[:, [0, -1]] = 0
    return opacity


def _glyph(character: str, font: str) -> Image.Image:
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    drawn = ImageFont.truetype(str(file), 96)
    left, top, right, bottom = (round(edge) for edge in drawn.getbbox(character))
    picture = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(picture).text((-left, -top), character, fill=255, font=drawn)
    return picture.crop(picture.getbbox())


def _shape(inside: _Inside) -> Image.Image:
    x, y = np.meshgrid(np.linspace(-1, 1, 160), np.linspace(1, -1, 160))
    return Image.fromarray(np.where(inside(x, y), 255, 0).astype(np.uint8))


@functools.cache
def _font_sprites(characters: tuple[str, ...]) -> _Sprites:
    rows = [
        (_on_bar(_glyph(character, font)), identity, split)
        for split, fonts in enumerate(_FONTS)
        for font in fonts
        for identity, character in enumerate(characters)
    ]
    return _sprites(rows)


@functools.cache
def _shape_sprites() -> _Sprites:
    rows = [
        (_on_bar(_shape(inside)), identity, split)
        for identity, inside in enumerate(_FIGURES.values())
        for split in range(3)
    ]
    return _sprites(rows)


@functools.cache
def _handwritten_sprites() -> _Sprites:
    """Scikit-learn's 1,797 digits of 8×8: two thirds for training, a sixth each for the others."""
    from sklearn.datasets import load_digits  # here, because importing it takes a second

    pixels, target = load_digits(return_X_y=True)
    split = np.empty(len(target), np.int32)
    rng = np.random.default_rng(1797)
    for label in range(10):
        members = rng.permutation(np.flatnonzero(target == label))
        split[members] = np.searchsorted(
            [2 / 3, 5 / 6], np.arange(len(members)) / len(members), "right"
        )
    rows = []
    for picture, identity, part in zip(pixels.reshape(-1, 8, 8), target, split, strict=True):
        grey = Image.fromarray(np.round(picture * (255 / 16)).astype(np.uint8))
        grey = grey.crop(grey.getbbox()).resize(
            (46 * grey.width // 8, 46), Image.Resampling.BICUBIC
        )
        grey = grey.point([min(255, max(0, round((level - 60) * 2))) for level in range(256)])
        rows.append((_on_bar(grey), int(identity), int(part)))
    return _sprites(rows)


@functools.cache
def _pretraining_sprites() -> _Sprites:
    pictures = [
        [_glyph(character, font) for font in _PRETRAINING_FONTS] for character in PRETRAINING_GLYPHS
    ] + [[_shape(inside)] * len(_PRETRAINING_FONTS) for inside in _PRETRAINING_FIGURES.values()]
    return _sprites(
        [(_on_bar(p), identity, -1) for identity, group in enumerate(pictures) for p in group]
    )


def _sprites(rows: list[tuple[np.ndarray, int, int]]) -> _Sprites:
    pictures, identity, split = zip(*rows, strict=True)
    return _Sprites(np.stack(pictures), np.array(identity, np.int32), np.array(split, np.int32))


_SPRITES: dict[str, Callable[[], _Sprites]] = {
    "handwritten": _handwritten_sprites,
    "digits": lambda: _font_sprites(DIGITS),
    "letters": lambda: _font_sprites(LETTERS),
    "shapes": _shape_sprites,
    "pretraining": _pretraining_sprites,
}

# --- Textures -----------------------------------------------------------------------------------


@functools.cache
def _textures(name: str) -> np.ndarray:
    """Returns the variants of a texture, uint8 `[variants, _TILE, _TILE]`, 255 darkest.

    Its lines run horizontally, and it is periodic in both directions.
    """
    rng = np.random.default_rng(sum(name.encode()))
    x, y = np.meshgrid(np.arange(_TILE), np.arange(_TILE))
    x, y = x * (2 * np.pi / _TILE), y * (2 * np.pi / _TILE)

    def streaks(along: float, across: float) -> np.ndarray:
        """Noise correlated over so many texels in each direction."""
        frequency = np.fft.fftfreq(_TILE) * 2 * np.pi
        power = np.exp(-((frequency * along) ** 2)[None, :] - ((frequency * across) ** 2)[:, None])
        noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((_TILE, _TILE))) * power).real
        return 0.5 + noise / (4 * noise.std())

    def strokes(number: int, length: int, thickness: int) -> np.ndarray:
        tile = np.ones((_TILE, _TILE))
        for _ in range(number):
            rows = (rng.integers(_TILE) + np.arange(thickness)) % _TILE
            columns = (rng.integers(_TILE) + np.arange(length + rng.integers(length))) % _TILE
            tile[np.ix_(rows, columns)] = rng.uniform(0, 0.5)
        return tile

    def wave(periods: int, bend: float = 0.0, bends: int = 1) -> np.ndarray:
        return np.cos(periods * y + bend * np.sin(bends * x + rng.uniform(0, 2 * np.pi)))

    if name == "swell":
        tiles = [0.5 + 0.5 * wave(5)]
    elif name == "grating":
        tiles = [0.5 + 0.5 * wave(12)]
    elif name == "plaid":
        tiles = [0.85 * (wave(8) > 0) + 0.15 * (np.cos(16 * x) > 0.6)]
    elif name == "clutter":
        tiles = [strokes(50, 32, 4) for _ in range(16)]
    elif name == "noise":
        tiles = [streaks(40, 2.0) for _ in range(16)]
    elif name == "pretraining":
        tiles = [0.5 + 0.5 * np.sign(wave(n)) * np.abs(wave(n)) ** 0.5 for n in (4, 6, 10, 14)]
        tiles += [0.5 + 0.25 * (wave(n) + wave(2 * n + 1)) for n in (3, 5, 7)]
        tiles += [0.5 + 0.5 * wave(n, bend=0.8, bends=2) for n in (7, 9, 13)]
        tiles += [0.8 * (wave(n) > 0.3) + 0.2 * (np.cos(9 * x) > 0) for n in (6, 9, 11)]
        tiles += [1.0 * (wave(n) > 0) * (np.cos(6 * x) > -0.6) for n in (7, 10)]
        tiles += [strokes(40, 40, 3) for _ in range(4)] + [strokes(110, 12, 3) for _ in range(4)]
        tiles += [streaks(24, 3.0) for _ in range(4)] + [streaks(10, 1.4) for _ in range(4)]
    else:
        raise ValueError(f"unknown texture {name!r}")
    return np.round(255 * np.clip(np.stack(tiles), 0, 1)).astype(np.uint8)
