import asyncio
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import chex
import etils.epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from absl import logging as absl_logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from matu_jax.runs import workdir
from matu_jax.runs.checkpoints import Checkpoints


class State(NamedTuple):
    vectors: dict
    masks: jax.Array
    server: tuple


def example_state(seed=0):
    rng = np.random.default_rng(seed)
    return State(
        vectors={
            "z": jnp.asarray(rng.normal(size=(16, 3)), jnp.float32),
            "a/b": jnp.asarray(rng.normal(size=(16, 3)), jnp.float32),
            "low": jnp.asarray(rng.normal(size=4), jnp.bfloat16),
            "half": jnp.asarray(rng.normal(size=4), jnp.float16),
            "nobody": jnp.zeros((0, 3)),
            "special": jnp.array([jnp.nan, jnp.inf, -0.0, 1e-42]),
        },
        masks=jnp.asarray(rng.integers(0, 256, (16, 9)), jnp.uint8),
        server=((), {}, None, rng.normal(size=3), jnp.int32(seed)),
    )


def restored(checkpoints, target):
    found = checkpoints.restore(target)
    assert found is not None
    return found


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, np.ndarray) == isinstance(b, np.ndarray)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def over_devices(count):
    mesh = Mesh(np.array(jax.devices()[:count]), ("slots",))
    return NamedSharding(mesh, PartitionSpec("slots"))


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state, meta = example_state(), {"best": 0.25, "rng": [1, 2], "name": "é", "none": None}
    with Checkpoints(tmp_path / "new" / "folder", keep=2) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.restore(state) is None
        checkpoints.save(3, state, meta)
        assert checkpoints.latest() == 3
    with Checkpoints(tmp_path / "new" / "folder", keep=2) as checkpoints:
        round_index, found, notes = restored(checkpoints, state)
    assert (round_index, notes) == (3, meta)
    assert_same(found, state)


@pytest.mark.parametrize("state", [(), {}, None, {"a": (), "b": [None]}, {"a": jnp.zeros((0, 2))}])
def test_states_without_any_number(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {"round": 1})
        assert_same(restored(checkpoints, state)[1], state)
        with pytest.raises(ValueError, match=r"extra: found nothing, expected float32\[3\]"):
            checkpoints.restore({"extra": jnp.zeros(3)})


def test_one_round_is_spared_and_read_whatever_is_newest(tmp_path):
    target = {"x": jnp.zeros(3)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for number in range(1, 5):
            spare = min(number, 2)
            checkpoints.save(number, {"x": jnp.full(3, float(number))}, {}, spare=spare)
        assert checkpoints.complete() == [2, 4]
        state, _ = checkpoints.restore_round(2, target)
        np.testing.assert_array_equal(np.asarray(state["x"]), 2.0)
        assert restored(checkpoints, target)[0] == 4
        with pytest.raises(ValueError, match="no checkpoint of round 3"):
            checkpoints.restore_round(3, target)
        file = next(path for path in (tmp_path / "2").rglob("*") if path.is_file())
        file.write_bytes(b"?")
        with pytest.raises(ValueError, match="2 is damaged"):
            checkpoints.restore_round(2, target)


def test_placement_is_the_targets_own(tmp_path):
    eight, four = over_devices(8), over_devices(4)
    one = SingleDeviceSharding(jax.devices()[5])
    x = jnp.arange(48.0).reshape(16, 3)
    state = {"to_four": x, "to_one": x, "to_eight": x, "free": x, "numpy": x, "abstract": x}
    state = {k: jax.device_put(v, eight if k != "to_eight" else one) for k, v in state.items()}
    target = {
        "to_four": jax.device_put(x, four),
        "to_one": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
        "to_eight": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=eight),
        "free": x,
        "numpy": np.zeros(x.shape, np.float32),
        "abstract": jax.ShapeDtypeStruct(x.shape, x.dtype),
    }
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        found = restored(checkpoints, target)[1]
    for leaf in found.values():
        np.testing.assert_array_equal(np.asarray(leaf), np.arange(48.0).reshape(16, 3))
    for name, sharding in {"to_four": four, "to_one": one, "to_eight": eight}.items():
        assert found[name].sharding == sharding
    assert type(found["numpy"]) is np.ndarray
    for name in ("free", "abstract"):  # free to be used beside arrays on any devices
        assert not found[name].committed
        assert (jax.jit(jnp.add)(found[name], found["to_eight"])).sharding == eight


