"""The program as its user meets it: mistakes, results, kill -9 and resume."""

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from dp_accounting import dp_event
from dp_accounting.rdp import rdp_privacy_accountant as rdp

from matu_jax import train
from matu_jax.config import Config, PrivacyConfig
from matu_jax.data import Split
from matu_jax.runs.results import _privacy
from matu_jax.runs.workdir import opened
from matu_jax.simulation import federation, rounds
from matu_jax.simulation.federation import load_tasks

EXPERIMENT = """
from matu_jax.config import Config, DataConfig, EvaluationConfig, LocalConfig, ModelConfig


def get_config():
    return Config(
        rounds=4,
        data=DataConfig(
            tasks="hue/grating,ground/grating,hue/plaid", clients=3, examples_per_slot=16
        ),
        local=LocalConfig(steps=2, batch_examples=4),
        model=ModelConfig(checkpoint="{checkpoint}", lora_rank=2, lora_targets=("query",)),
        evaluation=EvaluationConfig(every_rounds=2),
    )
"""


@pytest.fixture
def experiment(tmp_path):
    file = tmp_path / "tiny.py"
    checkpoint = tiny.write_checkpoint(tmp_path / "tiny.safetensors")
    file.write_text(EXPERIMENT.format(checkpoint=checkpoint))
    return f"--config={file}"


def test_profile_traces_a_round_and_the_summary_says_the_algorithms_own_share(experiment, tmp_path):
    words = ["train", experiment, "--config.rounds=2", f"--workdir={tmp_path / 'run'}"]
    assert train.main([*words, "--profile"]) == 0
    (trace,) = (tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert {"PjitFunction(train)", "PjitFunction(taken)"} <= names
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    own = [summary["seconds"][x] for x in ("client_unify", "server_aggregation", "server_download")]
    assert summary["overhead"]["seconds"] == pytest.approx(sum(own))
    running = summary["seconds"]["total"] - summary["seconds"]["compile"]
    assert summary["overhead"]["share"] == pytest.approx(sum(own) / running)


def test_the_summary_says_what_privacy_was_bought_and_who_lied(experiment, tmp_path):
    words = {
        "rounds": 3,
        "clients_per_round": 2,
        "privacy.clip_norm": 1.0,
        "privacy.noise_multiplier": 2.0,
        "privacy.delta": 1e-4,
        "attack.kind": "sign_flip",
        "attack.share": 0.5,
    }
    options = [f"--config.{name}={value}" for name, value in words.items()]
    assert train.main(["train", experiment, *options, f"--workdir={tmp_path / 'run'}"]) == 0
    summary, records = results(tmp_path / "run")
    present = [client for record in records for client in record["clients"]]
    releases = max(present.count(client) for client in range(3))
    assert summary["privacy"]["releases"] == releases
    assert summary["privacy"]["delta"] == 1e-4
    assert summary["privacy"]["private"] is True
    assert "operating system" in summary["privacy"]["noise"]
    # dp-accounting itself, for so many Gaussian mechanisms without sampling.
    accountant = rdp.RdpAccountant()
    accountant.compose(dp_event.GaussianDpEvent(2.0), releases)
    assert summary["privacy"]["epsilon"] <= accountant.get_epsilon(1e-4) * (1 + 1e-6)
    assert summary["privacy"]["epsilon"] > 0.5 * accountant.get_epsilon(1e-4)

    config = dataclasses.replace(Config(), privacy=PrivacyConfig(1.0, 2.0, 1e-4, seed=5))
    said = _privacy(config, records)
    assert (said["private"], said["epsilon"], said["delta"]) == (False, None, None)
    assert said["noise"] == "from config.privacy.seed = 5: not private"

    client, task = (np.array(summary["slots"][key]) for key in ("client", "task"))
    liars = summary["liars"]["clients"]
    assert liars
    shares = [float(np.isin(client[task == t], liars).mean()) for t in range(3)]
    assert list(summary["liars"]["share_of_holders"].values()) == shares
    assert max(shares) <= 0.5


def mistake(capsys, *arguments):
    code = train.main(["train", *arguments])
    out, err = capsys.readouterr()
    assert code == 2, out
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.roudns=3", 'Did you mean "rounds"'),
        ("--config.local.stpes=3", 'Did you mean "steps"'),
        ("--config.rounds=many", "config.rounds"),
        ("--config.rounds=2.5", "config.rounds"),
        ("--config.local.learning_rate=-1", "config.local.learning_rate: found -1.0"),
        ("--config.algorithm=mattu", 'Did you mean "matu"'),
        ("--config.matu.transfer=lots", "config.matu.transfer: found 'lots'"),
        ("--config.matu.uploads=vector", "'shrinkage' needs uploads = 'change'"),
        (
            "--config.algorithm=fedper",
            "config.fedper.personal_blocks: found 1, but the model has 1",
        ),
        ("--config.data.tasks=hue/gratng", "hue/grating"),
        ("--config.data.clients=1", "config.data (clients"),
        ("--config.data.assignment=(0,)", "config.data.assignment: client 0: found 0"),
        ("--config.seed=99999999999999999999", "config.seed"),
        ("--config.model.checkpoint=/nowhere/x", "/nowhere/x cannot be read"),
        ("--wrkdir=x", "wrkdir"),
        ("stray", "stray"),
    ],
)
def test_a_mistake_is_one_message(capsys, experiment, tmp_path, argument, words):
    arguments = [experiment, argument]
    text = mistake(capsys, *arguments, f"--workdir={tmp_path / 'run'}")
    assert words in text
    assert len(text.strip().splitlines()) == 1


