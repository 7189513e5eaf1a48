"""What leaves a run is loaded by torch, transformers and PEFT, and computes what we compute."""

import dataclasses
import io
import json
import os
import re
import shutil
import stat
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_clip
from jax.sharding import AxisType
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from matu_jax import export, models
from matu_jax.algorithms import ALGORITHMS
from matu_jax.config import Config, DataConfig, EvaluationConfig, LocalConfig, ModelConfig
from matu_jax.models import exporting
from matu_jax.models.architectures import ARCHITECTURES
from matu_jax.models.backbone import parameter_shapes
from matu_jax.models.checkpoint_config import checked_architecture
from matu_jax.models.exporting import model_card
from matu_jax.models.pretrained import read_towers
from matu_jax.models.towers import VisionTower
from matu_jax.runs.exported import count_slot, measure
from matu_jax.runs.exported import exported as exported_of
from matu_jax.runs.log import MetricsLog
from matu_jax.runs.model_folder import write
from matu_jax.runs.saved import read_slot
from matu_jax.runs.tables import result_table
from matu_jax.runs.training import train
from matu_jax.runs.workdir import opened
from matu_jax.simulation.evaluate import evaluation_sets
from matu_jax.simulation.federation import federate
from matu_jax.trees import leaf_items

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def tiny_architectures(monkeypatch):
    tiny_clip.register(monkeypatch)


def config_of(architecture, checkpoint, **model):
    model = {"logit_scale": 0.0, "lora_rank": 2, **model}
    return Config(
        rounds=2,
        data=DataConfig(tasks="mnist,svhn,dtd", source="synthetic", clients=3, examples_per_slot=8),
        model=ModelConfig(architecture=architecture, checkpoint=str(checkpoint), **model),
        local=LocalConfig(steps=2, batch_examples=4, learning_rate=0.01),
        evaluation=EvaluationConfig(max_examples=8, every_rounds=2),
    ).check()


def run(workdir, config):
    with opened(workdir, config):
        train(config, "tiny", workdir, QUIET)
    return workdir


def read_run(*words, **options):
    return exported_of(read_slot(*words, **options))


def our_logits(workdir, exported, images):
    """From the exported vector, through the package's own model."""
    config = exported.config
    federation = federate(config)
    model = models.build_classifier(config.model, federation.tasks, seed=config.seed)
    number = [task.name for task in federation.tasks].index(exported.task.name)
    params = exported.params
    if "trained" in model.frozen:
        head = exported.head
        width = model.base["head"]["bias"].shape[0] - len(head["weight"])
        if "bias" not in head:
            head = {"weight": np.zeros_like(head["weight"]), "bias": np.zeros(len(head["weight"]))}
        kernel = np.pad(head["weight"], ((0, width), (0, 0))).T
        bias = np.pad(head["bias"], (0, width)).astype(np.float32)
        params = {"shared": params, "head": {"kernel": kernel, "bias": bias}}
    params = jax.tree.map(jnp.asarray, params)
    logits = model.logits(params, model.frozen, images, jnp.int32(number))
    return np.asarray(logits)[:, : exported.task.num_classes]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def classified(folder, embeds):
    """Zero-shot logits from image embeddings and the exported head, as the card says."""
    head = load_file(folder / "head.safetensors")
    features = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
    return head["logit_scale"] * features @ head["weight"].T


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip.save(tiny_clip.clip_model(), folder)
    tiny_clip.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory, clip_folder):
    with pytest.MonkeyPatch.context() as patch:
        tiny_clip.register(patch)
        targets = ("query", "value", "out", "mlp_in", "mlp_out")
        config = config_of("tiny_clip", clip_folder, lora_targets=targets)
        yield run(tmp_path_factory.mktemp("run"), config)


