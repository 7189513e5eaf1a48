"""Clients that vanish, lie or send garbage: what a round does with who is left."""

import dataclasses
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federations import TINY, run
from jax.sharding import AxisType

import matu_jax as matu
from matu_jax import algorithms
from matu_jax.config import (
    AttackConfig,
    EvaluationConfig,
    FailureConfig,
    LocalConfig,
    PrivacyConfig,
)
from matu_jax.scenarios import attacks, failures, privacy
from matu_jax.simulation.attendance import StoppedError
from matu_jax.simulation.federation import federate

ONE = dataclasses.replace(
    TINY, rounds=1, evaluation=EvaluationConfig(every_rounds=9, batch_examples=16)
)


def with_trace(federation, trace):
    return federation._replace(trace=trace)


def test_a_trace_is_read_and_its_mistakes_are_named(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("round,client,reason\n2,1,night shift\n\n2,0,\n5,2,power cut\n")
    assert failures.read_trace(str(file), 3) == {
        2: {1: "night shift", 0: "no reason given"},
        5: {2: "power cut"},
    }
    for text, words in (
        ("client,round,reason\n", "line 1: found 'client,round,reason'"),
        (
            "round,client,reason\n1,3,x\n",
            "line 2: found '1,3,x', expected a round from 1, a client",
        ),
        ("round,client,reason\n0,1,x\n", "line 2"),
        ("round,client,reason\n1,1,x\none,1,x\n", "line 3"),
        ("round,client,reason\n1,1\n", "line 2"),
        ("", "line 1: found ''"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            failures.read_trace(str(file), 3)
        file.write_text(f"\ufeff{text}", encoding="utf-8")  # as from a spreadsheet: the same
        with pytest.raises(ValueError, match=words):
            failures.read_trace(str(file), 3)
    file.write_bytes(b"\xef\xbb\xbfround,client,reason\r\n2,1,night shift\r\n")
    assert failures.read_trace(str(file), 3) == {2: {1: "night shift"}}
    for line in (f"1,1,{'x' * 200_000}", f"{'9' * 5000},1,x", "1\0,1,x"):
        file.write_text(f"round,client,reason\n{line}\n")
        with pytest.raises(ValueError, match=r"trace\.csv, line [12]: "):
            failures.read_trace(str(file), 3)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="no UTF-8"):
        failures.read_trace(str(file), 3)
    config = dataclasses.replace(TINY, failures=FailureConfig(trace=str(tmp_path / "none.csv")))
    with pytest.raises(ValueError, match=r"failures.trace: .*none.csv cannot be read: No such"):
        federate(config)


def test_dropout_and_deadlines_are_drawn_from_seed_round_and_client():
    chosen = np.ones(2000, bool)
    config = FailureConfig(dropout=0.3, slowness=0.5, deadline=2.0)

    def absent(seed=0, index=0, chosen=chosen):
        return failures.absent_clients(config, {}, chosen, seed=seed, round_index=index)

    found = absent()
    dropped = [c for c, why in found.items() if why == "dropped out"]
    late = [c for c, why in found.items() if why.startswith("too late")]
    assert len(dropped) + len(late) == len(found)
    assert abs(len(dropped) / 2000 - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 2000)
    # log 2 / 0.5 standard deviations: 8.3 % of those who have not dropped out.
    assert abs(len(late) / (2000 - len(dropped)) - 0.083) < 4 * np.sqrt(0.083 * 0.917 / 1400)
    assert absent(index=1) != found != absent(seed=1)
    some = chosen.copy()
    some[::2] = False
    assert absent(chosen=some) == {c: why for c, why in found.items() if some[c]}


def test_who_is_left_goes_on_and_every_absence_is_on_record(federation, model):
    config = dataclasses.replace(ONE, rounds=2)
    whole = list(run(config, federation, model))
    broken = list(run(config, with_trace(federation, {2: {1: "night shift"}}), model))
    chex.assert_trees_all_equal(whole[0].state, broken[0].state)
    names = [task.name for task in federation.tasks]
    held = federation.slots.task[federation.slots.client == 1]
    assert broken[1].record["dropped"] == [
        {"client": 1, "task": names[t], "reason": "absent by the trace: night shift"} for t in held
    ]
    assert broken[1].record["clients"] == [0, 1, 2]
    assert 0 < broken[1].record["uplink_bits"] < whole[1].record["uplink_bits"]
    assert broken[1].record["downlink_bits"] == whole[1].record["downlink_bits"]
    assert broken[1].record["loss"] == whole[1].record["loss"]


@pytest.mark.parametrize("name", sorted(algorithms.ALGORITHMS))
def test_a_round_that_nobody_survives_changes_nothing(federation, model, name):
    config = dataclasses.replace(ONE, algorithm=name, rounds=2)
    first, second = run(config, with_trace(federation, {2: dict.fromkeys(range(3), "x")}), model)
    chex.assert_trees_all_equal(first.state, second.state)
    if name not in ("ties", "emr_one_shot"):  # those two send everything after the last round
        assert second.record["uplink_bits"] == 0
    assert second.similarity is None
    assert not second.record["aggregated"]
    assert len(second.record["dropped"]) == 6


def test_a_task_without_quorum_keeps_its_vector(federation, model):
    """Of three clients with two of three tasks each, one is gone: one task keeps two holders."""
    slots = federation.slots
    config = dataclasses.replace(ONE, algorithm="per_task", failures=FailureConfig(quorum=2))
    (result,) = run(config, with_trace(federation, {1: {0: "x"}}), model)
    moved = np.any(
        [np.abs(x).reshape(3, -1).any(axis=1) for x in jax.tree.leaves(result.state)], axis=0
    )
    left = np.bincount(slots.task[slots.client != 0], minlength=3)
    np.testing.assert_array_equal(moved, left >= 2)
    reasons = {d["reason"] for d in result.record["dropped"] if d["client"] != 0}
    assert reasons == {"fewer than 2 holders of the task reported"}


def test_a_run_stops_where_training_fails_in_too_many_slots(federation, model):
    local = LocalConfig(steps=2, batch_examples=4, optimizer="sgd", learning_rate=1e30)
    config = dataclasses.replace(ONE, rounds=3, local=local)
    with pytest.raises(StoppedError, match="round 1: training failed in 6 of 6 slots"):
        list(run(config, federation, model))
    config = dataclasses.replace(config, rounds=1, failures=FailureConfig(max_nonfinite_share=1.0))
    (result,) = run(config, federation, model)
    assert len(result.record["dropped"]) == 6
    chex.assert_tree_all_finite(result.state)


# Two tasks with five holders each, one with two: one in five may lie.
CLIENT = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6])
TASK = np.array([0, 1] * 5 + [2, 2])
SLOTS = matu.Slots(CLIENT, TASK, np.arange(1.0, 13.0, dtype=np.float32), 7, 3)


