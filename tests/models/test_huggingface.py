"""Checkpoint folders that are whole, old, in pieces, or wrong in one way each."""

import contextlib
import dataclasses
import http.server
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import ClassVar

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny_clip

from matu_jax import models
from matu_jax.config import ModelConfig
from matu_jax.models import huggingface, tensor_names
from matu_jax.models.architectures import ARCHITECTURES
from matu_jax.models.backbone import parameter_shapes
from matu_jax.models.checkpoint_config import checked_architecture
from matu_jax.models.huggingface import checkpoint_folder
from matu_jax.models.pretrained import read_towers
from matu_jax.models.towers import VisionTower
from matu_jax.trees import leaf_items

TASK = tiny_clip.task()
HUB_NAME = "openai/clip-vit-base-patch32"


@pytest.fixture(autouse=True)
def tiny_architectures(monkeypatch):
    tiny_clip.register(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny_clip.save(tiny_clip.clip_model(), folder)
    tiny_clip.write_tokenizer(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "checkpoint")


def build(folder, tasks=(TASK,), **changes):
    options = {"architecture": "tiny_clip", "checkpoint": str(folder), "logit_scale": 0.0}
    return models.build_classifier(ModelConfig(**{**options, **changes}), list(tasks))


def refusal(folder, tasks=(TASK,), **changes):
    with pytest.raises(ValueError, match=r".") as error:
        build(folder, tasks, **changes)
    return str(error.value)


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_json(file, **changes):
    value = json.loads(file.read_text()) if file.exists() else {}
    for path, new in changes.items():
        *blocks, name = path.split("__")
        block = value
        for key in blocks:
            block = block[key]
        block[name] = new
    file.write_text(json.dumps(value))


def read(folder, *, text=True):
    """All parameters of a checkpoint, without building the model that uses them."""
    architecture = checked_architecture(folder, tiny_clip.TINY_CLIP)
    shapes = parameter_shapes(lambda rngs: VisionTower(architecture, rngs=rngs))
    return read_towers(folder, architecture, shapes, text=text)


def same(first, second):
    for (path, expected), (_, found) in zip(leaf_items(first), leaf_items(second), strict=True):
        np.testing.assert_array_equal(found, expected, err_msg=path)
    return True


def test_missing_and_misshapen_tensors_are_all_listed(folder):
    def change(tensors):
        del tensors["vision_model.encoder.layers.1.mlp.fc1.weight"]
        del tensors["vision_model.post_layernorm.bias"]
        tensors["visual_projection.weight"] = np.zeros((20, 31), np.float32)

    edit_tensors(folder, change)
    message = refusal(folder)
    assert str(folder) in message
    assert "vision_model.encoder.layers.1.mlp.fc1.weight: missing, expected [64, 32]" in message
    assert "vision_model.post_layernorm.bias: missing, expected [32]" in message
    assert "visual_projection.weight: found [20, 31], expected [20, 32]" in message


def test_unknown_tensors_are_listed(folder):
    extra = {"vision_model.encoder.layers.9.mlp.fc1.bias": np.zeros(3, np.float32)}
    edit_tensors(folder, lambda tensors: tensors.update(extra, stranger=np.zeros(3, np.float32)))
    message = refusal(folder)
    assert "stranger" in message
    assert "vision_model.encoder.layers.9.mlp.fc1.bias" in message


def test_text_tensors_count_where_prompts_need_them(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("text_projection.weight"))
    assert "text_projection.weight: missing" in refusal(folder)
    build(folder, head="trained")


def test_a_missing_logit_scale_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("logit_scale"))
    assert "logit_scale is missing" in refusal(folder)


def test_position_ids_of_older_files_are_left_out(whole, folder, caplog):
    name = "vision_model.embeddings.position_ids"
    edit_tensors(folder, lambda tensors: tensors.update({name: np.arange(17)[None]}))
    with caplog.at_level("INFO"):
        assert same(read(whole), read(folder))
    assert name in caplog.text