def as_the_card_says(folder, images, architecture):
    """Logits by executing the code that a card shows."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    code = "".join(blocks).replace("FOLDER", str(folder))
    names: dict[str, Any] = {"pixel_values": tiny_clip.pixel_values(images, architecture)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, names)
    return names["logits"].numpy()


def load(model_class, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model_class.from_pretrained(folder).eval()


def embeds_of(model, images, architecture=tiny_clip.TINY_CLIP):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(tiny_clip.pixel_values(images, architecture)).image_embeds.numpy()


def test_a_peft_adapter_gives_our_logits(tmp_path, clip_run, clip_folder):
    images, out = tiny_clip.images(), tmp_path / "out"
    exported = read_run(clip_run, "svhn")
    write(exported, "peft", out)
    base = load(transformers.CLIPVisionModelWithProjection, clip_folder)
    before = classified(out, embeds_of(base, images))
    card = as_the_card_says(out, images, tiny_clip.TINY_CLIP)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(base, out).eval()
    b = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(b) == 5 * tiny_clip.TINY_CLIP.vision.depth
    assert all(bool(p.abs().max() > 0) for p in b)
    expected = our_logits(clip_run, exported, images)
    close(classified(out, embeds_of(adapted, images)), expected)
    close(card, expected)
    with pytest.raises(AssertionError):
        close(before, expected)


def test_a_merged_clip_checkpoint_gives_our_logits_and_keeps_the_text_tower(
    tmp_path, clip_run, clip_folder
):
    images, out = tiny_clip.images(), tmp_path / "out"
    exported = read_run(clip_run, "dtd")
    write(exported, "merged", out)
    model = load(transformers.CLIPVisionModelWithProjection, out)
    expected = our_logits(clip_run, exported, images)
    close(classified(out, embeds_of(model, images)), expected)
    close(as_the_card_says(out, images, tiny_clip.TINY_CLIP), expected)
    whole, source = load(transformers.CLIPModel, out), load(transformers.CLIPModel, clip_folder)
    for name, parameter in source.text_model.named_parameters():
        assert torch.equal(dict(whole.text_model.named_parameters())[name], parameter), name
    assert torch.equal(whole.logit_scale, source.logit_scale)
    assert (out / "vocab.json").read_bytes() == (clip_folder / "vocab.json").read_bytes()


def test_a_run_on_a_random_tower_and_of_all_parameters_leaves_too(tmp_path):
    config = config_of("tiny_clip", "random", trainable="full")
    workdir, out = run(tmp_path / "run", config), tmp_path / "out"
    exported = read_run(workdir, "mnist")
    write(exported, "merged", out)
    images = tiny_clip.images()
    model = load(transformers.CLIPVisionModelWithProjection, out)
    close(classified(out, embeds_of(model, images)), our_logits(workdir, exported, images))
    with pytest.raises(export.UserError, match="there is no adapter"):
        write(exported, "peft", tmp_path / "other")
    lora = dataclasses.replace(config.model, trainable="lora")
    drawn = dataclasses.replace(exported, config=dataclasses.replace(config, model=lora))
    with pytest.raises(export.UserError, match="drawn at random"):
        write(drawn, "peft", tmp_path / "other")


@pytest.mark.parametrize("kind", ["merged", "peft"])
def test_a_plain_vision_transformer_leaves_with_its_trained_head(tmp_path, kind):
    folder = tmp_path / "vit"
    sizes = tiny_clip.vision_sizes(hidden_act="gelu", layer_norm_eps=1e-12)
    torch_model = tiny_clip.randomised(
        transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=7))
    )
    tiny_clip.save(torch_model, folder)
    architecture = "vit" if kind == "merged" else "tiny_vit"
    config = config_of(architecture, folder, head="trained")
    workdir, out = run(tmp_path / "run", config), tmp_path / "out"
    exported = read_run(workdir, "svhn")
    write(exported, kind, out)
    images = tiny_clip.images()
    pixels = tiny_clip.pixel_values(images, tiny_clip.TINY_VIT)
    expected = our_logits(workdir, exported, images)
    close(as_the_card_says(out, images, tiny_clip.TINY_VIT), expected)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "merged":
            model = load(transformers.ViTForImageClassification, out)
            close(model(pixels).logits.numpy(), expected)
            assert list(model.config.id2label.values()) == list(exported.task.class_names)
        else:
            base = load(transformers.ViTForImageClassification, folder)
            adapted = peft.PeftModel.from_pretrained(base, out).eval()
            b = [p for name, p in adapted.named_parameters() if "lora_B" in name]
            assert b
            assert all(bool(p.abs().max() > 0) for p in b)
            states = adapted(pixels, output_hidden_states=True).hidden_states[-1]
            features = adapted.base_model.model.vit.layernorm(states)[:, 0].numpy()
            head = load_file(out / "head.safetensors")
            close(features @ head["weight"].T + head["bias"], expected)


def test_a_vision_tower_of_any_shape_without_projection_leaves(tmp_path):
    """Its family read from config.json; patches leave a margin; adapters fit its own class."""
    folder, images = tmp_path / "tower", np.tile(tiny_clip.images(), (1, 2, 2, 1))[:, :18, :18]
    sizes = tiny_clip.vision_sizes(hidden_size=24, num_attention_heads=3, image_size=18)
    config = transformers.CLIPVisionConfig(**sizes, hidden_act="relu")
    tiny_clip.save(tiny_clip.randomised(transformers.CLIPVisionModel(config)), folder)
    workdir = run(tmp_path / "run", config_of("clip", folder, head="trained"))
    exported = read_run(workdir, "svhn")
    expected = our_logits(workdir, exported, images)
    for kind in ("merged", "peft"):
        out = tmp_path / kind
        write(exported, kind, out)
        model = load(transformers.CLIPVisionModel, folder if kind == "peft" else out)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "peft":
                model = peft.PeftModel.from_pretrained(model, out).eval()
            features = model(tiny_clip.pixel_values(images, tiny_clip.TINY_CLIP)).pooler_output
        head = load_file(out / "head.safetensors")
        close(features.numpy() @ head["weight"].T + head["bias"], expected)
        close(as_the_card_says(out, images, tiny_clip.TINY_CLIP), expected)
        assert "CLIPVisionModel.from_pretrained" in (out / "README.md").read_text()


def test_the_raw_task_vector_is_tuned_minus_base(tmp_path, clip_run):
    exported, out = read_run(clip_run, "svhn"), tmp_path / "out"
    write(exported, "safetensors", out)
    vector = load_file(out / "task_vector.safetensors")
    config = exported.config
    federation = federate(config)
    base = models.build_classifier(config.model, federation.tasks, seed=config.seed).base
    assert sorted(vector) == sorted(
        f"blocks/{target}/{name}"
        for target in config.model.lora_targets
        for name in ("lora_a", "lora_b")
    )
    for target, pair in base["blocks"].items():
        for name, leaf in pair.items():
            found = np.asarray(leaf) + vector[f"blocks/{target}/{name}"]
            np.testing.assert_array_equal(found, exported.params["blocks"][target][name])


def test_the_card_says_how_it_was_made(tmp_path, clip_run, clip_folder):
    exported, out = read_run(clip_run, "svhn", client=None), tmp_path / "out"
    write(exported, "peft", out)
    card = (out / "README.md").read_text()
    summary = json.loads((clip_run / "summary.json").read_text())
    accuracy = summary["accuracy"]["per_slot"]
    holders = [
        (client, accuracy[i])
        for i, (client, task) in enumerate(
            zip(summary["slots"]["client"], summary["slots"]["task"], strict=True)
        )
        if task == 1
    ]
    assert (exported.client, exported.accuracy) in holders
    assert exported.accuracy is not None
    percent = f"{100 * exported.accuracy:.1f} %"
    examples = f"8 of {len(exported.task.test.labels)} test examples"
    recorded = f"(of these files, in float32; recorded in training: {percent})"
    assert f"{percent} of {examples} {recorded}" in card
    assert "2 of 2: the round with the best mean validation accuracy" in card
    for words in (
        "library_name: peft",
        "shortest side to 16 pixels",
        "matu",
        "LoRA of rank 2",
        str(clip_folder),
    ):
        assert words in card
    assert json.loads(card.split("```json\n")[1].split("```")[0])["rounds"] == 2


def test_what_is_exported_is_what_was_measured(clip_run):
    """Test accuracy of the exported parameters = that of the slot in the run's last record."""
    summary = json.loads((clip_run / "summary.json").read_text())
    config = read_run(clip_run, "svhn").config
    federation = federate(config)
    mesh = jax.make_mesh((1,), ("slots",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    drawn = evaluation_sets(config, federation, mesh)["test"]
    (images, labels), there = drawn.load(0)
    vectors = []
    for slot, (client, number) in enumerate(
        zip(federation.slots.client, federation.slots.task, strict=True)
    ):
        exported = read_run(clip_run, federation.tasks[number].name, int(client))
        logits = our_logits(clip_run, exported, images[number].reshape(-1, *images.shape[3:]))
        targets = labels[number].reshape(-1)
        accuracy = (logits.argmax(1) == targets)[there[number].reshape(-1)].mean()
        assert accuracy == pytest.approx(summary["accuracy"]["per_slot"][slot])
        vectors.append(np.concatenate([x.ravel() for x in jax.tree.leaves(exported.vector)]))
    assert len(np.unique(np.stack(vectors), axis=0)) == len(vectors)  # no two slots alike


def test_every_holder_can_be_asked_for(clip_run):
    config = read_run(clip_run, "svhn").config
    slots = federate(config).slots
    holders = slots.client[slots.task == 1].tolist()
    assert len(holders) == 2
    first, second = (read_run(clip_run, "svhn", client) for client in holders)
    assert [first.client, second.client] == holders
    (other,) = set(range(3)) - set(holders)
    with pytest.raises(export.UserError, match=f"--client {other}: does not hold"):
        read_run(clip_run, "svhn", other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "svnh"}, "svhn"),
        ({"workdir": "nowhere"}, "config.json cannot be read"),
        ({"out": "taken"}, "is there already"),
        ({"client": "9"}, "does not hold"),
        ({"out": "o\udcff"}, "which is no UTF-8"),
    ],
)
def test_mistakes_are_one_message(tmp_path, clip_run, capsys, change, words):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    given = {"workdir": str(clip_run), "task": "svhn", "out": "new", **change}
    if change.get("workdir"):
        given["workdir"] = str(tmp_path / "nowhere")
    given["out"] = str(tmp_path / given["out"])
    argv = [word for name, value in given.items() for word in (f"--{name}", value)]
    assert export.main(["export", *argv]) == 2
    error = capsys.readouterr().err
    assert words in " ".join(error.split())
    assert "Traceback" not in error
    assert not list(tmp_path.glob(".export-*"))


