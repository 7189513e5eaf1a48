"""Sites that own their data: who holds what, what each is measured on, and a run of them."""

import csv
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

import matu_jax
from matu_jax import doctor, export, prepare, train
from matu_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    LocalConfig,
    SimulationConfig,
)
from matu_jax.data import SPLITS
from matu_jax.models import Model, metrics
from matu_jax.runs.saved import read_slot, sums_of
from matu_jax.simulation.federation import dealt_out, measured

SITES = {  # by task and split, whose the examples are
    "up": {"train": "aabbb", "validation": "ab", "test": "aab"},
    "down": {"train": "bccc", "validation": "bc", "test": "ccc"},
}
CONFIG = SimulationConfig(
    rounds=2,
    data=DataConfig(clients=3),
    local=LocalConfig(steps=3, batch_examples=2, learning_rate=0.05),
    evaluation=EvaluationConfig(batch_examples=2),
)


def outputs(params, frozen, batch, task, key=None):
    return params["slope"] * batch["x"]


def loss(params, frozen, batch, task, key=None):
    return jnp.square(outputs(params, frozen, batch, task) - batch["y"]).mean()


ERROR = metrics.mean_squared_error(lambda found, batch: (found, batch["y"]))
MODEL = Model({"slope": jnp.zeros(1)}, {}, loss, outputs, {"error": ERROR})


def task(name, slope):
    rng = np.random.default_rng(len(name))
    splits = []
    for part in SPLITS:
        x = rng.normal(size=len(SITES[name][part])).astype(np.float32)
        splits.append({"x": x, "y": slope * x})
    return matu_jax.Task(name, *splits, sites=SITES[name])


TASKS = [task("up", 1.0), task("down", -2.0)]


def test_a_slot_without_examples_is_not_measured():
    """Whatever a metric makes of sums of nothing, such as 0 / max(0, 1)."""

    def sums(outputs, batch):
        error = jnp.abs(outputs - batch["y"])
        return {"error": error, "all": jnp.ones_like(error)}

    mean = metrics.Metric(sums, lambda sums: sums["error"] / max(sums["all"], 1), False)
    model = dataclasses.replace(MODEL, metrics={"error": mean})
    record = list(matu_jax.simulate(TASKS, model, CONFIG))[-1].record["error"]
    assert np.isnan(record["test_per_slot"][2])  # of "down", b has none to test on
    assert np.isfinite(np.delete(record["test_per_slot"], 2)).all()
    assert record["test_per_task"]["down"] == record["test_per_slot"][3]


def test_a_site_is_a_client_that_holds_what_it_has():
    federation = dealt_out(CONFIG, TASKS)
    assert federation.sites == ("a", "b", "c")
    assert federation.slots.client.tolist() == [0, 1, 1, 2]
    assert federation.slots.task.tolist() == [0, 0, 1, 1]
    assert [rows.tolist() for rows in federation.indices] == [[0, 1], [2, 3, 4], [0], [1, 2, 3]]
    assert federation.slots.weight.tolist() == [2, 3, 1, 3]
    splits, which = measured(federation, "test")
    assert which.tolist() == [0, 1, 2, 3]
    assert [len(split["x"]) for split in splits] == [2, 1, 0, 3]


def test_slots_are_measured_on_their_sites_own_examples():
    *_, last = matu_jax.simulate(TASKS, MODEL, CONFIG)
    found, slopes = last.record["error"], last.vectors["slope"]
    expected = []
    for row, (name, site) in enumerate([("up", "a"), ("up", "b"), ("down", "b"), ("down", "c")]):
        split = TASKS[name == "down"].test
        own = np.array(list(SITES[name]["test"])) == site
        errors = np.square(slopes[row] * split["x"][own] - split["y"][own])
        expected.append(errors.mean() if own.any() else np.nan)
    np.testing.assert_allclose(found["test_per_slot"], expected, rtol=1e-5)
    assert np.isnan(expected[2])  # a site without test examples of its own
    by_site = found["test_per_site"]
    assert list(by_site) == ["a", "b", "c"]
    np.testing.assert_allclose(list(by_site.values()), [expected[0], expected[1], expected[3]])
    np.testing.assert_allclose(found["test_per_task"]["up"], np.mean(expected[:2]), rtol=1e-5)
    np.testing.assert_allclose(found["test_per_task"]["down"], expected[3], rtol=1e-5)


