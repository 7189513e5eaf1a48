"""Models of others, in the three libraries that people have them in, through a whole federation."""

import dataclasses

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import matu_jax
from matu_jax.config import DataConfig, LocalConfig, SimulationConfig
from matu_jax.models import metrics
from matu_jax.models.modules import of_nnx

CONFIG = SimulationConfig(
    rounds=2,
    data=DataConfig(clients=3, tasks_per_client=2),
    local=LocalConfig(steps=20, learning_rate=0.01),
)
R2 = {"r2": metrics.r2(lambda outputs, batch: (outputs["y"], batch["y"]))}


def tasks():
    rng = np.random.default_rng(0)

    def split(sign):
        x = rng.normal(size=(64, 3)).astype(np.float32)
        return {"x": x, "y": (sign * np.sin(x[:, 0]) + 0.5 * x[:, 1]).astype(np.float32)}

    return [matu_jax.Task(str(sign), *(split(sign) for _ in range(3))) for sign in (-1.0, 0.5, 1.0)]


def squared(outputs, batch):
    """Two terms: the error, and how large the hidden features are."""
    return jnp.square(outputs["y"] - batch["y"]).mean() + 1e-3 * outputs["size"].mean()


def result_of(model, config=CONFIG):
    return list(matu_jax.simulate(tasks(), model, config))[-1]


class Perceptron(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])
        self.adapter = nnx.LoRA(8, 2, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.out = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = jax.nn.tanh(self.layers[1](jax.nn.tanh(self.layers[0](x))))
        x = x + self.adapter(x)
        if rngs is not None:
            x = self.dropout(x, rngs=rngs)
        return {"y": self.out(x)[:, 0], "size": jnp.square(x).sum(axis=1)}


def perceptron(trains=nnx.Param, **options):
    def outputs(module, batch, task, key):
        return module(batch["x"], None if key is None else nnx.Rngs(dropout=key))

    module = Perceptron(nnx.Rngs(0))
    return of_nnx(module, trains, outputs=outputs, loss=squared, metrics=R2, **options), module


@pytest.mark.parametrize("algorithm", ["matu", "ntk_fedavg"])
def test_an_nnx_module_of_ones_own_learns(algorithm):
    model, module = perceptron()
    config = dataclasses.replace(CONFIG, algorithm=algorithm)
    batch = tasks()[0].train
    theirs = module(batch["x"])
    ours = jax.jit(model.outputs)(model.base, model.frozen, batch, jnp.int32(0))
    np.testing.assert_allclose(ours["y"], theirs["y"], rtol=1e-5, atol=1e-6)
    assert result_of(model, config).record["r2"]["test_mean"] > 0


def test_what_the_filter_leaves_out_does_not_train():
    model, _ = perceptron(nnx.LoRAParam)
    assert sorted(path for path in model.base) == ["adapter"]
    result = result_of(model)
    assert result.vectors["adapter"]["lora_b"].shape == (6, 2, 8)
    assert np.abs(result.vectors["adapter"]["lora_b"]).max() > 1e-3


def test_dropout_is_drawn_from_the_key():
    model, _ = perceptron(stochastic=True)
    batch = tasks()[0].train
    at = lambda key: model.loss(model.base, model.frozen, batch, jnp.int32(0), key)  # noqa: E731
    first, again, other = (at(jax.random.key(i)) for i in (0, 0, 1))
    assert first == again != other
    assert at(None) != first
    assert result_of(model).record["loss"] != result_of(perceptron()[0]).record["loss"]


@pytest.mark.parametrize(
    ("trains", "words"),
    [
        (nnx.BatchStat, "selects nothing of Perceptron, which has adapter/lora_a, "),
        (lambda path, variable: variable.dtype == jnp.int32, "selects nothing of"),
        (..., "which is"),
    ],
)
def test_a_filter_that_selects_nothing_or_no_floats_is_refused(trains, words):
    class Counted(Perceptron):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.count = nnx.Variable(jnp.int32(0))

    module = Counted(nnx.Rngs(0)) if trains is ... else Perceptron(nnx.Rngs(0))
    with pytest.raises(ValueError, match=words):
        of_nnx(module, trains, outputs=lambda *_: None, loss=squared, metrics=R2)


class InTraining(nnx.Module):
    """A module as NNX makes it: in the mode for training."""

    def __init__(self, layer, rngs):
        self.layer, self.out = layer, nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return {"y": self.out(self.layer(x))[:, 0], "size": jnp.square(x).sum(axis=1)}


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda rngs: nnx.Dropout(0.5, rngs=rngs), r"layer/rngs/count \(RngState\)"),
        (lambda rngs: nnx.BatchNorm(3, rngs=rngs), r"layer/mean \(BatchStat\)"),
    ],
)
def test_a_module_in_training_is_not_evaluated(layer, words, stochastic):
    """Dropout would stay on, and statistics be those of a batch with its padding."""
    rngs = nnx.Rngs(0)
    module = InTraining(layer(rngs), rngs)

    def model():
        return of_nnx(
            module,
            nnx.Param,
            outputs=lambda module, batch, task, key: module(batch["x"]),
            loss=squared,
            metrics=R2,
            stochastic=stochastic,
        )

    with pytest.raises(
        ValueError, match=rf"outputs change {words} of InTraining.*module\.eval\(\)"
    ):
        result_of(model())
    module.eval()
    assert np.isfinite(result_of(model()).record["r2"]["test_mean"])