def test_the_program_says_what_it_wrote(tmp_path, clip_run, capsys):
    argv = ["--workdir", str(clip_run), "--task", "svhn", "--out", str(tmp_path / "new")]
    assert export.main(["export", *argv, "--format", "merged"]) == 0
    assert "after round 2, as merged" in " ".join(capsys.readouterr().out.split())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "README.md",
        "config.json",
        "head.safetensors",
        "merges.txt",
        "model.safetensors",
        "vocab.json",
    ]


def test_a_merged_checkpoint_is_as_readable_as_other_files(tmp_path, clip_run, clip_folder):
    exported, before = read_run(clip_run, "svhn"), os.umask(0o022)
    vocabulary = clip_folder / "vocab.json"
    mode = vocabulary.stat().st_mode
    try:
        vocabulary.chmod(0o600)
        write(exported, "merged", tmp_path / "out")
    finally:
        os.umask(before)
        vocabulary.chmod(mode)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()} == {0o644}


def test_the_embedded_model_leaves_as_a_task_vector_only(tmp_path):
    config = Config(
        rounds=1,
        data=DataConfig(tasks="hue/grating,hue/plaid", clients=1, examples_per_slot=8),
        local=LocalConfig(steps=1),
        evaluation=EvaluationConfig(max_examples=4),
    )
    workdir = run(tmp_path / "run", config)
    exported = read_run(workdir, "hue/plaid")
    with pytest.raises(export.UserError, match="--format safetensors"):
        write(exported, "merged", tmp_path / "merged")
    write(exported, "safetensors", tmp_path / "out")
    assert (tmp_path / "out" / "task_vector.safetensors").is_file()