def test_a_process_with_one_device_reads_what_eight_wrote(tmp_path):
    x = jnp.arange(64, dtype=jnp.uint8).reshape(16, 4)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(4, {"x": jax.device_put(x, over_devices(8))}, {"k": 1})
    program = (
        "import sys, jax, numpy as np; from matu_jax.runs.checkpoints import Checkpoints\n"
        "assert len(jax.devices()) == 1\n"
        "target = {'x': jax.device_put(np.zeros((16, 4), np.uint8), jax.devices()[0])}\n"
        "with Checkpoints(sys.argv[1], keep=1) as c: number, state, meta = c.restore(target)\n"
        "assert (number, meta) == (4, {'k': 1})\n"
        "assert (np.asarray(state['x']).ravel() == np.arange(64)).all()\n"
    )
    clean = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", program, tmp_path]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_random_keys_come_back(tmp_path):
    key = jax.random.key(7)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"key": key}, {})
        found = restored(checkpoints, {"key": key})[1]["key"]
    assert jax.random.uniform(found) == jax.random.uniform(key)


def folders(path):
    return sorted(p.name for p in path.iterdir())


def test_the_oldest_make_room(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for number in (1, 2, 9, 10):
            checkpoints.save(number, {"x": jnp.full(3, float(number))}, {})
            assert checkpoints.latest() == number
        assert folders(tmp_path) == ["10", "9"]
        assert restored(checkpoints, {"x": jnp.zeros(3)})[1]["x"][0] == 10


def save_three(path, state=None):
    with Checkpoints(path, keep=3) as checkpoints:
        for number in (1, 2, 3):
            checkpoints.save(number, state or example_state(number), {"number": number})


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "checksums.json")


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return True


def flip(file):
    content = bytearray(file.read_bytes())
    if content:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    return bool(content)


def remove(file):
    file.unlink()
    return True


def garbage(file):
    file.write_bytes(b"\x00 not what was here" * 7)
    return True


@pytest.mark.parametrize("harm", [truncate, flip, remove, garbage])
def test_a_damaged_newest_is_passed_over_and_named(tmp_path, harm, caplog, capfd):
    save_three(tmp_path / "whole")
    harmed = 0
    for i, whole in enumerate(files_of(tmp_path / "whole" / "3")):
        before = whole.read_bytes()
        if not harm(whole) or (whole.exists() and whole.read_bytes() == before):
            continue  # an empty file cannot be harmed in this way
        harmed += 1
        caplog.clear()
        with Checkpoints(tmp_path / "whole", keep=3) as checkpoints:
            number, state, meta = restored(checkpoints, example_state())
        whole.write_bytes(before)
        assert (number, meta) == (2, {"number": 2}), f"{i}: {whole}"
        assert_same(state, example_state(2))
        (record,) = [r for r in caplog.records if r.name == "matu_jax.runs.checkpoints"]
        assert record.levelno == logging.WARNING
        assert str(tmp_path / "whole" / "3") in record.getMessage()
        assert str(whole.relative_to(tmp_path / "whole" / "3")) in record.getMessage()
    assert harmed >= 6
    assert capfd.readouterr() == ("", "")
    with Checkpoints(tmp_path / "whole", keep=3) as checkpoints:  # all harm undone
        assert restored(checkpoints, example_state())[0] == 3


def test_a_run_goes_on_after_a_damaged_checkpoint(tmp_path, caplog):
    save_three(tmp_path)
    flip(next(p for p in files_of(tmp_path / "3") if "/d/" in str(p)))
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert restored(checkpoints, example_state())[0] == 2
        checkpoints.save(3, example_state(33), {})
        assert restored(checkpoints, example_state())[0] == 3
        assert_same(restored(checkpoints, example_state())[1], example_state(33))
    flip(next(p for p in files_of(tmp_path / "3") if "/d/" in str(p)))
    remove(files_of(tmp_path / "2")[0])
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert restored(checkpoints, example_state())[0] == 1
        checkpoints.save(2, example_state(22), {})  # round 3 is of a run that is no more
        assert folders(tmp_path) == ["1", "2"]
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert_same(restored(checkpoints, example_state())[1], example_state(22))
    assert len(caplog.records) == 3


def test_all_damaged_says_what_to_do(tmp_path, caplog):
    save_three(tmp_path)
    for number in "123":
        truncate(max(files_of(tmp_path / number), key=lambda p: p.stat().st_size))
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        with pytest.raises(ValueError, match=r"round 3: .*round 1: .*remove this folder"):
            checkpoints.restore(example_state())
        assert folders(tmp_path) == ["1", "2", "3"]  # nothing was taken away


