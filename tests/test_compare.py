"""The comparison program: its plan, the search with equal effort, what it gathers, and resuming."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from records import a_round
from scipy import stats

from matu_jax import compare
from matu_jax.comparison import plan, report
from matu_jax.comparison.collect import collect
from matu_jax.comparison.tables import result_notes
from matu_jax.comparison.tuning import Tried, search
from matu_jax.comparison.whole import with_finished
from matu_jax.config import Config, LocalConfig
from matu_jax.runs.commandline import Source, read_words
from matu_jax.simulation.measures import ACCURACY, Measure

FILE = """
from matu_jax.comparison.plan import Comparison, Setting
from matu_jax.config import Config, DataConfig, LocalConfig, ModelConfig


def get_config():
    experiment = Config(
        rounds=2,
        data=DataConfig(
            tasks="hue/grating,ground/grating,hue/plaid", clients=3, examples_per_slot=16
        ),
        local=LocalConfig(steps=2, batch_examples=4),
        model=ModelConfig(checkpoint="{checkpoint}", lora_rank=2, lora_targets=("query",)),
    )
    return Comparison(
        title="A small one",
        experiment=experiment,
        settings={{
            "pairs": Setting("Two tasks each.", {{}}, seconds=60),
            "one": Setting("One task each.", {{"data.tasks_per_client": 1}}, seconds=30),
        }},
        arms={{"matu": {{}}, "per_task": {{"algorithm": "per_task"}}}},
        seeds=(0, 1),
        search={{"local.learning_rate": (3e-3, 1e-2)}},
        own_search={{"matu": {{"matu.magnitude": ("max", "mean")}}}},
        trials=3,
        {more}
    )