# ------------------------------------------------------------------ what is measured is exported


def embedded_config(tmp_path, algorithm="per_task", **fields: Any):
    config = Config(
        algorithm=algorithm,
        rounds=4,
        data=DataConfig(
            tasks="hue/grating,hue/plaid,tilt/grating", clients=3, examples_per_slot=16
        ),
        model=ModelConfig(checkpoint=tiny.write_checkpoint(tmp_path / "tiny.safetensors")),
        local=LocalConfig(steps=3, learning_rate=0.05),
        evaluation=EvaluationConfig(max_examples=60),
    )
    return config.with_fields(fields).check()


def accuracy_of(exported):
    """Of the exported parameters, by a loop over images: the same examples, another program."""
    task, number = exported.task, exported.number
    order = np.random.default_rng((exported.config.seed, number)).permutation(len(task.test.labels))
    rows = np.sort(order[: exported.config.evaluation.max_examples])
    model = models.build_classifier(
        exported.config.model, exported.tasks, seed=exported.config.seed
    )
    params = exported.params
    if "trained" in model.frozen:
        kernel = np.zeros_like(model.base["head"]["kernel"])
        bias = np.zeros_like(model.base["head"]["bias"])
        kernel[:, : task.num_classes] = exported.head["weight"].T
        bias[: task.num_classes] = exported.head["bias"]
        params = {"shared": params, "head": {"kernel": kernel, "bias": bias}}
    logits = model.logits(params, model.frozen, task.test.images[rows], jnp.int32(number))
    found = np.asarray(logits)[:, : task.num_classes].argmax(axis=1)
    return (found == task.test.labels[rows]).mean()


