"""Trains the small backbone that ships with the package as the embedded benchmark's checkpoint.

    python experiments/pretrain_backbone.py --out matu_jax/models/embedded.safetensors

The images show other glyphs, other shapes and other textures than the benchmark's tasks (see
`matu_jax.data.pretraining.pretraining_images`); the backbone learns to tell identity, hue, place,
tilt, size, ground and flow of all of them at once. The heads of these questions are thrown away.
The file also holds ten orthonormal label vectors, drawn from the seed: class i of every task of the
benchmark is read off vector i, so that tasks which ask different questions about the same images
contradict each other.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from matu_jax.data.pretraining import pretraining_images
from matu_jax.data.sprites import PRETRAINING_GLYPHS, PRETRAINING_SHAPES
from matu_jax.models import embedded
from matu_jax.models.vit import VisionTransformer, ViTShape

BINS = {"hue": 24, "x": 9, "y": 9, "tilt": 18, "size": 7, "ground": 24, "flow": 18}
IDENTITIES = len(PRETRAINING_GLYPHS) + len(PRETRAINING_SHAPES)
LABEL_VECTORS = 10
AVERAGE_STEPS = 25


def binned(values, low, high, bins):
    return np.clip(((values - low) / (high - low) * bins).astype(np.int32), 0, bins - 1)


def labels(pool):
    columns = {
        "identity": pool.identity,
        "hue": binned(pool.hue, 0, 1, BINS["hue"]),
        "x": binned(pool.position[:, 0], -7, 7, BINS["x"]),
        "y": binned(pool.position[:, 1], -7, 7, BINS["y"]),
        "tilt": binned(pool.tilt, -1.4, 1.4, BINS["tilt"]),
        "size": binned(pool.size, 15, 22, BINS["size"]),
        "ground": binned(pool.ground, 0, 1, BINS["ground"]),
        "flow": binned(pool.flow, 0, np.pi, BINS["flow"]),
    }
    return {name: column.astype(np.int32) for name, column in columns.items()}


class Pretrainer(nnx.Module):
    """The backbone with one linear head per question."""

    def __init__(self, shape: ViTShape, *, rngs: nnx.Rngs):
        self.backbone = VisionTransformer(shape, rngs=rngs)
        sizes = {"identity": IDENTITIES, **BINS}
        self.heads = nnx.Dict({n: nnx.Linear(shape.width, c, rngs=rngs) for n, c in sizes.items()})

    def __call__(self, images):
        features = self.backbone(images)
        return {name: head(features) for name, head in self.heads.items()}


def main():
    parser = argparse.ArgumentParser(description="Trains the embedded backbone.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=262_144, help="size of the image pool")
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--replicas", type=int, default=2, help="CPU devices; the result depends")
    args = parser.parse_args()
    if args.batch % args.replicas:
        parser.error(f"--batch {args.batch} is not a multiple of --replicas {args.replicas}")
    jax.config.update("jax_num_cpu_devices", args.replicas)
    started = time.time()

    shape = ViTShape(stem_widths=(24, 48))
    parts = [pretraining_images(8192, (args.seed, i)) for i in range(-(-args.images // 8192))]
    images = np.concatenate([part.images for part in parts])
    answers = {
        name: np.concatenate([labels(part)[name] for part in parts]) for name in labels(parts[0])
    }
    del parts
    print(f"{len(images)} images drawn in {time.time() - started:.0f} s", flush=True)

    graph, params, rest = nnx.split(Pretrainer(shape, rngs=nnx.Rngs(args.seed)), nnx.Param, ...)
    schedule = optax.warmup_cosine_decay_schedule(0, args.learning_rate, 300, args.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05))
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    split, same = PartitionSpec("batch"), PartitionSpec()
    first = mesh.devices.flat[0]

    def loss(params, batch, targets):
        logits = nnx.merge(graph, params, rest)(batch)
        losses = {
            name: optax.softmax_cross_entropy_with_integer_labels(logits[name], target).mean()
            for name, target in targets.items()
        }
        hits = {
            name: (logits[name].argmax(-1) == target).mean() for name, target in targets.items()
        }
        return sum(losses.values()), hits

    # Every device takes AVERAGE_STEPS steps of its own; then parameters and optimiser states are
    # averaged (local SGD; Stich 2019, arXiv 1805.09767). Collectives at every step would make small
    # virtual CPU devices wait for each other most of the time.
    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(same, split), out_specs=split, check_vma=False)
    def train(start, batches):
        def step(carry, batch):
            params, state = carry
            (value, hits), grads = jax.value_and_grad(loss, has_aux=True)(params, *batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), (value, hits)

        carry, scores = jax.lax.scan(step, start, jax.tree.map(lambda x: x[0], batches))
        return jax.tree.map(lambda x: x[None], (carry, scores))

    @jax.jit
    def average(results):
        return jax.tree.map(lambda x: x.mean(axis=0).astype(x.dtype), results)

    carry = (params, tx.init(params))
    rng = np.random.default_rng((args.seed, 1))
    for i in range(0, args.steps, AVERAGE_STEPS):
        rows = rng.integers(len(images), size=(mesh.size, AVERAGE_STEPS, args.batch // mesh.size))
        targets = {name: column[rows] for name, column in answers.items()}
        results = train(jax.device_put(carry, NamedSharding(mesh, same)), (images[rows], targets))
        carry, (value, hits) = average(jax.device_put(results, first))
        if not np.isfinite(value).all():
            raise SystemExit(f"step {i}: the loss is no longer finite; lower --learning-rate")
        if i % 250 == 0:
            shown = " ".join(f"{name} {hit.mean():.2f}" for name, hit in hits.items())
            print(f"{i} {time.time() - started:.0f} s loss {value.mean():.3f} {shown}", flush=True)
            save(args, shape, nnx.merge(graph, carry[0], rest).backbone)
    save(args, shape, nnx.merge(graph, carry[0], rest).backbone)
    print(f"{args.out}: {args.out.stat().st_size} bytes, {time.time() - started:.0f} s")


def save(args, shape, trained):
    square = np.random.default_rng((args.seed, 2)).normal(size=(shape.width, shape.width))
    label_vectors = np.linalg.qr(square)[0][:LABEL_VECTORS]
    command = (
        f"experiments/pretrain_backbone.py --seed {args.seed} --images {args.images} "
        f"--steps {args.steps} --batch {args.batch} --learning-rate {args.learning_rate} "
        f"--replicas {args.replicas}"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    embedded.write(args.out, shape, trained, label_vectors, {"made_by": command})


if __name__ == "__main__":
    main()
