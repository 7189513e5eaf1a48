"""Tasks about every pixel: segmentation, height, edges and orientation, each in two domains.

    python -m matu_jax.compare --config experiments/dense.py --tune   # learning rates
    python -m matu_jax.compare --config experiments/dense.py

The setting of MaT-FL's paper (arXiv 2306.10527: dense tasks of different kinds, clients hold some),
small. The generator of the embedded benchmark knows what stands where in its images:

    colours       which of five colours the sprite has, at each of its pixels, or that there is none
    height        of the relief: the ground's lines, and the sprite standing out above them
    edges         how steeply the sprite rises above the ground
    orientation   which way lines run: those of the ground, and the sprite's on the sprite; as sine
                  and cosine of the doubled angle

Colours are measured by mean intersection over union, the others by R². Tasks of both domains see
different images. The model is a small convolutional encoder and decoder, all of which trains, with
a head per task that starts at zero. Its base has learnt to remove noise from images of other
sprites and textures, half a minute on two cores, and is kept in the cache. Results:
results/dense/report.md.
"""

import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from flax import nnx

from matu_jax.comparison.plan import Comparison, Setting
from matu_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LocalConfig,
    ModelConfig,
)
from matu_jax.data import SOURCES, Task
from matu_jax.data.embedded_tasks import DOMAINS
from matu_jax.data.pretraining import pretraining_images
from matu_jax.data.rendering import Scene, render_with_maps, texture_tiles
from matu_jax.data.selection import cache
from matu_jax.data.sprites import SPRITES
from matu_jax.json_files import replace_file
from matu_jax.models import MODELS, Model, metrics
from matu_jax.models.modules import restored
from matu_jax.trees import leaf_items

KINDS = ("colours", "height", "edges", "orientation")
STYLES = ("grating", "plaid")  # of DOMAINS, whose grounds have lines
COLOURS = 5
SIZES = {"train": 192, "validation": 48, "test": 96}
STEPS = 400  # of pretraining


def scenes(style, count, rng, split):
    """Images of a domain, with what is known of every pixel; sprites are those of a split."""
    _, kind, look = DOMAINS[style]
    sprites = SPRITES[kind]()
    allowed = np.flatnonzero(np.isin(sprites.split, (split, -1)))
    colour = rng.permutation(np.arange(count) % COLOURS)
    scene = Scene(
        hue=((colour + rng.uniform(-0.3, 0.3, count)) / COLOURS) % 1,
        position=rng.uniform(-5, 5, (count, 2)),
        tilt=rng.uniform(-np.pi / 4, np.pi / 4, count),
        size=rng.uniform(18, 23, count),
        ground=rng.random(count),
        flow=rng.uniform(0, np.pi, count),
        ink_saturation=rng.uniform(*look.ink_saturation, count),
        ink_value=rng.uniform(*look.ink_value, count),
        ground_saturation=rng.uniform(*look.ground_saturation, count),
        ground_value=rng.uniform(*look.ground_value, count),
        contrast=rng.uniform(*look.contrast, count),
    )
    chosen = rng.choice(allowed, count)
    images, maps = render_with_maps(rng, sprites.atlas, chosen, texture_tiles(look.texture), scene)
    return images, known(maps, colour, scene)


def known(maps, colour, scene):
    """By kind of task what its pixels are: int32 classes, or float32 `[count, SIZE, SIZE, 2]`."""
    opacity, texture = (m.astype(np.float32) / 255 for m in maps)
    on_sprite = opacity > 0.5
    height = np.where(on_sprite, 1.0, 0.5 * (1 - texture))
    slopes = np.gradient(opacity, axis=(1, 2))
    angle = np.where(on_sprite, scene.tilt[:, None, None], scene.flow[:, None, None])
    return {
        "colours": np.where(on_sprite, colour[:, None, None] + 1, 0).astype(np.int32),
        "height": np.stack([height, height], axis=-1),
        "edges": np.stack([np.hypot(*slopes)] * 2, axis=-1),
        "orientation": np.stack([np.cos(2 * angle), np.sin(2 * angle)], axis=-1),
    }


def tasks(config):
    """A task of each kind in each domain; targets are standardised by the training pixels."""
    found = []
    for style in STYLES:
        for kind in KINDS:
            rng = np.random.default_rng((config.seed, STYLES.index(style), KINDS.index(kind)))
            splits = {
                part: split(kind, *scenes(style, count, rng, index))
                for index, (part, count) in enumerate(SIZES.items())
            }
            values = splits["train"]["values"]
            mean, std = values.mean(axis=(0, 1, 2)), values.std(axis=(0, 1, 2))
            for part in splits.values():
                part["values"] = (part["values"] - mean) / np.where(std > 0, std, 1)
            measured_by = ("mean iou", "pixel accuracy") if kind == "colours" else ("r2",)
            found.append(
                Task(
                    f"{kind}/{style}",
                    *splits.values(),
                    label_space=kind,
                    domain=style,
                    metrics=measured_by,
                    chance=background(splits["test"]) if kind == "colours" else {"r2": 0.0},
                )
            )
    return found


def split(kind, images, pixels):
    """A split of a task; what its kind does not ask about is zeros."""
    shape = images.shape[:3]
    classes = pixels[kind] if kind == "colours" else np.zeros(shape, np.int32)
    values = np.zeros((*shape, 2)) if kind == "colours" else pixels[kind]
    return {"images": images, "classes": classes, "values": values.astype(np.float32)}


def background(split):
    """What calling every pixel ground reaches; every colour is there."""
    ground = float((split["classes"] == 0).mean())
    return {"mean iou": ground / (COLOURS + 1), "pixel accuracy": ground}