@pytest.mark.parametrize("algorithm", ["emr_one_shot", "individual", "matfl"])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_the_card_states_the_accuracy_of_what_is_written(tmp_path, algorithm, head):
    fields = {"rounds": 2, "model.head": head}
    workdir = run(tmp_path / "run", embedded_config(tmp_path, algorithm, **fields))
    exported = read_run(workdir, "hue/plaid")
    write(exported, "safetensors", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    expected = accuracy_of(exported)
    assert f"| test accuracy | {100 * expected:.1f} %" in card
    assert expected == pytest.approx(exported.accuracy, abs=1 / 60 + 1e-9)
    written = load_file(tmp_path / "out" / "task_vector.safetensors")
    for path, leaf in leaf_items(exported.vector):
        np.testing.assert_array_equal(written[path], leaf)
    # The card's code runs as it stands, given features.
    code = "".join(re.findall(r"```python\n(.*?)```", card, re.S)).replace(
        "FOLDER", str(tmp_path / "out")
    )
    names: dict[str, Any] = {"features": np.ones((2, exported.head["weight"].shape[1]), np.float32)}
    exec(code, names)
    assert names["logits"].shape == (2, exported.task.num_classes)


def test_a_linearised_model_is_refused_with_the_reason(tmp_path):
    workdir = run(tmp_path / "run", embedded_config(tmp_path, "ntk_fedavg", rounds=1))
    with pytest.raises(export.UserError, match="ntk_fedavg trains the model's first-order"):
        read_run(workdir, "hue/plaid")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """Of a learning rate so high that the last rounds are worse than an earlier one."""
    folder = tmp_path_factory.mktemp("long")
    fields: dict[str, Any] = {
        "rounds": 6,
        "local.learning_rate": 1.0,
        "checkpoint.keep": 1,
        "checkpoint.every_rounds": 4,
    }
    workdir = run(folder / "run", embedded_config(folder, **fields))
    records = MetricsLog(workdir / "metrics.jsonl").records()
    means = [record["accuracy"]["validation_mean"] for record in records]
    best = 1 + int(np.argmax(means))
    assert best < 5, "choose a rate or seed with which it gets worse"
    return workdir, best


def test_table_summary_card_and_checkpoints_speak_of_the_best_round(tmp_path, long_run):
    workdir, best = long_run
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["selected_round"] == best
    assert "best mean validation accuracy" in summary["selection"]
    exported = read_run(workdir, "hue/plaid")
    assert exported.round == best
    row = summary["slots"]["client"].index(exported.client)
    while summary["slots"]["task"][row] != 1:
        row = summary["slots"]["client"].index(exported.client, row + 1)
    assert exported.accuracy == summary["accuracy"]["per_slot"][row]
    write(exported, "safetensors", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{best} of 6: the round with the best mean validation accuracy" in card
    assert accuracy_of(exported) == pytest.approx(exported.accuracy, abs=1 / 60 + 1e-9)
    printed = io.StringIO()
    Console(width=100, file=printed).print(result_table(summary))
    assert f"round {best} of 6" in printed.getvalue()


def test_another_round_can_be_asked_for(tmp_path, long_run, capsys):
    workdir, _ = long_run
    argv = ["--workdir", str(workdir), "--task", "hue/plaid", "--format", "safetensors"]
    out = tmp_path / "out"
    assert export.main(["export", *argv, "--out", str(out), "--round", "6"]) == 0
    card = (out / "README.md").read_text()
    assert "6 of 6: as asked for" in card
    record = MetricsLog(workdir / "metrics.jsonl").records()[-1]["accuracy"]
    percent = re.search(r"recorded in training: ([\d.]+) %", card)
    assert percent
    recorded = {f"{100 * x:.1f}" for x in record["test_per_slot"]}
    assert percent[1] in recorded
    assert export.main(["export", *argv, "--out", str(tmp_path / "no"), "--round", "9"]) == 2
    assert "--round 9: has no checkpoint. There are checkpoints of rounds" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_run_that_did_not_keep_its_best_round_says_so(tmp_path, long_run):
    workdir, best = long_run
    other = tmp_path / "run"
    shutil.copytree(workdir, other)
    shutil.rmtree(other / "checkpoints" / str(best))
    with pytest.raises(export.UserError, match=f"round {best}, .*has no checkpoint") as caught:
        read_run(other, "hue/plaid")
    assert "--round 6" in str(caught.value)
    assert read_run(other, "hue/plaid", round_index=6).round == 6


def test_another_model_than_the_measured_one_is_an_error(tmp_path, long_run):
    workdir, _ = long_run
    exported = read_run(workdir, "hue/plaid")
    rng = np.random.default_rng(0)
    noise = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), exported.params)
    with pytest.raises(export.UserError, match="but the run recorded") as caught:
        write(dataclasses.replace(exported, params=noise), "safetensors", tmp_path / "out")
    assert "of 60 validation examples" in str(caught.value)
    assert not (tmp_path / "out").exists()
    # Of a round that the run did not measure there is nothing to differ from.
    unmeasured = dataclasses.replace(exported, params=noise, recorded={})
    write(unmeasured, "safetensors", tmp_path / "out")
    assert "the run did not measure this round" in (tmp_path / "out" / "README.md").read_text()


