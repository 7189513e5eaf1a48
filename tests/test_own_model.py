"""Models that the package has never seen: trained, resumed, compared and exported."""

import json
import math
import os
import re
import shutil
import stat
import textwrap
from dataclasses import replace

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from matu_jax import compare, doctor, export, prepare, train
from matu_jax.config import Config
from matu_jax.data import SOURCES
from matu_jax.errors import UserError
from matu_jax.models import MODELS
from matu_jax.runs import own_model
from matu_jax.runs.saved import read_slot

EQUINOX = """
    import equinox as eqx, jax, jax.numpy as jnp
    from matu_jax.models import Model

    def model(config, tasks, *, seed):
        net = eqx.nn.MLP(4, 1, width_size=8, depth=1, key=jax.random.key(seed))
        arrays, rest = eqx.partition(net, eqx.is_inexact_array)
        leaves, tree = jax.tree.flatten(arrays)

        def outputs(params, frozen, batch, task, key=None):
            arrays = jax.tree.unflatten(tree, [params[str(i)] for i in range(len(leaves))])
            return jax.vmap(eqx.combine(arrays, rest))(batch["x"])[:, 0]

        def loss(params, frozen, batch, task, key=None):
            return jnp.square(outputs(params, frozen, batch, task) - batch["y"]).mean()

        base = {str(i): leaf for i, leaf in enumerate(leaves)}
        return Model(base, {}, loss, outputs, {"r2": R2, "error": ERROR})
"""

LINEN = """
    import jax, jax.numpy as jnp
    from flax import linen as nn
    from matu_jax.models import Model

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Dropout(0.1, deterministic=not train)(nn.tanh(nn.Dense(8)(x)))
            return nn.Dense(1)(x)[:, 0]

    def model(config, tasks, *, seed):
        net = Net()
        variables = net.init(jax.random.key(seed), jnp.zeros((1, 4)))

        def outputs(params, frozen, batch, task, key=None):
            rngs = None if key is None else {"dropout": key}
            return net.apply({"params": params}, batch["x"], train=key is not None, rngs=rngs)

        def loss(params, frozen, batch, task, key=None):
            return jnp.square(outputs(params, frozen, batch, task, key) - batch["y"]).mean()

        metrics = {"error": ERROR, "r2": R2}
        return Model(variables["params"], {}, loss, outputs, metrics, stochastic=True)
"""

TWO_TERMS = """
    import jax, jax.numpy as jnp
    from flax import nnx
    from matu_jax.models.modules import of_nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.encoder, self.decoder = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 4, rngs=rngs)
            self.head = nnx.Linear(3, 1, rngs=rngs)

        def __call__(self, x):
            code = nnx.tanh(self.encoder(x))
            return self.head(code)[:, 0], jnp.square(self.decoder(code) - x).mean(axis=1)

    def model(config, tasks, *, seed):
        return of_nnx(
            Net(nnx.Rngs(seed)),
            nnx.Param,
            outputs=lambda net, batch, task, key: net(batch["x"]),
            loss=lambda out, batch: jnp.square(out[0] - batch["y"]).mean() + 0.1 * out[1].mean(),
            metrics={"r2": metrics.r2(lambda out, batch: (out[0], batch["y"]))},
        )
"""

FILE = """
import numpy as np
from matu_jax.config import Config, DataConfig, LocalConfig, ModelConfig
from matu_jax.data import SOURCES, Task
from matu_jax.models import MODELS, metrics

R2 = metrics.r2(lambda found, batch: (found, batch["y"]))
ERROR = metrics.mean_squared_error(lambda found, batch: (found, batch["y"]))

def tasks(config):
    rng = np.random.default_rng(config.seed)
    def split(task, examples):
        x = rng.normal(size=(examples, 4)).astype(np.float32)
        return {{"x": x, "y": x[:, task] - 0.5 * x[:, 3]}}
    return [
        Task(f"column {{t}}", split(t, 64), split(t, 32), split(t, 32), chance={{"r2": 0.0}})
        for t in range(3)
    ]
{model}
SOURCES["columns"], MODELS["own"] = tasks, model

EXPERIMENT = Config(
    rounds=3,
    data=DataConfig(source="columns", clients=3, tasks_per_client=2),
    model=ModelConfig("own"),
    local=LocalConfig(steps=10, learning_rate=0.03),
)
"""

