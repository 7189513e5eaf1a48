"""A run's directory after damage: what is missing, changed or of another kind is said."""

import json
import re
import shutil

import pytest
import tiny
from test_train import EXPERIMENT, mistake

from matu_jax import train


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    checkpoint = tiny.write_checkpoint(folder / "tiny.safetensors")
    (folder / "tiny.py").write_text(EXPERIMENT.format(checkpoint=checkpoint))
    return f"--config={folder / 'tiny.py'}"


@pytest.fixture(scope="module")
def three_rounds(experiment, tmp_path_factory):
    """A workdir of a finished run whose summary is to be made again from its checkpoints."""
    workdir = tmp_path_factory.mktemp("three") / "run"
    words = ("--config.rounds=3", "--config.checkpoint.every_rounds=1")
    assert train.main(["train", experiment, *words, f"--workdir={workdir}"]) == 0
    results = json.loads((workdir / "summary.json").read_text("utf-8"))
    (workdir / "summary.json").unlink()
    return workdir, words, results


def copied(three_rounds, folder):
    workdir, words, results = three_rounds
    shutil.copytree(workdir, folder / "run")
    return folder / "run", (*words, f"--workdir={folder / 'run'}"), results


def edited(change):
    def damage(workdir):
        file = workdir / "metrics.jsonl"
        file.write_bytes(b"".join(change(file.read_bytes().splitlines(keepends=True))))

    return damage


METRICS = {
    "a line is gone": edited(lambda lines: lines[1:]),
    "the last line is gone": edited(lambda lines: lines[:2]),
    "a line is there twice": edited(lambda lines: [lines[0], *lines]),
    "a line is damaged": edited(lambda lines: [b"\0" * 20 + b"\n", *lines[1:]]),
    "a number was changed": edited(
        lambda lines: [lines[0].replace(b'"uplink_bits": ', b'"uplink_bits": 1'), *lines[1:]]
    ),
    "the file is gone": lambda workdir: (workdir / "metrics.jsonl").unlink(),
    "the file is a folder": lambda workdir: (
        (workdir / "metrics.jsonl").unlink(),
        (workdir / "metrics.jsonl").mkdir(),
    ),
}


@pytest.mark.parametrize("damage", METRICS)
def test_totals_of_records_that_are_not_all_there_are_refused(
    capsys, experiment, three_rounds, tmp_path, damage
):
    workdir, words, _ = copied(three_rounds, tmp_path)
    METRICS[damage](workdir)
    text = mistake(capsys, experiment, *words)
    assert str(workdir / "metrics.jsonl") in text
    assert "Bring the file back from a copy" in text
    assert not (workdir / "summary.json").exists()


def test_a_run_goes_on_from_the_round_that_the_message_names(
    capsys, experiment, three_rounds, tmp_path
):
    workdir, words, whole = copied(three_rounds, tmp_path)
    METRICS["the last line is gone"](workdir)
    text = mistake(capsys, experiment, *words)
    assert f"to go on after round 2, remove the newer ones in {workdir}/checkpoints" in text
    shutil.rmtree(workdir / "checkpoints" / "3")
    assert train.main(["train", experiment, *words]) == 0
    progress = capsys.readouterr().err  # without a terminal, a line a round
    assert re.fullmatch(r"round 3 of 3: loss [\d.]+, accuracy [\d.]+ %, [\d.]+ s\n", progress)
    results = json.loads((workdir / "summary.json").read_text("utf-8"))
    assert results["communication"] == whole["communication"]
    assert results["similarity"]["matrix"] == whole["similarity"]["matrix"]


def test_what_another_run_or_kill_left_behind_the_checkpoint_is_dropped(
    experiment, three_rounds, tmp_path
):
    workdir, words, whole = copied(three_rounds, tmp_path)
    with (workdir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"round": 4}\n\xff\n{"round": 5, "lo')
    assert train.main(["train", experiment, *words]) == 0
    results = json.loads((workdir / "summary.json").read_text("utf-8"))
    assert results["communication"] == whole["communication"]
    assert (workdir / "metrics.jsonl").read_bytes().count(b"\n") == 3


@pytest.mark.parametrize(
    "name", ["summary.json", "metrics.jsonl", "config.json", "checkpoints", "accuracy.png", ".lock"]
)
def test_what_is_no_file_or_no_folder_is_named(capsys, experiment, three_rounds, tmp_path, name):
    workdir, words, _ = copied(three_rounds, tmp_path)
    there = workdir / name
    if name == "checkpoints":
        shutil.rmtree(there)
        there.write_text("")
    else:
        there.unlink(missing_ok=True)
        there.mkdir()
    text = mistake(capsys, experiment, *words)
    assert str(there) in text
    assert "Is a directory" in text or "File exists" in text


@pytest.mark.parametrize("text", [b"\xff", b"[" * 10**5, b"{", b"{}", b"[1]", b'{"rounds": NaN}'])
@pytest.mark.parametrize("name", ["summary.json", "config.json"])
def test_damaged_json_in_a_workdir_is_a_mistake(
    capsys, experiment, three_rounds, tmp_path, name, text
):
    workdir, words, _ = copied(three_rounds, tmp_path)
    (workdir / name).write_bytes(text)
    said = mistake(capsys, experiment, *words)
    assert name in said or "holds a run of another config" in said