def test_one_example_more_or_less_is_an_error(long_run):
    exported = read_run(long_run[0], "hue/plaid")
    measure(exported, "safetensors")
    for split, examples in (("validation", 60), ("test", 60)):
        for change in (-1, 1):
            changed = exported.recorded[split] + change / examples
            recorded = {**exported.recorded, split: changed}
            with pytest.raises(export.UserError, match=f"{split} examples rightly, but"):
                measure(dataclasses.replace(exported, recorded=recorded), "safetensors")


def test_a_few_measured_examples_do_not_hide_another_model(tmp_path):
    fields = {"rounds": 2, "evaluation.max_examples": 7}
    workdir = run(tmp_path / "run", embedded_config(tmp_path, "fedavg", **fields))
    exported = read_run(workdir, "hue/plaid")
    measure(exported, "safetensors")  # the same seven examples as in training
    other = jax.tree.map(np.zeros_like, exported.params)
    with pytest.raises(export.UserError, match="of 7 validation examples rightly"):
        measure(dataclasses.replace(exported, params=other), "safetensors")


def test_another_base_than_the_run_began_with_is_refused(tmp_path):
    config = embedded_config(tmp_path, "fedavg", rounds=1)
    workdir, base = run(tmp_path / "run", config), tmp_path / "tiny.safetensors"
    tensors = load_file(base)
    with safe_open(base, "np") as file:
        metadata = file.metadata()
    name = sorted(tensors)[0]
    save_file(tensors | {name: np.nextafter(tensors[name], np.float32(9))}, base, metadata)
    with pytest.raises(export.UserError, match="other tensors than when this run began"):
        read_run(workdir, "hue/plaid")
    summary = (workdir / "summary.json").read_bytes()
    (workdir / "summary.json").unlink()
    with pytest.raises(export.UserError, match="other tensors than when this run began"):
        run(workdir, config)
    (workdir / "summary.json").write_bytes(summary)
    save_file(dict(reversed(tensors.items())), base, metadata)  # the same, in another order
    assert read_run(workdir, "hue/plaid").round == 1


