"""Loads the embedded benchmark of `embedded_tasks`: generated, seeded and cached."""

import hashlib
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from matu_jax.data import SPLITS, ImageTask, Split
from matu_jax.data.embedded_tasks import (
    ATTRIBUTES,
    DOMAINS,
    GROUNDS,
    HUES,
    IDENTITIES,
    TaskSpec,
    spec_of,
)
from matu_jax.data.rendering import SIZE, Scene, render, texture_tiles
from matu_jax.data.sprites import SPRITES
from matu_jax.json_files import regular_file

__all__ = ["load"]

VERSION = 1
"""Of the generator: part of the cache's key, to be raised by any change to what is drawn."""
TRAIN_EXAMPLES, VALIDATION_EXAMPLES, TEST_EXAMPLES = 2048, 512, 512
"""Examples per domain, and so per task."""

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
) -> tuple[ImageTask, ...]:
    """Loads tasks, generating what the cache does not hold.

    Tasks of one domain share their image arrays; do not write into them.

    Args:
        names: Keys of `embedded_tasks.TASKS`, each at most once.
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
    specs = [spec_of(name) for name in names]
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
        ImageTask(
            spec.name,
            *(split(spec, part) for part in SPLITS),
            label_space=spec.label_space,
            domain=spec.domain,
            class_names=spec.class_names,
        )
        for spec in specs
    )


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
        spaces = {identity: IDENTITIES[identity]} | ATTRIBUTES
        labels = {
            space: rng.permutation(np.arange(count, dtype=np.int32) % len(names))
            for space, names in spaces.items()
        }
        sources = np.empty(count, np.int64)
        for label in range(len(IDENTITIES[identity])):
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