def test_sharded_files(whole, tmp_path):
    folder = tiny_clip.save(tiny_clip.clip_model(), tmp_path, max_shard_size="20KB")
    tiny_clip.write_tokenizer(folder)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert same(read(whole), read(folder))
    shards[1].unlink()
    assert f"lacks {shards[1].name}" in refusal(folder)
    edit_json(folder / "model.safetensors.index.json", weight_map=None)
    assert "weight_map: found None" in refusal(folder)


def test_a_fingerprint_is_of_tensors_whatever_the_shards(whole, tmp_path):
    folder = tiny_clip.save(tiny_clip.clip_model(), tmp_path, max_shard_size="20KB")
    assert huggingface.fingerprint(folder) == huggingface.fingerprint(whole)
    # What a shard holds besides its index, as older files do, is read over, not refused.
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    more = {"vision_model.embeddings.position_ids": np.arange(17)[None]}
    save_file(load_file(shard) | more, shard, {"format": "pt"})
    assert same(read(whole), read(folder))
    assert huggingface.fingerprint(folder) != huggingface.fingerprint(whole)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_become_float32(dtype, folder):
    full = read(folder)

    def change(tensors):
        tensors.update({name: tensor.astype(dtype) for name, tensor in tensors.items()})

    edit_tensors(folder, change)
    half = read(folder)
    assert all(leaf.dtype == np.float32 for _, leaf in leaf_items(half[:2]))
    assert same(jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), full[:2]), half[:2])
    assert half[2] == pytest.approx(full[2], rel=1e-2)


def test_quantised_files_are_refused(folder):
    name = "vision_model.post_layernorm.bias"
    edit_tensors(folder, lambda tensors: tensors.update({name: np.zeros(32, np.int8)}))
    assert f"tensor {name} is int8" in refusal(folder)


def test_names_with_and_without_the_towers_prefix(tmp_path):
    import transformers

    config = transformers.CLIPVisionConfig(**tiny_clip.vision_sizes())
    tiny_clip.save(tiny_clip.randomised(transformers.CLIPVisionModel(config)), tmp_path)
    new = read(tmp_path, text=False)
    assert "embeddings.class_embedding" in load_file(tmp_path / "model.safetensors")

    def change(tensors):
        for name in list(tensors):
            tensors[f"vision_model.{name}"] = tensors.pop(name)

    edit_tensors(tmp_path, change)
    assert same(new, read(tmp_path, text=False))


def test_wrong_architectures_are_named_field_by_field(folder):
    message = refusal(folder, architecture="clip_vit_b32")
    assert "config.model.architecture clip_vit_b32 does not fit" in message
    for line in (
        "vision.width: clip_vit_b32 has 768, the checkpoint 32",
        "text.heads: clip_vit_b32 has 8, the checkpoint 3",
        "vocabulary: clip_vit_b32 has 49408, the checkpoint 88",
        "projection: clip_vit_b32 has 512, the checkpoint 20",
    ):
        assert line in message
    assert "model_type is 'clip'" in refusal(folder, architecture="vit_b16", head="trained")
    assert 'Did you mean "clip_vit_b32"' in refusal(folder, architecture="clip_vit_b23")
    edit_json(folder / "config.json", vision_config__hidden_act="mish")
    assert "hidden_act: found 'mish': expected one of gelu, " in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "config.json: damaged: not JSON" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"vision_config": [1]}, "vision_config: found [1]"),
        ("config.json", {"vision_config__hidden_size": "32"}, "hidden_size: found '32'"),
        ("config.json", {"vision_config__num_hidden_layers": 0}, "num_hidden_layers: found 0"),
        ("config.json", {"vision_config__patch_size": True}, "patch_size: found True"),
        ("config.json", {"vision_config__image_size": 10**30}, "image_size: found 1000"),
        ("config.json", {"vision_config__layer_norm_eps": "x"}, "layer_norm_eps: found 'x'"),
        ("config.json", {"vision_config__layer_norm_eps": float("nan")}, "layer_norm_eps: found"),
        ("config.json", {"vision_config__hidden_act": ["gelu"]}, "hidden_act: found"),
        ("config.json", {"text_config__eos_token_id": None}, "eos_token_id: found None"),
        ("config.json", {"text_config__eos_token_id": 88}, "eos_token_id: found 88: expected a"),
        ("config.json", {"text_config__eos_token_id": 2**31}, "eos_token_id: found 2147483648"),
        ("config.json", {"text_config__vocab_size": -1}, "vocab_size: found -1"),
        ("config.json", {"model_type": ["clip"]}, "model_type is ['clip']"),
        ("config.json", {"projection_dim": {}}, "projection_dim: found"),
        ("preprocessor_config.json", {"image_mean": ["a", "b", "c"]}, "image_mean.0: found 'a'"),
        ("preprocessor_config.json", {"image_std": [[0.1], 0.2]}, "image_std.0: found"),
        ("preprocessor_config.json", {"resample": [3]}, "resample: found"),
        ("preprocessor_config.json", {"size": {"height": "a"}}, "found 'a'"),
    ],
)
def test_hostile_fields_are_named(folder, file, changes, words):
    edit_json(folder / file, **changes)
    message = refusal(folder)
    assert words in message
    assert str(folder / file) in message


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a\0b", "", ".", "a/../b"])
def test_shards_outside_the_folder_are_refused(folder, name):
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    edit_json(index, weight_map={"logit_scale": name})
    message = refusal(folder)
    assert f"{index}: damaged" in message
    assert "expected the name of a file in the same folder" in message


