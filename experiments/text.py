"""A small language model on kinds of text that this machine has, with LoRA by qwix.

    pip install -e '.[lora]'
    python -m matu_jax.compare --config experiments/text.py --tune   # learning rates
    python -m matu_jax.compare --config experiments/text.py

A task is a kind of text, read byte by byte from files that come with Python and the packages of
this environment: Python's sources, C headers, licences, reStructuredText, font metrics,
descriptions of packages, SVG drawings and style sheets. Files are divided among train, validation
and test, no file among two of them; files of equal content count once. (Licences still quote each
other.) Measured is the perplexity per byte; guessing among 256 bytes has 256.

The model is a decoder in the shape of Llama and Qwen2, so that its adapters leave as PEFT
(`matu_jax.models.language`). Its base has learnt from text files of other packages, see BASE, for
a minute or two on two cores, and is kept in the cache. Results: results/text/report.md.
"""

import hashlib
import sysconfig
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
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
from matu_jax.data.selection import cache
from matu_jax.json_files import replace_file
from matu_jax.models import MODELS, metrics
from matu_jax.models.modules import of_nnx, restored
from matu_jax.trees import leaf_items

STANDARD, PACKAGES = (Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib"))
KINDS = {
    "Python": (STANDARD, "*.py"),
    "C": (PACKAGES / "numpy" / "_core" / "include", "**/*.h"),
    "licences": (PACKAGES, "*.dist-info/**/LICENSE*"),
    "package descriptions": (PACKAGES, "*.dist-info/METADATA"),
    "data descriptions": (PACKAGES / "sklearn" / "datasets" / "descr", "*.rst"),
    "font metrics": (PACKAGES / "matplotlib" / "mpl-data" / "fonts", "*/*.afm"),
    "SVG": (PACKAGES / "matplotlib" / "mpl-data" / "images", "*.svg"),
    "style sheets": (PACKAGES / "matplotlib" / "mpl-data" / "stylelib", "*.mplstyle"),
}
BASE = (PACKAGES / "scipy", "*/*.py")  # what the base has learnt from
TOKENS, VOCABULARY, RANK, ALPHA = 64, 256, 4, 8.0
MOST_BYTES = 100_000  # of a kind
SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}
SIZES = {"train": 400, "validation": 48, "test": 96}
STEPS = 600  # of pretraining


def pieces(folder, pattern, rng, most=MOST_BYTES):
    """Pieces of each file, bytes `[pieces, TOKENS + 1]`; not of files that are there twice."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    contents = dict.fromkeys(path.read_bytes()[: MOST_BYTES // 8] for path in files)
    found, total = [], 0
    for index in rng.permutation(len(contents)):
        content = np.frombuffer(list(contents)[index], np.uint8)
        rows = len(content) // (TOKENS + 1)
        if rows and total < most:
            found.append(content[: rows * (TOKENS + 1)].reshape(rows, TOKENS + 1))
            total += found[-1].size
    return found


def tasks(config):
    found = []
    for number, (kind, place) in enumerate(KINDS.items()):
        rng = np.random.default_rng((config.seed, number))
        parts, splits = {part: [] for part in SHARES}, {}
        for file in pieces(*place, rng):
            # To the split that has the least of its share.
            filled = {part: sum(map(len, rows)) / SHARES[part] for part, rows in parts.items()}
            parts[min(filled, key=filled.__getitem__)].append(file)
        for part, rows in parts.items():
            if not rows:
                raise ValueError(f"{kind}: found too few files {place[1]} in {place[0]}")
            rows = rng.permutation(np.concatenate(rows))[: SIZES[part]]
            splits[part] = {"bytes": rows}
        found.append(
            Task(kind, *splits.values(), label_space=kind, chance={"perplexity": float(VOCABULARY)})
        )
    return found


class Norm(nnx.Module):
    """Root mean square normalisation."""

    def __init__(self, width):
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x):
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6)
        return x * self.scale[...]


class Attention(nnx.Module):
    """Causal attention with rotary positions; keys and values may have fewer heads."""

    def __init__(self, width, heads, groups, *, bias, rngs):
        self.heads, self.groups, self.size = heads, groups, width // heads

        def linear(fan_in, fan_out, bias):
            return nnx.Linear(fan_in, fan_out, use_bias=bias, rngs=rngs)

        self.q_proj = linear(width, width, bias)
        self.k_proj = linear(width, groups * self.size, bias)
        self.v_proj = linear(width, groups * self.size, bias)
        self.o_proj = linear(width, width, False)

    def __call__(self, x):
        count, length, width = x.shape
        query, key, value = (
            projection(x).reshape(count, length, -1, self.size)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = jax.nn.dot_product_attention(rotated(query), rotated(key), value, is_causal=True)
        return self.o_proj(mixed.reshape(count, length, width))


def rotated(x, base=10_000.0):
    """Rotary positions as transformers' Llama has them: halves are turned against each other."""
    length, size = x.shape[1], x.shape[-1]
    angle = jnp.arange(length)[:, None] * base ** (-jnp.arange(0, size, 2) / size)[None]
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Layer(nnx.Module):
    """Attention and a gated MLP, each after a normalisation and added to what was there."""

    def __init__(self, width, heads, groups, hidden, *, bias, rngs):
        self.input_layernorm, self.post_attention_layernorm = Norm(width), Norm(width)
        self.self_attn = Attention(width, heads, groups, bias=bias, rngs=rngs)
        self.gate_proj = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(hidden, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(nnx.silu(self.gate_proj(y)) * self.up_proj(y))


class Decoder(nnx.Module):
    """Tokens to logits of the next ones, in the shape of Llama; with `bias`, of Qwen2."""

    def __init__(self, vocabulary, width, depth, heads, groups, hidden, *, bias=False, rngs):
        self.embed_tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.layers = nnx.List(
            [Layer(width, heads, groups, hidden, bias=bias, rngs=rngs) for _ in range(depth)]
        )
        self.norm = Norm(width)
        self.lm_head = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def small(seed):
    return Decoder(VOCABULARY, 96, 3, 4, 2, 256, rngs=nnx.Rngs(seed))


def surprise(logits, batch):
    """Negative log-likelihood of every byte from those before it, in nats `[examples, TOKENS]`."""
    expected = batch["bytes"][:, 1:].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, expected)


