"""Images for pretraining a backbone, of other glyphs, shapes and textures than the benchmark's."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from matu_jax.data.rendering import Scene, render, texture_tiles
from matu_jax.data.sprites import PRETRAINING_GLYPHS, PRETRAINING_SHAPES, SPRITES


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
