"""Language models in Flax NNX with LoRA by qwix, against transformers and PEFT."""

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from safetensors.numpy import load_file

import matu_jax
from matu_jax.config import DataConfig, LocalConfig, ModelConfig, SimulationConfig
from matu_jax.data import SOURCES
from matu_jax.models import MODELS, language, metrics
from matu_jax.models.modules import of_nnx, restored
from matu_jax.trees import leaf_items

# qwix and PEFT call things of Flax and transformers by names that are older than those of now.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

EXPERIMENTS = Path(matu_jax.__file__).parents[1] / "experiments"
SIZES = {"vocabulary": 50, "width": 32, "depth": 2, "heads": 4, "groups": 2, "hidden": 48}
TOKENS = np.random.default_rng(0).integers(0, 50, (3, 9))


@pytest.fixture(autouse=True)
def models_of_others():
    """They may mix ranks and dtypes as NumPy does; this package does not."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def text(monkeypatch):
    for registry, name in ((SOURCES, "text"), (MODELS, "decoder")):
        monkeypatch.setitem(registry, name, None)  # gone after the test
    spec = importlib.util.spec_from_file_location("text", EXPERIMENTS / "text.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def adapted(model, seed=1):
    """The model with adapters, and the adapters with random numbers in place of zeros."""
    provider = qwix.LoraProvider(module_path="layers/.*_proj", rank=3, alpha=6.0)
    model = qwix.apply_lora_to_model(model, provider, jnp.asarray(TOKENS), rngs=nnx.Rngs(seed))
    state = nnx.state(model, nnx.LoRAParam)
    rng = np.random.default_rng(seed)
    values = jax.tree.map(
        lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), nnx.to_pure_dict(state)
    )
    nnx.update(model, restored(state, values))
    return model, values


def in_torch(family, bias):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config, model = (getattr(transformers, family + kind) for kind in ("Config", "ForCausalLM"))
    made = model(
        config(
            vocab_size=SIZES["vocabulary"],
            hidden_size=SIZES["width"],
            num_hidden_layers=SIZES["depth"],
            num_attention_heads=SIZES["heads"],
            num_key_value_heads=SIZES["groups"],
            intermediate_size=SIZES["hidden"],
            rms_norm_eps=1e-6,
            rope_theta=10_000.0,
            tie_word_embeddings=False,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                assert bias
                parameter.normal_()
    return made


def with_weights_of(text, model, bias):
    """The decoder of experiments/text.py with the parameters of one of transformers."""
    decoder = text.Decoder(*SIZES.values(), bias=bias, rngs=nnx.Rngs(0))
    theirs = {name: x.detach().numpy() for name, x in model.named_parameters()}
    state = nnx.state(decoder, nnx.Param)
    values, used = nnx.to_pure_dict(state), set()

    def of(path):
        name = path.replace("/", ".").replace("kernel", "weight").replace("scale", "weight")
        name = name.replace("embedding", "weight")
        for projection in ("gate_proj", "up_proj", "down_proj"):
            name = name.replace(f".{projection}", f".mlp.{projection}")
        name = name if name.startswith("lm_head") else f"model.{name}"
        used.add(name)
        return theirs[name].T if path.endswith("kernel") else theirs[name]

    leaves = [jnp.asarray(of(path)) for path, _ in leaf_items(values)]
    assert used == set(theirs)
    tree = jax.tree.unflatten(jax.tree.structure(values), leaves)
    nnx.update(decoder, restored(state, tree))
    return decoder


@pytest.mark.parametrize(("family", "bias"), [("Llama", False), ("Qwen2", True)])
def test_adapters_give_transformers_and_peft_our_logits(family, bias, text, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    theirs = in_torch(family, bias)
    decoder = with_weights_of(text, theirs, bias)
    inputs = torch.tensor(TOKENS)
    with torch.no_grad():
        np.testing.assert_allclose(decoder(TOKENS), theirs(inputs).logits, atol=1e-5)

    decoder, adapters = adapted(decoder)
    language.write_adapter(tmp_path, adapters, base="somebody/some-model", alpha=6.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of keys that fit nothing
        model = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    ours = np.asarray(decoder(TOKENS))
    with torch.no_grad():
        found = model(inputs).logits.numpy()
        base = model.get_base_model()
        with model.disable_adapter():
            before = base(inputs).logits.numpy()
    np.testing.assert_allclose(found, ours, atol=2e-5)
    assert np.abs(found - before).max() > 0.01
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (3, 6.0, "CAUSAL_LM")


def test_what_is_no_adapter_of_a_layer_is_refused(tmp_path):
    a, b = np.ones((4, 2), np.float32), np.ones((2, 6), np.float32)

    def layer(**leaves):
        return {"layers": {0: {"q_proj": leaves}}}

    for adapters, words in (
        ({"norm": {"scale": a}}, "norm/scale: expected layers/<number>"),
        ({"layers": {0: {"x_proj": {"kernel_lora_a": a}}}}, "layers/0/x_proj/kernel_lora_a: expec"),
        (layer(kernel_lora_a=a), "layer 0, q_proj: found lora_a alone"),
        (layer(kernel_lora_a=a, kernel_lora_b=b[:1]), "lora_a is of rank 2, lora_b of rank 1"),
        (layer(kernel_lora_a=a, kernel_lora_b=0 * b), "every lora_B is zero"),
        (
            {
                "layers": {
                    0: {"q_proj": {"kernel_lora_a": a, "kernel_lora_b": b}},
                    1: {"q_proj": {"kernel_lora_a": a[:, :1], "kernel_lora_b": b[:1]}},
                }
            },
            "layer 1, q_proj: is of rank 1, and adapters: layer 0, q_proj of rank 2",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            language.write_adapter(tmp_path, adapters, base="b", alpha=1.0)
    assert not list(tmp_path.iterdir())


def test_projections_with_axes_of_heads_are_matrices(tmp_path):
    """Of models that multiply by einsum: kernels [width, heads, size], [heads, size, width]."""
    rng = np.random.default_rng(0)
    adapters = {
        "layers": {
            0: {
                "attn": {
                    "q_proj": {
                        "w_lora_a": rng.normal(size=(8, 2)),
                        "w_lora_b": rng.normal(size=(2, 4, 3)),
                    },
                    "o_proj": {
                        "w_lora_a": rng.normal(size=(4, 3, 2)),
                        "w_lora_b": rng.normal(size=(2, 8)),
                    },
                }
            }
        }
    }
    language.write_adapter(tmp_path, adapters, base="b", alpha=1.0)
    found = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn"
    assert {name.removeprefix(prefix): x.shape for name, x in found.items()} == {
        ".q_proj.lora_A.weight": (2, 8),
        ".q_proj.lora_B.weight": (12, 2),
        ".o_proj.lora_A.weight": (2, 12),
        ".o_proj.lora_B.weight": (8, 2),
    }
    # What PEFT adds to a weight [out, in] is what the einsum adds, head after head.
    for name, rule, inputs in (
        ("q_proj", "xd,dr,rnh->xnh", rng.normal(size=(5, 8))),
        ("o_proj", "xnh,nhr,rd->xd", rng.normal(size=(5, 4, 3))),
    ):
        pair = adapters["layers"][0]["attn"][name]
        expected = np.einsum(rule, inputs, pair["w_lora_a"], pair["w_lora_b"])
        a, b = (found[f"{prefix}.{name}.lora_{side}.weight"] for side in "AB")
        np.testing.assert_allclose(
            inputs.reshape(5, -1) @ (b @ a).T, expected.reshape(5, -1), atol=1e-4
        )


def test_lora_by_qwix_on_a_module_that_nobody_has_seen():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.tanh(self.first(x)))[:, 0]

    plain = Net(nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    provider = qwix.LoraProvider(module_path="first|last", rank=2, alpha=4.0)
    module: Any = qwix.apply_lora_to_model(plain, provider, x, rngs=nnx.Rngs(1))
    r2 = metrics.r2(lambda found, batch: (found, batch["y"]))
    model = of_nnx(
        module,
        nnx.LoRAParam,
        outputs=lambda net, batch, task, key: net(batch["x"]),
        loss=lambda found, batch: jnp.square(found - batch["y"]).mean(),
        metrics={"r2": r2},
    )
    names = {path.split("/")[-1] for path, _ in leaf_items(model.base)}
    assert names == {"kernel_lora_a", "kernel_lora_b"}
    before = model.outputs(model.base, model.frozen, {"x": x}, jnp.int32(0))
    np.testing.assert_array_equal(before, plain(x))  # bit for bit: B starts at zero

    def task(name, y):
        split = {"x": x, "y": y}
        return matu_jax.Task(name, split, split, split)

    config = SimulationConfig(
        rounds=3,
        data=DataConfig(clients=2, tasks_per_client=1),
        local=LocalConfig(steps=60, learning_rate=0.02),
    )
    tasks = [task("a", x[:, 0]), task("b", -x[:, 1])]
    *_, last = matu_jax.simulate(tasks, model, config)
    assert last.record["r2"]["test_mean"] > 0.5


def test_a_kind_of_text_has_no_file_in_two_splits_and_the_decoder_learns(
    text, tmp_path, monkeypatch
):
    monkeypatch.setenv("MATU_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(text, "STEPS", 3)
    tasks = text.tasks(DataConfig())
    assert [task.name for task in tasks] == list(text.KINDS)
    for number, (task, place) in enumerate(zip(tasks, text.KINDS.values(), strict=True)):
        files = text.pieces(*place, np.random.default_rng((DataConfig().seed, number)))
        contents = [file.tobytes() for file in files]
        assert len(set(contents)) == len(contents) >= 3
        holders: dict[bytes, set[int]] = {}
        for index, file in enumerate(files):
            for row in file:
                holders.setdefault(row.tobytes(), set()).add(index)
        read = []  # per split, the files of those of its pieces that no other file quotes
        for split in (task.train, task.validation, task.test):
            held = [holders[row.tobytes()] for row in split["bytes"]]
            read.append({file for files in held if len(files) == 1 for file in files})
        assert all(read), task.name
        assert len(set.union(*read)) == sum(map(len, read)), task.name
    model = text.model(ModelConfig("decoder"), tasks, seed=0)
    assert (tmp_path / "text").is_dir()
    again = text.model(ModelConfig("decoder"), tasks, seed=0)  # out of the cache
    for (path, one), (_, other) in zip(*map(leaf_items, (model.frozen, again.frozen)), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=path)
    batch = {"bytes": tasks[0].train["bytes"][:8]}
    logits = model.outputs(model.base, model.frozen, batch, jnp.int32(0))
    changed = {"bytes": batch["bytes"].copy()}
    changed["bytes"][:, 20] ^= 1
    later = model.outputs(model.base, model.frozen, changed, jnp.int32(0))
    np.testing.assert_allclose(logits[:, :20], later[:, :20], atol=1e-5)  # sees no later byte
    assert np.abs(np.asarray(logits - later))[:, 20:].max() > 1e-3
    config = SimulationConfig(
        rounds=2,
        data=DataConfig(clients=2, tasks_per_client=1, examples_per_slot=32),
        local=LocalConfig(steps=8, batch_examples=8, learning_rate=0.02),
    )
    first, last = matu_jax.simulate(tasks[:2], model, config)
    assert last.record["perplexity"]["test_mean"] < first.record["perplexity"]["test_mean"] < 256
    assert tasks[0].chance == {"perplexity": 256.0}
