"""The targets and the model of experiments/dense.py, against what is drawn."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import matu_jax
from matu_jax.config import DataConfig, ModelConfig
from matu_jax.data import SOURCES, SPLITS
from matu_jax.data.rendering import render_with_maps
from matu_jax.models import MODELS
from matu_jax.trees import leaf_items

FILE = Path(matu_jax.__file__).parents[1] / "experiments" / "dense.py"


@pytest.fixture
def dense(monkeypatch, tmp_path):
    monkeypatch.setenv("MATU_JAX_CACHE", str(tmp_path))
    for registry, name in ((SOURCES, "pixels"), (MODELS, "dense")):
        monkeypatch.setitem(registry, name, None)  # gone after the test
    spec = importlib.util.spec_from_file_location("dense", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "STEPS", 3)
    monkeypatch.setattr(module, "SIZES", {"train": 32, "validation": 16, "test": 24})
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield module


@pytest.fixture
def drawn(dense, monkeypatch):
    """What is said of images' pixels, what they were drawn from, and the ground by itself."""
    calls = []

    def spy(rng, *what):
        calls.append((rng.bit_generator.state, what, render_with_maps(rng, *what)))
        return calls[-1][-1]

    monkeypatch.setattr(dense, "render_with_maps", spy)
    _, pixels = dense.scenes("grating", 24, np.random.default_rng(1), 0)
    ((state, (atlas, chosen, tiles, scene), (_, maps)),) = calls
    rng = np.random.default_rng()
    rng.bit_generator.state = state
    ground, _ = render_with_maps(rng, np.zeros_like(atlas), chosen, tiles, scene)
    return pixels, scene, maps, ground


def test_colours_height_and_edges_are_those_of_the_sprite_that_is_drawn(drawn):
    pixels, _, maps, _ = drawn
    sprite = maps.opacity > 127
    np.testing.assert_array_equal(pixels["colours"] > 0, sprite)
    height, edges = pixels["height"][..., 0], pixels["edges"][..., 0]
    np.testing.assert_array_equal(height == 1, sprite)
    np.testing.assert_allclose(height[~sprite], 0.5 - maps.texture[~sprite] / 510, atol=1e-6)
    inner, around = np.s_[:, 1:-1, 1:-1], []
    for axis in (1, 2):
        around += [np.roll(maps.opacity.astype(int), step, axis)[inner] for step in (-1, 1)]
    expected = np.hypot(around[1] - around[0], around[3] - around[2]) / 510
    np.testing.assert_allclose(edges[inner], expected, atol=1e-5)


def test_orientation_is_that_of_the_lines_that_are_drawn(drawn):
    pixels, scene, _, ground = drawn
    down, right = np.gradient(ground.sum(axis=-1, dtype=float), axis=(1, 2))
    # Brightness changes across the lines: its doubled angle is half a turn from theirs.
    found = np.angle(-np.square(right + 1j * down).sum(axis=(1, 2)))
    difference = np.angle(np.exp(1j * (found - 2 * scene.flow)))
    assert np.abs(difference).max() < 0.3
    on_ground = pixels["colours"] == 0
    on_sprite = np.broadcast_to(scene.tilt[:, None, None], on_ground.shape)[~on_ground]
    cosine, sine = np.moveaxis(pixels["orientation"], -1, 0)
    np.testing.assert_allclose(cosine[~on_ground], np.cos(2 * on_sprite), atol=1e-6)
    for row, (there, angle) in enumerate(zip(on_ground, scene.flow, strict=True)):
        np.testing.assert_allclose(sine[row][there], np.sin(2 * angle), atol=1e-6)


def test_dense_tasks_share_no_image_and_are_standardised_by_training_pixels(dense):
    tasks = dense.tasks(DataConfig())
    assert len(tasks) == 8
    images = [
        x.tobytes() for task in tasks for part in SPLITS for x in getattr(task, part)["images"]
    ]
    assert len(set(images)) == len(images) == 8 * (32 + 16 + 24)
    for task in tasks:
        if task.label_space == "colours":
            assert not task.train["values"].any()
            continue
        assert not task.train["classes"].any()
        np.testing.assert_allclose(task.train["values"].mean(axis=(0, 1, 2)), 0, atol=1e-3)
        np.testing.assert_allclose(task.train["values"].std(axis=(0, 1, 2)), 1, atol=1e-3)
        assert np.abs(task.test["values"].mean(axis=(0, 1, 2))).max() > 1e-3


def test_a_dense_model_is_pretrained_once_and_a_loss_is_of_its_own_task(dense, tmp_path):
    tasks = dense.tasks(DataConfig())
    model = dense.model(ModelConfig("dense"), tasks, seed=0)
    (kept,) = (tmp_path / "dense").iterdir()
    written = kept.stat().st_mtime_ns
    again = dense.model(ModelConfig("dense"), tasks, seed=0)
    assert kept.stat().st_mtime_ns == written
    for (path, one), (_, other) in zip(*map(leaf_items, (model.base, again.base)), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=path)
    fresh = nnx.to_pure_dict(nnx.state(dense.Net(nnx.Rngs(0))))
    for (path, one), (_, other) in zip(
        *map(leaf_items, (fresh, model.base["shared"])), strict=True
    ):
        assert (np.asarray(one) != other).any(), path

    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), model.base)
    for number, task in enumerate(tasks):
        batch = jax.tree.map(lambda x: x[:4], task.test)
        loss = model.loss(params, model.frozen, batch, jnp.int32(number))
        others = {"classes": 1 - batch["classes"], "values": batch["values"] + 1}
        for name, value in others.items():
            changed = model.loss(params, model.frozen, batch | {name: value}, jnp.int32(number))
            asked = (name == "classes") == (task.label_space == "colours")
            assert (changed != loss) == asked, (task.name, name)
        if task.label_space == "colours":  # what calling every pixel ground reaches
            ground = jax.nn.one_hot(jnp.zeros_like(task.test["classes"]), dense.COLOURS + 1)
            for name in task.metrics:
                metric = model.metrics[name]
                sums = metric.sums({"logits": ground, "values": None}, task.test)
                total = jax.tree.map(lambda x: np.asarray(x).sum(axis=0), sums)
                assert metric.value(total) == pytest.approx(task.chance[name])