def test_liars_reach_every_tasks_share_where_one_order_does_not():
    # Ten clients with two of four tasks each, five holders a task: four of them can lie.
    pairs = [(0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (1, 3), (0, 1), (1, 2), (2, 3), (3, 0)]
    client, task = np.repeat(np.arange(10), 2), np.array(pairs).ravel()
    slots = matu.Slots(client, task, np.ones(20, np.float32), 10, 4)
    for seed in range(20):
        lies = attacks.liars(AttackConfig("sign_flip", share=0.4), slots, seed)
        assert np.bincount(task, weights=lies[client]).tolist() == [2, 2, 2, 2]


def test_liars_are_as_many_of_every_tasks_holders_as_allowed():
    seen = set()
    for seed in range(20):
        lies = attacks.liars(AttackConfig("sign_flip", share=0.2), SLOTS, seed)
        assert lies[:5].sum() == 1
        assert not lies[5:].any()
        seen.add(int(np.flatnonzero(lies)[0]))
    assert seen == set(range(5))
    assert attacks.liars(AttackConfig("noise", share=1.0), SLOTS, 0).all()
    assert not attacks.liars(AttackConfig("none", share=1.0), SLOTS, 0).any()
    assert attacks.liars(AttackConfig("noise", share=0.5), SLOTS, 0).sum() == 3


def vectors():
    rng = np.random.default_rng(3)
    return {
        "a": jnp.asarray(rng.normal(size=(12, 40, 25)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(12, 7)), jnp.float32),
    }


def flat(tree):
    return np.concatenate([np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(tree)], 1)


LIES = jnp.asarray(np.isin(CLIENT, [1, 3]))


def lie(kind, strength=1.0, *, colludes=False, index=0):
    config = AttackConfig(kind, strength=strength, colludes=colludes)
    said = attacks.lied(config, vectors(), LIES, SLOTS, jnp.int32(index), seed=0)
    truth, found = flat(vectors()), flat(said)
    np.testing.assert_array_equal(found[~np.asarray(LIES)], truth[~np.asarray(LIES)])
    return truth[np.asarray(LIES)], found[np.asarray(LIES)]


def test_lies_are_what_they_are_said_to_be():
    truth, said = lie("sign_flip", 2.0)
    np.testing.assert_allclose(said, -2 * truth, rtol=1e-6)
    truth, said = lie("scaling", 100.0)
    np.testing.assert_allclose(said, 100 * truth, rtol=1e-6)
    truth, said = lie("garbage")
    np.testing.assert_array_equal(said, np.where(truth > 0, np.inf, np.nan))
    length = np.linalg.norm(truth, axis=1)
    truth, said = lie("constant", 3.0)
    np.testing.assert_allclose(np.linalg.norm(said, axis=1), 3 * length, rtol=1e-5)
    assert np.ptp(said / said[:, :1]) < 1e-5
    truth, said = lie("noise", 3.0)
    np.testing.assert_allclose(np.linalg.norm(said, axis=1), 3 * length, rtol=1e-5)
    directions = said / np.linalg.norm(said, axis=1, keepdims=True)
    others = directions @ directions.T - np.eye(4)
    assert np.abs(others).max() < 4 / np.sqrt(said.shape[1])
    assert not np.allclose(said, lie("noise", 3.0, index=1)[1])


@pytest.mark.parametrize("kind", ["sign_flip", "noise", "constant"])
def test_colluding_liars_of_a_task_say_the_same(kind):
    truth, said = lie(kind, colludes=True)  # rows: client 1 tasks 0, 1; client 3 tasks 0, 1
    np.testing.assert_array_equal(said[0], said[2])
    np.testing.assert_array_equal(said[1], said[3])
    weight = SLOTS.weight[np.asarray(LIES)]
    mean = (weight[0] * truth[0] + weight[2] * truth[2]) / (weight[0] + weight[2])
    if kind == "sign_flip":
        np.testing.assert_allclose(said[0], -mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(said[0]), np.linalg.norm(mean), rtol=1e-4)


def test_masks_and_scales_can_lie():
    uploads = matu.unify(vectors(), SLOTS)
    wrong = attacks.lied_upload(AttackConfig("masks"), (uploads, {"head": 1}), LIES, SLOTS)[0]
    for honest, lying in zip(
        jax.tree.leaves(uploads.masks), jax.tree.leaves(wrong.masks), strict=True
    ):
        turned = np.asarray(lying) ^ np.asarray(honest)
        assert (turned[np.asarray(LIES)] == 255).all()
        assert not turned[~np.asarray(LIES)].any()
    wrong = attacks.lied_upload(AttackConfig("scales", strength=50.0), uploads, LIES, SLOTS)
    np.testing.assert_allclose(wrong.scales / uploads.scales, np.where(LIES, 50, 1), rtol=1e-6)
    hidden = attacks.lied_upload(AttackConfig("hidden", strength=50.0), uploads, LIES, SLOTS)
    chex.assert_trees_all_close(
        matu.modulate(hidden, SLOTS), matu.modulate(wrong, SLOTS), rtol=1e-5
    )
    # Vectors of which every square is 0 in float32, by liars alone.
    lying = np.zeros(SLOTS.num_clients, bool)
    lying[np.asarray(SLOTS.client)[np.asarray(LIES)]] = True
    for leaf in jax.tree.leaves(hidden.vector):
        squares = np.square(np.asarray(leaf)).reshape(len(lying), -1)
        assert ((squares == 0).all(axis=1) == lying).all()


def test_an_attack_of_nobody_is_a_mistake():
    config = dataclasses.replace(TINY, attack=AttackConfig("sign_flip", share=0.1))
    with pytest.raises(ValueError, match=r"attack.share: found 0.1, of which nobody lies"):
        federate(config)


def attacked(name, kind, strength=1.0):
    return dataclasses.replace(
        ONE,
        algorithm=name,
        rounds=2,
        attack=AttackConfig(kind, share=0.5, strength=strength),
    )


@pytest.mark.parametrize("name", sorted(algorithms.ALGORITHMS))
def test_garbage_never_enters_the_state(federation, model, name):
    config = attacked(name, "garbage")
    (liar,) = np.flatnonzero(attacks.liars(config.attack, federation.slots, config.seed))
    for result in run(config, federation, model):
        chex.assert_tree_all_finite(result.state)
        dropped = result.record["dropped"]
        assert {d["client"] for d in dropped} == {liar}
        assert {d["reason"] for d in dropped} == {"upload refused: a number is not finite"}
        assert len(dropped) == 2


@pytest.mark.parametrize("kind", ["sign_flip", "label_flip", "masks", "scales", "hidden"])
def test_attacks_reach_the_state_and_only_after_they_were_sent(federation, model, kind):
    honest = list(run(attacked("matu", "none"), federation, model))
    lied = list(run(attacked("matu", kind, 4.0), federation, model))
    states = [
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(r[0].state)]) for r in (honest, lied)
    ]
    assert not np.allclose(states[0], states[1])
    same = kind != "label_flip"
    assert (honest[0].record["loss"] == lied[0].record["loss"]) == same
    assert honest[0].record["uplink_bits"] == lied[0].record["uplink_bits"]


