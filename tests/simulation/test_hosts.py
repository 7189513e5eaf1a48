"""Runs of several processes: the same results, each one's own data, one stop, one message."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from test_train import EXPERIMENT, mistake

from matu_jax import algorithms, models, train
from matu_jax.runs import recorder
from matu_jax.runs.checkpoints import Checkpoints
from matu_jax.simulation.federation import federate
from matu_jax.simulation.programs import SHARDED_FROM

ROUNDS = 8

# Small pieces, so that both training and evaluation are fed in several; what is read is noted down,
# and how much of the server's vectors lies here.
PROGRAM = """
import functools, json, os, sys
import jax
from matu_jax import train
from matu_jax.simulation import batches, evaluate, programs, rounds

read = {"slots": [], "tasks": [], "pieces": [], "here": []}
round_indices, gather, load = batches.round_indices, batches.gather, evaluate.EvaluationSet.load

def noted_indices(indices, client, task, **others):
    read["slots"] += list(zip(client.tolist(), task.tolist()))
    return round_indices(indices, client, task, **others)

def noted_gather(tasks, task, chunks):
    read["pieces"].append(chunks.shape)
    return gather(tasks, task, chunks)

def noted_load(self, index):
    read["tasks"] += self.pieces[index].tasks.tolist()
    return load(self, index)

agreed = rounds.agreed

def noted_agreed(state):
    for leaf in jax.tree.leaves(state):
        here = {str(shard.index): shard.data.size for shard in leaf.addressable_shards}
        read["here"] += [sum(here.values()) / leaf.size] if leaf[0].size >= 8 else []
    return agreed(state)

rounds.agreed = noted_agreed
programs.SHARDED_FROM = int(os.environ["SHARED_FROM"])
batches.round_indices, batches.gather = noted_indices, noted_gather
evaluate.EvaluationSet.load = noted_load
for room, name in ((batches, "grid"), (evaluate, "EvaluationSet")):
    small = functools.partial(getattr(room, name), budget_bytes=4 * 4 * 3072)
    setattr(room, name, small)
