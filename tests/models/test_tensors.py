"""Safetensors in pieces, held against the safetensors library."""

import contextlib
import gc
import json
import os
import resource
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from matu_jax.models import tensors
from matu_jax.models.tensors import Tensor, TensorFileError, TensorFiles, Writer, fingerprint

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "U8": np.uint8}
SHAPES = {"F32": (7, 5), "F16": (3,), "BF16": (), "U8": (2, 3)}


def _arrays():
    generator = np.random.default_rng(0)
    arrays = {
        f"{dtype.lower()}.weight": np.asarray(100 * generator.random(shape)).astype(DTYPES[dtype])
        for dtype, shape in SHAPES.items()
    }
    return arrays | {"none": np.zeros((0, 4), np.float32)}


def _specification(arrays):
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    return {name: Tensor(names[x.dtype], x.shape, x.nbytes) for name, x in arrays.items()}


def _write(path, arrays, metadata=None):
    """Writes entry by entry, the last ones first."""
    with Writer(path, _specification(arrays), metadata) as writer:
        for name, array in reversed(arrays.items()):
            flat = array.reshape(-1)
            for i in reversed(range(flat.size)):
                writer.write(name, flat[i : i + 1], i * array.itemsize)


def _shards(folder, arrays):
    folder.mkdir()
    files, names = {}, list(arrays)
    for i, name in enumerate(names):
        files.setdefault(f"model-{i % 2}.safetensors", {})[name] = arrays[name]
    for file, part in files.items():
        save_file(part, folder / file, {"format": "pt"})
    places = {name: file for file, part in files.items() for name in part}
    (folder / tensors.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def _message(kind, function, *arguments):
    with pytest.raises(kind) as caught:
        function(*arguments)
    return str(caught.value)


# ------------------------------------------------------------------ writing


def test_the_library_reads_what_is_written(tmp_path):
    arrays, path = _arrays(), tmp_path / "x.safetensors"
    _write(path, arrays, {"format": "pt", "name": "ä"})
    found = load_file(path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, strict=True)
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt", "name": "ä"}


def test_torch_reads_what_is_written(tmp_path):
    pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    _write(tmp_path / "x.safetensors", _arrays())
    found = load_torch(tmp_path / "x.safetensors")["bf16.weight"]
    assert float(found) == float(_arrays()["bf16.weight"])


def test_every_tensor_begins_at_a_multiple_of_its_entries(tmp_path):
    path = tmp_path / "x.safetensors"
    _write(path, _arrays())
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % _arrays()[name].itemsize == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_writer_leaves_nothing(tmp_path, error):
    arrays, path = _arrays(), tmp_path / "x.safetensors"
    path.write_text("the old one")

    def interrupted():
        with Writer(path, _specification(arrays)) as writer:
            writer.write("u8.weight", arrays["u8.weight"])
            assert len(list(tmp_path.iterdir())) == 2
            raise error

    with pytest.raises(error):
        interrupted()
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    assert path.read_text() == "the old one"


def test_the_file_has_no_name_before_it_is_complete(tmp_path):
    with Writer(tmp_path / "x.safetensors", {"a": Tensor("U8", (1,), 1)}) as writer:
        writer.write("a", b"1")
        assert not (tmp_path / "x.safetensors").exists()
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [ord("1")]


def test_bytes_never_written_are_an_error(tmp_path):
    def incomplete():
        with Writer(tmp_path / "x.safetensors", _specification(_arrays())) as writer:
            for name, array in list(_arrays().items())[1:]:
                writer.write(name, array)

    assert "f32.weight" in _message(ValueError, incomplete)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("start", [-1, 4])
def test_bytes_outside_a_tensor_are_an_error(tmp_path, start):
    def outside():
        with Writer(tmp_path / "x.safetensors", _specification(_arrays())) as writer:
            writer.write("u8.weight", b"123", start)

    assert "u8.weight" in _message(ValueError, outside)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "nowhere" / "x.safetensors"
    assert str(path) in _message(TensorFileError, _write, path, _arrays())


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors.os, "fsync", full)
    message = _message(TensorFileError, _write, tmp_path / "x.safetensors", _arrays())
    assert "No space left on device" in message
    assert "x.safetensors" in message
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ reading