def test_sizes_that_config_json_leaves_out_are_transformers_defaults(folder):
    edit_json(folder / "config.json", vision_config={}, text_config={})
    message = refusal(folder)
    assert "vision.width: tiny_clip has 32, the checkpoint 768" in message
    assert "patch_size: tiny_clip has 4, the checkpoint 32" in message
    assert "text.width: tiny_clip has 24, the checkpoint 512" in message


def test_other_images_than_the_architectures_are_refused(whole, folder):
    file = folder / "preprocessor_config.json"
    good = {"image_mean": list(tiny_clip.TINY_CLIP.image_mean), "resample": 3}
    edit_json(file, **good, image_std=list(tiny_clip.TINY_CLIP.image_std), size=16)
    assert same(read(whole), read(folder))
    edit_json(file, size={"shortest_edge": 16})
    read(folder)
    edit_json(file, image_mean=[0.5, 0.5, 0.5], size={"height": 32, "width": 32}, resample=2)
    message = refusal(folder)
    assert "size is {'height': 32, 'width': 32}, but config.json's image_size 16" in message
    edit_json(file, size={"height": 16, "width": 16})
    message = refusal(folder)
    assert "image_mean: tiny_clip has (0.48" in message
    assert "resize: tiny_clip has shortest_side, the checkpoint squash" in message
    assert "resample: tiny_clip has bicubic, the checkpoint bilinear" in message
    assert "image_std" not in message


def test_a_file_that_is_cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} cannot be read as safetensors" in refusal(folder)


def test_why_a_tensor_file_cannot_be_read_is_said(tmp_path):
    """The library says of every error that there is no such file, and waits at a pipe."""
    file = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(2, np.float32)}, file)
    found = huggingface.tensor_files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as first:  # the lowest number that is free
        resource.setrlimit(resource.RLIMIT_NOFILE, (first.fileno(), hard))
    try:
        for read in (lambda: huggingface.tensor_files(tmp_path), lambda: read_all(found)):
            with pytest.raises(ValueError, match="Too many open files") as caught:
                read()
            assert "ulimit -n 1024" in str(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    file.unlink()
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": file.name}})
    )
    os.mkfifo(file)
    with pytest.raises(ValueError, match="not a regular file"):
        huggingface.tensor_files(tmp_path)


def read_all(files):
    return huggingface.read_tensors(files, files)


def test_without_tokenizer_files_prompts_are_refused(folder):
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    message = refusal(folder)
    assert "merges.txt" in message
    assert "tokenizer" in message
    build(folder, head="trained")


def test_a_tokenizer_of_another_model_is_refused(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**vocabulary, "extra": len(vocabulary)}))
    assert "has 89 tokens, the text tower 88" in refusal(folder)


def test_prompts_that_cannot_be_made(folder):
    assert "no templates" in refusal(folder, [tiny_clip.task(templates=())])
    assert "no {}" in refusal(folder, [tiny_clip.task(templates=("a photo",))])
    long = tiny_clip.task(classes=("cat", "dog", "x y " * 20))
    assert "tokens, but the text tower takes 48" in refusal(folder, [long])