def renamed(**sites):
    """The tasks, whose sites have other names."""
    return [
        dataclasses.replace(
            one, sites={part: [sites[site] for site in held] for part, held in one.sites.items()}
        )
        for one in TASKS
    ]


@pytest.mark.parametrize(
    ("clients", "words"),
    [
        (2, r"and 'nroth' \(4 to train on\) look like one site: correct .* data has it\.$"),
        (
            12,
            r"'north' \(2 to train on\) and 'nroth' .* has it, or set config\.data\.clients = 3\.",
        ),
    ],
)
def test_a_misspelled_site_is_not_taken_for_one_more(clients, words):
    config = dataclasses.replace(CONFIG, data=DataConfig(clients=clients))
    with pytest.raises(ValueError, match=words):
        dealt_out(config, renamed(a="north", b="nroth", c="south"))


@pytest.mark.parametrize(
    ("tasks", "data", "words"),
    [
        (TASKS, {"clients": 12}, r"clients: found 12, but .* 3 sites \(a, b, c\).*clients = 3"),
        (TASKS, {"examples_per_slot": 1}, "examples_per_slot: found 1, which is about dealing out"),
        (TASKS, {"dirichlet_alpha": 0.5}, "dirichlet_alpha: found 0.5"),
        (TASKS, {"assignment": ((0,), (1,), (0,))}, "assignment: found"),
        ([TASKS[0], dataclasses.replace(TASKS[1], sites={})], {}, "task 'down': has no sites"),
        (
            [dataclasses.replace(TASKS[0], sites=SITES["up"] | {"test": ["a", "b", "z"]})],
            {},
            "task 'up': site 'z' has examples in 'test' and none in 'train'",
        ),
    ],
)
def test_what_does_not_fit_sites_is_refused(tasks, data, words):
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, **data))
    with pytest.raises(ValueError, match=words):
        dealt_out(config, tasks)


def test_every_example_has_a_site():
    with pytest.raises(ValueError, match="sites: found 1 for the split 'validation', expected 2"):
        dataclasses.replace(TASKS[0], sites=SITES["up"] | {"validation": "a"})


def test_a_run_of_before_there_were_sites_is_read():
    kept = json.loads(json.dumps(dataclasses.asdict(Config())))
    for name in ("sites", "manifest"):
        del kept["data"][name]
    assert Config.from_json(kept) == Config()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"sites": "a", "manifest": "b"},
            "config.data.sites = 'a', config.data.manifest = 'b': fo",
        ),
        ({"folders": "a", "sites": "b"}, "more than one place of data"),
        ({"manifest": "a", "source": "synthetic"}, "more than one place of data"),
    ],
)
def test_places_of_data_exclude_each_other(data, words):
    with pytest.raises(ValueError, match=words):
        Config(data=DataConfig(**data)).check()