code = train.main(["train", *sys.argv[2:]])
with open(sys.argv[1], "w") as file:
    json.dump(read, file)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    text = EXPERIMENT.format(checkpoint=tiny.write_checkpoint(folder / "tiny.safetensors"))
    # Plain SGD: Adam's first steps divide rounding noise by rounding noise.
    text = text.replace("batch_examples=4", "batch_examples=4, optimizer='sgd', learning_rate=0.01")
    text = text.replace("rounds=4", f"rounds={ROUNDS}")
    text = text.replace(
        "Config(\n", "Config(\n        checkpoint=CheckpointConfig(every_rounds=1000),\n", 1
    )
    text = text.replace("import Config", "import CheckpointConfig, Config")
    text += "\nimport jax\njax.numpy.zeros(1)  # as files with a model of their own may\n"
    (folder / "tiny.py").write_text(text)
    return f"--config={folder / 'tiny.py'}"


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory):
    """What one process makes of it."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert train.main(["train", experiment, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture
def begun(experiment, tmp_path, monkeypatch):
    """A run of one process that was stopped after its second round."""
    append = recorder.MetricsLog.append

    def append_and_stop(self, record):
        append(self, record)
        if record["round"] == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(recorder.MetricsLog, "append", append_and_stop)
    assert train.main(["train", experiment, f"--workdir={tmp_path / 'run'}"]) == 143
    monkeypatch.undo()
    return tmp_path / "run"


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def pair(experiment, workdir, *words, shared=False):
    """Starts the two processes of a run, with two devices each."""
    port, folder = free_port(), workdir.parent
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-c", PROGRAM, folder / f"read{process}.json"),
                *(experiment, f"--workdir={workdir}", f"--coordinator=localhost:{port}"),
                *("--processes=2", f"--process={process}", *words),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(tiny.__file__).parents[1],
            env=os.environ
            | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
            | {"SHARED_FROM": "0" if shared else str(SHARDED_FROM)},
        )
        for process in range(2)
    ]


def ended(processes):
    try:
        texts = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any("Traceback" in text for text in texts), "\n".join(texts)
    return [process.returncode for process in processes], texts


def lines(workdir):
    file = workdir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def final_state(experiment, workdir):
    config, *_ = train.parse(["train", experiment])
    federation = federate(config)
    model = models.build_classifier(config.model, federation.tasks, seed=config.seed)
    state = jax.eval_shape(algorithms.build(config).init, model.base, federation.slots)
    zero = np.zeros((3, 3), np.float32)
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        found = checkpoints.restore({"state": state, "similarity_sum": zero})
    assert found
    assert found[0] == ROUNDS
    return found[1]


def assert_equal(experiment, workdir, whole):
    for one, other in zip(lines(workdir), lines(whole), strict=True):
        assert one["round"] == other["round"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["accuracy"] == other["accuracy"]
        assert one["uplink_bits"] == other["uplink_bits"]
    states = final_state(experiment, workdir), final_state(experiment, whole)
    close = functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4)
    jax.tree.map(close, *states)


@pytest.mark.parametrize("shared", [False, True])
def test_one_process_then_two_then_one_again_reach_the_result_of_one(
    experiment, begun, whole, shared
):
    """Two go on where one has stopped; of these, the second alone is preempted.

    Each computes the server's arithmetic for itself, or all devices share it out.
    """
    processes = pair(experiment, begun, shared=shared)
    deadline = time.monotonic() + 240
    while len(lines(begun)) < 3 and time.monotonic() < deadline:
        if any(process.poll() is not None for process in processes):
            break
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGTERM)
    codes, texts = ended(processes)
    assert codes == [143, 143], "\n".join(texts)
    done = len(lines(begun))
    assert 2 < done < ROUNDS
    assert (begun / "checkpoints" / str(done)).exists()
    for text in texts:
        assert f"Stopped after round {done} of {ROUNDS}, which is saved" in text
    for words in ("4 x cpu (cpu) of 2 processes", "Going on after round 2"):
        assert words in texts[0]
        assert words not in texts[1]
    for one in each_has_read_its_own_slots_alone(begun):
        assert set(one["here"]) == {0.5 if shared else 1.0}

    assert train.main(["train", experiment, f"--workdir={begun}"]) == 0
    assert_equal(experiment, begun, whole)


def each_has_read_its_own_slots_alone(workdir):
    """Slots in groups of four, one per device: 0 1 | 2 3, then 4 5 | 5 5, which fills up."""
    read = [json.loads((workdir.parent / f"read{i}.json").read_text()) for i in range(2)]
    slots = [{tuple(slot) for slot in one["slots"]} for one in read]
    held = sorted(slots[0] | slots[1])
    assert slots == [{held[i] for i in rows} for rows in ([0, 1, 4, 5], [2, 3, 5])]
    for one in read:
        assert {tuple(piece) for piece in one["pieces"]} == {(2, 1, 4)}  # slots, steps, batch
    # Evaluation goes by task: 0 0 | 1 1, then 2 2 | 2 2.
    assert [set(one["tasks"]) for one in read] == [{0, 2}, {1, 2}]
    return read


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_two_processes_from_start_to_end(experiment, tmp_path, whole, shared):
    """With a checkpoint after every round."""
    workdir = tmp_path / "run"
    words = "--config.checkpoint.every_rounds=1"
    codes, texts = ended(pair(experiment, workdir, words, shared=shared))
    assert codes == [0, 0], "\n".join(texts)
    assert "Results" in texts[0]
    assert "Results" not in texts[1]
    assert (workdir / "summary.json").exists()
    assert_equal(experiment, workdir, whole)


def test_a_mistake_at_one_process_ends_all(experiment, tmp_path):
    (tmp_path / "run").write_text("")
    codes, texts = ended(pair(experiment, tmp_path / "run"))
    assert codes == [2, 2], "\n".join(texts)
    assert "cannot be written" in texts[0]
    assert "another process of this run has ended with an error" in texts[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--process=1", "missing: --coordinator, --processes"),
        ("--coordinator=here --processes=2 --process=1", "found 'here', expected HOST:PORT"),
        ("--coordinator=here:1 --processes=two --process=1", "--processes: found 'two'"),
        ("--coordinator=here:1 --processes=2 --process=2", "--process: found 2 of 2"),
    ],
)
def test_mistakes_in_the_options_are_named(capsys, experiment, options, words):
    assert words in mistake(capsys, experiment, *options.split())
