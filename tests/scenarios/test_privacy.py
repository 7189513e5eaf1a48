"""Clipping and discrete noise, and what a membership attack gains from what the server sees.

The attacker knows everything but whether a client took part: the change x that it would have sent,
the clip norm, the noise. Its best test is then how far what it sees reaches along x (Neyman and
Pearson 1933), and with noise z the area under that test's ROC curve is Phi(1 / (z sqrt 2)).
"""

import dataclasses
import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from opendp import domains, measurements, metrics, mod
from scipy import stats

import matu_jax as matu
from matu_jax.config import Config, PrivacyConfig
from matu_jax.scenarios import privacy

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


def test_every_number_is_a_whole_multiple_of_the_step_with_the_client_and_without():
    """No bit below the step is left, by which noises could be told from sums with noises."""
    config = PrivacyConfig(clip_norm=1.0, noise_multiplier=20.0)
    step = privacy.grid_step(config, change())
    assert math.frexp(step)[0] == 0.5  # a power of 2
    for there in (0.0, 1.0):
        vectors = jax.tree.map(lambda x, there=there: there * x, change())
        for noise in ({"noise": privacy.drawn(config, vectors, SLOTS)}, {"seed": 3}):
            found = privacy.privatised(config, vectors, SLOTS, jnp.int32(0), **noise)["w"]
            wholes = np.asarray(found, np.float64) / step
            np.testing.assert_array_equal(wholes, np.round(wholes))
            assert len(np.unique(wholes)) > 70


TWO = matu.Slots(
    np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), np.array([1, 1, 1, 0], np.float32), 2, 2
)
LEAVES = {"a": (4, 7, 3), "b": (4, 100)}


@jax.jit
def without_noise(x):
    config = PrivacyConfig(clip_norm=0.7, noise_multiplier=1.0)
    zeros = {name: jnp.zeros(shape, jnp.int32) for name, shape in LEAVES.items()}
    return privacy.privatised(config, x, TWO, jnp.int32(0), noise=zeros)


@given(
    st.integers(0, 10_000),
    st.floats(-40, 38),
    st.sampled_from(["normal", "one number", "all equal", "not finite"]),
)
def test_no_client_is_longer_than_the_clip_norm_in_exact_arithmetic(seed, size, form):
    rng = np.random.default_rng(seed)
    x = {name: rng.normal(size=shape) for name, shape in LEAVES.items()}
    if form == "one number":
        x = {
            name: np.where(np.arange(v.size).reshape(v.shape) % v[0].size, 0, v)
            for name, v in x.items()
        }
    if form == "all equal":
        x = {name: np.ones(v.shape) for name, v in x.items()}
    with np.errstate(over="ignore", under="ignore"):
        x = {name: (v * 10.0**size).astype(np.float32) for name, v in x.items()}
    if form == "not finite":
        x["b"][0, :2] = np.nan, np.inf
    config = PrivacyConfig(clip_norm=0.7, noise_multiplier=1.0)
    step = privacy.grid_step(config, x)
    found = {name: np.asarray(v, np.float64) / step for name, v in without_noise(x).items()}
    for rows in ([0, 1], [2]):
        wholes = [int(k) for v in found.values() for k in v[rows].ravel()]
        assert sum(k * k for k in wholes) <= (config.clip_norm / step) ** 2
    given = np.concatenate([v[:2].ravel() for v in x.values()]).astype(np.float64)
    kept = step * np.concatenate([v[:2].ravel() for v in found.values()])
    if form != "not finite" and np.abs(given).max() < 1e12:
        length = np.linalg.norm(given)
        expected = given * min(1, 0.7 * (1 - 1 / 128) / length)
        # Half a step, and what is left for the rounding of float32's sums.
        np.testing.assert_allclose(kept, expected, rtol=5e-3, atol=0.5 * step * (1 + 1e-3))


def test_the_noise_is_a_discrete_gaussian():
    """Pearson's test on its probabilities, the deviations' size, and no two draws alike."""
    first, second = np.zeros(20_000, np.int32), np.zeros(20_000, np.int32)
    privacy.discrete_gaussian(1.5, [first, second])
    k = np.arange(-60, 61)
    probability = np.exp(-(k**2) / (2 * 1.5**2))
    probability /= probability.sum()
    edges = np.arange(-4.5, 5.5)
    expected = [
        probability[(k > low) & (k < high)].sum()
        for low, high in zip([-99, *edges], [*edges, 99], strict=True)
    ]
    counts = np.bincount(np.searchsorted(edges, np.concatenate([first, second])), minlength=11)
    assert stats.chisquare(counts, np.array(expected) * 40_000).pvalue > 1e-6
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(20_000)
    wide = np.zeros(10_000, np.int32)
    privacy.discrete_gaussian(3500.0, [wide])
    assert abs(wide.std() / 3500 - 1) < 5 / math.sqrt(20_000)
    assert stats.kstest(wide, stats.norm(scale=3500).cdf).pvalue > 1e-6


def test_who_is_absent_needs_no_noise_and_nobody_gets_the_same_twice():
    config = PrivacyConfig(clip_norm=0.7, noise_multiplier=1.0)
    like = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in LEAVES.items()}
    one, other = (privacy.drawn(config, like, TWO) for _ in range(2))
    for name in LEAVES:
        assert not one[name][3].any()
        assert one[name].dtype == np.int32
        rows = np.concatenate([one[name][:3], other[name][:3]]).reshape(6, -1)
        assert (np.abs(np.corrcoef(rows)) - np.eye(6) < 0.999).all()


@pytest.mark.parametrize(("noise", "releases"), [(0.5, 1), (1.0, 10), (20.0, 100)])
def test_epsilon_is_that_of_zero_concentrated_privacy(noise, releases):
    """By Canonne, Kamath and Steinke's proposition 12, minimised over orders; rho by OpenDP."""
    mod.enable_features("contrib")
    config = PrivacyConfig(clip_norm=1.0, noise_multiplier=noise, delta=1e-5)
    step = privacy.grid_step(config, change())
    numbers = domains.vector_domain(domains.atom_domain(T="i32"))
    mechanism = measurements.make_gaussian(numbers, metrics.l2_distance(T=float), noise / step)
    assert mechanism.map(1 / step) == pytest.approx(1 / (2 * noise**2), rel=1e-9)
    order = 1 + np.logspace(-2, 4, 100_000)
    rho = releases / (2 * noise**2)
    bound = rho * order + np.log1p(-1 / order) - (np.log(1e-5) + np.log(order)) / (order - 1)
    assert privacy.epsilon(config, releases) == pytest.approx(bound.min(), rel=2e-2)
    assert privacy.epsilon(config, releases) >= bound.min() * (1 - 1e-9)


def test_noise_beyond_its_integers_and_two_sources_of_it_are_mistakes():
    huge = PrivacyConfig(clip_norm=1.0, noise_multiplier=1e6)
    with pytest.raises(ValueError, match=r"noise_multiplier: found 1e\+06, .* expected at most"):
        privacy.grid_step(huge, change())
    config = dataclasses.replace(huge, noise_multiplier=1.0)
    small = Config(privacy=PrivacyConfig(clip_norm=1e-42, noise_multiplier=1.0))
    with pytest.raises(ValueError, match=r"privacy.clip_norm: found 1e-42, expected 1e-30 to 1e30"):
        small.check()
    for both in ({}, {"seed": 1, "noise": {"w": np.zeros((2, 40), np.int32)}}):
        with pytest.raises(ValueError, match="expected a seed or noise, and not both"):
            privacy.privatised(config, change(), SLOTS, jnp.int32(0), **both)