def test_unreadable_checksums_count_as_damage(tmp_path, caplog):
    save_three(tmp_path)
    for content in (b"", b"[1", b"[]", b"\xff\xfe"):
        (tmp_path / "3" / "checksums.json").write_bytes(content)
        with Checkpoints(tmp_path, keep=3) as checkpoints:
            assert restored(checkpoints, example_state())[0] == 2


def test_what_a_killed_run_leaves_is_ignored(tmp_path, capfd):
    save_three(tmp_path)
    shutil.copytree(tmp_path / "3", tmp_path / "4.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "3", tmp_path / "5")
    (tmp_path / "5" / "checksums.json").unlink()  # killed before the last step of a save
    (tmp_path / "notes").mkdir()
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.latest() == 3
        assert restored(checkpoints, example_state())[0] == 3
        for number in (4, 5):
            checkpoints.save(number, example_state(number), {})
        assert checkpoints.latest() == 5
        assert_same(restored(checkpoints, example_state())[1], example_state(5))
    assert folders(tmp_path) == ["3", "4", "5", "notes"]
    assert capfd.readouterr() == ("", "")


def test_a_save_that_dies_leaves_the_one_before(tmp_path, monkeypatch):
    save_three(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr("matu_jax.runs.checkpoints._checksum", killed)
            with pytest.raises(KeyboardInterrupt):
                checkpoints.save(4, example_state(4), {})
        assert checkpoints.latest() == 3
        assert_same(restored(checkpoints, example_state())[1], example_state(3))
        checkpoints.save(4, example_state(44), {})
        assert_same(restored(checkpoints, example_state())[1], example_state(44))
        assert folders(tmp_path) == ["4"]


def test_a_mismatch_names_every_leaf_that_differs(tmp_path):
    save_three(tmp_path)
    state = example_state()
    vectors = dict(state.vectors)
    del vectors["z"]
    vectors |= {"new": jnp.zeros(2), "low": jnp.zeros(5, jnp.bfloat16), "half": jnp.zeros(4)}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        with pytest.raises(ValueError, match="state saved differs") as error:
            checkpoints.restore(state._replace(vectors=vectors))
        assert restored(checkpoints, state)[0] == 3
    lines = str(error.value).splitlines()
    assert str(tmp_path / "3") in lines[0]
    assert sorted(lines[1:-1]) == [
        "  vectors/half: found float16[4], expected float32[4]",
        "  vectors/low: found bfloat16[4], expected bfloat16[5]",
        "  vectors/new: found nothing, expected float32[2]",
        "  vectors/z: found float32[16, 3], expected nothing",
    ]


def test_leaves_are_matched_by_name_not_by_place(tmp_path):
    class Swapped(NamedTuple):
        b: jax.Array
        a: jax.Array

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros(2), "b": jnp.ones(2)}, {})
        found = restored(checkpoints, Swapped(jnp.zeros(2), jnp.zeros(2)))[1]
    assert (found.a[0], found.b[0]) == (0, 1)


def test_what_cannot_be_saved_leaves_the_rest_alone(tmp_path):
    save_three(tmp_path)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        with pytest.raises(TypeError):
            checkpoints.save(3, example_state(), {"bad": object()})
        with pytest.raises(ValueError, match="two leaves are called a/b"):
            checkpoints.save(3, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, {})
        assert restored(checkpoints, example_state())[2] == {"number": 3}


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path / "x", keep=0)
    assert not (tmp_path / "x").exists()


def test_logging_of_others_is_left_as_it_was(tmp_path):
    before = absl_logging.get_verbosity()
    try:
        absl_logging.set_verbosity(absl_logging.INFO)
        save_three(tmp_path)
        assert absl_logging.get_verbosity() == absl_logging.INFO
    finally:
        absl_logging.set_verbosity(before)


@pytest.mark.parametrize(
    ("file", "logged"),
    [
        (Path(orbax.checkpoint.__file__).with_name("path.py"), False),
        (Path(etils.epath.__file__).with_name("path.py"), False),
        ("/home/orbax/own.py", True),
    ],
)
def test_errors_that_orbax_drops_are_not_logged(tmp_path, caplog, file, logged):
    """Where several of its writes fail it raises one; asyncio would report the others, late."""
    save_three(tmp_path)
    names = {}
    exec(compile("def write(): raise OSError('disk full')", str(file), "exec"), names)

    async def nobody_asks():
        await asyncio.wait([asyncio.ensure_future(asyncio.to_thread(names["write"]))])

    asyncio.run(nobody_asks())
    gc.collect()
    assert ("exception was never retrieved" in caplog.text) == logged


