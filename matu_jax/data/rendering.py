"""Rendering of the embedded benchmark: a described scene becomes an image.

`render` draws sprites before textures; both are looked up, turned and scaled, texel by texel.
"""

import functools
from typing import NamedTuple

import numpy as np

from matu_jax.data.sprites import CELL, SPRITE_TEXELS

__all__ = ["SIZE", "Maps", "Scene", "render", "render_with_maps", "texture_tiles"]

SIZE = 32
"""Height and width of an image in pixels."""


class Scene(NamedTuple):
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


class Maps(NamedTuple):
    """What is where in images, uint8 `[count, SIZE, SIZE]` each.

    Attributes:
        opacity: Of the sprite, 255 where nothing of the ground is seen through it.
        texture: Of the ground, beneath the sprite too; 255 where it is darkest.
    """

    opacity: np.ndarray
    texture: np.ndarray


_TILE = 128  # texels of a texture, periodic in both directions
_TEXELS_PER_PIXEL = 2.0  # of a texture
_CHUNK = 256  # images drawn at once, so that intermediate arrays stay in the processor's cache


def render(
    rng: np.random.Generator,
    sprites: np.ndarray,
    sprite_index: np.ndarray,
    textures: np.ndarray,
    scene: Scene,
) -> np.ndarray:
    """Draws sprites before textures; nuisances of geometry and light come from `rng`.

    Args:
        rng: Source of the nuisances.
        sprites: uint8 `[sprites, CELL, CELL]`, an atlas of `matu_jax.data.sprites`.
        sprite_index: Integers `[count]`, the sprite of each image.
        textures: uint8 `[variants, tile, tile]`, as `texture_tiles` returns them.
        scene: What each image shows.

    Returns:
        uint8 `[count, SIZE, SIZE, 3]`.
    """
    return render_with_maps(rng, sprites, sprite_index, textures, scene)[0]


def render_with_maps(
    rng: np.random.Generator,
    sprites: np.ndarray,
    sprite_index: np.ndarray,
    textures: np.ndarray,
    scene: Scene,
) -> tuple[np.ndarray, Maps]:
    """The images of `render`, and what is where in them, for tasks that ask about every pixel.

    Args:
        rng: As for `render`.
        sprites: As for `render`.
        sprite_index: As for `render`.
        textures: As for `render`.
        scene: As for `render`.

    Returns:
        The images, uint8 `[count, SIZE, SIZE, 3]`, and their maps.
    """
    count = len(sprite_index)
    texture_index = rng.integers(len(textures), size=count)
    sprite_map, sprite_origin = _affine(
        scene.tilt,
        SPRITE_TEXELS / scene.size,
        stretch=np.exp(rng.uniform(-0.1, 0.1, count)),
        shear=rng.uniform(-0.15, 0.15, count),
        centre=scene.position + SIZE / 2 - 0.5,
        target=np.full((count, 2), CELL / 2 - 0.5),
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
    maps = Maps(*(np.empty(images.shape[:3], np.uint8) for _ in Maps._fields))
    for start in range(0, count, _CHUNK):
        part = slice(start, min(start + _CHUNK, count))
        x, y = _texels(sprite_map[part], sprite_origin[part])
        for texel in (x, y):
            np.clip(texel, 0, CELL - 1, out=texel)  # the border of a cell is empty
        maps.opacity[part] = _gather(sprites, sprite_index[part], x, y)
        opacity = maps.opacity[part].astype(np.float32) / 255
        x, y = _texels(texture_map[part], texture_origin[part])
        texture = _gather(textures, texture_index[part], x & (_TILE - 1), y & (_TILE - 1))
        maps.texture[part] = texture
        light = (1 - contrast[part] * texture) * (1 - opacity)
        grain = rng.random(light.shape, dtype=np.float32) * 16
        for channel in range(3):
            value = ground[part, channel, None, None] * light
            value += ink[part, channel, None, None] * opacity
            value *= 239
            value += grain
            images[part, ..., channel] = value
    return images, maps


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


# --- Textures -----------------------------------------------------------------------------------


@functools.cache
def texture_tiles(name: str) -> np.ndarray:
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