def test_lying_masks_need_masks(federation, model):
    with pytest.raises(ValueError, match="uploads of 'fedavg' have no masks and scales"):
        list(run(attacked("fedavg", "masks"), federation, model))


def test_a_client_is_clipped_over_all_its_tasks_and_noise_has_its_size():
    config = PrivacyConfig(clip_norm=2.0, noise_multiplier=1.5, seed=0)
    big = jax.tree.map(lambda x: 10 * x, vectors())
    found = privacy.privatised(config, big, SLOTS, jnp.int32(0), 0)
    quiet = dataclasses.replace(config, noise_multiplier=1e-9)
    clipped = flat(privacy.privatised(quiet, big, SLOTS, jnp.int32(0), 0))
    for client in range(7):
        rows = clipped[client == CLIENT]
        assert 2.0 * 0.99 <= np.linalg.norm(rows) <= 2.0
        whole = flat(big)[client == CLIENT]
        shorter = whole * np.linalg.norm(rows) / np.linalg.norm(whole)
        np.testing.assert_allclose(
            rows, shorter, rtol=1e-3, atol=0.51 * privacy.grid_step(config, big)
        )
    noise = (flat(found) - clipped).ravel()
    assert abs(noise.std() / 3.0 - 1) < 4 / np.sqrt(2 * len(noise))
    assert abs(noise.mean()) < 4 * 3.0 / np.sqrt(len(noise))
    rows = noise.reshape(12, -1)
    others = rows @ rows.T / np.outer(*[np.linalg.norm(rows, axis=1)] * 2) - np.eye(12)
    assert np.abs(others).max() < 5 / np.sqrt(rows.shape[1])
    small = jax.tree.map(lambda x: 1e-3 * x, vectors())
    np.testing.assert_allclose(
        flat(privacy.privatised(quiet, small, SLOTS, jnp.int32(0), 0)),
        flat(small),
        rtol=1e-6,
        atol=privacy.grid_step(quiet, small) / 2,
    )


