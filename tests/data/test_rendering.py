"""What is said of an image's pixels, against images drawn without the sprite or the texture."""

import numpy as np
import pytest

from matu_jax.data.rendering import SIZE, Scene, render, render_with_maps, texture_tiles
from matu_jax.data.sprites import SPRITES

COUNT = 300  # more than are drawn at once


@pytest.fixture(scope="module")
def draw():
    """Draws the same images, but for what is changed of atlas and scene."""
    rng = np.random.default_rng(0)
    unit = {name: rng.uniform(0.6, 0.9, COUNT) for name in Scene._fields}
    place = {
        "position": rng.uniform(-5, 5, (COUNT, 2)),
        "tilt": rng.uniform(-1, 1, COUNT),
        "size": rng.uniform(18, 23, COUNT),
        "hue": np.zeros(COUNT),
        "ground": np.full(COUNT, 0.5),
    }
    sprites, scene = SPRITES["shapes"]().atlas, Scene(**unit | place)
    chosen = rng.integers(len(sprites), size=COUNT)

    def drawn(function=render_with_maps, atlas=sprites, **changes):
        tiles = texture_tiles("grating")
        return function(np.random.default_rng(1), atlas, chosen, tiles, scene._replace(**changes))

    return drawn


def test_images_are_those_without_maps(draw):
    images, maps = draw()
    np.testing.assert_array_equal(images, draw(render))
    assert {(m.shape, m.dtype.name) for m in maps} == {((COUNT, SIZE, SIZE), "uint8")}


def test_opacity_is_where_a_sprite_changes_the_image(draw):
    images, maps = draw()
    ground, blank = draw(atlas=np.zeros_like(SPRITES["shapes"]().atlas))
    changed = (images != ground).any(axis=-1)
    assert not changed[maps.opacity == 0].any()
    assert changed[maps.opacity > 127].all()
    assert not blank.opacity.any()
    np.testing.assert_array_equal(blank.texture, maps.texture)  # beneath the sprite too


def test_texture_is_where_the_ground_is_darker(draw):
    nothing = np.zeros_like(SPRITES["shapes"]().atlas)
    images, maps = draw(atlas=nothing)
    even, _ = draw(atlas=nothing, contrast=np.zeros(COUNT))
    darker = even.astype(int).sum(axis=-1) - images.astype(int).sum(axis=-1)
    assert not darker[maps.texture == 0].any()
    assert (darker[maps.texture > 127] > 50).all()