def _open(path):
    with TensorFiles(path) as checkpoint:
        return checkpoint


@pytest.mark.parametrize("sharded", [False, True])
def test_reads_what_the_library_wrote(tmp_path, sharded):
    arrays = _arrays() | {"ids": np.arange(4)}
    if sharded:
        path = _shards(tmp_path / "folder", arrays)
    else:
        path = tmp_path / "x.safetensors"
        save_file(arrays, path, {"format": "pt"})
    with TensorFiles(path) as checkpoint:
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.tensors.keys() == arrays.keys()
        assert checkpoint.tensors["ids"] == Tensor("I64", (4,), 32)
        for name, array in arrays.items():
            tensor = checkpoint.tensors[name]
            assert (tensor.shape, tensor.size, tensor.nbytes) == (
                array.shape,
                array.size,
                array.nbytes,
            )
            assert b"".join(data for _, data in checkpoint.pieces(name)) == array.tobytes()
        for name in arrays.keys() - {"ids"}:
            flat = arrays[name].reshape(-1)
            found = checkpoint.read(name, flat.size // 2, flat.size - flat.size // 2)
            np.testing.assert_array_equal(found, flat[flat.size // 2 :], strict=True)


def test_pieces_are_small_and_say_where_they_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_PIECE_BYTES", 64)
    save_file(_arrays(), tmp_path / "x.safetensors")
    with TensorFiles(tmp_path / "x.safetensors") as checkpoint:
        pieces = list(checkpoint.pieces("f32.weight"))
    assert [(start, len(data)) for start, data in pieces] == [(0, 64), (64, 64), (128, 12)]


def test_a_whole_model_comes_before_an_index(tmp_path):
    folder = _shards(tmp_path / "folder", _arrays())
    save_file({"whole": np.zeros(1)}, folder / tensors.WHOLE)
    assert list(_open(folder).tensors) == ["whole"]


def test_the_fingerprint_is_that_of_the_contents(tmp_path):
    def of(arrays):
        save_file(arrays, tmp_path / "x.safetensors")
        with TensorFiles(tmp_path / "x.safetensors") as checkpoint:
            return fingerprint(checkpoint)

    arrays = _arrays()
    with TensorFiles(_shards(tmp_path / "folder", arrays)) as sharded:
        assert of(arrays) == fingerprint(sharded)
    changed = arrays["f32.weight"].copy()
    changed[3, 2] = np.nextafter(changed[3, 2], np.float32(1000))
    others = [
        arrays | {"f32.weight": changed},
        arrays | {"f32.weight": arrays["f32.weight"].reshape(5, 7)},
        arrays | {"u8.weight": arrays["u8.weight"].view(np.int8)},
        {name.replace("u8", "u9"): array for name, array in arrays.items()},
    ]
    assert len({of(arrays), *map(of, others)}) == 5


def _cut(data):
    return data[:-3]


@pytest.mark.parametrize(
    "damage", [_cut, lambda data: data + b"z", lambda data: b"<html>" * 9, lambda data: b""]
)
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    save_file(_arrays(), path)
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path}: not a safetensors file, or cut short" in _message(TensorFileError, _open, path)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(10_000, np.float32)}, path)
    with TensorFiles(path) as checkpoint:
        path.write_bytes(path.read_bytes()[:200])
        assert "tensor a" in _message(TensorFileError, checkpoint.read, "a", 9000, 1000)


def test_no_such_checkpoint(tmp_path):
    assert "openai/clip: no such file" in _message(TensorFileError, _open, "openai/clip")


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ([], ["nothing", "save_pretrained"]),
        (["pytorch_model.bin"], ["pytorch_model.bin", "save_pretrained"]),
        (["adapter_model.safetensors"], ["merge_and_unload"]),
        (["open_clip.safetensors"], ["open_clip.safetensors", "Give the file itself"]),
    ],
)
def test_a_folder_without_a_model_says_what_is_in_it(tmp_path, files, parts):
    for file in files:
        (tmp_path / file).touch()
    message = _message(TensorFileError, _open, tmp_path)
    for part in (str(tmp_path), *parts):
        assert part in message