AS_AN_EXPERIMENT = "\ndef get_config():\n    return EXPERIMENT\n"
AS_A_COMPARISON = """
def get_config():
    from matu_jax.comparison.plan import Comparison, Setting

    return Comparison(
        "Own",
        EXPERIMENT,
        settings={"a": Setting("Three columns.", {})},
        arms={
            "matu": {"algorithm": "matu"},
            "per_task": {"algorithm": "per_task"},
            "untrained": {"algorithm": "untrained", "rounds": 1, "local.steps": 1},
        },
        seeds=(0,),
        search={"local.learning_rate": (0.01, 0.03)},
        trials=2,
        tuned="tuned.json",
    )
"""


@pytest.fixture(params=[EQUINOX, LINEN, TWO_TERMS], ids=["equinox", "linen", "nnx"])
def model(request, monkeypatch):
    for registry, name in ((SOURCES, "columns"), (MODELS, "own")):
        monkeypatch.setitem(registry, name, None)  # gone after the test
    return textwrap.dedent(request.param)


def written(folder, model, how, name="own.py"):
    file = folder / name
    file.write_text(FILE.format(model=model) + how)
    return f"--config={file}"


def what_was_seen(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def loaded_as_the_card_says(out, **names):
    """The names that the code of an exported model's card makes."""
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    exec(code.replace("FOLDER", str(out)), names)
    return names


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_an_own_model_trains_resumes_and_is_exported(model, tmp_path, capsys):
    config = written(tmp_path, model, AS_AN_EXPERIMENT)
    whole, again, out = (tmp_path / name for name in ("whole", "again", "out"))
    assert prepare.main(["prepare", config]) == 0
    assert doctor.main(["doctor", config]) == 0
    assert train.main(["train", config, f"--workdir={whole}"]) == 0
    table = capsys.readouterr().out
    measure = json.loads((whole / "summary.json").read_text())["measure"]
    assert measure["name"] in ("r2", "error")
    assert f"test {measure['name']}" in table
    assert (whole / f"{measure['name']}.png").stat().st_size > 5000
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["r2"]["mean"] > 0.2
    assert summary["chance"] == (
        {f"column {t}": 0.0 for t in range(3)} if measure["name"] == "r2" else {}
    )

    words = ["train", config, f"--workdir={again}"]
    assert train.main([*words, "--config.checkpoint.keep=3"]) == 0
    shutil.rmtree(again / "checkpoints" / "3")
    (again / "summary.json").unlink()
    assert train.main([*words, "--config.checkpoint.keep=3"]) == 0
    assert "Going on after round 2 of 3" in capsys.readouterr().out
    assert what_was_seen(again) == what_was_seen(whole)

    words = ["export", f"--workdir={whole}", "--task=column 1", f"--out={out}", config]
    words = [w for word in words for w in word.split("=", 1)]
    assert export.main(words) == 2
    assert "--format merged: the run is of a model of your own, 'own'" in capsys.readouterr().err
    assert export.main([*words, "--format", "safetensors"]) == 0
    vector, parameters = (
        safetensors.numpy.load_file(out / f"{name}.safetensors")
        for name in ("task_vector", "parameters")
    )
    assert vector.keys() == parameters.keys()
    assert all(np.abs(x).max() > 0 for x in vector.values())
    assert f"| test {measure['name']} |" in (out / "README.md").read_text()
    slot = read_slot(whole, "column 1")
    names = loaded_as_the_card_says(out)
    expected = jax.tree.map(lambda a, b: np.asarray(a + b), slot.model.base, slot.vector)
    assert_same(names["params"], expected)
    if "of_nnx" in model:
        module = MODELS["own"].__globals__["Net"](nnx.Rngs(7))  # pyright: ignore[reportFunctionMemberAccess]
        assert np.abs(module.head.kernel[...] - expected["head"]["kernel"]).max() > 0
        card = (out / "README.md").read_text()
        exec(
            "\n".join(re.findall(r"^#   (.*)", card, re.M)), names | {"nnx": nnx, "module": module}
        )
        assert_same(nnx.to_pure_dict(nnx.state(module, nnx.Param)), expected)


CLASSES = """
import jax.numpy as jnp, numpy as np
from matu_jax.config import Config, DataConfig, LocalConfig, ModelConfig
from matu_jax.data import SOURCES, Task
from matu_jax.models import MODELS, Model, metrics

def tasks(config):
    rng = np.random.default_rng(0)
    def split(examples):
        x = rng.normal(size=(examples, 4)).astype(np.float32)
        return {"x": x, "y": (x[:, 0] + rng.normal(size=examples) > 0).astype(np.int32)}
    return [Task("sign", split(64), split(40), split(40), notes=("y: 0 = no, 1 = yes",))]

def model(config, tasks, *, seed):
    def outputs(params, frozen, batch, task, key=None):
        return batch["x"] @ params["layers"][0]["kernel"] + params["bias"]

    def loss(params, frozen, batch, task, key=None):
        wanted = batch["y"].astype(jnp.float32)
        return jnp.square(outputs(params, frozen, batch, task) - wanted).mean()

    pair = lambda found, batch: ((found > 0.5).astype(jnp.int32), batch["y"])
    base = {"layers": [{"kernel": jnp.zeros(4)}], "bias": jnp.zeros(())}
    measured_by = {"accuracy": metrics.accuracy(pair), "iou": metrics.mean_iou(pair, 2)}
    return Model(base, {}, loss, outputs, measured_by)

SOURCES["columns"], MODELS["own"] = tasks, model

def get_config():
    return Config(
        rounds=1,
        data=DataConfig(source="columns", clients=1, tasks_per_client=1),
        model=ModelConfig("own"),
        local=LocalConfig(steps=20, learning_rate=0.03),
    )
"""


@pytest.fixture
def classes_run(tmp_path, monkeypatch):
    """A workdir and the config's word, of a model of labels measured by accuracy and IoU."""
    for registry, name in ((SOURCES, "columns"), (MODELS, "own")):
        monkeypatch.setitem(registry, name, None)  # gone after the test
    (tmp_path / "own.py").write_text(CLASSES)
    config, run = f"--config={tmp_path / 'own.py'}", tmp_path / "run"
    assert train.main(["train", config, f"--workdir={run}"]) == 0
    return run, config


def test_one_example_may_differ_where_a_metric_counts_examples_and_nowhere_else(
    classes_run, tmp_path
):
    slot = read_slot(classes_run[0], "sign")
    right, iou = (slot.recorded[name]["test"] for name in ("accuracy", "iou"))
    assert 0.6 < right < 0.95
    assert round(40 * right) == pytest.approx(40 * right)
    assert abs(40 * iou - round(40 * iou)) > 0.01

    def written(name, value, out="no"):
        recorded = {**slot.recorded, name: {"test": value}}
        own_model.write(replace(slot, recorded=recorded), "safetensors", tmp_path / out)

    for i, (name, value) in enumerate(
        (("iou", iou), ("accuracy", right), ("accuracy", right + 1 / 40))
    ):
        written(name, value, f"out{i}")
    whole = math.ceil(40 * iou) / 40
    for name, value in (
        ("accuracy", right + 2 / 40),
        ("accuracy", right + 0.5 / 40),
        ("iou", iou + 0.9 / 40),
        ("iou", iou - 1 / 40),
        ("iou", whole),
        ("iou", 1.0),
    ):
        with pytest.raises(UserError, match=f"test {name} is .*but the run recorded"):
            written(name, value)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_exported_files_have_the_permissions_that_others_get(classes_run, tmp_path, umask):
    slot, before = read_slot(classes_run[0], "sign"), os.umask(umask)
    try:
        own_model.write(slot, "safetensors", tmp_path / "out")
    finally:
        os.umask(before)
    modes = {f.name: stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "out").iterdir()}
    names = ("README.md", "parameters.safetensors", "task_vector.safetensors")
    assert modes == dict.fromkeys(names, 0o666 & ~umask)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