def test_missing_config_and_missing_file_are_mistakes(capsys, tmp_path):
    assert "--config is missing" in mistake(capsys)
    assert "No such file" in mistake(capsys, f"--config={tmp_path / 'none.py'}")


def test_an_experiment_that_does_not_run_says_where(capsys, tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("def get_config():\n    return nonsense\n")
    assert "nonsense" in mistake(capsys, f"--config={file}")
    file.write_text("def get_config(:\n")
    assert "broken.py" in mistake(capsys, f"--config={file}")


def test_workdirs_that_cannot_serve_are_refused(capsys, experiment, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in mistake(capsys, experiment, f"--workdir={tmp_path}/file/run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    assert "not empty" in mistake(capsys, experiment, f"--workdir={tmp_path}/other")


def test_a_workdir_of_another_config_is_refused_with_the_differences(capsys, experiment, tmp_path):
    config, *_ = train.parse(["train", experiment])
    with opened(tmp_path / "run", config):
        pass
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    text = mistake(capsys, experiment, "--config.rounds=9", f"--workdir={tmp_path}/run")
    assert "config.rounds: there 4, here 9" in text


def program(experiment, workdir, extra=(), **popen):
    return subprocess.Popen(
        [sys.executable, "-m", "matu_jax.train", experiment, f"--workdir={workdir}", *extra],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(train.__file__).parents[1],
        **popen,
    )


def results(workdir):
    """Everything that a run has found: its summary and its rounds, less how long it took."""
    summary = json.loads((workdir / "summary.json").read_text())
    for what in ("seconds", "overhead", "date", "commit", "metrics"):  # whose hash has the seconds
        del summary[what]
    del summary["config"]["checkpoint"]
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return summary, records


def test_kill_in_the_middle_and_run_again_equals_uninterrupted(experiment, tmp_path):
    whole = program(experiment, tmp_path / "whole")
    text, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, text
    for word in ("devices", "uplink", "memory", "hue/grating", "mean"):
        assert word in text

    workdir = tmp_path / "killed"
    killed = program(experiment, workdir)
    deadline = time.monotonic() + 240
    while not any((workdir / "checkpoints").glob("*/checksums.json")):
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (workdir / "summary.json").exists()

    again = program(experiment, workdir)
    text, _ = again.communicate(timeout=300)
    assert again.returncode == 0, text
    assert "Going on after round" in text
    assert results(workdir) == results(tmp_path / "whole")
    lines = [json.loads(x)["round"] for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4]
    for picture in ("accuracy.png", "similarity.png"):
        assert (workdir / picture).stat().st_size > 5000

    finished = program(experiment, workdir)
    text, _ = finished.communicate(timeout=120)
    assert finished.returncode == 0
    assert "finished" in text


def test_a_first_run_that_failed_leaves_its_workdir_free(capsys, experiment, tmp_path):
    workdir = f"--workdir={tmp_path}/run"
    assert "config.data" in mistake(capsys, experiment, "--config.data.clients=1", workdir)
    assert train.main(["train", experiment, "--config.rounds=1", workdir]) == 0


def test_ctrl_c_says_how_to_go_on(capsys, experiment, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "run", interrupted)
    assert train.main(["train", experiment, f"--workdir={tmp_path}/run"]) == 130
    assert "goes on" in capsys.readouterr().err


def test_a_run_whose_checkpoints_are_all_damaged_is_a_mistake(capsys, experiment, tmp_path):
    workdir = tmp_path / "run"
    assert train.main(["train", experiment, "--config.rounds=1", f"--workdir={workdir}"]) == 0
    (workdir / "summary.json").unlink()
    for file in (workdir / "checkpoints").rglob("*"):
        if file.is_file() and file.name != "checksums.json":
            file.write_bytes(b"damaged")
    text = mistake(capsys, experiment, "--config.rounds=1", f"--workdir={workdir}")
    assert "checkpoint" in text


def test_summary_has_what_it_promises(experiment, tmp_path):
    code = train.main(["train", experiment, "--config.rounds=1", f"--workdir={tmp_path}/run"])
    assert code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["algorithm"] == "matu"
    assert set(summary["accuracy"]["per_task"]) == {"hue/grating", "ground/grating", "hue/plaid"}
    bits = summary["communication"]
    assert bits["uplink_bits_per_client_round"] * 3 == bits["uplink_bits_total"]
    assert 0 <= summary["similarity"]["auc"] <= 1
    assert "definition" in summary["similarity"]
    for phase in ("local_training", "client_unify", "server_aggregation", "evaluation", "compile"):
        assert summary["seconds"][phase] >= 0
    assert summary["config"]["rounds"] == 1
    assert summary["versions"]["jax"]
    assert len(summary["data_fingerprint"]["hue/plaid"]["test"]) == 64


def test_a_run_whose_data_has_changed_is_not_gone_on_with(
    experiment, tmp_path, monkeypatch, capsys
):
    words = ["train", experiment, "--config.rounds=1", f"--workdir={tmp_path / 'run'}"]
    assert train.main(words) == 0
    (tmp_path / "run" / "summary.json").unlink()
    load = load_tasks

    def changed(config):
        first, *rest = load(config)
        images = first.test.images.copy()
        images[0, 0, 0, 0] ^= 1
        return (dataclasses.replace(first, test=Split(images, first.test.labels)), *rest)

    monkeypatch.setattr(federation, "load_tasks", changed)
    assert train.main(words) == 2
    said = capsys.readouterr().err
    assert "divides it otherwise: task 'hue/grating'. Bring it back" in " ".join(said.split())
    monkeypatch.undo()
    assert train.main(words) == 0
