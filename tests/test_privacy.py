"""A membership attack on what the server sees: it gains no more than epsilon and delta allow.

The attacker knows everything but whether a client took part: the change x that it would have sent,
the clip norm, the noise. Its best test is then how far what it sees reaches along x (Neyman and
Pearson 1933), and with noise z the area under that test's ROC curve is Phi(1 / (z sqrt 2)).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import matu_jax as matu
from matu_jax import privacy
from matu_jax.config import PrivacyConfig

# One client with two tasks that mostly agree, so that folding keeps most of what it says.
SLOTS = matu.Slots(np.array([0, 0]), np.array([0, 1]), np.ones(2, np.float32), 1, 2)
ROUNDS = 3000


def change(seed=0):
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=40)
    return {"w": jnp.asarray(shared + 0.3 * rng.normal(size=(2, 40)), jnp.float32)}


@functools.cache
def seen(noise):
    """What crosses to the server with and without the client: float32 `[2, ROUNDS, 2, 40]`.

    Both as the vectors that are folded, noise on them, and as the server rebuilds them.
    """
    config = PrivacyConfig(clip_norm=1.0, noise_multiplier=noise)

    @jax.jit
    @jax.vmap
    def release(there, index):
        vectors = jax.tree.map(lambda x: there * x, change())
        noisy = privacy.privatised(config, vectors, SLOTS, index, 0)
        return noisy["w"], matu.modulate(matu.unify(noisy, SLOTS), SLOTS)["w"]

    members = release(jnp.ones(ROUNDS), jnp.arange(ROUNDS))
    others = release(jnp.zeros(ROUNDS), jnp.arange(ROUNDS, 2 * ROUNDS))
    return [np.stack(pair) for pair in zip(members, others, strict=True)]


def scores(what):
    along = np.asarray(change()["w"]).ravel()
    return what.reshape(2, ROUNDS, -1) @ (along / np.linalg.norm(along))


def area(members, others):
    """Probability that a member scores higher."""
    ranks = np.argsort(np.argsort(np.concatenate([members, others])))[: len(members)] + 1
    return (ranks.sum() - len(members) * (len(members) + 1) / 2) / len(members) / len(others)


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0])
def test_a_membership_attack_gains_what_the_noise_allows_and_no_more(noise):
    expected = 0.5 * (1 + math.erf(1 / (noise * math.sqrt(2)) / math.sqrt(2)))
    slack = 4 * 0.5 / math.sqrt(ROUNDS)
    vectors, rebuilt = (scores(what) for what in seen(noise))
    assert abs(area(*vectors) - expected) < slack
    assert area(*rebuilt) < expected + slack


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0])
def test_no_threshold_beats_epsilon_and_delta(noise):
    """True positives <= e^epsilon x false positives + delta, and the other way round."""
    for delta in (1e-5, 0.05):
        config = PrivacyConfig(clip_norm=1.0, noise_multiplier=noise, delta=delta)
        factor = math.exp(privacy.epsilon(config, 1))
        for what in seen(noise):
            members, others = scores(what)
            for threshold in np.linspace(-4, 4, 81) * max(noise, 0.5):
                hit, false = (members > threshold).mean(), (others > threshold).mean()
                for a, b in ((hit, false), (false, hit), (1 - hit, 1 - false)):
                    sampling = (math.sqrt(a * (1 - a)) + factor * math.sqrt(b * (1 - b))) * 4
                    assert a <= factor * b + delta + (sampling + factor * 0.1) / math.sqrt(ROUNDS)


def test_without_noise_the_attack_never_errs():
    members, others = scores(seen(1e-6)[1])
    assert members.min() > others.max()
    # Half a standard deviation of noise already hides some clients.
    members, others = scores(seen(0.5)[1])
    assert members.min() < others.max()