class Net(nnx.Module):
    """Convolutions over images, halved twice and doubled again: 16 features of every pixel."""

    def __init__(self, rngs):
        def convolution(fan_in, fan_out, size=3, stride=1):
            return nnx.Conv(fan_in, fan_out, (size, size), strides=stride, rngs=rngs)

        self.fine, self.half = convolution(3, 16), convolution(16, 24, stride=2)
        self.quarter, self.deep = convolution(24, 32, stride=2), convolution(32, 32)
        self.to_half, self.to_fine = convolution(32, 24, size=1), convolution(24, 64, size=1)

    def __call__(self, images):
        fine = nnx.gelu(self.fine(images.astype(jnp.float32) / 127.5 - 1))
        half = nnx.gelu(self.half(fine))
        deep = nnx.gelu(self.quarter(half))
        deep = nnx.gelu(self.to_half(deep + nnx.gelu(self.deep(deep))))
        half = half + jnp.repeat(jnp.repeat(deep, 2, axis=1), 2, axis=2)
        count, height, width, _ = half.shape
        four = nnx.gelu(self.to_fine(half)).reshape(count, height, width, 2, 2, 16)
        return fine + four.swapaxes(2, 3).reshape(count, 2 * height, 2 * width, 16)


def pretrained(seed):
    """A net, split, whose parameters have learnt to remove noise; from the cache where it is."""
    net = Net(nnx.Rngs(seed))
    graph, state = nnx.split(net)
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    file = cache() / "dense" / f"{code}-{seed}.safetensors"
    if file.exists():
        kept = safetensors.numpy.load_file(file)
    else:
        kept = {path: np.asarray(x) for path, x in leaf_items(denoising(graph, state, seed))}
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, safetensors.numpy.save(kept))
    leaves = [jnp.asarray(kept[path]) for path, _ in leaf_items(nnx.to_pure_dict(state))]
    return graph, state, jax.tree.unflatten(jax.tree.structure(nnx.to_pure_dict(state)), leaves)


def denoising(graph, state, seed):
    """Trains a net to show images without the noise that was added, with a head of its own."""
    params = {"net": nnx.to_pure_dict(state), "head": jnp.zeros((16, 3))}
    optimizer = optax.adam(2e-3)

    def loss(params, noisy, clean):
        features = nnx.merge(graph, restored(state, params["net"]))(noisy)
        return jnp.square(features @ params["head"] - clean).mean()

    @jax.jit
    def step(params, moments, noisy, clean):
        gradient = jax.grad(loss)(params, noisy, clean)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, updates), moments

    moments = optimizer.init(params)
    for index in range(STEPS):
        images = pretraining_images(32, (seed, index)).images
        noise = np.random.default_rng((seed, index)).normal(0, 40, images.shape)
        noisy = np.clip(images + noise, 0, 255).astype(np.float32)
        params, moments = step(params, moments, noisy, images.astype(np.float32) / 127.5 - 1)
    return params["net"]


def model(config, tasks, *, seed):
    """The net with a head per task, `[colours and ground, then two values]` at every pixel."""
    graph, state, shared = pretrained(seed)
    kinds = [KINDS.index(task.label_space) for task in tasks]
    classes = COLOURS + 1
    head = {"kernel": jnp.zeros((16, classes + 2)), "bias": jnp.zeros(classes + 2)}

    def outputs(params, frozen, batch, task, key=None):
        features = nnx.merge(graph, restored(state, params["shared"]))(batch["images"])
        found = features @ params["head"]["kernel"] + params["head"]["bias"]
        both = found[..., classes:]
        two = frozen["kinds"][task] == KINDS.index("orientation")
        values = jnp.where(two, both, both[..., :1])
        return {"logits": found[..., :classes], "values": values}

    def loss(params, frozen, batch, task, key=None):
        found = outputs(params, frozen, batch, task)
        entropy = optax.softmax_cross_entropy_with_integer_labels(found["logits"], batch["classes"])
        errors = jnp.square(found["values"] - batch["values"])
        asks_colours = frozen["kinds"][task] == KINDS.index("colours")
        return jnp.where(asks_colours, entropy.mean(), errors.mean())

    def labels(found, batch):
        return found["logits"].argmax(axis=-1), batch["classes"]

    def values(found, batch):
        return found["values"], batch["values"]

    measures = {
        "mean iou": metrics.mean_iou(labels, classes),
        "pixel accuracy": metrics.accuracy(labels),
        "r2": metrics.r2(values),
    }
    base, frozen = {"shared": shared, "head": head}, {"kinds": jnp.array(kinds)}
    return Model(base, frozen, loss, outputs, measures, trains_heads=True)


SOURCES["pixels"], MODELS["dense"] = tasks, model


def get_config():
    return Comparison(
        title="Tasks about every pixel",
        experiment=Config(
            rounds=6,
            data=DataConfig(source="pixels", clients=12, tasks_per_client=2, examples_per_slot=48),
            model=ModelConfig("dense"),
            local=LocalConfig(steps=12, batch_examples=8, learning_rate=1e-2),
            evaluation=EvaluationConfig(every_rounds=2),
            checkpoint=CheckpointConfig(every_rounds=6),
        ),
        settings={
            "pixels": Setting(
                "Four kinds of tasks in two domains, twelve clients with two tasks each, three "
                "holders a task, 48 images a slot.",
                {},
                seconds=35,
            )
        },
        arms={
            "matu": {},
            "per_task": {"algorithm": "per_task"},
            "individual": {"algorithm": "individual"},
            "fedavg": {"algorithm": "fedavg"},
            "untrained": {"algorithm": "untrained", "rounds": 1, "local.steps": 1},
        },
        seeds=(0, 1, 2),
        search={"local.learning_rate": (1e-2, 3e-3, 2e-2, 4e-2)},
        trials=5,
        tuned="results/dense/tuned.json",
    )
