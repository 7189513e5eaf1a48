"""A language model of Tunix through the contract, in an environment of its own: pytest -m slow.

Tunix holds other packages at versions of its own. $MATU_JAX_TUNIX may name the Python of an
environment that has it with this package; else one is made, which takes minutes and the registry.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import matu_jax

ROOT = Path(matu_jax.__file__).parents[1]
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, optax, qwix, sys
from flax import nnx
from tunix.models.qwen2.model import ModelConfig, Qwen2
import matu_jax
from matu_jax.config import DataConfig, LocalConfig, SimulationConfig
from matu_jax.models import language, metrics
from matu_jax.models.modules import of_nnx

TOKENS = 16
nnx.use_eager_sharding(False)  # its parameters name axes of a mesh, which there is none of here
base = Qwen2(
    ModelConfig(num_layers=2, vocab_size=256, embed_dim=32, hidden_dim=64, num_heads=4, head_dim=8,
                num_kv_heads=2, rope_theta=10_000, norm_eps=1e-6),
    rngs=nnx.Rngs(0),
)

def inputs(tokens):
    count, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (count, length))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (count, length, length))
    return dict(input_tokens=tokens, positions=positions, cache=None, attention_mask=mask)

provider = qwix.LoraProvider(
    module_path=".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*up_proj|.*down_proj",
    rank=4, alpha=8.0,
)
example = inputs(jnp.zeros((1, TOKENS), jnp.int32))
adapted = qwix.apply_lora_to_model(base, provider, rngs=nnx.Rngs(1), **example)
# Tunix's classes are no pytrees, which the class that qwix derives from one has forgotten.
type(adapted)._pytree__is_pytree = type(base)._pytree__is_pytree

def outputs(module, batch, task, key):
    return module(**inputs(batch["tokens"][:, :-1]))[0].astype(jnp.float32)

def surprise(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])

def total(logits, batch):
    found = surprise(logits, batch)
    return found.sum(axis=1), jnp.full(len(found), found.shape[1])

model = of_nnx(
    adapted, nnx.LoRAParam, outputs=outputs,
    loss=lambda logits, batch: surprise(logits, batch).mean(),
    metrics={"perplexity": metrics.perplexity(total)},
)
print("dtypes", {str(x.dtype) for x in jax.tree.leaves(model.base)})

def task(name, text, rng):
    text = np.frombuffer(text, np.uint8).astype(np.int32)
    starts = [rng.integers(0, len(text) - TOKENS - 1, n) for n in (64, 16, 16)]
    return matu_jax.Task(name, *({"tokens": np.stack([text[s:s + TOKENS + 1] for s in part])}
                                 for part in starts))

rng = np.random.default_rng(0)
texts = {"letters": b"the quick brown fox " * 40, "digits": b"0123456789 " * 60}
tasks = [task(name, text, rng) for name, text in texts.items()]
config = SimulationConfig(
    rounds=3, data=DataConfig(clients=3, tasks_per_client=1, seed=1),
    local=LocalConfig(steps=25, batch_examples=8, learning_rate=0.02),
)
results = list(matu_jax.simulate(tasks, model, config))
for result in results:
    print("round", result.round, result.record["perplexity"]["test_per_task"])
first, last = (r.record["perplexity"]["test_mean"] for r in (results[0], results[-1]))
assert last < 0.95 * first < 250, (first, last)
vector = jax.tree.map(lambda x: x[0], results[-1].vectors)
adapters = jax.tree.map(jnp.add, model.base, vector)
language.write_adapter(__import__("pathlib").Path(sys.argv[1]), adapters, base="tiny", alpha=8.0)
print("adapter written")
"""


@pytest.mark.slow
def test_a_model_of_tunix_is_federated_and_leaves_as_peft(tmp_path):
    python = os.environ.get("MATU_JAX_TUNIX", "")
    if not python:
        python = str(tmp_path / "environment" / "bin" / "python")
        for words in (
            [sys.executable, "-m", "venv", str(tmp_path / "environment")],
            [python, "-m", "pip", "install", "-q", "google-tunix", f"{ROOT}[lora]"],
        ):
            subprocess.run(words, check=True)
    (tmp_path / "adapter").mkdir()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, str(program), str(tmp_path / "adapter")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "adapter written" in done.stdout
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