def settings_of(card):
    return json.loads(card.split("```json\n")[1].split("```")[0])


def test_the_card_of_an_own_model_says_what_it_is_of(classes_run, tmp_path, capsys):
    run, config = classes_run
    out, summary = tmp_path / "out", json.loads((run / "summary.json").read_text())
    words = [f"--workdir={run}", "--task=sign", "--format=safetensors", f"--out={out}"]
    assert export.main(["export", *words, config]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Client 0: the only one that holds the task. Round 1 of 1: the round with" in said
    card = (out / "README.md").read_text()
    digests = summary["data_fingerprint"]["sign"]
    data = "columns, a source of the experiment's own; fingerprint train " + digests["train"]
    assert f"| data | {data}, validation {digests['validation']}, test " in card
    assert "| about the data | y: 0 = no, 1 = yes |" in card
    assert settings_of(card)["model"] == {"architecture": "own"}
    assert settings_of(card)["local"] == summary["config"]["local"]

    # Of a base with a list in it, paths alone do not tell the tree.
    slot = read_slot(run, "sign")
    params = loaded_as_the_card_says(out, base=slot.model.base)["params"]
    assert_same(params, jax.tree.map(lambda a, b: np.asarray(a + b), slot.model.base, slot.vector))
    assert isinstance(params["layers"], list)
    other = replace(slot.config.model, lora_rank=3)
    slot = replace(slot, config=replace(slot.config, model=other))
    own_model.write(slot, "safetensors", tmp_path / "rank")
    card = (tmp_path / "rank" / "README.md").read_text()
    assert settings_of(card)["model"] == {"architecture": "own", "lora_rank": 3}


@pytest.mark.parametrize(
    ("base", "needed"),
    [
        (np.zeros(3), True),
        ({"a/b": np.zeros(2)}, True),
        ({"a": {0: np.ones(1), 1: np.zeros(2)}}, True),
        ((np.ones(1), {"b": np.zeros(2)}), True),
        ({"a": np.ones(2), "a/b": np.zeros(2)}, True),
        ({"a": {"b": np.ones(1)}, "empty": {}}, True),
        ({"a": {"b": np.ones(1), "c": {"d": np.zeros(2)}}}, False),
    ],
    ids=["array", "slash", "numbers", "tuple", "slash twice", "empty", "names"],
)
def test_a_base_of_any_form_is_made_again_as_the_card_says(base, needed, classes_run, tmp_path):
    slot = read_slot(classes_run[0], "sign")
    base = jax.tree.map(np.float32, base)
    slot = replace(slot, model=replace(slot.model, base=base), vector=base, recorded={})
    own_model.write(slot, "safetensors", tmp_path / "out")
    names = {"base": base} if needed else {}
    params = loaded_as_the_card_says(tmp_path / "out", **names)["params"]
    assert_same(params, jax.tree.map(lambda x: 2 * x, base))


def test_the_card_of_a_table_says_what_its_columns_and_classes_are(tmp_path, monkeypatch, capsys):
    for registry, name in ((SOURCES, "columns"), (MODELS, "own")):
        monkeypatch.setitem(registry, name, None)  # gone after the test
    (tmp_path / "own.py").write_text(CLASSES)
    rng, table = np.random.default_rng(0), tmp_path / "visits.csv"
    rows = [
        [*rng.normal(size=4), rng.choice(("ill", "well")), site]
        for site in ("east", "south")
        for _ in range(60)
    ]
    lines = [["pulse", "age", "height", "weight", "label", "site"], *rows]
    table.write_text("".join(f"{','.join(map(str, line))}\n" for line in lines))
    words = [f"--config={tmp_path / 'own.py'}", "--config.data.source=prepared"]
    words += [f"--config.data.manifest={table}", "--config.data.clients=2"]
    run, out = tmp_path / "run", tmp_path / "out"
    assert train.main(["train", *words, f"--workdir={run}"]) == 0
    task = read_slot(run, "visits").federation.tasks[0]
    words = [f"--workdir={run}", "--task=visits", "--format=safetensors", f"--out={out}"]
    assert export.main(["export", *words, "--client=south"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "task visits, client 1 (site south), after round 1, as safetensors" in said
    assert "Client 1 (site south): as asked for." in said
    card = (out / "README.md").read_text()
    assert f"| data | manifest {table}; fingerprint {task.fingerprint} |" in card
    about = card.split("| about the data |")[1].split("|\n")[0]
    for words in ("pulse, age, height, weight", "ill", "well"):
        assert words in about


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("default_rng(0)", "default_rng(1)", "the data of task 'sign', or how this version"),
        ("jnp.zeros(4)", "jnp.ones(4)", "a model of your own, holds other tensors than when"),
        ('"bias": ', '"more": jnp.zeros(3), "bias": ', "a model of your own, holds other tensors"),
        (', "iou": metrics.mean_iou(pair, 2)', "", "then accuracy, accuracy, iou, now accuracy, a"),
        ("iou(pair, 2)", "iou(pair, 2)._replace(higher_is_better=False)", "then none, now iou"),
        ('"sign", ', '"mark", ', "the order of tasks, or which examples slots or sites hold"),
    ],
    ids=["data", "base", "leaves", "metrics", "better", "held"],
)
def test_an_export_of_what_has_changed_says_what_to_bring_back(
    before, after, words, classes_run, tmp_path, capsys
):
    run, config = classes_run
    assert before in CLASSES
    (tmp_path / "own.py").write_text(CLASSES.replace(before, after))
    given = [f"--workdir={run}", "--format=safetensors", f"--out={tmp_path / 'o'}"]
    name = "mark" if "mark" in after else "sign"
    assert export.main(["export", *given, f"--task={name}", config]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert words in said
    assert "Bring the data, files and code of then back, and give the same command again." in said
    assert f"{run / 'experiment.py'} is a copy of the experiment's file as it was then." in said
    for wrong in ("remove", "esume", "start from round 0", "another folder"):
        assert wrong not in said
    given += ["--task=sign", f"--config={run / 'experiment.py'}"]
    assert export.main(["export", *given]) == 0


def test_own_models_are_compared_by_their_own_metric(model, tmp_path, capsys):
    config, workdir = written(tmp_path, model, AS_A_COMPARISON), tmp_path / "compared"
    assert compare.main(["compare", config, "--tune", f"--workdir={workdir}"]) == 0
    tuned = json.loads((tmp_path / "tuned.json").read_text())
    assert compare.main(["compare", config, f"--workdir={workdir}"]) == 0
    found = json.loads((workdir / "comparison.json").read_text())
    (setting,) = found["settings"]
    name, higher = setting["measure"]["name"], setting["measure"]["higher_is_better"]
    best = max if higher else min
    for arm in tuned["arms"].values():
        values = [trial["validation"] for trial in arm["trials"]]
        assert arm["validation"] == best(values)
    arms = {arm["label"]: arm for arm in setting["arms"]}
    reached = {label: arm[name]["mean"] for label, arm in arms.items()}
    assert best(reached, key=reached.__getitem__) != "untrained"
    sign = 1 if higher else -1
    difference = sign * (reached["untrained"] - reached["matu"])
    assert arms["untrained"]["against_ours"]["difference"] == pytest.approx(difference)
    assert difference < 0
    text = (workdir / "report.md").read_text()
    assert f"| test {name} |" in text
    assert "accuracy" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    start = next(i for i, row in enumerate(rows) if row.startswith("| arm | test"))
    assert "untrained" in rows[start + 4]  # of three, best first
    if name == "error":
        assert "lower is better" in text
        assert "| test r2 |" in text


@pytest.mark.parametrize("options", [[], ["--tune"]])
@pytest.mark.parametrize("model", [EQUINOX], indirect=True, ids=["equinox"])
def test_arms_that_an_own_model_cannot_have_are_named_before_the_first_run(
    model, options, tmp_path, capsys
):
    code = AS_A_COMPARISON.replace('tuned="tuned.json",', 'tuned="tuned.json",' * bool(options))
    for name in ("fedper", "fedrep", "fed_lora_b", "ntk_fedavg"):
        code = code.replace("arms={", f'arms={{"my {name}": {{"algorithm": "{name}"}},')
    config, workdir = written(tmp_path, model, code), tmp_path / "compared"
    assert compare.main(["compare", config, f"--workdir={workdir}", *options]) == 2
    said = " ".join(capsys.readouterr().err.split())
    blocks = "personal_blocks: found 1, but the model has no transformer blocks: none of its arrays"
    assert f"a / my fedper: config.fedper.{blocks}" in said
    assert f"a / my fedrep: config.fedrep.{blocks}" in said
    assert "a / my fed_lora_b: config.algorithm: 'fed_lora_b' shares the B of LoRA" in said
    assert "arrays (0, 1, 2, 3) none has a path that ends with lora_a" in said
    assert "a / matu" not in said
    assert not workdir.exists()


@pytest.mark.parametrize("model", [EQUINOX], indirect=True, ids=["equinox"])
def test_runs_and_trials_of_another_metric_are_not_taken_for_those_of_this_one(
    model, tmp_path, capsys
):
    config, tuned = written(tmp_path, model, AS_A_COMPARISON), tmp_path / "tuned.json"
    words = ["compare", config, f"--workdir={tmp_path / 'w'}", "--arms=matu", "--config.rounds=1"]

    def measured_by(metrics):
        text = FILE.format(model=model) + AS_A_COMPARISON
        text = text.replace(', chance={"r2": 0.0}', "")  # of a metric that may not be there
        (tmp_path / "own.py").write_text(text.replace('{"r2": R2, "error": ERROR}', metrics))

    def refused(*options):
        capsys.readouterr()
        assert compare.main([*words, *options]) == 2
        return " ".join(capsys.readouterr().err.split())

    measured_by('{"r2": R2, "error": ERROR}')
    assert compare.main([*words, "--tune"]) == 0
    assert compare.main(words) == 0
    measured_by('{"r2": R2}')
    assert compare.main([*words, "--tune"]) == 0  # which looks at the main metric alone
    both = "this run was measured by r2 (higher is better), error (lower is better), and its like"
    # Also before a run of this metric, beside which it could not stand.
    for seeds in ("0", "1,0"):
        said = refused(f"--seeds={seeds}")
        assert f"w/runs/a/matu/0: {both} are now by r2 (higher is better), which" in said
    assert not (tmp_path / "w" / "runs" / "a" / "matu" / "1").exists()

    measured_by('{"error": ERROR}')
    before = tuned.read_text()
    was = "this run was measured by r2 (higher is better), and its like are now by error (lower is"
    assert f"w/tuning/matu/local.learning_rate=0.01: {was}" in refused("--tune")
    assert tuned.read_text() == before
    assert "tuned: the fields of 'matu' were chosen by r2, and it is measured by error" in refused()
    shutil.rmtree(tmp_path / "w" / "tuning")
    assert compare.main([*words, "--tune"]) == 0
    assert f"w/runs/a/matu/0: {both} are now by error (lower is better), which" in refused()


@pytest.mark.parametrize("model", [EQUINOX], indirect=True, ids=["equinox"])
def test_a_base_data_or_metrics_that_changed_are_not_gone_on_with(model, tmp_path, capsys):
    config, workdir = written(tmp_path, model, AS_AN_EXPERIMENT), f"--workdir={tmp_path}/run"
    assert train.main(["train", config, workdir, "--config.rounds=1"]) == 0
    (tmp_path / "run" / "summary.json").unlink()
    for change, words in (
        (("(seed)", "(seed + 1)"), "a model of your own, holds other tensors"),
        (("0.5 * x", "0.25 * x"), "the data of this run has changed"),
        (("MODELS, metrics", "MODELS, metrics as m"), "this run was measured by"),
    ):
        text = (FILE.format(model=model) + AS_AN_EXPERIMENT).replace(*change)
        if "as m" in text:  # other names of the same metrics
            text = text.replace("as m", "").replace('"r2": ', '"R²": ').replace("chance=", "notes=")
            text = text.replace('{"R²": 0.0}', "()")
        (tmp_path / "own.py").write_text(text)
        assert train.main(["train", config, workdir, "--config.rounds=1"]) == 2
        assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("MODELS['own'] = lambda *_, **__: 3", "its function in MODELS returned int"),
        ("SOURCES['columns'] = lambda _: []", "returned the tasks none; expected at least one"),
        (
            "SOURCES['columns'] = lambda c: tasks(c) * 2",
            "the tasks column 0, column 1, column 2, co",
        ),
        ("SOURCES['columns'] = lambda c: [3]", "returned int among tasks"),
        ("SOURCES['columns'] = list", "its function in SOURCES: TypeError: 'DataConfig' object is"),
        ("SOURCES['columns'] = lambda c: c.tusks", "in SOURCES: AttributeError: 'DataConfig' obje"),
        ("MODELS['own'] = lambda *_, **__: {}['a']", "its function in MODELS: KeyError: 'a' ("),
        (
            "MODELS['own'] = lambda *a, **k: type(model(*a, **k))({}, *[{}] * 4)",
            "base: found no array",
        ),
        ("SOURCES['prepared'] = SOURCES.pop('columns')", "no such source"),
        ("MODELS['clip'] = model", None),
    ],
)
def test_what_is_entered_wrongly_is_said(code, words, tmp_path, capsys, monkeypatch):
    for registry, name in ((SOURCES, "columns"), (MODELS, "own")):
        monkeypatch.setitem(registry, name, None)
    for registry, name in ((SOURCES, "prepared"), (MODELS, "clip")):
        monkeypatch.delitem(registry, name, raising=False)
    config = written(tmp_path, textwrap.dedent(TWO_TERMS), code + AS_AN_EXPERIMENT)
    more = [] if words else ["--config.model.architecture=clip"]
    words = words or "MODELS['clip']: is the name of an architecture of the package"
    try:
        assert train.main(["train", config, f"--workdir={tmp_path}/run", *more]) == 2
    finally:
        SOURCES.pop("prepared", None)
        MODELS.pop("clip", None)
    assert words in " ".join(capsys.readouterr().err.split())