def test_runs_in_bfloat16_are_compared_in_bfloat16(tmp_path, monkeypatch):
    fields = {"rounds": 1, "model.compute_dtype": "bfloat16"}
    workdir = run(tmp_path / "run", embedded_config(tmp_path, "per_task", **fields))
    exported = read_run(workdir, "hue/plaid")
    assert exported.recorded.keys() == {"validation", "test"}
    asked, real = [], count_slot

    def counted(config, model, splits, *args, rounding):
        asked.append((model.logits is not exported.model.logits, rounding))
        return real(config, model, splits, *args, rounding=rounding)

    monkeypatch.setattr("matu_jax.runs.exported.count_slot", counted)
    measure(exported, "safetensors")
    assert asked == [(True, 2.0**-7), (True, 2.0**-7), (False, 2.0**-10)]


def test_an_experiment_that_registers_its_own_can_be_exported(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(ARCHITECTURES, "tiny_clip")
    file = tmp_path / "mine.py"
    file.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import tiny_clip\n"
        "from matu_jax.models.architectures import ARCHITECTURES\n"
        "from matu_jax.config import Config\n"
        "ARCHITECTURES['mine'] = tiny_clip.TINY_CLIP\n"
        "get_config = Config\n"
    )
    config = config_of("mine", "random", trainable="full")
    with monkeypatch.context() as registered:
        registered.setitem(ARCHITECTURES, "mine", tiny_clip.TINY_CLIP)
        workdir = run(tmp_path / "run", config)
    argv = ["--workdir", str(workdir), "--task", "svhn", "--out", str(tmp_path / "out")]
    assert export.main(["export", *argv]) == 2
    assert "--config" in capsys.readouterr().err
    try:
        assert export.main(["export", *argv, "--config", str(file)]) == 0
    finally:
        ARCHITECTURES.pop("mine", None)


def test_an_experiment_with_an_algorithm_of_its_own_can_be_exported(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ALGORITHMS, "mine", ALGORITHMS["fedavg"])
    workdir = run(tmp_path / "run", embedded_config(tmp_path, "mine", rounds=1))
    monkeypatch.delitem(ALGORITHMS, "mine")
    file = tmp_path / "mine.py"
    file.write_text(
        "from matu_jax.algorithms import ALGORITHMS\n"
        "from matu_jax.config import Config\n"
        "ALGORITHMS['mine'] = ALGORITHMS['fedavg']\n"
        "get_config = Config\n"
    )
    argv = ["--workdir", str(workdir), "--task", "hue/plaid", "--format", "safetensors"]
    argv += ["--out", str(tmp_path / "out")]
    assert export.main(["export", *argv]) == 2
    assert "give that file to --config" in " ".join(capsys.readouterr().err.split())
    assert export.main(["export", *argv, "--config", str(file)]) == 0
    assert "Measuring on 60 validation and 60 test examples" in capsys.readouterr().out