def test_orbax_is_imported_only_when_needed():
    program = "import sys, matu_jax.runs.checkpoints; assert 'orbax.checkpoint' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def listed_without(kept, folder):
    """Lists fewer files, as they are: what is left out of the list is removed."""
    sums = json.loads((folder / "checksums.json").read_text())
    sums = {name: value for name, value in sums.items() if name.startswith(kept)}
    (folder / "checksums.json").write_text(json.dumps(sums))
    shutil.rmtree(folder / "state")


def a_folder_in_its_place(file):
    file.unlink()
    file.mkdir()


ODD = {
    "a file where a checkpoint goes": lambda folder: (folder.parent / "7").write_text("x"),
    "a folder of another": lambda folder: (folder.parent / "mine").mkdir(),
    "a folder without files": lambda folder: (folder.parent / "3").mkdir(),
}
DAMAGED = {
    "a folder for checksums": lambda folder: a_folder_in_its_place(folder / "checksums.json"),
    "no checksums listed": lambda folder: (folder / "checksums.json").write_text("{}"),
    "files elsewhere": lambda folder: (folder / "checksums.json").write_text('{"/dev/zero": "x"}'),
    "files above": lambda folder: (folder / "checksums.json").write_text('{"../1": "x"}'),
    "a name with NUL": lambda folder: (folder / "checksums.json").write_text('{"a\\u0000": "x"}'),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
}


@pytest.mark.parametrize("name", [*ODD, *DAMAGED])
def test_odd_things_are_passed_over_and_damage_falls_back(tmp_path, name):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for number in (1, 2):
            checkpoints.save(number, {"a": np.arange(number + 0.0)}, {"round": number})
    (ODD | DAMAGED)[name](tmp_path / "2")
    expected = 2 if name in ODD else 1
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        found = checkpoints.restore({"a": np.zeros(expected)})
        assert found is not None
        assert found[0] == expected
        checkpoints.save(expected + 1, {"a": np.zeros(1)}, {})
        assert checkpoints.complete() == [expected, expected + 1]


def test_a_list_of_files_that_is_short_is_said(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(2, {"a": np.arange(2.0)}, {})
        listed_without("meta", tmp_path / "2")
        with pytest.raises(ValueError, match="2: damaged: it has no state"):
            checkpoints.restore({"a": np.zeros(2)})


@pytest.mark.parametrize("place", [0, -1])  # what Orbax reads at once, and what it reads later
def test_a_pipe_in_a_files_place_is_not_waited_for(tmp_path, caplog, place):
    save_three(tmp_path)
    file = files_of(tmp_path / "3")[place]
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        file.unlink()
        os.mkfifo(file)
        assert checkpoints.whole()[0] == 2
        assert "not a regular file" in checkpoints.whole()[1][3]
    with (
        pytest.raises(workdir.UserError, match=f"{file}: not a regular file. Move it away"),
        workdir.disk_errors(tmp_path),
    ):
        Checkpoints(tmp_path, keep=3)
    file.unlink()  # as the message says
    assert restored(Checkpoints(tmp_path, keep=3), example_state())[0] == 2
    assert "is missing" in caplog.text


@pytest.mark.parametrize(
    "name", ["lab [bold] x", "[day 1]", "[!x]", "a*b", "what?", "run[adam]/[b]"]
)
def test_a_name_that_looks_like_a_pattern_keeps_what_is_saved(tmp_path, name):
    state = {"a": np.arange(6.0, dtype=np.float32), "b": np.zeros(3, np.int32)}
    with Checkpoints(tmp_path / name, keep=2) as checkpoints:
        for number in (1, 2, 3):
            checkpoints.save(number, state, {"n": number})
    with Checkpoints(tmp_path / name, keep=2) as checkpoints:
        assert checkpoints.complete() == [2, 3]
        found = checkpoints.restore(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        )
        assert found is not None
        chex.assert_trees_all_equal(found[1], state)
        assert found[2] == {"n": 3}
        assert checkpoints.meta(2) == {"n": 2}
    assert (tmp_path / name / "3" / "state").is_dir()