def test_code_that_changed_is_told(tmp_path, capsys):
    """Configs and data tell runs apart, and code does not."""
    config = written(tmp_path, textwrap.dedent(TWO_TERMS), AS_AN_EXPERIMENT)
    words = ["train", config, f"--workdir={tmp_path}/run", "--config.rounds=1"]
    assert train.main(words) == 0
    assert (tmp_path / "run" / "experiment.py").read_bytes() == (tmp_path / "own.py").read_bytes()
    assert train.main(words) == 0
    assert "has changed since" not in capsys.readouterr().out
    with open(tmp_path / "own.py", "a") as file:
        file.write("# another word\n")
    assert train.main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"own.py has changed since the work in {tmp_path}/run began" in said
    assert "this run is finished" in said


def test_a_file_that_was_mended_before_the_first_round_is_the_one_kept(tmp_path, capsys):
    code = textwrap.dedent(TWO_TERMS)
    config = written(tmp_path, code, AS_AN_EXPERIMENT)
    right = (tmp_path / "own.py").read_text()
    (tmp_path / "own.py").write_text(right + "\nMODELS['own'] = lambda config: 3\n")
    words = ["train", config, f"--workdir={tmp_path}/run", "--config.rounds=1"]
    assert train.main(words) == 2
    assert "expected a function (config, tasks, *, seed)" in capsys.readouterr().err
    (tmp_path / "own.py").write_text(right)
    assert train.main(words) == 0
    assert "has changed since" not in capsys.readouterr().out
    assert (tmp_path / "run" / "experiment.py").read_text() == right