def test_a_file_that_reads_back_otherwise_is_an_error(tmp_path, monkeypatch, long_run):
    exported = read_run(long_run[0], "hue/plaid")
    real = exporting.load_file

    def flipped(file):
        found = real(file)
        next(iter(found.values())).flat[0] += 1
        return found

    monkeypatch.setattr(exporting, "load_file", flipped)
    with pytest.raises(export.UserError, match="reads back otherwise than it was written"):
        write(exported, "safetensors", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_no_dtype_is_left_at_any_depth():
    config = {
        "dtype": "float16",
        "vision_config": {"dtype": "float16", "torch_dtype": "float16", "x": [{"dtype": "bf16"}]},
        "dtype_of_mine": 3,
    }
    assert exporting.without_dtypes(config) == {"vision_config": {"x": [{}]}, "dtype_of_mine": 3}


def test_a_half_precision_clip_comes_back_in_float32(tmp_path):
    first, base, out = (tmp_path / name for name in ("first", "base", "out"))
    tiny_clip.save(tiny_clip.clip_model().half(), first)
    tiny_clip.save(load(transformers.CLIPModel, first), base)  # writes the dtype of every part
    assert json.loads((base / "config.json").read_text())["vision_config"]["dtype"] == "float16"
    found = checked_architecture(base, tiny_clip.TINY_CLIP)
    shapes = parameter_shapes(lambda rngs: VisionTower(found, None, rngs=rngs))
    tower, _, _ = read_towers(base, found, shapes, text=False)
    tower = jax.tree.map(lambda x: x + np.float32(1e-5), tower)
    out.mkdir()
    head = {"weight": np.zeros((2, tiny_clip.TINY_CLIP.projection or 0), np.float32)}
    name = exporting.write_merged(out, tower, found, base, class_names=("a", "b"), head=head)
    for model_class in (getattr(transformers, name), transformers.CLIPModel):
        model = load(model_class, out)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_links_are_named_as_they_were_given(tmp_path, clip_folder):
    link = tmp_path / "my-clip"
    link.symlink_to(clip_folder)
    assert exporting.base_model(str(link)) == (str(link), None)


def test_what_a_card_quotes_keeps_its_form():
    card = model_card(
        "t", {"base_model": "a: [b"}, {"task": "a|b\nc"}, code={"Load it": "load()"}, settings={}
    )
    assert 'base_model: "a: [b"\n' in card
    assert "| task | a\\|b c |\n" in card
    assert "Load it:\n\n```python\nload()\n```\n" in card


def test_results_and_exports_cannot_speak_of_different_rounds(long_run, tmp_path):
    """Whatever was changed, removed or moved since: no other model is written in its place."""
    workdir = tmp_path / "run"

    def refused(harm, words):
        shutil.copytree(long_run[0], workdir, dirs_exist_ok=True)
        harm()
        with pytest.raises(export.UserError, match=words):
            read_run(workdir, "hue/grating")
        shutil.rmtree(workdir)

    log = workdir / "metrics.jsonl"
    refused(log.unlink, r"found no round, expected rounds 1 to \d+\. They say which round")
    refused(
        lambda: log.write_bytes(log.read_bytes().replace(b'"loss": ', b'"loss": 1', 1)),
        r"was changed later\. They say which round",
    )
    told = json.loads((long_run[0] / "summary.json").read_text())
    told["selected_round"] += 1
    refused(
        lambda: (workdir / "summary.json").write_text(json.dumps(told)),
        rf"summary.json speaks of round {told['selected_round']}",
    )
