"""A run's directory after damage: what is missing, changed or of another kind is said."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import tiny
from test_train import EXPERIMENT, mistake

from matu_jax import train
from matu_jax.config import Config
from matu_jax.errors import UserError
from matu_jax.runs import figures
from matu_jax.runs.workdir import LOCK, check, disk_errors, is_locked, opened


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


def test_a_run_killed_while_it_writes_its_first_file_goes_on(tmp_path, monkeypatch):
    """What a kill leaves is a copy of the folder, made while the file is written."""
    config, replace, left = Config(), os.replace, []

    def kill(source, target):
        for size in (0, 9, None):  # empty, half written, whole
            left.append(tmp_path / f"left {len(left)}")
            shutil.copytree(Path(source).parent, left[-1])
            if size is not None:
                os.truncate(left[-1] / Path(source).name, size)
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", kill)
        with opened(tmp_path / "run", config):
            pass
    assert len(left) == 3
    for folder in left:
        assert not (folder / "config.json").exists()
        with opened(folder, config):
            assert sorted(path.name for path in folder.iterdir()) == [LOCK, "config.json"]
    # What looks like it, and is none of this program's, stays.
    for name in ("config.json.7.tmp", ".config.json.tmp", "notes"):
        other = tmp_path / name
        other.mkdir()
        (other / name).touch()
        with pytest.raises(UserError, match="holds no run of this program"), opened(other, config):
            pass
        assert [path.name for path in other.iterdir()] == [name]


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


def test_what_a_kill_leaves_of_a_file_is_removed_and_the_run_starts(experiment, tmp_path):
    config, *_ = train.parse(["train", experiment])
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.8988.tmp").write_text('{"rou')
    with opened(tmp_path, config):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "config.json"}
    (tmp_path / ".summary.json.12.tmp").touch()  # of a kill later on
    with opened(tmp_path, config):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "config.json"}


@pytest.mark.parametrize("name", [".config.json.tmp", "notes.12.tmp", ".bashrc"])
def test_files_that_are_not_a_runs_own_stay_and_keep_it_out(experiment, tmp_path, name):
    config, *_ = train.parse(["train", experiment])
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="not empty"), opened(tmp_path, config):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_models_folder_is_no_workdir_and_keeps_its_config(experiment, tmp_path):
    config, *_ = train.parse(["train", experiment])
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"its config\.json is another's"), opened(tmp_path, config):
        pass
    assert (tmp_path / "config.json").read_text() == '{"model_type": "vit"}'


def loop(path):
    path.symlink_to(path.name)


def dangling(path):
    path.symlink_to("/nonexistent/file")


@pytest.mark.parametrize("kind", [loop, dangling, os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_what_is_no_file_is_not_waited_for(capsys, experiment, three_rounds, tmp_path, name, kind):
    workdir, words, _ = copied(three_rounds, tmp_path)
    (workdir / name).rename(tmp_path / name)
    kind(workdir / name)
    assert str(workdir / name) in mistake(capsys, experiment, *words)
    (workdir / name).rename(tmp_path / "away")
    if name == "metrics.jsonl":
        (tmp_path / name).rename(workdir / name)
    assert train.main(["train", experiment, *words]) == 0
    assert json.loads((workdir / "config.json").read_text())["rounds"] == 3


@pytest.mark.parametrize("kind", [loop, dangling, os.mkfifo])
def test_pictures_replace_links_and_pipes(tmp_path, kind):
    file = tmp_path / "similarity.png"
    kind(file)
    figures.plot_similarity([[1, 0.5], [0.5, 1]], ["a", "b"], ["x", "x"], file, title="")
    assert not file.is_symlink()
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", [loop, dangling])
def test_outputs_that_are_links_to_nowhere_are_one_message(tmp_path, kind):
    kind(tmp_path / "report.html")
    with pytest.raises(UserError, match=r"report\.html: .*Move it away"), disk_errors(tmp_path):
        (tmp_path / "report.html").write_text("")


@pytest.mark.parametrize("kind", [loop, dangling, os.mkdir])
def test_a_lock_that_is_no_file_is_to_be_moved_away(experiment, tmp_path, kind):
    config, *_ = train.parse(["train", experiment])
    kind(tmp_path / LOCK)
    with pytest.raises(UserError, match=r"\.lock: .*Move it away"), opened(tmp_path, config):
        pass
    with pytest.raises(OSError, match=r"\.lock"):
        is_locked(tmp_path)
    (tmp_path / LOCK).rename(tmp_path.with_name(f"{tmp_path.name}.away"))
    with opened(tmp_path, config):
        pass


def test_a_lost_config_is_that_of_the_checkpoints_or_the_results(
    experiment, three_rounds, tmp_path
):
    workdir, words, results = copied(three_rounds, tmp_path)
    config, *_ = train.parse(["train", experiment, *words])
    other, *_ = train.parse(["train", experiment, *words, "--config.seed=5"])
    whole = (workdir / "config.json").read_bytes()
    for summary in (False, True):
        (workdir / "config.json").unlink()
        if summary:
            (workdir / "summary.json").write_text(json.dumps(results))
            shutil.rmtree(workdir / "checkpoints")
        with (
            pytest.raises(UserError, match=r"config\.seed: there 0, here 5"),
            opened(workdir, other),
        ):
            pass
        assert not (workdir / "config.json").exists()
        with opened(workdir, config):
            assert (workdir / "config.json").read_bytes() == whole


def test_a_lost_config_that_nothing_holds_is_said_to_be_missing(experiment, three_rounds, tmp_path):
    workdir, words, _ = copied(three_rounds, tmp_path)
    config, *_ = train.parse(["train", experiment, *words])
    (workdir / "config.json").unlink()
    for folder in (workdir / "checkpoints").iterdir():
        for file in folder.rglob("*"):
            if file.is_file() and file.name != "checksums.json":
                file.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint can be read"):
        check(workdir, config)
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(UserError, match=r"its config\.json is missing"):
        check(workdir, config)
    (workdir / "checkpoints").mkdir()  # none was saved yet
    check(workdir, config)