def test_prompts_end_with_the_token_at_which_features_are_taken(folder):
    for end in (2, len(tiny_clip.TOKENS) - 1):
        edit_json(folder / "config.json", text_config__eos_token_id=end)
        heads = np.asarray(build(folder).frozen["heads"][0])
        assert (heads @ heads.T)[~np.eye(3, dtype=bool)].max() < 0.999, "classes differ"
    for end in (0, tiny_clip.TOKENS.index("p"), len(tiny_clip.TOKENS) - 2, 49407):
        edit_json(folder / "config.json", text_config__eos_token_id=end)
        message = refusal(folder)
        assert "prompt 'a photo of a cat.' becomes the tokens [86, " in message
        assert f"ending with 87, but the text tower takes its feature at {end} (eos_" in message
    build(folder, head="trained")


def test_images_of_another_size_are_refused_before_training(folder):
    split = TASK.train._replace(images=np.zeros((2, 8, 8, 3), np.uint8))
    small = dataclasses.replace(TASK, train=split, validation=split, test=split)
    message = refusal(folder, [small])
    assert "task 'pets': images are [8, 8, 3]" in message
    assert "takes [16, 16, 3]" in message


def test_folders_that_are_no_checkpoints(tmp_path):
    assert "no such folder" in refusal(tmp_path / "none")
    assert "'openai/clip-vit-base-patch32'" in refusal("embedded", architecture="clip_vit_b32")
    assert "lacks config.json, model.safetensors" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    message = refusal(tmp_path)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def unreachable(monkeypatch, cache, endpoint="http://127.0.0.1:1"):
    """Has the hub elsewhere: by default at a port where nobody listens."""
    import huggingface_hub

    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return huggingface_hub


@pytest.mark.parametrize("revision", ["", "@" + "a" * 40])
def test_without_a_network_a_hub_name_is_answered_quickly(monkeypatch, tmp_path, revision):
    hub = unreachable(monkeypatch, tmp_path)
    start = time.monotonic()
    message = refusal(HUB_NAME + revision, architecture="clip_vit_b32")
    assert time.monotonic() - start < 5
    assert "cannot be downloaded from http://127.0.0.1:1: ConnectError" in message
    assert f"hf download {HUB_NAME}" in message
    assert "--config.model.checkpoint=FOLDER" in message
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(HUB_NAME + revision, architecture="clip_vit_b32")


@pytest.mark.parametrize("endpoint", ["nonsense", "http://", "http://[", "ftp://127.0.0.1"])
def test_an_endpoint_that_is_none_is_one_message(monkeypatch, tmp_path, endpoint):
    unreachable(monkeypatch, tmp_path, endpoint)
    message = refusal(HUB_NAME, architecture="clip_vit_b32")
    assert f"cannot be downloaded from {endpoint}: " in message


class SlowHub(http.server.BaseHTTPRequestHandler):
    """A hub with one tiny repository, whose answers take half a second each."""

    files: ClassVar = {"config.json": b"{}", "model.safetensors": b"\x02\0\0\0\0\0\0\0{}"}

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        time.sleep(0.5)
        name, status, headers = self.path.rsplit("/", 1)[-1], 200, {}
        if "/tree/" in self.path:
            rows = [
                {"type": "file", "oid": "b" * 40, "size": len(body), "path": path}
                for path, body in self.files.items()
            ]
            body = json.dumps(rows).encode()
        elif self.path.startswith("/api/models/"):
            body = json.dumps({"id": "me/tiny", "sha": "a" * 40}).encode()
        elif "/resolve/" in self.path and name in self.files:
            body, headers = self.files[name], {"ETag": f'"{name}"', "X-Repo-Commit": "a" * 40}
        else:
            body, status = b"", 404
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(body if self.command == "GET" else b"")

    def log_message(self, *_):
        pass