@pytest.fixture
def folders(tmp_path):
    """Two sites with squares and discs, one of them also with dark and light."""
    rng = np.random.default_rng(0)
    table = []
    for site, tasks in (("north", ("shape",)), ("south", ("shape", "light"))):
        for name in tasks:
            for split, count in (("train", 24), ("val", 6), ("test", 8)):
                for i in range(count):
                    label = i % 2
                    pixels = rng.integers(0, 60, (32, 32, 3), np.uint8)
                    if name == "light":
                        pixels += np.uint8(120 * label)
                    elif label:
                        pixels[8:24, 8:24] += np.uint8(150)
                    file = tmp_path / "images" / site / name / split / ("no", "yes")[label]
                    file.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(file / f"{i}.png")
                    path = (file / f"{i}.png").relative_to(tmp_path)
                    table.append((path, ("no", "yes")[label], site, name, split))
    with (tmp_path / "m.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("path", "label", "site", "task", "split"), *table])
    return tmp_path


def test_sites_train_resume_and_are_exported(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MATU_JAX_CACHE", str(tmp_path / "cache"))
    checkpoint = tiny.write_checkpoint(tmp_path / "tiny.safetensors")
    file = tmp_path / "experiment.py"
    file.write_text(
        "from matu_jax.config import *\n"
        "def get_config():\n"
        "    return Config(rounds=3, data=DataConfig(clients=2), evaluation="
        "EvaluationConfig(batch_examples=4), local=LocalConfig(steps=20, learning_rate=0.01),\n"
        f"        model=ModelConfig(checkpoint={str(checkpoint)!r}, head='trained'))\n"
    )
    words = [f"--config={file}", f"--config.data.sites={folders / 'images'}"]
    assert prepare.main(["prepare", *words]) == 0
    assert "nothing to prepare" in capsys.readouterr().out
    assert doctor.main(["doctor", *words]) == 0
    run, again, table = (tmp_path / name for name in ("run", "again", "table"))
    assert train.main(["train", *words, f"--workdir={run}"]) == 0
    printed = capsys.readouterr().out
    assert "site north" in printed
    assert "site south" in printed
    summary = json.loads((run / "summary.json").read_text())["accuracy"]
    assert list(summary["per_site"]) == ["north", "south"]
    assert summary["per_task"]["light"] > 0.8
    slots = summary["per_slot"]
    np.testing.assert_allclose(summary["per_site"]["north"], slots[0])
    np.testing.assert_allclose(summary["per_site"]["south"], np.mean(slots[1:]))

    # The same by a manifest, and in two parts.
    words[1] = f"--config.data.manifest={folders / 'm.csv'}"
    assert train.main(["train", *words, f"--workdir={table}"]) == 0
    assert json.loads((table / "summary.json").read_text())["accuracy"] == summary
    assert train.main(["train", *words, f"--workdir={again}"]) == 0
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoints" / "3")
    assert train.main(["train", *words, f"--workdir={again}"]) == 0
    assert "Going on after round 2" in capsys.readouterr().out
    assert json.loads((again / "summary.json").read_text())["accuracy"] == summary

    slot = read_slot(run, "shape", 1)
    splits, own = slot.measured_on("test")
    assert [len(split.labels) for split in splits] == [8, 8, 8]
    params = jax.tree.map(lambda a, b: np.asarray(a + b), slot.model.base, slot.vector)
    sums = sums_of(slot.config, slot.model, slot.model.metrics, splits, own, slot.task, params)
    found = slot.model.metrics["accuracy"].value(sums["accuracy"])
    assert found == slot.recorded["accuracy"]["test"] == slots[own]
    options = ["--format=safetensors", f"--out={tmp_path / 'out'}"]
    assert export.main(["export", f"--workdir={run}", "--task=shape", *options]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "of 8 of 8 test examples" in card
    assert "| sites | 2 (north, south), each a client with its own data; this is the model" in card
    by_site = [f"{site} {100 * value:.1f} %" for site, value in summary["per_site"].items()]
    assert f"| test accuracy at each site | {', '.join(by_site)}: of its own models" in card
    assert "tasks of each" not in card
    assert f"| data | folder of sites {folders / 'images'}; fingerprint " in card
    best = slots_best(run)
    name = ("client 0 (site north)", "client 1 (site south)")[best]
    said = " ".join(capsys.readouterr().out.split())
    assert f"task shape, {name}, after round" in said
    assert f"C{name[1:]}: of 2 that hold the task, the best on validation. Round" in said
    assert f"{('north', 'south')[best]} (client {best}), of 2 that hold the task, the best" in card
    options[1] = f"--out={tmp_path / 'of a table'}"
    words = ["export", f"--workdir={table}", "--task=shape", *options]
    assert export.main([*words, "--client=nroth"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "--client nroth: does not hold task shape; those that do: client 0 (site north), " in said
    )
    other = ("south", "north")[best]
    assert export.main([*words, f"--client={other}"]) == 0
    card = (tmp_path / "of a table" / "README.md").read_text()
    assert f"this is the model of {other} (client {1 - best}), as asked for |" in card
    assert f"| data | manifest {folders / 'm.csv'}; fingerprint " in card


def slots_best(run):
    """Of the first task's two slots, the one that was best on validation in the run's round."""
    chosen = json.loads((run / "summary.json").read_text())["selected_round"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (record,) = (record for record in records if record["round"] == chosen)
    slots = json.loads((run / "summary.json").read_text())["slots"]
    names = list(record["accuracy"]["test_per_task"])
    rows = [i for i, task in enumerate(slots["task"]) if names[task] == "shape"]
    values = [record["accuracy"]["validation_per_slot"][row] for row in rows]
    return int(np.argmax(values))