def test_slots_whose_tasks_changed_places_are_not_gone_on_with(tmp_path, capsys):
    """Task vectors go by the tasks' order, which a source of listed files may change."""
    config = written(tmp_path, textwrap.dedent(TWO_TERMS), AS_AN_EXPERIMENT)
    words = ["train", config, f"--workdir={tmp_path}/run", "--config.rounds=1"]
    assert train.main(words) == 0
    (tmp_path / "run" / "summary.json").unlink()
    file = tmp_path / "own.py"
    right = file.read_text()
    file.write_text(right + "\nSOURCES['columns'] = lambda config: tasks(config)[::-1]\n")
    assert train.main(words) == 2
    assert "tasks stand in another order" in " ".join(capsys.readouterr().err.split())
    file.write_text(right + FLIPPED)
    assert train.main(words) == 2
    assert "began lower values were better of " in capsys.readouterr().err


def test_heads_that_a_model_of_ones_own_lacks_are_refused(tmp_path, capsys):
    config = written(tmp_path, textwrap.dedent(TWO_TERMS), AS_AN_EXPERIMENT)
    words = ["train", config, f"--workdir={tmp_path}/run", "--config.model.head=trained"]
    assert train.main(words) == 2
    assert "returned a model without trained heads" in " ".join(capsys.readouterr().err.split())


