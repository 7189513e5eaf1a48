"""Runs that are killed, stopped, doubled, or run out of disk: nothing is lost, and it is said."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from test_train import EXPERIMENT, program, results

ROUNDS = 12


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    text = EXPERIMENT.format(checkpoint=tiny.write_checkpoint(folder / "tiny.safetensors"))
    text = text.replace("rounds=4", f"rounds={ROUNDS}")
    (folder / "tiny.py").write_text(text)
    return f"--config={folder / 'tiny.py'}"


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    run = program(experiment, workdir)
    text, _ = run.communicate(timeout=900)
    assert run.returncode == 0, text
    return workdir


def lines(workdir):
    file = workdir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line)["round"] for line in text.split("\n")[:-1]]


def as_long_as(workdir, count, run):
    return len(lines(workdir)) >= count or run.poll() is not None


def saved(workdir):
    """The newest round with a complete checkpoint."""
    files = (workdir / "checkpoints").glob("*/checksums.json")
    return max((int(file.parent.name) for file in files), default=0)


def wait_for(condition, run, seconds=900):
    deadline = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(experiment, workdir, words=()):
    run = program(experiment, workdir, extra=words)
    text, _ = run.communicate(timeout=900)
    assert run.returncode == 0, text
    return text


def saved_arrays(workdir):
    """What the newest checkpoint holds, by name."""
    folder = workdir / "checkpoints" / str(saved(workdir)) / "state"
    with ocp.StandardCheckpointer() as reader:
        return {name: np.asarray(leaf) for name, leaf in reader.restore(folder.resolve()).items()}


def assert_ended_like(whole, workdir):
    """To the bit: what was reported, and the state that the server was left with."""
    assert results(workdir) == results(whole)
    found, expected = saved_arrays(workdir), saved_arrays(whole)
    assert found.keys() == expected.keys()
    assert expected
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype
        assert found[name].tobytes() == leaf.tobytes(), name


def killed_often(experiment, workdir, whole, kills, seed, every):
    """Kills a run at random moments, of start-up and rounds alike; then lets it end.

    It saves a checkpoint every so many rounds.
    """
    rng, words = random.Random(seed), [f"--config.checkpoint.every_rounds={every}"]
    done = survived = unsaved = runs = 0
    at = []  # the newest round that was saved, at each kill
    while survived < kills:
        run = program(experiment, workdir, extra=words)
        if rng.random() < 0.25:  # while it starts
            time.sleep(rng.uniform(0.2, 6.0))
        else:
            goal = len(lines(workdir)) + rng.randint(1, 3)
            wait_for(partial(as_long_as, workdir, goal, run), run)
            time.sleep(rng.uniform(0.0, 0.4))  # two or three rounds and their checkpoints
        alive = run.poll() is None
        run.kill()
        text, _ = run.communicate()
        if alive:
            survived += 1
            assert "Traceback" not in text, text
            assert saved(workdir) >= done  # nothing that was saved is lost
            assert len(lines(workdir)) - saved(workdir) <= every
            unsaved += len(lines(workdir)) - saved(workdir)
            done = saved(workdir)
            at.append(done)
        elif (workdir / "summary.json").exists():  # it came to its end first: once more
            assert_ended_like(whole, workdir)
            shutil.rmtree(workdir)
            done, runs = 0, runs + 1
    finish(experiment, workdir, words)
    assert_ended_like(whole, workdir)
    assert lines(workdir) == [*range(1, ROUNDS + 1)]
    print(
        f"{survived} kills in {runs + 1} runs of {ROUNDS} rounds, a checkpoint every {every}; "
        f"rounds saved when killed: {at}; "
        f"rounds finished but not saved: {unsaved}"
    )


def test_killed_at_random_moments_it_ends_the_same(experiment, tmp_path, whole):
    killed_often(experiment, tmp_path / "run", whole, kills=3, seed=0, every=2)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3])
def test_fifty_kills(experiment, tmp_path, whole, every):
    killed_often(experiment, tmp_path / "run", whole, kills=50, seed=every, every=every)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_round_end_saves_it_and_says_how_to_go_on(
    experiment, tmp_path, whole, number, code
):
    workdir = tmp_path / "run"
    words = ["--config.checkpoint.every_rounds=1000"]  # nothing would be saved before the end
    run = program(experiment, workdir, extra=words)
    wait_for(lambda: lines(workdir), run)
    run.send_signal(number)
    text, _ = run.communicate(timeout=120)
    assert run.returncode == code, text
    assert "Traceback" not in text
    last = saved(workdir)
    assert 0 < last < ROUNDS
    assert f"Stopped after round {last} of {ROUNDS}, which is saved" in text.replace("\n", " ")
    again = program(experiment, workdir, extra=words)
    text, _ = again.communicate(timeout=900)
    assert again.returncode == 0, text
    assert f"Going on after round {last}" in text
    assert results(workdir) == results(whole)


def test_sigterm_while_it_starts_ends_it_at_once(experiment, tmp_path):
    workdir = tmp_path / "run"
    run = program(experiment, workdir)
    wait_for(lambda: (workdir / "config.json").exists(), run)
    run.terminate()
    text, _ = run.communicate(timeout=60)
    assert run.returncode == 143, text
    assert "Traceback" not in text
    assert "goes on" in text


def test_two_processes_in_one_workdir(experiment, tmp_path):
    workdir = tmp_path / "run"
    first = program(experiment, workdir)
    try:
        wait_for(lambda: (workdir / "config.json").exists(), first)
        second = program(experiment, workdir)
        text, _ = second.communicate(timeout=120)
        assert second.returncode == 2
        assert "another process is at work in it" in text
        assert "Traceback" not in text
        doctor = subprocess.run(
            [sys.executable, "-m", "matu_jax.doctor", experiment, f"--workdir={workdir}"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(tiny.__file__).parents[1],
        )
        assert doctor.returncode == 2, doctor.stdout
        assert "a process is at work in it" in doctor.stdout
    finally:
        first.kill()
        first.communicate()
    assert "Results" in finish(experiment, workdir)  # the lock has ended with its process


def unfinished(whole, workdir):
    """The whole run's directory without its results, as if it had been killed at the very end."""
    shutil.copytree(whole, workdir)
    (workdir / "summary.json").unlink()


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(experiment, tmp_path, whole):
    workdir = tmp_path / "run"
    unfinished(whole, workdir)
    newest = workdir / "checkpoints" / str(ROUNDS)
    files = [f for f in newest.rglob("*") if f.is_file() and f.name != "checksums.json"]
    file = max(files, key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    text = finish(experiment, workdir).replace("\n", " ")
    assert f"{newest} is damaged ({file.relative_to(newest)} has changed since" in text
    assert f"Going on after round {ROUNDS - 1} of {ROUNDS}" in text
    assert results(workdir) == results(whole)


def test_checkpoints_of_another_config_are_refused(experiment, tmp_path, whole):
    """Of equal shapes, copied into a run of its own directory."""
    workdir, words = tmp_path / "run", ["--config.local.learning_rate=0.5"]
    run = program(experiment, workdir, extra=words)
    wait_for(lambda: saved(workdir), run)
    run.kill()
    run.communicate()
    shutil.rmtree(workdir / "checkpoints")
    shutil.copytree(whole / "checkpoints", workdir / "checkpoints")
    out = tmp_path / "out"
    for module, options in (
        ("train", [experiment, f"--workdir={workdir}", *words]),
        ("doctor", [experiment, f"--workdir={workdir}", *words]),
        (
            "export",
            [f"--workdir={workdir}", "--task=hue/grating", "--format=safetensors", f"--out={out}"],
        ),
    ):
        run = subprocess.run(
            [sys.executable, "-m", f"matu_jax.{module}", *options],
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
            cwd=Path(tiny.__file__).parents[1],
        )
        text = " ".join((run.stdout + run.stderr).split())
        assert run.returncode == 2, text
        assert "Traceback" not in text
        assert "holds checkpoints of another config" in text
        assert "config.local.learning_rate: there 0.003, here 0.5" in text
    assert not out.exists()
    shutil.rmtree(workdir / "checkpoints")  # as the message says
    assert "Results" in finish(experiment, workdir, words)


def refused(experiment, workdir, prelude=""):
    """A run that cannot write, which is one message; `prelude` is what the process does first."""
    words = [experiment, f"--workdir={workdir}"]
    run = subprocess.run(
        [sys.executable, "-c", prelude + START, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        cwd=Path(tiny.__file__).parents[1],
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    )
    assert run.returncode == 2, run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr, run.stdout + run.stderr
    return run.stderr


START = """
import os, sys
os.execv(sys.executable, [sys.executable, "-m", "matu_jax.train", *sys.argv[1:]])
"""

# Root may write everywhere; with these two of its rights gone (CAP_DAC_OVERRIDE, _READ_SEARCH; 24
# is PR_CAPBSET_DROP) it is refused like everybody else.
LIKE_EVERYBODY = """
import ctypes, os
if os.geteuid() == 0:
    for right in (1, 2):
        assert ctypes.CDLL(None).prctl(24, right, 0, 0, 0) == 0
"""


@pytest.mark.parametrize("part", [".", "checkpoints"])
def test_a_read_only_workdir_is_a_message(experiment, tmp_path, whole, part):
    """All of it, or where checkpoints go; writable again, the run goes on."""
    workdir = tmp_path / "run"
    unfinished(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(ROUNDS))
    (workdir / part).chmod(0o555)
    text = refused(experiment, workdir, LIKE_EVERYBODY)
    assert re.search("cannot be written: (.*: )?Permission denied", text)
    (workdir / part).chmod(0o755)
    finish(experiment, workdir)
    assert results(workdir) == results(whole)


@pytest.fixture
def small_disk(tmp_path):
    """`disk(kilobytes)` mounts one of that size, or changes its size; needs root."""
    place = tmp_path / "disk"

    def disk(kilobytes):
        words = f"size={kilobytes}k" + (",remount" if place.exists() else "")
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", words, "tmpfs", str(place)]
        if (
            not shutil.which("mount")
            or subprocess.run(command, stderr=subprocess.DEVNULL).returncode
        ):
            pytest.skip("no disk can be mounted here")
        return place

    yield disk
    subprocess.run(["umount", str(place)], stderr=subprocess.DEVNULL, check=False)


@pytest.mark.parametrize("kilobytes", [4, 100, 200])
def test_a_full_disk_is_a_message(experiment, small_disk, whole, kilobytes):
    """Full at the start, at the first checkpoint, and after some; with more room it goes on."""
    workdir = small_disk(kilobytes) / "run"
    text = refused(experiment, workdir)
    assert "cannot be written: No space left on device" in text
    small_disk(100_000)
    finish(experiment, workdir)
    assert results(workdir) == results(whole)


LIMITED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1))
"""


@pytest.mark.parametrize("limit", [0, 1000, 4000, 20000])
def test_files_that_cannot_be_written_are_a_message(experiment, tmp_path, limit, whole):
    """The system refuses files over a limit, as a full disk does at any moment."""
    workdir = tmp_path / "run"
    text = refused(experiment, workdir, LIMITED.format(limit=limit))
    assert "cannot be written: File too large" in text
    finish(experiment, workdir)
    assert results(workdir) == results(whole)