def test_an_index_that_does_not_fit_is_named(tmp_path):
    folder = _shards(tmp_path / "folder", _arrays())
    index = json.loads((folder / tensors.INDEX).read_text())
    file = index["weight_map"]["f32.weight"]

    index["weight_map"]["more"] = file
    (folder / tensors.INDEX).write_text(json.dumps(index))
    message = _message(TensorFileError, _open, folder)
    assert f"{file}: differs from {tensors.INDEX}: more missing" in message

    del index["weight_map"]["more"], index["weight_map"]["f32.weight"]
    (folder / tensors.INDEX).write_text(json.dumps(index))
    assert "f32.weight not in the index" in _message(TensorFileError, _open, folder)

    (folder / file).unlink()
    message = _message(TensorFileError, _open, folder)
    assert f"{file}: No such file" in message


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        "[" * 200_000,
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": "../b.safetensors"}}',
        '{"weight_map": {"a": "/b.safetensors"}}',
        '{"weight_map": {"a": "x\\u0000y"}}',
        '{"weight_map": {"a": "\\ud800"}}',
    ],
)
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / tensors.INDEX).write_text(text)
    message = _message(TensorFileError, _open, tmp_path)
    assert f"{tensors.INDEX}: damaged" in message


def test_links_to_blobs_are_followed_as_in_hugging_faces_cache(tmp_path):
    arrays = _arrays()
    blobs = _shards(tmp_path / "blobs", arrays)
    (tmp_path / "snapshot").mkdir()
    for file in blobs.iterdir():
        file.rename(blobs / f"blob-{file.name}")
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/blob-{file.name}")
    with TensorFiles(tmp_path / "snapshot") as checkpoint:
        assert set(checkpoint.tensors) == set(arrays)


# ------------------------------------------------------------------ open files


@contextlib.contextmanager
def _few_files(more):
    """Lets the process open only `more` files besides those that are open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    listed = os.listdir("/proc/self/fd")  # of which one was open for listing them
    used = {int(name) for name in listed if os.path.lexists(f"/proc/self/fd/{name}")}
    free = [number for number in range(max(used) + more + 2) if number not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[more], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_than_files_may_be_open(tmp_path):
    arrays = {f"t{i}": np.full(3, i, np.float32) for i in range(60)}
    folder = tmp_path / "many"
    folder.mkdir()
    places = {name: f"{name}.safetensors" for name in arrays}
    for name, array in arrays.items():
        save_file({name: array}, folder / places[name])
    (folder / tensors.INDEX).write_text(json.dumps({"weight_map": places}))
    gc.collect()  # what other tests have left open may be closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as stack, _few_files(20):
        opened = [stack.enter_context(TensorFiles(folder)) for _ in range(3)]
        for _ in range(2):
            for name, array in arrays.items():
                for checkpoint in opened:
                    np.testing.assert_array_equal(checkpoint.read(name, 0, 3), array)
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("name", ["model.safetensors", "part.safetensors"])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    (tmp_path / tensors.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    for path in (tmp_path, tmp_path / name):
        assert _message(TensorFileError, _open, path) == f"{tmp_path / name}: not a regular file."


def test_where_no_file_may_be_opened_the_reason_is_said(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(_arrays(), path)
    with TensorFiles(path) as checkpoint:
        tensors._File._open.popitem()[1].close()
        with _few_files(0):
            message = _message(TensorFileError, _open, path)
            assert f"{path}: Too many open files" in message
            assert "ulimit -n 1024" in message
            message = _message(TensorFileError, checkpoint.read, "f32.weight", 0, 1)
            assert "f32.weight: Too many open files" in message


def test_a_file_that_is_replaced_while_it_is_read_is_named(tmp_path):
    path, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file(_arrays(), path)
    save_file(_arrays(), other)
    with TensorFiles(path) as checkpoint:
        tensors._File._open.popitem()[1].close()
        other.replace(path)
        message = _message(TensorFileError, checkpoint.read, "f32.weight", 0, 1)
    assert f"{path}: the file has changed" in message