def test_how_long_to_wait_for_a_slow_hub_is_the_environments_to_say(monkeypatch, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = unreachable(monkeypatch, tmp_path, f"http://127.0.0.1:{server.server_port}")
    try:
        monkeypatch.setattr(hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
        assert "Timeout" in refusal("me/tiny", architecture="clip")
        assert "HF_HUB_ETAG_TIMEOUT" in refusal("me/tiny", architecture="clip")
        monkeypatch.setattr(hub.constants, "HF_HUB_ETAG_TIMEOUT", 30)
        folder = checkpoint_folder("me/tiny", "clip")
        assert sorted(file.name for file in folder.iterdir()) == sorted(SlowHub.files)
        assert checkpoint_folder("me/tiny", "clip") == folder  # from the cache
    finally:
        server.shutdown()
        server.server_close()


def test_the_cache_is_used_without_a_network(monkeypatch, tmp_path, whole):
    unreachable(monkeypatch, tmp_path)
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(whole, snapshot)
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text("a" * 40)
    assert checkpoint_folder("someone/tiny", "tiny_clip").samefile(snapshot)
    assert checkpoint_folder(f"someone/tiny@{'a' * 40}", "tiny_clip").samefile(snapshot)


def test_with_a_network_only_the_needed_files_are_fetched(monkeypatch, tmp_path, whole):
    hub, asked = unreachable(monkeypatch, tmp_path), []

    def download(repository, *, revision, allow_patterns, local_files_only=False):
        if local_files_only:
            raise hub.errors.LocalEntryNotFoundError("not here")
        asked.append((repository, revision, allow_patterns))
        if repository == "someone/gone":
            raise OSError("404")
        return str(whole)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: None)
    assert checkpoint_folder("someone/tiny@refs/pr/3", "tiny_clip") == whole
    ((repository, revision, patterns),) = asked
    assert (repository, revision) == ("someone/tiny", "refs/pr/3")
    assert "model.safetensors" in patterns
    assert not any(pattern.endswith(".bin") for pattern in patterns)
    assert "OSError: 404" in refusal("someone/gone")


def test_an_older_checkpoint_is_taken_from_the_hubs_own_conversion(
    monkeypatch, tmp_path, whole, caplog
):
    hub, asked = unreachable(monkeypatch, tmp_path), []
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text("{}")

    def proposal(number, title, author):
        return SimpleNamespace(num=number, title=title, author=author)

    title = "Adding `safetensors` variant of this model"
    proposals = [
        proposal(3, title, "somebody"),
        proposal(4, "Update README", "SFconvertbot"),
        proposal(5, title, "SFconvertbot"),
    ]

    class Hub:
        def get_repo_discussions(self, repository, **_):
            return iter(proposals)

        def model_info(self, repository, **_):
            return None

    def download(repository, *, revision, local_files_only=False, **_):
        if local_files_only:
            raise FileNotFoundError(repository)
        asked.append(revision)
        return str(whole if revision else old)

    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert huggingface.checkpoint_folder("some/model", "tiny_clip") == whole
    assert asked == [None, "refs/pr/5"]
    assert "some/model@refs/pr/5 is taken" in caplog.text
    proposals.pop()
    with pytest.raises(ValueError, match="holds no model"):
        huggingface.checkpoint_folder("some/model", "tiny_clip")


def test_tables_cover_full_size_towers():
    for name, kind, count in (("clip_vit_b32", "clip_vision", 200), ("vit_b16", "vit", 198)):
        architecture = ARCHITECTURES[name]
        shapes = parameter_shapes(lambda rngs, a=architecture: VisionTower(a, rngs=rngs))
        assert len(set(tensor_names.tensor_names(kind, shapes))) == count


def test_adapters_have_no_name_in_a_checkpoint():
    with pytest.raises(ValueError, match="blocks/query/lora_a"):
        tensor_names.to_huggingface({"blocks": {"query": {"lora_a": np.zeros((2, 3))}}}, "vit")


def test_transformers_is_not_heard_on_pytorch_which_nothing_needs(tmp_path):
    code = """
import sys

sys.modules["torch"] = None  # as if it were not installed
from matu_jax.models import huggingface

try:
    huggingface.tokenizer(sys.argv[1], 3)
except ValueError as error:
    print(error)
import transformers

assert not transformers.is_torch_available()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "tokenizer" in done.stdout
    assert done.stderr == ""