def test_labels_among_outputs_do_not_hinder_the_first_order_expansion():
    """Where they are integers they have no derivative."""

    def outputs(module, batch, task, key):
        found = module(batch["x"])
        return found | {"positive": (found["y"] > 0).astype(jnp.int32)}

    module = Perceptron(nnx.Rngs(0))
    model = of_nnx(module, nnx.Param, outputs=outputs, loss=squared, metrics=R2)
    config = dataclasses.replace(CONFIG, algorithm="ntk_fedavg")
    assert np.isfinite(result_of(model, config).record["r2"]["test_mean"])


def test_a_linen_module_is_its_tree_of_parameters():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(8)(x))
            return {"y": nn.Dense(1)(x)[:, 0], "size": jnp.square(x).sum(axis=1)}

    net = Net()

    def outputs(params, frozen, batch, task, key=None):
        return net.apply({"params": params}, batch["x"])

    def loss(params, frozen, batch, task, key=None):
        return squared(outputs(params, frozen, batch, task), batch)

    base = net.init(jax.random.key(0), jnp.zeros((1, 3)))["params"]
    assert result_of(matu_jax.Model(base, {}, loss, outputs, R2)).record["r2"]["test_mean"] > 0


def test_an_equinox_module_is_what_partition_makes_of_it():
    net = eqx.nn.MLP(3, "scalar", 8, 1, key=jax.random.key(0))
    base, static = eqx.partition(net, eqx.is_inexact_array)

    def outputs(params, frozen, batch, task, key=None):
        y = jax.vmap(eqx.combine(params, static))(batch["x"])
        return {"y": y, "size": jnp.square(y)}

    def loss(params, frozen, batch, task, key=None):
        return squared(outputs(params, frozen, batch, task), batch)

    assert result_of(matu_jax.Model(base, {}, loss, outputs, R2)).record["r2"]["test_mean"] > 0


def test_a_module_in_which_flax_sees_nothing_is_said_to_be_one():
    class Outside(nnx.Module, pytree=False):
        def __init__(self):
            self.linear = nnx.Linear(2, 1, rngs=nnx.Rngs(0))

    class Derived(Outside):
        """What qwix makes of it."""

    module = Outside()
    module.__class__ = Derived
    about = {"outputs": lambda m, b, t, k: m.linear(b["x"]), "loss": lambda o, b: o.mean()}
    with pytest.raises(ValueError, match=r"Flax sees no array in Derived.*is_pytree = Fal"):
        of_nnx(module, nnx.Param, metrics={}, **about)
    setattr(Derived, "_pytree__is_pytree", False)  # noqa: B010
    assert set(of_nnx(module, nnx.Param, metrics={}, **about).base) == {"linear"}