def test_private_runs_do_not_depend_on_devices_and_cost_what_is_known(federation, model):
    choices = PrivacyConfig(clip_norm=1.0, noise_multiplier=2.0, seed=0)
    config = dataclasses.replace(ONE, privacy=choices)
    local = dataclasses.replace(ONE.local, optimizer="sgd", learning_rate=0.01)
    config = dataclasses.replace(config, local=local)
    mesh = jax.make_mesh((2,), ("slots",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    (one,), (two,) = run(config, federation, model), run(config, federation, model, mesh=mesh)
    # Rounding to steps makes one of what differs in the last bit.
    step = privacy.grid_step(choices, jax.tree.leaves(one.state))
    chex.assert_trees_all_close(one.state, two.state, rtol=1e-4, atol=4 * step)
    (plain,) = run(dataclasses.replace(ONE, local=local), federation, model)
    first, other = (np.asarray(jax.tree.leaves(r.state)[0]) for r in (one, plain))
    assert not np.allclose(first, other)
    # Four rounds at noise 2 tell as much as one at noise 1; of both test_privacy has the number.
    one_round = privacy.epsilon(PrivacyConfig(clip_norm=1.0, noise_multiplier=1.0), 1)
    assert privacy.epsilon(choices, 4) == pytest.approx(one_round, rel=1e-9)
    assert privacy.epsilon(choices, 0) == 0


def test_noise_cannot_be_drawn_again(federation, model):
    """The same config and seed, from the same state: what clients send differs, losses do not."""
    private = PrivacyConfig(clip_norm=1.0, noise_multiplier=1e-3)
    config = dataclasses.replace(ONE, algorithm="per_task", privacy=private)
    (one,), (two,) = run(config, federation, model), run(config, federation, model)
    assert one.record["loss"] == two.record["loss"]
    for first, second in zip(*(jax.tree.leaves(r.state) for r in (one, two)), strict=True):
        different = np.asarray(first) != np.asarray(second)
        assert different.mean() > 0.5
        chex.assert_trees_all_close(first, second, atol=0.02)


def test_a_trace_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "trace.csv")
    with pytest.raises(ValueError, match=r"trace\.csv cannot be read: not a regular file"):
        failures.read_trace(str(tmp_path / "trace.csv"), 3)