"""


@pytest.fixture
def write(tmp_path):
    def write(more=""):
        file = tmp_path / "small.py"
        checkpoint = tiny.write_checkpoint(tmp_path / "tiny.safetensors")
        file.write_text(FILE.format(checkpoint=checkpoint, more=more))
        return file

    return write


def mistake(capsys, *arguments):
    code = compare.main(["compare", *arguments])
    err = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("options", [[], ["--tune"]])
def test_what_a_later_arm_lacks_is_said_before_the_first_run(
    write, capsys, monkeypatch, tmp_path, options
):
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "dp_accounting" else known(name, *rest),
    )
    file = write('tuned="tuned.json",' if options else "")
    private = '{"privacy.clip_norm": 1.0, "privacy.noise_multiplier": 1.0}'
    file.write_text(file.read_text().replace('{"algorithm": "per_task"}', private))
    text = mistake(capsys, f"--config={file}", f"--workdir={tmp_path / 'runs'}", *options)
    assert "pairs / per_task: config.privacy: not installed" in text
    assert "dp_accounting" in text
    assert "pip install 'matu_jax[privacy]'" in text
    assert not (tmp_path / "runs").exists()


def comparison(**changes):
    return dataclasses.replace(
        plan.Comparison(
            "t",
            Config(),
            {"a": plan.Setting("A.", {"rounds": 3}), "b": plan.Setting("B.", {})},
            {"matu": {}, "per_task": {"algorithm": "per_task", "rounds": 5}},
        ),
        **changes,
    )


def test_fields_of_arm_and_seed_win():
    config = plan.run_config(comparison(), plan.Run("a", "per_task", 7), {"local.steps": 4})
    assert (config.algorithm, config.rounds, config.local.steps) == ("per_task", 5, 4)
    assert (config.seed, config.data.seed) == (7, 7)
    assert plan.run_config(comparison(), plan.Run("a", "matu", 0)).rounds == 3
    assert comparison().experiment.rounds == Config().rounds  # never changed in place


def test_runs_are_ordered_so_that_a_part_is_a_comparison():
    order = [(r.setting, r.seed, r.arm) for r in plan.runs(comparison(seeds=(4, 2)))]
    assert order[:4] == [
        ("a", 4, "matu"),
        ("a", 4, "per_task"),
        ("a", 2, "matu"),
        ("a", 2, "per_task"),
    ]
    assert len(order) == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ours": "mattu"}, r"ours: found 'mattu', no such arm. Did you mean \"matu\""),
        ({"reference": "best"}, "reference: found 'best', no such arm"),
        ({"seeds": ()}, "seeds: found none"),
        ({"arms": {"matu": {"local.stpes": 1}, "per_task": {}}}, 'Did you mean "steps"'),
        ({"arms": {"matu": {"rounds": 2.5}, "per_task": {}}}, "config.rounds: found 2.5"),
        ({"arms": {"matu": {"rounds": 0}, "per_task": {}}}, "config.rounds: found 0"),
        ({"arms": {"matu": {}, "per_task": {}, "per task": {}}}, "has the same folder"),
        (
            {"arms": {"matu": {}, "per_task": {}, "é" * 101: {}}},
            "name has 202 bytes, expected 200 at most",
        ),
        (
            {"settings": {"a" * 201: plan.Setting("A.", {})}},
            "settings: 'a+': its folder's name has 201 bytes",
        ),
        (
            {"settings": {"a": plan.Setting("A.", {"data.seed": 4})}},
            r"settings\['a'\]: found 'data.seed', and each of `seeds` is both",
        ),
        (
            {"arms": {"matu": {}, "per_task": {"seed": 0}}},
            r"arms\['per_task'\]: found 'seed', and each of `seeds` is both",
        ),
        (
            {"tuned": "tuned.json", "search": {"rounds": (1, 2)}},
            r"arms\['per_task'\]: found 'rounds', which is searched as well",
        ),
        (
            {"tuned": "tuned.json", "own_search": {"per_task": {"rounds": (1, 2)}}},
            r"arms\['per_task'\]: found 'rounds', which is searched as well",
        ),
        ({"tuning_seed": 1}, "tuning_seed: found 1, which is one of seeds"),
        ({"tuning_setting": "c"}, "tuning_setting: found 'c'"),
        ({"own_search": {"fedprox": {}}}, "own_search: found 'fedprox', no such arm"),
        ({"seeds": 2}, "seeds:\n  value: found 2: Input should"),
        ({"arms": ["matu"]}, r"arms:\n  value: found \['matu'\]: Input should be a valid dict"),
        ({"settings": {"a": {}}}, "settings:\n  a: found {}: Input should be an instance of Sett"),
        ({"settings": {"a": plan.Setting("A.", None)}}, r"settings\['a'\].fields:\n  value: found"),  # pyright: ignore[reportArgumentType]
        ({"search": {"rounds": 3}}, "search:\n  rounds: found 3: "),
        (
            {"settings": {"a": plan.Setting("A.", {}, arms=("mattu",))}},
            r"settings\['a'\].arms: found 'mattu', no such arm. Did you mean \"matu\"",
        ),
    ],
)
def test_a_wrong_comparison_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        plan.check(plan.overridden(comparison(**changes), {}))


@pytest.mark.parametrize("field", ["seed", "data.seed"])
def test_a_seed_on_the_command_line_is_refused(field, write, capsys):
    said = mistake(capsys, f"--config={write()}", f"--config.{field}=3")
    assert f"--config.{field}: each of `seeds` is both `seed` and `data.seed`" in said
    assert "Give --seeds in its place" in said


def test_what_is_searched_for_another_arm_can_be_fixed():
    plan.check(comparison(tuned="tuned.json", own_search={"matu": {"rounds": (1, 2)}}))


def test_names_of_200_bytes_are_taken():
    plan.check(comparison(arms={"matu": {}, "per_task": {}, "é" * 100: {}}))


def test_an_arm_may_have_the_value_that_its_search_starts_from():
    arms = {"matu": {"rounds": 4}, "per_task": {"algorithm": "per_task"}}
    made = {"arms": arms, "tuned": "tuned.json", "own_search": {"matu": {"rounds": (4, 2)}}}
    plan.check(comparison(**made))
    with pytest.raises(ValueError, match="or make it the first value there"):
        plan.check(comparison(**made | {"own_search": {"matu": {"rounds": (2, 4)}}}))


def test_lists_are_as_good_as_tuples():
    plan.check(comparison(seeds=[4, 2], search={"rounds": [1, 2]}))


def test_a_setting_can_have_arms_of_its_own(tmp_path):
    own = {"a": plan.Setting("A.", {}, arms=("matu",)), "b": plan.Setting("B.", {})}
    made = comparison(settings=own, seeds=(3,), tuning_setting="a")
    plan.check(made)
    order = [(run.setting, run.arm) for run in plan.runs(made)]
    assert order == [("a", "matu"), ("b", "matu"), ("b", "per_task")]
    for run in plan.runs(made):
        fake_run(run.folder(tmp_path), 0.5)
    found = collect(made, tmp_path, Source(Path("small.py")), tuning=None)["settings"]
    assert [[arm["label"] for arm in setting["arms"]] for setting in found] == [
        ["matu"],
        ["matu", "per_task"],
    ]
    assert not any(setting["missing"] for setting in found)

    some = plan.part(made, arms="per_task")
    plan.check(some)
    assert [(run.setting, run.arm) for run in plan.runs(some)] == [("b", "per_task")]
    assert some.tuning_setting == ""


def test_names_with_commas_can_be_chosen():
    arms = {"matu": {}, "matu, int8": {}, "a, b, c": {}, "c": {}, "d,e": {}, "f, ": {}, ",": {}}
    whole = dataclasses.replace(comparison(), arms=arms)
    for text, expected in (
        ("matu, int8", ["matu, int8"]),
        ("matu, matu, int8,c", ["matu", "matu, int8", "c"]),
        ("a,b,c", ["a, b, c"]),
        ("d,e", ["d,e"]),
        ("matu, d,e,c", ["matu", "c", "d,e"]),
        ("c, d , e", ["c", "d,e"]),
        ("f, ", ["f, "]),
        (",", [","]),
    ):
        assert list(plan.part(whole, arms=text).arms) == expected
    with pytest.raises(ValueError, match="--arms: found 'int8'"):
        plan.part(whole, arms="matu, c, int8")


def test_a_part_keeps_what_it_is_measured_by():
    some = plan.part(comparison(), arms="matu", seeds="5", settings="b")
    assert (list(some.arms), some.seeds, list(some.settings)) == (["matu"], (5,), ["b"])
    assert some.reference == "matu"
    with pytest.raises(ValueError, match="--arms: found 'mat'"):
        plan.part(comparison(), arms="mat")
    with pytest.raises(ValueError, match="--seeds: found 'x'"):
        plan.part(comparison(), seeds="x")


def tried(measure, by=ACCURACY):
    def trial(fields):
        value = measure(fields)
        return Tried(value, by.rank(value))

    return trial


def test_a_search_goes_down_where_lower_is_better():
    perplexity = Measure("perplexity", higher_is_better=False)
    best, trials = search({"rate": (1.0,)}, 3, tried(lambda fields: fields["rate"], perplexity))
    assert best == {"fields": {"rate": 0.5}, "validation": 0.5}
    assert len(trials) == 3


def test_search_spends_the_same_on_everyone_and_finds_the_best():
    def measure(fields):
        return -abs(math.log(fields["rate"] / 0.02)) - (fields.get("mu", 2) - 2) ** 2

    for fields in ({"rate": (0.003, 0.001, 0.01)}, {"rate": (0.003, 0.001, 0.01), "mu": (1, 2)}):
        best, trials = search(fields, 6, tried(measure))
        assert len(trials) == 6
        assert len({tuple(t["fields"].items()) for t in trials}) == 6
        assert best["fields"]["rate"] == pytest.approx(0.02)
        assert best == max(trials, key=lambda t: t["validation"])
        assert best["fields"].get("mu", 2) == 2


def test_search_survives_a_run_that_diverges():
    diverges = tried(lambda fields: math.nan if fields["rate"] == 1 else 0.3)
    best, _ = search({"rate": (1.0, 0.1)}, 2, diverges)
    assert best["fields"] == {"rate": 0.1}


def test_search_with_one_value_looks_around_it():
    best, trials = search({"rate": (1.0,)}, 3, tried(lambda fields: fields["rate"]))
    assert best["fields"] == {"rate": 2.0}
    assert [t["fields"]["rate"] for t in trials] == [1.0, 2.0, 0.5]


def fake_run(folder: Path, accuracy, *, bits=8.0, rounds=(0.2, 0.4)):
    folder.mkdir(parents=True)
    per_task = {"x": accuracy, "y": accuracy + 0.1}
    summary = {
        "algorithm": "matu",
        "seed": 0,
        "rounds": 2,
        "selected_round": 2,
        "label_spaces": ["hue", "tilt"],
        "config": {"data": {"clients": 3}},
        "accuracy": {"mean": accuracy + 0.05, "validation_mean": 0.5, "per_task": per_task},
        "communication": {
            "uplink_bits_per_client_round": bits,
            "downlink_bits_per_client_round": bits,
            "downlink_bits_total": 2 * bits,
        },
        "seconds": {"total": 3.0, "local_training": 2.0},
        "server": {"kept_bytes": 12, "kept_per_client": False},
        "similarity": None,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [
        json.dumps(a_round(i + 1, accuracy=a_round(0)["accuracy"] | {"test_mean": value}))
        for i, value in enumerate(rounds)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_a_number_that_was_changed_after_the_run_is_in_no_comparison(tmp_path):
    made = comparison(settings={"a": plan.Setting("A.", {})}, seeds=(0,))
    folder = plan.Run("a", "matu", 0).folder(tmp_path)
    fake_run(folder, 0.5)
    lines = (folder / "metrics.jsonl").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    summary["metrics"] = hashlib.sha256(lines.encode()).hexdigest()
    (folder / "summary.json").write_text(json.dumps(summary))
    assert collect(made, tmp_path, Source(Path("small.py")), tuning=None)["settings"][0]["arms"]
    (folder / "metrics.jsonl").write_text(lines.replace('"loss": ', '"loss": 1', 1))
    with pytest.raises(ValueError, match=r"was changed later\. Bring the file back"):
        collect(made, tmp_path, Source(Path("small.py")), tuning=None)


def changed(folder: Path, change):
    summary = json.loads((folder / "summary.json").read_text())
    change(summary)
    (folder / "summary.json").write_text(json.dumps(summary))


def test_of_a_seed_that_diverged_no_mean_is_made(tmp_path):
    """The other seeds would flatter the arm: in its means, its tasks, metrics and its test."""
    made = comparison(settings={"a": plan.Setting("A.", {})}, seeds=(0, 1))
    for run in plan.runs(made):
        fake_run(run.folder(tmp_path), 0.5)

    def diverges(summary):
        summary["accuracy"] |= {"mean": None, "validation_mean": None}
        summary["accuracy"]["per_task"]["y"] = None

    also = {"name": "error", "higher_is_better": False, "percent": False}
    for arm, seed, value in (("matu", 0, None), ("matu", 1, 0.2), ("per_task", 0, 0.3)):
        folder = plan.Run("a", arm, seed).folder(tmp_path)
        changed(folder, lambda s, v=value: s.update(also=[also], error={"mean": v}))
    folder = plan.Run("a", "per_task", 1).folder(tmp_path)
    changed(folder, lambda s: s.update(also=[also], error={"mean": 0.4}))
    changed(plan.Run("a", "matu", 0).folder(tmp_path), diverges)
    (setting,) = collect(made, tmp_path, Source(Path("small.py")), tuning=None)["settings"]
    matu, per_task = setting["arms"]
    assert matu["diverged"] == [0]
    assert matu["accuracy"]["per_seed"] == [None, pytest.approx(0.55)]
    assert matu["accuracy"]["mean"] is matu["accuracy"]["validation_mean"] is None
    assert matu["accuracy"]["per_task"]["y"] == {"mean": None, "std": None}
    assert matu["accuracy"]["per_task"]["x"]["mean"] == pytest.approx(0.5)
    assert matu["also"][0]["mean"] is None
    assert per_task["also"][0]["mean"] == pytest.approx(0.35)
    assert per_task["diverged"] == []
    assert per_task["against_ours"] is None
    said = str(list(result_notes(setting["arms"], "matu", "per_task", 2)))
    assert "matu diverged with seed 0: outputs were no longer finite numbers." in said


def test_runs_of_different_data_are_not_compared(tmp_path):
    """With one seed in one setting; seeds may draw different splits, and settings differ anyway."""
    made = comparison(seeds=(0, 1))
    for run in plan.runs(made):
        fake_run(run.folder(tmp_path), 0.5)
        data = {"x": f"{run.setting} {run.seed}", "y": {"train": "1"}}
        changed(run.folder(tmp_path), lambda s, d=data: s.update(data_fingerprint=d))
    source = Source(Path("small.py"))
    before = plan.Run("b", "matu", 1).folder(tmp_path)
    changed(before, lambda summary: summary.pop("data_fingerprint"))  # of an older version
    assert collect(made, tmp_path, source, tuning=None)["settings"][1]["arms"]
    other = {"x": "b 1", "y": {"train": "2"}}
    changed(before, lambda summary: summary.update(data_fingerprint=other))
    with pytest.raises(ValueError, match="were made of different data") as raised:
        collect(made, tmp_path, source, tuning=None)
    folders = [plan.Run("b", arm, 1).folder(tmp_path) for arm in ("matu", "per_task")]
    assert f"\n  {folders[0]}\nwith others than:\n  {folders[1]}\n" in str(raised.value)
    assert "or give another --workdir" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s["accuracy"].update(per_task={"x": 0.5}),
            "has 3 clients and the tasks x; others have 3 clients and the tasks x, y",
        ),
        (
            lambda s: s["config"]["data"].update(clients=4),
            "has 4 clients and the tasks x, y; others have 3 clients and the tasks x, y",
        ),
    ],
)
def test_arms_of_other_tasks_or_clients_are_not_compared(tmp_path, change, words):
    made = comparison(settings={"a": plan.Setting("A.", {})}, seeds=(0, 1))
    for run in plan.runs(made):
        fake_run(run.folder(tmp_path), 0.5)
    changed(plan.Run("a", "per_task", 1).folder(tmp_path), change)
    with pytest.raises(ValueError, match=r"settings\['a'\]: arm 'per_task', seed 1, ") as raised:
        collect(made, tmp_path, Source(Path("small.py")), tuning=None)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("known", "expected"), [({"x": 0.2, "y": 0.4}, 0.3), ({"x": 0.2}, None), ({}, None)]
)
def test_chance_is_of_all_tasks_or_not_said(known, expected, tmp_path):
    made = comparison(settings={"a": plan.Setting("A.", {})}, seeds=(0,))
    for run in plan.runs(made):
        fake_run(run.folder(tmp_path), 0.5)
        changed(run.folder(tmp_path), lambda summary: summary.update(chance=known))
    (setting,) = collect(made, tmp_path, Source(Path("small.py")), tuning=None)["settings"]
    assert setting["chance"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("metrics.jsonl", b"", "found no round, expected rounds 1 to 2"),
        (
            "metrics.jsonl",
            b'{"round": 1}\n{"round": 1}\n',
            "metrics.jsonl, line 1:\n  loss: missing",
        ),
        ("summary.json", b"{}", "summary.json: damaged:\n  algorithm: missing"),
        ("summary.json", b"\xff", "summary.json: damaged: not UTF-8"),
        ("summary.json", b"[" * 10**5, "summary.json: damaged: nested"),
        ("summary.json", None, "summary.json: Is a directory"),
        ("metrics.jsonl", None, "metrics.jsonl: Is a directory"),
    ],
)
def test_a_damaged_run_is_named_with_what_to_do(tmp_path, file, damage, words):
    made = comparison(settings={"a": plan.Setting("A.", {})}, seeds=(0,))
    folder = plan.Run("a", "matu", 0).folder(tmp_path)
    fake_run(folder, 0.5)
    (folder / file).unlink()
    if damage is None:
        (folder / file).mkdir()
    else:
        (folder / file).write_bytes(damage)
    with pytest.raises(ValueError, match="Bring the file back") as raised:
        collect(made, tmp_path, Source(Path("small.py")), tuning=None)
    assert words in str(raised.value)
    assert f"or remove {folder}: the same command makes that run again" in str(raised.value)


def test_collect_counts_rightly(tmp_path):
    made = comparison(settings={"a": plan.Setting("A.", {})}, seeds=(0, 1, 2))
    values = {"matu": (0.5, 0.6, 0.7), "per_task": (0.4, 0.65, None)}
    for arm, row in values.items():
        for seed, value in enumerate(row):
            if value is not None:
                run = plan.Run("a", arm, seed)
                fake_run(run.folder(tmp_path), value, rounds=(0.1, 0.5 + 0.1 * seed))
    found = collect(made, tmp_path, Source(Path("small.py")), tuning=None)["settings"][0]
    assert found["missing"] == [{"label": "per_task", "seed": 2}]
    matu, per_task = found["arms"]
    np.testing.assert_allclose(matu["accuracy"]["mean"], 0.65)
    np.testing.assert_allclose(matu["accuracy"]["std"], 0.1)
    assert per_task["accuracy"]["per_seed"] == [pytest.approx(0.45), pytest.approx(0.7), None]
    np.testing.assert_allclose(per_task["accuracy"]["per_task"]["y"]["mean"], 0.625)
    assert matu["curve"]["rounds"] == [1, 2]
    np.testing.assert_allclose(matu["curve"]["mean"], [0.1, 0.6])
    # 95 % of 0.45 is reached in round 2 with seed 0; 95 % of 0.7 never with seed 1.
    assert matu["rounds_to_95"] == {"mean": 2.0, "reached": 1, "of": 2}
    differences = [-0.1, -0.1, 0.05, 0.05]
    assert matu["against_ours"] is None
    assert per_task["against_ours"]["pairs"] == 4
    assert per_task["against_ours"]["seeds"] == 2
    assert per_task["against_ours"]["verdict"] == "too few seeds to tell"
    np.testing.assert_allclose(per_task["against_ours"]["difference"], np.mean(differences))
    expected: Any = stats.wilcoxon(
        [0.4 - 0.5, 0.5 - 0.6, 0.65 - 0.6, 0.75 - 0.7], zero_method="zsplit"
    )
    np.testing.assert_allclose(per_task["against_ours"]["p_value"], expected.pvalue)
    # Ranks 3.5, 3.5, 1.5, 1.5 of 10: 3 for, 7 against.
    np.testing.assert_allclose(per_task["against_ours"]["rank_correlation"], -0.4)
    assert found["arms"][0]["commands"][1].endswith(" --settings=a --arms=matu --seeds=1")


def test_what_each_site_reaches_is_collected_and_in_the_report(tmp_path):
    made = comparison(settings={"a": plan.Setting("A.", {})}, seeds=(0, 1))
    for run in plan.runs(made):
        fake_run(run.folder(tmp_path), 0.5)
    source = Source(Path("small.py"))
    assert "at each site" not in report.markdown(collect(made, tmp_path, source, tuning=None))
    for run in plan.runs(made):
        north = 0.5 + 0.1 * run.seed - 0.2 * (run.arm == "matu")
        sites = {"north": north, "south": None, "we_st": 0.9}
        changed(run.folder(tmp_path), lambda s, v=sites: s["accuracy"].update(per_site=v))
    found = collect(made, tmp_path, source, tuning=None)
    matu, _ = found["settings"][0]["arms"]
    reached = matu["accuracy"]["per_site"]
    assert reached["north"]["mean"] == pytest.approx(0.35)
    assert reached["south"] == {"mean": None, "std": None}
    table = report.markdown(found).split("Test accuracy at each site")[1].split("\n\n")[1]
    header, _, *rows = table.splitlines()
    columns = [header, *rows]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in columns]
    at = cells[0].index("matu")
    assert {row[0]: row[at] for row in cells[1:]} == {
        "north": "35.0 ± 7.1 %",
        "south": "–",
        "we_st": "90.0 ± 0.0 %",
    }
    assert {row[0]: row[cells[0].index("per_task")] for row in cells}["north"] == "55.0 ± 7.1 %"


def test_rounds_to_what_a_reference_reaches_that_diverged_are_not_counted(tmp_path):
    made = comparison(settings={"a": plan.Setting("A.", {})}, seeds=(0, 1))
    for run in plan.runs(made):
        fake_run(run.folder(tmp_path), 0.3, rounds=(0.2, 0.6))

    def reached():
        (setting,) = collect(made, tmp_path, Source(Path("small.py")), tuning=None)["settings"]
        return [arm["rounds_to_95"] for arm in setting["arms"]]

    assert reached() == [{"mean": 2.0, "reached": 2, "of": 2}] * 2
    lost = plan.Run("a", made.reference, 1).folder(tmp_path)
    changed(lost, lambda summary: summary["accuracy"].update(mean=None))
    assert reached() == [{"mean": None, "reached": 0, "of": 0}] * 2


def test_a_command_of_a_report_makes_its_run_whatever_the_names_hold(tmp_path):
    setting, arm, own = 'a "b" $HOME', "matu,  $(int8) `c`", "my file's.py"
    made = comparison(settings={setting: plan.Setting("A.", {})}, seeds=(3,), ours=arm)
    made = dataclasses.replace(made, arms={arm: {}, "per_task": {}, "matu": {}})
    fake_run(plan.Run(setting, arm, 3).folder(tmp_path), 0.5)
    source = Source(Path(own), {"local.steps": "1 + 1", "data": "synthetic"})
    (found,) = collect(made, tmp_path, source, tuning=None)["settings"][0]["arms"]
    shell = ["sh", "-c", f"printf '%s\\0' {found['commands'][0]}"]
    words = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split("\0")
    assert words[:3] == ["python", "-m", "matu_jax.compare"]
    given, options = read_words(words[2:-1], "", ["settings", "arms", "seeds"])
    assert given == source
    part = plan.part(made, **options)
    assert list(plan.runs(part)) == [plan.Run(setting, arm, 3)]


def test_the_program_compares_tunes_and_reports(write, tmp_path, capsys):
    file, out = write('tuned="found/tuned.json",'), tmp_path / "out"
    arguments = [f"--config={file}", f"--workdir={out}"]
    assert "--tune" in mistake(capsys, *arguments)  # the search comes first
    assert compare.main(["compare", *arguments, "--tune"]) == 0
    tuned = json.loads((tmp_path / "found" / "tuned.json").read_text())
    assert {len(arm["trials"]) for arm in tuned["arms"].values()} == {3}
    assert tuned["arms"]["per_task"]["fields"] == {"algorithm": "per_task"}
    for arm in tuned["arms"].values():
        best = max(arm["trials"], key=lambda trial: trial["validation"])
        assert arm["chosen"] == best["fields"]
    capsys.readouterr()

    arguments.append("--settings=pairs")
    assert compare.main(["compare", *arguments, "--seeds=0"]) == 0
    text, progress = capsys.readouterr()
    for arm in tuned["arms"]:  # without a terminal, a line a round
        assert f"pairs / {arm} / seed 0: round 2 of 2: loss " in progress
    assert "Runs: 2, done: 0 (settings: 1, arms: 2, seeds: 1)." in text
    assert "What is left takes about 2 min" in text
    found = json.loads((out / "comparison.json").read_text())
    (setting,) = found["settings"]
    for arm in setting["arms"]:
        chosen = tuned["arms"][arm["label"]]["chosen"]
        assert chosen.items() <= arm["overrides"].items()
        folder = plan.Run("pairs", arm["label"], 0).folder(out)
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["config"]["local"]["learning_rate"] == chosen["local.learning_rate"]
        assert arm["accuracy"]["per_seed"] == [summary["accuracy"]["mean"]]
    assert "A small one" in (out / "report.html").read_text()
    assert (out / "report.md").exists()

    assert compare.main(["compare", *arguments, "--seeds=0,1"]) == 0
    text, progress = capsys.readouterr()
    assert "Runs: 4, done: 2 (settings: 1, arms: 2, seeds: 2)." in text
    assert "seed 1: round 1 of 2: " in progress
    assert "seed 0: " not in progress
    found = json.loads((out / "comparison.json").read_text())
    assert found["seeds"] == [0, 1]

    # The command of one row makes the same report again, of all that is there.
    names = ("report.md", "report.html", "comparison.json")
    before = [(out / name).read_bytes() for name in names]
    (row,) = [arm["commands"][1] for arm in found["settings"][0]["arms"] if arm["label"] == "matu"]
    assert compare.main(["compare", *shlex.split(row)[3:]]) == 0
    assert "Runs: 1, done: 1 (settings: 1, arms: 1, seeds: 1)." in capsys.readouterr().out
    assert before == [(out / name).read_bytes() for name in names]

    # Of a run of a config that the comparison no longer has nothing is told.
    changed = [*arguments, "--arms=matu", "--seeds=1", "--config.local.steps=3"]
    assert "pairs/matu/0 holds a run of another config" in mistake(capsys, *changed)


def test_a_report_of_a_part_tells_of_all_that_is_finished(tmp_path):
    arms = {"matu": {}, "per_task": {"algorithm": "per_task"}, "a, b": {}, "c": {}}
    whole = comparison(seeds=(0, 1), arms=arms)
    some = {"settings": "b", "arms": "c", "seeds": "7"}
    part = plan.part(whole, **some)
    source = Source(Path("small.py"), {"rounds": "4"}, {**some, "workdir": "w"})
    assert with_finished(part, whole, source, tmp_path) == (part, source)
    fake_run(plan.Run("b", "c", 7).folder(tmp_path), 0.5)
    assert with_finished(part, whole, source, tmp_path) == (part, source)

    fake_run(plan.Run("b", "per_task", 1).folder(tmp_path), 0.5)
    plan.Run("a", "matu", 0).folder(tmp_path).mkdir(parents=True)  # is not finished
    fake_run(tmp_path / "runs" / "b" / "an arm of before" / "5", 0.5)
    told, told_source = with_finished(part, whole, source, tmp_path)
    assert (list(told.settings), list(told.arms), told.seeds) == (["b"], ["per_task", "c"], (1, 7))
    assert (told.ours, told.reference) == ("per_task", "per_task")
    assert told_source.fields == source.fields
    assert told_source.options == {
        "settings": "b",
        "arms": "per_task,c",
        "seeds": "1,7",
        "workdir": "w",
    }
    (setting,) = collect(told, tmp_path, told_source, tuning=None)["settings"]
    assert [arm["label"] for arm in setting["arms"]] == ["per_task", "c"]
    assert setting["missing"] == [{"label": "per_task", "seed": 7}, {"label": "c", "seed": 1}]

    for run in plan.runs(dataclasses.replace(whole, seeds=(0,))):
        if run.arm != "per_task":
            folder = run.folder(tmp_path)
            folder.rmdir() if folder.exists() else None
            fake_run(folder, 0.5)
    part = plan.part(whole, seeds="0")
    told, told_source = with_finished(part, whole, source, tmp_path)
    assert (list(told.settings), list(told.arms)) == (["a", "b"], list(arms))
    assert (told.ours, told.reference) == ("matu", "per_task")
    assert told_source.options == {"seeds": "0,1,7", "workdir": "w"}


def test_a_mean_over_seeds_that_have_other_metrics_is_refused(tmp_path):
    made = comparison(settings={"a": plan.Setting("A.", {})}, seeds=(0, 1))
    for run in plan.runs(made):
        fake_run(run.folder(tmp_path), 0.5)
    also = {"name": "error", "higher_is_better": False, "percent": False}
    folder = plan.Run("a", "matu", 1).folder(tmp_path)
    changed(folder, lambda s: s.update(also=[also], error={"mean": 0.5}))
    words = "arm 'matu', seed 1, is also measured by error, with another seed by nothing"
    with pytest.raises(ValueError, match=words):
        collect(made, tmp_path, Source(Path("small.py")), tuning=None)


def test_a_killed_comparison_goes_on_where_it_was(write, tmp_path):
    file, out = write(), tmp_path / "out"
    command = [sys.executable, "-m", "matu_jax.compare", f"--config={file}", f"--workdir={out}"]
    command += ["--settings=pairs", "--seeds=0"]
    first = plan.Run("pairs", "matu", 0).folder(out) / "summary.json"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.time() + 240
        while not first.exists() and time.time() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    assert first.exists()
    left = out / f".comparison.json.{process.pid}.tmp"
    left.touch()
    before = first.stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "done: 0 " not in done.stdout
    assert not left.exists()
    assert first.stat().st_mtime_ns == before
    found = json.loads((out / "comparison.json").read_text())
    assert not any(setting["missing"] for setting in found["settings"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arms=mat"], "--arms: found 'mat'."),
        (["--seeds=one"], "--seeds: found 'one'"),
        (["--settings=some"], "--settings: found 'some'"),
        (["--config.roudns=3"], 'Did you mean "rounds"'),
        (["--config.algorithm=mattu"], 'Did you mean "matu"'),
        (["--tune"], "no `tuned`"),
        (["--tune=yes"], "expected no value"),
        (["--seed=1"], 'Did you mean "seeds"'),
    ],
)
def test_mistakes_are_said_in_one_message(write, capsys, arguments, words):
    assert words in mistake(capsys, f"--config={write()}", *arguments)


def test_a_run_that_diverges_is_a_message_with_its_name(write, tmp_path, capsys):
    wild = ["--config.local.optimizer=sgd", "--config.local.learning_rate=1e30"]
    said = mistake(capsys, f"--config={write()}", f"--workdir={tmp_path / 'out'}", *wild)
    assert "training failed in" in said
    assert "/ seed 0: round 1" in said


def test_an_arm_whose_trials_all_diverge_is_named_and_the_others_are_searched(
    write, tmp_path, capsys
):
    file, tuned = write('tuned="tuned.json",'), tmp_path / "tuned.json"
    text = file.read_text().replace('"matu": {}', '"matu": {"algorithm": "untrained"}')
    text = text.replace("(3e-3, 1e-2)", "(1e20, 1e30)").replace("own_search", "own_search={}, #")
    file.write_text(text.replace("trials=3", "trials=2"))
    tuned.write_text('{"arms": {"per_task": {"chosen": {"local.learning_rate": 1.0}}}}')
    said = mistake(capsys, f"--config={file}", f"--workdir={tmp_path / 'out'}", "--tune")
    assert "round 1: training failed in" in said
    assert "no trial of per_task (local.learning_rate=1e+20; local.learning_rate=1e+30)" in said
    assert list(json.loads(tuned.read_text())["arms"]) == ["matu"]
    assert "lacks 'per_task'" in mistake(capsys, f"--config={file}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON: Expecting property name"),
        ("[]", "value: found []"),
        ('{"arms": []}', "arms: found []"),
        ('{"arms": {"matu": {"chosen": 3}}}', "arms.matu.chosen: found 3"),
        ('{"arms": {"matu": {"chosen": {}, "validation": "0.5"}}}', "matu.validation: found '0.5'"),
        ('{"arms": {"matu": {"chosen": {}, "trials": [{}]}}}', "trials.0.fields: missing"),
        (None, "tuned.json: Is a directory"),
    ],
)
def test_a_damaged_search_is_said(write, tmp_path, capsys, text, words):
    file, tuned = write('tuned="tuned.json",'), tmp_path / "tuned.json"
    tuned.mkdir() if text is None else tuned.write_text(text)
    for options, advice in (([], ". Make it with: python -m"), (["--tune"], ". Remove it, and")):
        said = mistake(capsys, f"--config={file}", *options)
        assert words in said
        assert advice in said
    assert text is None or tuned.read_text() == text


def test_a_search_of_before_is_read_by_the_names_of_now(tmp_path):
    trial = {"fields": {"personal_blocks": 2}, "validation": 0.5}
    arm = {"chosen": {"personal_blocks": 2, "local.learning_rate": 0.1}, "trials": [trial]}
    (tmp_path / "tuned.json").write_text(json.dumps({"arms": {"fedper": arm}}))
    made = dataclasses.replace(
        comparison(), tuned="tuned.json", arms={"fedper": {"algorithm": "fedper"}}
    )
    made, _ = plan.with_tuned(made, Source(tmp_path / "mine.py"))
    config = plan.run_config(made, plan.Run("a", "fedper", 0))
    assert (config.fedper.personal_blocks, config.local.learning_rate) == (2, 0.1)


def test_choices_of_an_arm_that_has_changed_since_are_refused(tmp_path):
    made = comparison(
        tuned="tuned.json",
        search={"local.learning_rate": (0.1, 0.2)},
        arms={
            "matu": {"model.lora_targets": ("query", "key"), "local": LocalConfig(steps=3)},
            "per_task": {"algorithm": "per_task"},
            "old": {"algorithm": "fedprox"},
        },
    )
    chosen = {"local.learning_rate": 0.1}
    found = {
        label: {"chosen": chosen, "fields": plan.as_json(fields)}
        for label, fields in made.arms.items()
    }
    found["old"].pop("fields")  # of an older version
    (tmp_path / "tuned.json").write_text(json.dumps({"arms": found}))
    source = Source(tmp_path / "mine.py", {}, {"workdir": "w"})
    tuned, _ = plan.with_tuned(made, source)
    assert tuned.arms["per_task"] == {"algorithm": "per_task"} | chosen

    changed = dataclasses.replace(made, arms={**made.arms, "per_task": {"algorithm": "fedavg"}})
    with pytest.raises(ValueError, match="whose own fields have changed since") as raised:
        plan.with_tuned(changed, source)
    said = str(raised.value)
    was, now = "{'algorithm': 'per_task'}", "{'algorithm': 'fedavg'}"
    assert f"\n  per_task: searched with {was}, has {now}\n" in said
    assert said.endswith("mine.py --workdir=w --arms=per_task --tune")
    with pytest.raises(ValueError, match=r"matu: searched with .*, has none"):
        plan.with_tuned(dataclasses.replace(made, arms={**made.arms, "matu": {}}), source)


@pytest.mark.parametrize("arms", [None, ("matu",), ("matu", "per_task", "a", "b")])
def test_what_makes_a_search_repeats_the_changes_and_searches_what_is_missing(tmp_path, arms):
    made = dataclasses.replace(
        comparison(),
        tuned="tuned.json",
        arms={"matu": {}, "per_task": {}, "a, b": {}, "c": {}},
        search={"local.learning_rate": (0.1, 0.2)},
    )
    with pytest.raises(ValueError, match=r"Bring it back, or give .*`search`, or set tuned = ''"):
        plan.with_tuned(dataclasses.replace(made, search={}), Source(tmp_path / "mine.py"))
    source = Source(
        tmp_path / "my file.py", {"rounds": "2", "algorithm": "x y"}, {"workdir": "a b"}
    )
    if arms is not None:
        found = {"arms": {arm: {"chosen": {}} for arm in arms}}
        (tmp_path / "tuned.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=" with: python") as raised:
        plan.with_tuned(made, source)
    words = shlex.split(str(raised.value).partition(" with: ")[2])
    given, options = read_words(words[2:], "", ["arms", "workdir"], ["tune"])
    assert given == source._replace(options={})
    assert options["workdir"] == "a b"
    assert "tune" in options
    lacking = [label for label in made.arms if label not in (arms or ())]
    chosen = plan.part(made, arms=options["arms"]) if "arms" in options else made
    assert list(chosen.arms) == lacking


def test_a_comparison_of_no_experiment_is_a_mistake(write, capsys):
    file = write()
    file.write_text(file.read_text().replace("experiment=experiment", 'experiment={"rounds": 2}'))
    said = mistake(capsys, f"--config={file}")
    assert "experiment: found dict, expected a matu_jax.config.Config, such as Config(" in said


def test_an_experiment_is_no_comparison(capsys):
    file = Path(compare.__file__).parent.parent / "experiments" / "quickstart.py"
    assert "is run by matu_jax.train" in mistake(capsys, f"--config={file}")