def read(decoder, batch):
    return decoder(batch["bytes"][:, :-1].astype(jnp.int32))


def pretrained(seed):
    """A decoder that has learnt from `BASE`; from the cache where it is."""
    decoder = small(seed)
    graph, state = nnx.split(decoder)
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    file = cache() / "text" / f"{code}-{seed}.safetensors"
    if file.exists():
        kept = safetensors.numpy.load_file(file)
    else:
        kept = {path: np.asarray(x) for path, x in leaf_items(learnt(graph, state, seed))}
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, safetensors.numpy.save(kept))
    values = nnx.to_pure_dict(state)
    leaves = [jnp.asarray(kept[path]) for path, _ in leaf_items(values)]
    values = jax.tree.unflatten(jax.tree.structure(values), leaves)
    return nnx.merge(graph, restored(state, values))


def learnt(graph, state, seed):
    """Parameters after so many steps on pieces of the files of `BASE`."""
    rng = np.random.default_rng(seed)
    rows = np.concatenate(pieces(*BASE, rng, most=10 * MOST_BYTES))
    optimizer, params = optax.adam(2e-3), nnx.to_pure_dict(state)
    moments = optimizer.init(params)

    def loss(params, batch):
        return surprise(read(nnx.merge(graph, restored(state, params)), batch), batch).mean()

    @jax.jit
    def step(params, moments, batch):
        updates, moments = optimizer.update(jax.grad(loss)(params, batch), moments)
        return optax.apply_updates(params, updates), moments

    for _ in range(STEPS):
        params, moments = step(params, moments, {"bytes": rng.choice(rows, 16)})
    return params


def model(config, tasks, *, seed):
    """The decoder with adapters on all projections of its layers, which alone train."""
    provider = qwix.LoraProvider(module_path="layers/.*_proj", rank=RANK, alpha=ALPHA)
    example = jnp.zeros((1, TOKENS), jnp.int32)
    adapted: Any = qwix.apply_lora_to_model(
        pretrained(seed), provider, example, rngs=nnx.Rngs(seed)
    )

    def total(logits, batch):
        found = surprise(logits, batch)
        return found.sum(axis=1), jnp.full(len(found), found.shape[1])

    return of_nnx(
        adapted,
        nnx.LoRAParam,
        outputs=lambda decoder, batch, task, key: read(decoder, batch),
        loss=lambda logits, batch: surprise(logits, batch).mean(),
        metrics={"perplexity": metrics.perplexity(total)},
    )


SOURCES["text"], MODELS["decoder"] = tasks, model


def get_config():
    return Comparison(
        title="A language model on kinds of text",
        experiment=Config(
            rounds=6,
            data=DataConfig(source="text", clients=12, tasks_per_client=2, examples_per_slot=48),
            model=ModelConfig("decoder"),
            local=LocalConfig(steps=12, batch_examples=8, learning_rate=1e-2),
            evaluation=EvaluationConfig(every_rounds=2),
            checkpoint=CheckpointConfig(every_rounds=6),
        ),
        settings={
            "text": Setting(
                "Eight kinds of text, twelve clients with two each, three holders a kind, 48 "
                "pieces of 64 bytes a slot.",
                {},
                seconds=30,
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
        search={"local.learning_rate": (1e-2, 3e-3, 1e-3)},
        trials=4,
        tuned="results/text/tuned.json",
    )