def test_some_of_a_sources_tasks_can_be_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SOURCES, "columns", None)
    monkeypatch.setitem(MODELS, "own", None)
    config = written(tmp_path, textwrap.dedent(TWO_TERMS), AS_AN_EXPERIMENT)
    words = ["train", config, "--config.rounds=1", "--config.data.tasks"]
    assert (
        train.main([*words[:-1], f"{words[-1]}=column 2, column 0", f"--workdir={tmp_path}/a"]) == 0
    )
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert list(summary["r2"]["per_task"]) == ["column 2", "column 0"]
    assert Config.from_json(summary["config"]).data.tasks == "column 2, column 0"
    assert train.main([*words[:-1], f"{words[-1]}=column 9", f"--workdir={tmp_path}/b"]) == 2
    assert "found 'column 9', no such task of this source" in capsys.readouterr().err


FLIPPED = """
def flipped(*args, **options):
    made = model(*args, **options)
    return dataclasses.replace(
        made,
        metrics={
            name: metric._replace(higher_is_better=not metric.higher_is_better)
            for name, metric in made.metrics.items()
        },
    )

import dataclasses
MODELS["own"] = flipped
"""
BROKEN = """
    import jax.numpy as jnp
    from matu_jax.models import Metric, Model

    def outputs(params, frozen, batch, task, key=None):
        return batch["x"] @ params["w"]

    def loss(params, frozen, batch, task, key=None):
        return jnp.square(outputs(params, frozen, batch, task) - batch["y"]).mean()

    def model(config, tasks, *, seed):
        sums = lambda out, batch: {"all": jnp.abs(out)}
        broken = Metric(sums, lambda sums: VALUE)
        return Model({"w": jnp.zeros(4)}, {}, LOSS, outputs, {"NAME": broken})
"""


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"VALUE": "1 / 0"}, [], "model.metrics['r2'].value: ZeroDivisionError: division by zero"),
        ({"VALUE": "None"}, [], "model.metrics['r2'].value: TypeError"),
        ({"LOSS": "lambda *_: jnp.zeros(2)"}, [], "model.loss: returned float32[2]"),
        ({"NAME": ""}, [], "found the name '', expected 1 to 60 printable"),
        ({}, ["--config.algorithm=ntk_fedavg"], "needs Model(..., linearise=...)"),
    ],
)
def test_what_a_model_does_wrongly_is_one_message(
    changes, options, words, tmp_path, capsys, monkeypatch
):
    for registry, name in ((SOURCES, "columns"), (MODELS, "own")):
        monkeypatch.setitem(registry, name, None)
    code = textwrap.dedent(BROKEN)
    for name, text in {"VALUE": "0.5", "LOSS": "loss", "NAME": "r2", **changes}.items():
        code = code.replace(name, text)
    config = written(tmp_path, code, AS_AN_EXPERIMENT)
    assert train.main(["train", config, f"--workdir={tmp_path}/run", *options]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
