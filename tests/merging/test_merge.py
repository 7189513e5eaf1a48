"""The merging program and its mathematics, held against plain loops and against the library."""

import contextlib
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import matu_jax as matu
from matu_jax import merge, merging
from matu_jax.aggregation.storage import unpack
from matu_jax.merging import blocks, methods, running
from matu_jax.merging.options import name_models
from matu_jax.models.tensors import INDEX, TensorFileError, TensorFiles

SHAPES = {
    "vision.patch.weight": (37, 41),  # longer than one block of 1024
    "vision.norm.weight": (13,),
    "vision.norm.bias": (3,),
    "vision.temperature": (),
    "vision.empty": (0, 4),
    "head.weight": (5, 7),
}
IDS = {"vision.position_ids": np.arange(6)[None]}
NAMES = ("cars", "dtd", "sun")
SMALL = 1  # a budget that gives the shortest blocks, of 1024


def _family(dtype: type = np.float32, models=3, seed=0, step=1 / 16):
    """A base and models on a grid of numbers, so coarse that every sum and difference is exact."""
    generator = np.random.default_rng(seed)

    def tree(low, high, other):
        return {
            name: (other[name] + step * generator.integers(low, high, shape)).astype(dtype)
            for name, shape in SHAPES.items()
        }

    base = tree(-60, 61, dict.fromkeys(SHAPES, 0.0))
    wide = {name: array.astype(np.float64) for name, array in base.items()}
    return base, [tree(-9, 10, wide) for _ in range(models)]


def _save(folder: Path, base, models, names: Sequence[str] = NAMES):
    """Writes files and returns their paths; the first is the base's."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}.safetensors" for name in ("base", *names)]
    for path, tree in zip(paths, (base, *models), strict=True):
        arrays = {name: np.asarray(array) for name, array in {**tree, **IDS}.items()}
        save_file(arrays, path, {"format": "pt"})
    return paths


@contextlib.contextmanager
def _opened(paths):
    with contextlib.ExitStack() as stack:
        base, *models = (stack.enter_context(TensorFiles(path)) for path in paths)
        yield base, {model.path.stem: model for model in models}


def _unify(paths, out, **settings):
    with _opened(paths) as (base, models):
        alignment = merging.align(base, models)
        return merging.unify_models(base, models, alignment, out, budget=SMALL, **settings)


def _merge(paths, out, **settings):
    with _opened(paths) as (base, models):
        alignment = merging.align(base, models)
        return merging.merge_models(base, models, alignment, out, budget=SMALL, **settings)


def _rebuild(unified, base, task, out):
    with TensorFiles(unified) as file, TensorFiles(base) as base_file:
        return merging.rebuild_model(file, base_file, task, out, budget=SMALL)


def _rows(trees):
    """Trees as float64 rows `[trees, parameters]`."""
    return np.array(
        [
            np.concatenate([tree[name].reshape(-1).astype(np.float64) for name in SHAPES])
            for tree in trees
        ]
    )


def _vectors(base, models):
    return _rows(models) - _rows([base])


def _run(*arguments):
    return merge.main(["merge", *map(str, arguments)])


def _mistake(capsys, *arguments):
    assert _run(*arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    return err


# ------------------------------------------------------------------ unify


@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [
        (np.float32, "max"),
        (np.float32, "mean"),
        (np.float16, "max"),
        (ml_dtypes.bfloat16, "mean"),
    ],
)
def test_unify_equals_the_library_and_the_loops(tmp_path, dtype, magnitude):
    base, models = _family(dtype)
    paths = _save(tmp_path / "in", base, models)
    summary = _unify(paths, tmp_path / "u.safetensors", magnitude=magnitude)
    found = load_file(tmp_path / "u.safetensors")

    library = matu.unify(matu.task_vectors(matu.stack(models), base), magnitude=magnitude)
    assert found.keys() == {"scales"} | {f"{p}.{name}" for p in ("vector", "mask") for name in base}
    for name, array in base.items():
        assert found[f"vector.{name}"].dtype == array.dtype
        np.testing.assert_array_equal(found[f"vector.{name}"], np.asarray(library.vector[name]))
        np.testing.assert_array_equal(found[f"mask.{name}"], np.asarray(library.masks[name]))
    np.testing.assert_allclose(found["scales"], np.asarray(library.scales), rtol=1e-6)

    plain = oracle.unify(
        _vectors(base, models), [True] * 3, magnitude, lambda x: x.astype(dtype).astype(float)
    )
    vector = _rows([{name: found[f"vector.{name}"] for name in base}])[0]
    np.testing.assert_allclose(vector, plain.vector, rtol=1e-2 if dtype != np.float32 else 1e-6)
    np.testing.assert_allclose(found["scales"], plain.scales, rtol=1e-5)
    assert [summary.models[name]["scale"] for name in NAMES] == found["scales"].tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_mean_absolute_value_is_kept(tmp_path, dtype):
    base, models = _family(dtype, seed=1)
    _unify(_save(tmp_path / "in", base, models), tmp_path / "u.safetensors")
    found = load_file(tmp_path / "u.safetensors")
    vectors = _vectors(base, models)
    for s in range(3):
        kept = 0.0
        for name, array in base.items():
            bits = unpack(found[f"mask.{name}"][s], array.size)
            kept += np.abs(found[f"vector.{name}"].reshape(-1)[bits].astype(np.float64)).sum()
        np.testing.assert_allclose(found["scales"][s] * kept, np.abs(vectors[s]).sum(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_one_model_comes_back(tmp_path, dtype):
    base, models = _family(dtype, models=1)
    paths = _save(tmp_path / "in", base, models, ["cars"])
    summary = _unify(paths, tmp_path / "u.safetensors")
    assert _rebuild(tmp_path / "u.safetensors", paths[0], "cars", tmp_path / "r.safetensors") == 1.0
    found = load_file(tmp_path / "r.safetensors")
    assert found.keys() == base.keys() | IDS.keys()
    for name, array in (models[0] | IDS).items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    np.testing.assert_allclose(summary.models["cars"]["cosine"], 1.0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_rebuilt_models_equal_the_library(tmp_path, dtype):
    base, models = _family(dtype, seed=2)
    paths = _save(tmp_path / "in", base, models)
    summary = _unify(paths, tmp_path / "u.safetensors")
    vectors = matu.task_vectors(matu.stack(models), base)
    rebuilt = matu.modulate(matu.unify(vectors, magnitude="max"))
    expected = matu.apply_vectors(base, rebuilt)
    for s, task in enumerate(NAMES):
        _rebuild(tmp_path / "u.safetensors", paths[0], task, tmp_path / "r.safetensors")
        found = load_file(tmp_path / "r.safetensors")
        for name in base:
            left, right = found[name].astype(float), np.asarray(expected[name][s]).astype(float)
            tolerance = 1e-6 if dtype == np.float32 else 1e-2
            np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)
        row = _rows([{name: np.asarray(leaf[s]) for name, leaf in rebuilt.items()}])[0]
        own = _vectors(base, models)[s]
        cosine = row @ own / np.linalg.norm(row) / np.linalg.norm(own)
        tolerance = 1e-6 if dtype == np.float32 else 1e-3
        np.testing.assert_allclose(summary.models[task]["cosine"], cosine, rtol=tolerance)


def test_models_of_several_dtypes(tmp_path):
    base, models = _family()
    for tree in (base, *models):
        tree["vision.patch.weight"] = tree["vision.patch.weight"].astype(ml_dtypes.bfloat16)
        tree["vision.norm.bias"] = tree["vision.norm.bias"].astype(np.float16)
    paths = _save(tmp_path / "in", base, models)
    _unify(paths, tmp_path / "u.safetensors")
    found = load_file(tmp_path / "u.safetensors")
    plain = oracle.unify(_vectors(base, models), [True] * 3)
    np.testing.assert_allclose(found["scales"], plain.scales, rtol=1e-5)
    vector = _rows([{name: found[f"vector.{name}"] for name in base}])[0]
    np.testing.assert_array_equal(vector, plain.vector)
    _rebuild(tmp_path / "u.safetensors", paths[0], "sun", tmp_path / "r.safetensors")
    rebuilt = load_file(tmp_path / "r.safetensors")
    assert {name: x.dtype for name, x in rebuilt.items() if name in base} == {
        name: x.dtype for name, x in base.items()
    }


@pytest.mark.parametrize("factors", [(1e37, 1e36, 1e35), (1e-30, 1e-31, 1e-32)])
def test_huge_and_tiny_task_vectors_have_finite_scales(tmp_path, factors):
    base, models = _family()
    base = {name: np.zeros_like(array) for name, array in base.items()}
    models = [
        {name: (factor * array).astype(np.float32) for name, array in tree.items()}
        for factor, tree in zip(factors, models, strict=True)
    ]
    summary = _unify(_save(tmp_path / "in", base, models), tmp_path / "u.safetensors")
    plain = oracle.unify(_vectors(base, models), [True] * 3)
    found = [summary.models[name]["scale"] for name in NAMES]
    np.testing.assert_allclose(found, plain.scales, rtol=1e-5)
    norms = [summary.models[name]["norm"] for name in NAMES]
    np.testing.assert_allclose(norms, np.linalg.norm(_vectors(base, models), axis=1), rtol=1e-6)


def test_a_model_that_equals_the_base(tmp_path, capsys):
    base, models = _family()
    models[1] = base
    paths = _save(tmp_path / "in", base, models)
    assert _run("--base", paths[0], "--models", *paths[1:], "--out", tmp_path / "out") == 0
    assert "Model dtd equals the base" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    dtd = report["models"][1]
    assert (dtd["name"], dtd["zero"], dtd["scale"], dtd["norm"]) == ("dtd", True, 0.0, 0.0)
    assert report["similarity"]["matrix"][1] == [0.5, 0.5, 0.5]
    unified = tmp_path / "out" / "unified.safetensors"
    assert _rebuild(unified, paths[0], "dtd", tmp_path / "r.safetensors") == 0.0
    for name, array in load_file(tmp_path / "r.safetensors").items():
        np.testing.assert_array_equal(array, (base | IDS)[name])


def test_eight_models_take_the_published_share(tmp_path):
    # One vector, 8 / 32 of a vector in masks, and 8 scales, of 8 checkpoints.
    generator = np.random.default_rng(0)
    names = [f"task{i}" for i in range(8)]
    trees = [{"w": generator.standard_normal((200, 2000), np.float32)} for _ in range(9)]
    paths = _save(tmp_path / "in", trees[0], trees[1:], names)
    assert _run("--base", paths[0], "--models", *paths[1:], "--out", tmp_path / "out") == 0
    size = (tmp_path / "out" / "unified.safetensors").stat().st_size
    everything = sum(path.stat().st_size for path in paths[1:])
    assert abs(size / everything - (1 + 8 / 32) / 8) < 1e-4
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert report["bytes"]["result_file"] == size
    assert abs(report["bytes"]["ratio"] - (1 + 8 / 32) / 8) < 1e-4


# ------------------------------------------------------------------ similarity, TIES, arithmetic


@pytest.mark.parametrize("method", ["unify", "arithmetic", "ties"])
def test_similarity_and_norms_equal_the_loops(tmp_path, method):
    base, models = _family(seed=3)
    models[2] = {name: 2 * base[name] - array for name, array in models[0].items()}  # the negative
    paths = _save(tmp_path / "in", base, models)
    options = ["--method", method]
    assert _run("--base", paths[0], "--models", *paths[1:], *options, "--out", tmp_path / "o") == 0
    report = json.loads((tmp_path / "o" / "merge.json").read_text())
    vectors = _vectors(base, models)
    expected = np.zeros((3, 3))
    for (i, j), _ in np.ndenumerate(expected):
        touched = [k for k in range(vectors.shape[1]) if vectors[i, k] or vectors[j, k]]
        product = oracle.sign_product(vectors[i, touched], vectors[j, touched])
        expected[i, j] = (1 + float(product)) / 2
    np.testing.assert_allclose(report["similarity"]["matrix"], expected, rtol=1e-12)
    assert (vectors == 0).any()
    assert np.diag(expected).tolist() == [1, 1, 1]
    assert expected[0][2] == 0
    norms = [model["norm"] for model in report["models"]]
    np.testing.assert_allclose(norms, np.linalg.norm(vectors, axis=1), rtol=1e-6)


def _ties(vectors, keep):
    """TIES in plain loops, with thresholds and numbers of entries kept."""
    trimmed, thresholds, kept = np.zeros_like(vectors), [], []
    for s, row in enumerate(vectors):
        threshold = sorted((abs(x) for x in row), reverse=True)[keep - 1]
        for i, x in enumerate(row):
            if abs(x) >= threshold:
                trimmed[s, i] = x
        thresholds.append(threshold)
        kept.append(sum(x != 0 for x in trimmed[s]))
    merged = np.zeros(vectors.shape[1])
    for i in range(len(merged)):
        elected = oracle.sign(sum(trimmed[:, i]))
        agreeing = [x for x in trimmed[:, i] if elected and oracle.sign(x) == elected]
        if agreeing:
            merged[i] = sum(agreeing) / len(agreeing)
    return merged, thresholds, kept


TOLERANCE = {np.float32: 1e-6, np.float16: 1e-3, ml_dtypes.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_ties_equals_the_loops(tmp_path, dtype, density):
    base, models = _family(dtype, seed=4)
    models[1] = {  # nearly all of this model's task vector is zero
        name: base[name] if name != "head.weight" else array for name, array in models[1].items()
    }
    paths = _save(tmp_path / "in", base, models)
    out = tmp_path / "m.safetensors"
    summary = _merge(paths, out, method="ties", density=density, scale=0.5)
    vectors = _vectors(base, models)
    keep = round(density * vectors.shape[1])
    expected, thresholds, kept = _ties(vectors, keep)
    assert kept[0] >= min(keep, np.count_nonzero(vectors[0]))
    if density < 1:
        assert thresholds[0] > 0
        assert kept[0] > keep, "choose data with magnitudes that tie"
        assert thresholds[1] == 0
    assert [summary.models[name]["threshold"] for name in NAMES] == thresholds
    assert [summary.models[name]["kept"] for name in NAMES] == kept
    found = load_file(out)
    assert {name: x.dtype for name, x in found.items()} == {
        name: x.dtype for name, x in (base | IDS).items()
    }
    full = _rows([base])[0] + 0.5 * expected
    np.testing.assert_allclose(_rows([found])[0], full, rtol=TOLERANCE[dtype], atol=1e-6)
    np.testing.assert_array_equal(found["vision.position_ids"], IDS["vision.position_ids"])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_arithmetic_equals_the_loops(tmp_path, dtype):
    base, models = _family(dtype, seed=5)
    paths = _save(tmp_path / "in", base, models)
    _merge(paths, tmp_path / "m.safetensors", method="arithmetic", scale=-0.3)
    found = load_file(tmp_path / "m.safetensors")
    expected = _rows([base])[0] - 0.3 * _vectors(base, models).sum(axis=0)
    np.testing.assert_allclose(_rows([found])[0], expected, rtol=TOLERANCE[dtype], atol=1e-6)


@given(
    st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
        | st.sampled_from([0.0, 1.0, -1.0, 1.0000001, 0.5]),
        min_size=1,
        max_size=40,
    ),
    st.data(),
)
def test_the_threshold_is_the_keep_th_largest_magnitude(values, data):
    keep = data.draw(st.integers(1, len(values)))
    rows = np.zeros((2, 1024), np.float32)
    rows[0, : len(values)] = values
    rows[1, 100 : 100 + len(values)] = -np.array(values, np.float32)[::-1]
    halves = [
        blocks.Block([], np.zeros(1024, np.float32), rows),
        blocks.Block([], np.zeros(1024, np.float32), np.zeros_like(rows)),
    ]
    found = methods._thresholds(lambda: iter(halves), keep, 2)
    expected = np.sort(np.abs(np.array(values, np.float32)))[::-1][keep - 1]
    assert found.tolist() == [expected, expected]


# ------------------------------------------------------------------ blocks


@pytest.mark.parametrize("models", [1, 2, 3, 16, 100, 10**6])
def test_blocks_keep_within_the_budget(models):
    size = blocks.block_size(models)
    assert size & (size - 1) == 0
    assert size == 1024 or size * (models + 2) <= blocks.BUDGET
    assert 2 * size * (models + 2) > blocks.BUDGET


def test_blocks_hold_every_entry_once(tmp_path):
    base, models = _family()
    with _opened(_save(tmp_path / "in", base, models)) as (file, _):
        planned = blocks.plan(file, [*SHAPES], 2048)
    seen = {name: np.zeros(array.size, int) for name, array in base.items()}
    for segments in planned:
        places = np.zeros(2048, int)
        for segment in segments:
            assert segment.start % 1024 == segment.place % 1024 == 0
            seen[segment.name][segment.start : segment.start + segment.size] += 1
            places[segment.part] += 1
        assert places.max() == 1
    assert all((count == 1).all() for count in seen.values())
    assert len(planned) <= sum(array.size for array in base.values()) / 64 + 2


def test_more_blocks_compile_nothing_more(tmp_path, compilations):
    def play(shape):
        generator = np.random.default_rng(0)
        trees = [{"w": generator.standard_normal(shape, np.float32)} for _ in range(6)]
        paths = _save(tmp_path / "in", trees[0], trees[1:], list("abcde"))
        _unify(paths, tmp_path / "u.safetensors")
        _merge(paths, tmp_path / "m.safetensors", method="ties", density=0.1, scale=1.0)
        _rebuild(tmp_path / "u.safetensors", paths[0], "b", tmp_path / "r.safetensors")

    play((10, 3))
    before = len(compilations)
    assert before
    play((70, 100))
    assert len(compilations) == before


MEMORY = """
import sys
from matu_jax import merge
assert merge.main(sys.argv) == 0
status = open("/proc/self/status").read()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_models(tmp_path):
    # 20 MiB a model: sixteen are 280 MiB more than two. Half of it is for the allocator's whims.
    names, shape = [f"m{i}" for i in range(16)], (5, 1 << 20)
    generator = np.random.default_rng(0)
    trees = [{"w": generator.standard_normal(shape, np.float32)}] * 17
    paths = _save(tmp_path / "in", trees[0], trees[1:], names)
    peaks = {}
    for count in (2, 16):
        arguments = ["--base", paths[0], "--models", *paths[1 : count + 1]]
        arguments += ["--out", tmp_path / f"{count}"]
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[count] = int(done.stdout.split()[-1]) / 1024
    assert peaks[16] < peaks[2] + 140, peaks


# ------------------------------------------------------------------ inputs


def test_shards_and_files_merge_to_the_same(tmp_path):
    base, models = _family()
    paths = _save(tmp_path / "in", base, models)
    folders = []
    for path, tree in zip(paths, (base, *models), strict=True):
        folder = tmp_path / path.stem
        folder.mkdir()
        places = {}
        for i, (name, array) in enumerate((tree | IDS).items()):
            places[name] = f"model-{i:05}-of-00007.safetensors"
            save_file({name: np.asarray(array)}, folder / places[name], {"format": "pt"})
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
        folders.append(folder)
    (folders[0] / "config.json").write_text('{"a": 1}')
    for method in ("unify", "ties", "arithmetic"):
        for kind, (base_path, *rest) in (("files", paths), ("folders", folders)):
            out = tmp_path / f"{method}-{kind}"
            assert (
                _run("--base", base_path, "--models", *rest, "--method", method, "--out", out) == 0
            )
        names = ("unified" if method == "unify" else "model") + ".safetensors"
        left, right = (
            load_file(tmp_path / f"{method}-{kind}" / names) for kind in ("files", "folders")
        )
        assert left.keys() == right.keys()
        for name, array in left.items():
            np.testing.assert_array_equal(array, right[name])
        copied = (tmp_path / f"{method}-folders" / "config.json").exists()
        assert copied == (method != "unify")
    report = json.loads((tmp_path / "ties-folders" / "merge.json").read_text())
    assert [model["name"] for model in report["models"]] == list(NAMES)
    assert report["copied_files"] == ["config.json"]


def test_only_some_prefixes(tmp_path, capsys):
    base, models = _family()
    del models[0]["head.weight"]
    models[1]["head.weight"] = np.zeros((9, 7), np.float32)
    models[2]["classifier.weight"] = np.full(2, np.nan, np.float32)
    paths = _save(tmp_path / "in", base, models)
    arguments = ["--base", paths[0], "--models", *paths[1:]]

    message = _mistake(capsys, *arguments, "--out", tmp_path / "out")
    for part in (
        f"cars ({paths[1]}): 1 missing: head.weight",
        f"dtd ({paths[2]}): 1 of another dtype or shape: "
        "head.weight (found F32[9, 7], expected F32[5, 7])",
        f"sun ({paths[3]}): 1 not in the base: classifier.weight",
        "--only vision.",
    ):
        assert part in message
    assert not (tmp_path / "out").exists()

    only = ["--only", "vision.patch,vision.norm."]
    outside = {"vision.temperature", "vision.empty", "head.weight", "vision.position_ids"}
    for method in ("arithmetic", "unify"):
        out = tmp_path / method
        assert _run(*arguments, *only, "--method", method, "--out", out) == 0
        printed = capsys.readouterr().out
        assert "tensors: 4: " in printed
        assert "head.weight" in printed
        assert "Left out of model sun: classifier.weight" in printed
        report = json.loads((out / "merge.json").read_text())
        assert set(report["tensors"]["from_base"]) == outside
        assert report["models"][2]["left_out"] == ["classifier.weight"]

    merged = load_file(tmp_path / "arithmetic" / "model.safetensors")
    assert merged.keys() == base.keys() | IDS.keys()
    for name, array in (base | IDS).items():
        expected = array.astype(np.float64)
        if name not in outside:
            expected = expected + 0.3 * sum(model[name] - array for model in models)
        np.testing.assert_allclose(merged[name], expected, rtol=1e-6, atol=1e-6)

    inside = {name: array for name, array in base.items() if name not in outside}
    tuned = [{name: model[name] for name in inside} for model in models]
    library = matu.unify(matu.task_vectors(matu.stack(tuned), inside), magnitude="max")
    unified = tmp_path / "unify" / "unified.safetensors"
    np.testing.assert_allclose(load_file(unified)["scales"], library.scales, rtol=1e-6)
    _rebuild(unified, paths[0], "dtd", tmp_path / "r.safetensors")
    rebuilt = load_file(tmp_path / "r.safetensors")
    expected = matu.apply_vectors(inside, matu.modulate(library))
    for name, array in (base | IDS).items():
        want = np.asarray(expected[name][1]) if name in inside else array
        # Numbers of size 1 are added, which may cancel: two roundings of them.
        np.testing.assert_allclose(rebuilt[name], want, rtol=1e-6, atol=2e-7)


def test_prefixes_after_an_exclamation_mark_come_from_the_base(tmp_path, capsys):
    base, models = _family()
    for number, model in enumerate(models):
        model["head.weight"] = np.zeros((7 + number, 7), np.float32)
        model["head.more"] = np.zeros(2, np.float32)
    paths = _save(tmp_path / "in", base, models)
    arguments = ["--base", paths[0], "--models", *paths[1:]]
    assert _run(*arguments, "--only", "!head.", "--out", tmp_path / "a") == 0
    assert _run(*arguments, "--only", "vision.", "--out", tmp_path / "b") == 0
    left, right = (load_file(tmp_path / name / "unified.safetensors") for name in "ab")
    assert left.keys() == right.keys()
    only = ["--only", "vision.,!vision.norm", "--out", tmp_path / "c"]
    assert _run(*arguments, *only) == 0
    report = json.loads((tmp_path / "c" / "merge.json").read_text())
    assert set(report["tensors"]["from_base"]) == {
        "vision.norm.weight",
        "vision.norm.bias",
        "head.weight",
    }
    assert _run(*arguments, "--only", "!head.more,!head.weight", "--out", tmp_path / "d") == 0
    message = _mistake(capsys, *arguments, "--only", "!haed", "--out", tmp_path / "e")
    assert "begins with 'haed'" in message


def test_the_hint_where_every_prefix_has_a_misfit_does_what_it_says(tmp_path, capsys):
    base = {name.removeprefix("vision."): array for name, array in _family()[0].items()}
    base = {f"all {name}": array for name, array in base.items()}  # one first word for all
    base = {name.replace(".", "_"): array for name, array in base.items()}
    names = list(base)
    base = {f"m.{name}": base[name] for name in names}
    tuned = base | {"m.all head_weight": np.zeros((2, 2), np.float32)}
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "one")]
    for path, tree in zip(paths, (base, tuned), strict=True):
        save_file({name: np.asarray(array) for name, array in tree.items()}, path)
    arguments = ["--base", paths[0], "--models", paths[1], "--out", tmp_path / "out"]
    hint = _mistake(capsys, *arguments).split("--only ")[1].strip()
    assert _run(*arguments, "--only", *shlex.split(hint)) == 0


def test_a_prefix_without_tensors_is_named(tmp_path, capsys):
    paths = _save(tmp_path / "in", *_family())
    message = _mistake(
        capsys, "--base", paths[0], "--models", paths[1], "--only", "text.", "--out", tmp_path / "o"
    )
    for part in ("'text.'", str(paths[0]), "head., vision."):
        assert part in message


def test_only_integers_are_nothing_to_merge(tmp_path, capsys):
    paths = _save(tmp_path / "in", *_family())
    only = ["--only", "vision.position_ids"]
    message = _mistake(
        capsys, "--base", paths[0], "--models", paths[1], *only, "--out", tmp_path / "o"
    )
    assert "no parameters to merge" in message


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_what_cannot_be_merged_must_be_equal(tmp_path, capsys, dtype):
    base, models = _family()
    base["head.steps"] = np.arange(3).astype(dtype)
    models = [model | {"head.steps": base["head.steps"]} for model in models]
    models[1]["head.steps"] = base["head.steps"] + 1
    paths = _save(tmp_path / "in", base, models)
    arguments = ["--base", paths[0], "--models", *paths[1:], "--out", tmp_path / "out"]
    message = _mistake(capsys, *arguments)
    for part in ("head.steps", f"dtd ({paths[2]})", "--only"):
        assert part in message
    assert "sun" not in message
    assert _run(*arguments, "--only", "vision.") == 0


def test_models_of_another_dtype_are_refused(tmp_path, capsys):
    base, models = _family()
    models[0]["head.weight"] = models[0]["head.weight"].astype(np.float16)
    paths = _save(tmp_path / "in", base, models)
    message = _mistake(
        capsys, "--base", paths[0], "--models", *paths[1:], "--out", tmp_path / "out"
    )
    assert "head.weight (found F16[5, 7], expected F32[5, 7])" in message


@pytest.mark.parametrize("method", ["unify", "ties", "arithmetic"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_named(tmp_path, capsys, method, bad):
    base, models = _family()
    models[2]["vision.patch.weight"][30, 5] = bad  # in the second block of 1024
    paths = _save(tmp_path / "in", base, models)
    arguments = ["--models", *paths[1:], "--method", method, "--out", tmp_path / "out"]
    message = _mistake(capsys, "--base", paths[0], *arguments)
    for part in (f"model sun ({paths[3]})", "vision.patch.weight", "1 of the 1517"):
        assert part in message
    assert not (tmp_path / "out").exists()

    base["vision.norm.bias"][1] = bad
    paths = _save(tmp_path / "in", base, models)
    message = _mistake(capsys, "--base", paths[0], *arguments)
    assert f"the base ({paths[0]}): tensor vision." in message


def test_differences_beyond_the_dtype_are_named(tmp_path, capsys):
    base, models = _family(np.float16)
    base["vision.norm.bias"][:] = -60_000
    for model in models:
        model["vision.norm.bias"][:] = -60_000
    models[1]["vision.norm.bias"][2] = 60_000
    paths = _save(tmp_path / "in", base, models)
    arguments = ["--base", paths[0], "--models", *paths[1:], "--out", tmp_path / "out"]
    message = _mistake(capsys, *arguments)
    for part in (f"model dtd ({paths[2]})", "vision.norm.bias", "120000", "float16"):
        assert part in message
    message = _mistake(capsys, *arguments, "--method", "arithmetic", "--scale", "2")
    for part in ("vision.norm.bias", "beyond the largest float16", "--scale"):
        assert part in message
    assert _run(*arguments, "--method", "arithmetic", "--scale", "0.5") == 0


# ------------------------------------------------------------------ the program


def test_names_come_from_folders_and_files(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b.safetensors", tmp_path / "c" / "model.safetensors"]
    assert name_models(paths, None) == dict(zip("abc", paths, strict=True))
    assert list(name_models(paths, ["x", "y", "z"])) == ["x", "y", "z"]


def test_links_are_named_as_given(tmp_path, monkeypatch):
    (tmp_path / "blobs").mkdir()
    for name, blob in (("cars", "1f2e"), ("dtd", "9a")):
        (tmp_path / "blobs" / blob).touch()
        (tmp_path / f"{name}.safetensors").symlink_to(tmp_path / "blobs" / blob)
    (tmp_path / "sun").symlink_to(tmp_path / "blobs")
    paths = [tmp_path / name for name in ("cars.safetensors", "dtd.safetensors", "sun")]
    assert list(name_models(paths, None)) == ["cars", "dtd", "sun"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    relative = [Path("."), Path("../sun/model.safetensors"), Path("..")]
    assert list(name_models(relative, None)) == ["here", "sun", tmp_path.name]


def test_two_models_of_one_name_are_refused(tmp_path, capsys):
    arguments = ["--base", "b", "--models", "x/checkpoint-9", "y/checkpoint-9"]
    arguments += ["--out", tmp_path / "out"]
    message = _mistake(capsys, *arguments)
    for part in ("x/checkpoint-9", "y/checkpoint-9", "'checkpoint-9'", "--names"):
        assert part in message
    assert "both called 'n'" in _mistake(capsys, *arguments, "--names", "n", "n")
    assert "found 1, expected 2" in _mistake(capsys, *arguments, "--names", "n")


MERGE = ["--base", "b", "--models", "m", "--out", "o"]
REBUILD = ["--base", "b", "--unified", "u", "--task", "t", "--out", "o"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "required: --base, --out"),
        (["--base", "b", "--out", "o"], "either --models to merge, or --unified"),
        ([*MERGE, "--unified", "u"], "either --models to merge, or --unified"),
        ([*MERGE, "--task", "t"], "--task has no effect with --method unify"),
        ([*MERGE, "--density", "0.1"], "--density has no effect with --method unify"),
        ([*MERGE, "--scale", "1"], "--scale has no effect with --method unify"),
        ([*MERGE, "--method", "ties", "--magnitude", "max"], "--magnitude has no effect with"),
        ([*MERGE, "--method", "arithmetic", "--density", "0.1"], "--density has no effect with"),
        ([*REBUILD, "--names", "n"], "--names has no effect with --unified"),
        ([*REBUILD, "--method", "unify"], "--method has no effect with --unified"),
        ([*REBUILD, "--only", "x"], "--only has no effect with --unified"),
        (["--base", "b", "--unified", "u", "--out", "o"], "--task is missing"),
        ([*MERGE, "--method", "tie"], "invalid choice: 'tie'"),
        ([*MERGE, "--metod", "ties"], 'Did you mean "method"'),
        ([*MERGE, "--meth", "ties"], 'Did you mean "method"'),
        ([*MERGE, "--method", "ties", "--density", "0"], "--density: found 0.0"),
        ([*MERGE, "--method", "ties", "--density", "1.5"], "--density: found 1.5"),
        ([*MERGE, "--method", "ties", "--density", "nan"], "--density: found nan"),
        ([*MERGE, "--method", "ties", "--density", "few"], "invalid float value: 'few'"),
        ([*MERGE, "--method", "ties", "--scale", "inf"], "--scale: found inf"),
        ([*MERGE, "--only", "a,,b"], "--only: found an empty prefix"),
        ([*MERGE, "--only", "a,!"], "--only: found an empty prefix"),
        ([*MERGE, "--names", ""], "--names: found an empty name"),
        (["--base", "b", "--models", "m\udcff", "--out", "o"], "'m\\udcff', which is no UTF-8"),
        (["--base", "b", "--out", "o", "--models"], "--models: expected at least one argument"),
    ],
)
def test_a_wrong_command_is_one_message(arguments, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = _mistake(capsys, *arguments)
    assert part in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_a_checkpoint_that_is_not_there_leaves_no_folder(tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert "nowhere: no such file" in _mistake(
        capsys, "--base", "nowhere", "--models", "m", "--out", out
    )
    assert not out.exists()


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        _run("--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for option in ("--base", "--density", "--only", "--task", "examples:"):
        assert option in out


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    paths = _save(tmp_path / "in", *_family())
    arguments = ["--base", paths[0], "--models", *paths[1:]]
    before = sorted((tmp_path / "in").iterdir())
    assert "is not empty" in _mistake(capsys, *arguments, "--out", tmp_path / "in")
    assert sorted((tmp_path / "in").iterdir()) == before
    assert "cannot be used" in _mistake(capsys, *arguments, "--out", paths[0])


@pytest.mark.parametrize("method", ["unify", "ties"])
def test_ctrl_c_leaves_nothing(tmp_path, capsys, monkeypatch, method):
    (tmp_path / "out").mkdir()
    paths = _save(tmp_path / "in", *_family())

    def interrupt(self, name, data, start=0):
        raise KeyboardInterrupt

    monkeypatch.setattr(methods.Writer, "write", interrupt)
    arguments = ["--base", paths[0], "--models", *paths[1:], "--method", method]
    for out in ("out", "new"):
        assert _run(*arguments, "--out", tmp_path / out) == 130
        assert "Interrupted" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [TensorFileError("no room"), OSError(28, "no room")])
def test_a_late_error_takes_the_result_with_it(tmp_path, capsys, monkeypatch, error):
    paths = _save(tmp_path / "in", *_family())

    def fail(*_):
        raise error

    monkeypatch.setattr(running, "write_json", fail)
    message = _mistake(
        capsys, "--base", paths[0], "--models", *paths[1:], "--out", tmp_path / "out"
    )
    assert "no room" in message
    assert not (tmp_path / "out").exists()


def test_merge_json_says_everything(tmp_path):
    paths = _save(tmp_path / "in", *_family())
    arguments = ["--base", paths[0], "--models", *paths[1:], "--names", "a", "b", "[c]"]
    assert _run(*arguments, "--method", "ties", "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert report["settings"] == {"density": 0.2, "scale": 1.0}
    assert report["parameters"] == sum(np.prod(shape, dtype=int) for shape in SHAPES.values())
    assert [model["name"] for model in report["models"]] == ["a", "b", "[c]"]
    assert report["tensors"]["equal"] == ["vision.position_ids"]
    assert report["versions"]["jax"] == jax.__version__
    assert report["seconds"] > 0
    assert len(report["base"]["fingerprint"]) == 64


def test_tables_are_not_cut_in_pipes(tmp_path, capsys):
    names = [f"a-rather-long-name-{i:02}" for i in range(14)]
    base, models = _family(models=14)
    paths = _save(tmp_path / "in", base, models, names)
    assert _run("--base", paths[0], "--models", *paths[1:], "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert all(out.count(name) == 2 for name in names)
    assert "…" not in out
    rows = [line.split() for line in out.splitlines() if names[3] in line]
    assert len(rows[1]) == 2 + 14


# ------------------------------------------------------------------ rebuilding


@pytest.fixture
def unified(tmp_path):
    paths = _save(tmp_path / "in", *_family())
    assert _run("--base", paths[0], "--models", *paths[1:], "--out", tmp_path / "unified") == 0
    return tmp_path / "unified", paths[0]


def test_rebuilding_takes_the_folder_or_the_file(unified, tmp_path):
    folder, base = unified
    for number, file in enumerate((folder, folder / "unified.safetensors")):
        out = tmp_path / f"{number}"
        assert _run("--base", base, "--unified", file, "--task", "sun", "--out", out) == 0
    found = [load_file(tmp_path / f"{number}" / "model.safetensors") for number in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *found)
    report = json.loads((tmp_path / "0" / "merge.json").read_text())
    assert (report["task"], report["models"]) == ("sun", list(NAMES))
    _rebuild(folder / "unified.safetensors", base, "sun", tmp_path / "r.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found[0], load_file(tmp_path / "r.safetensors"))


def test_rebuilding_says_what_is_lost_and_what_is_the_bases(tmp_path, capsys):
    base, models = _family()
    models[1]["dtd.only"] = np.ones(2, np.float32)
    paths = _save(tmp_path / "in", base, models)
    arguments = ["--base", paths[0], "--models", *paths[1:], "--only", "vision."]
    assert _run(*arguments, "--out", tmp_path / "u") == 0
    cosine = json.loads((tmp_path / "u" / "merge.json").read_text())["models"][1]["cosine"]
    assert 0.3 < cosine < 0.99
    unified = tmp_path / "u" / "unified.safetensors"
    rebuild = ["--base", paths[0], "--task", "dtd", "--unified"]

    capsys.readouterr()
    assert _run(*rebuild, unified, "--out", tmp_path / "r") == 0
    out = capsys.readouterr().out
    assert f"the cosine between its task vector and the one rebuilt is {cosine:.4f}" in out
    assert "Not dtd's own but the base's, tensors: 1: head.weight\n" in out
    assert "Only dtd has, and lost: dtd.only" in out
    report = json.loads((tmp_path / "r" / "merge.json").read_text())
    assert report["cosine"] == pytest.approx(cosine, abs=1e-6)
    assert (report["from_base"], report["left_out"]) == (["head.weight"], ["dtd.only"])

    with TensorFiles(unified) as file:
        metadata = file.metadata
    older = {k: v for k, v in metadata.items() if k not in ("cosines", "from_base", "left_out")}
    save_file(load_file(unified), tmp_path / "older.safetensors", older)
    assert _run(*rebuild, tmp_path / "older.safetensors", "--out", tmp_path / "o") == 0
    out = capsys.readouterr().out
    assert "the unified file does not say; unify again" in out
    assert "but the base's, tensors: 2: " in out
    assert "(some may be equal in all)" in out


def test_links_out_of_the_base_are_not_copied(tmp_path, capsys):
    base, models = _family()
    paths = _save(tmp_path / "in", base, models)
    folder, secret = tmp_path / "base", tmp_path / "secret.txt"
    folder.mkdir()
    secret.write_text("secret")
    Path(paths[0]).rename(folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "alias.json").symlink_to("config.json")
    (folder / "notes.json").symlink_to(secret)
    line = "Not copied, links out of the base's folder: notes.json\n"
    merge = ["--base", folder, "--models", *paths[1:]]
    assert _run(*merge, "--method", "arithmetic", "--out", tmp_path / "a") == 0
    assert line in capsys.readouterr().out
    assert _run(*merge, "--out", tmp_path / "u") == 0
    rebuild = ["--base", folder, "--unified", tmp_path / "u", "--task", "dtd"]
    assert _run(*rebuild, "--out", tmp_path / "r") == 0
    assert line in capsys.readouterr().out
    for out in (tmp_path / "a", tmp_path / "r"):
        files = sorted(file.name for file in out.iterdir())
        assert files == ["alias.json", "config.json", "merge.json", "model.safetensors"]
        report = json.loads((out / "merge.json").read_text())
        assert report["copied_files"] == ["alias.json", "config.json"]
        assert report["links_left_out"] == ["notes.json"]


def test_no_more_than_five_names_of_tensors_are_printed(tmp_path, capsys):
    base, models = _family()
    more = {f"more.{number}": np.zeros(2, np.float32) for number in range(9)}
    models[1] |= {f"own.{number}": np.zeros(2, np.float32) for number in range(9)}
    paths = _save(tmp_path / "in", base | more, [more | model for model in models])
    merge = ["--base", paths[0], "--models", *paths[1:], "--only", "!more.,!own."]
    assert _run(*merge, "--out", tmp_path / "u") == 0
    rebuild = ["--base", paths[0], "--unified", tmp_path / "u", "--task", "dtd"]
    assert _run(*rebuild, "--out", tmp_path / "r") == 0
    out = capsys.readouterr().out
    for name in ("more", "own"):
        listed = ", ".join(f"{name}.{number}" for number in range(5))
        assert out.count(f": {listed} and 4 more") == 2
        assert f"{name}.5" not in out


def test_a_task_that_is_not_there_is_named(unified, tmp_path, capsys):
    arguments = ["--base", unified[1], "--unified", unified[0], "--out", tmp_path / "out"]
    message = _mistake(capsys, *arguments, "--task", "carz")
    assert "no task 'carz'" in message
    assert 'Did you mean "cars"' in message
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(unified, tmp_path, capsys):
    arguments = ["--unified", unified[0], "--task", "sun", "--out", tmp_path / "out"]
    base, _ = _family()
    base["head.weight"][0, 0] += 1
    other = tmp_path / "other.safetensors"
    save_file({**{name: np.asarray(array) for name, array in base.items()}, **IDS}, other)
    message = _mistake(capsys, "--base", other, *arguments)
    for part in (str(other), "is not the base", "base.safetensors", "fingerprint"):
        assert part in message
    save_file({"head.weight": base["head.weight"][:2]}, other)
    message = _mistake(capsys, "--base", other, *arguments)
    assert "head.weight (found F32[2, 7], expected F32[5, 7])" in message


def test_what_is_no_unified_is_refused(unified, tmp_path, capsys):
    folder, base = unified
    arguments = ["--base", base, "--task", "sun", "--out", tmp_path / "out"]
    assert "found format 'pt'" in _mistake(capsys, *arguments, "--unified", base)
    with TensorFiles(folder / "unified.safetensors") as file:
        metadata = file.metadata
    tensors = load_file(folder / "unified.safetensors")
    newer = tmp_path / "newer.safetensors"
    save_file(tensors, newer, metadata | {"format_version": "3"})
    assert "version '3'; expected" in _mistake(capsys, *arguments, "--unified", newer)
    tensors["mask.head.weight"] = tensors["mask.head.weight"][:2]
    save_file(tensors, newer, metadata)
    assert "wrong tensors: mask.head.weight" in _mistake(capsys, *arguments, "--unified", newer)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": None}, "models: missing"),
        ({"models": "{"}, "not JSON"),
        ({"models": "[" * 100_000}, "nested"),
        ({"models": "5"}, "models: found 5"),
        ({"models": "[]"}, "models: found []"),
        ({"models": '[["a"], ["b"], ["c"]]'}, "models.0: found ['a']"),
        ({"models": '["a", "a", "b"]'}, "expected names that differ"),
        ({"models": '["a", "b"]'}, "one cosine per model"),
        ({"models": '["a", "b"]', "cosines": None}, "wrong tensors: "),
        ({"cosines": "[2, 0, 0]"}, "cosines.0: found 2"),
        ({"cosines": '["x", 0, 0]'}, "cosines.0: found 'x'"),
        ({"from_base": '{"a": 1}'}, "from_base: found"),
        ({"left_out": '{"a": 1}'}, "left_out.a: found 1"),
        ({"base_fingerprint": None}, "base_fingerprint: missing"),
        ({"base_fingerprint": "x"}, "base_fingerprint: found 'x'"),
    ],
)
def test_damaged_metadata_of_a_unified_are_named(unified, tmp_path, capsys, changes, words):
    folder, base = unified
    with TensorFiles(folder / "unified.safetensors") as file:
        metadata = file.metadata | changes
    metadata = {name: text for name, text in metadata.items() if text is not None}
    bad = tmp_path / "bad.safetensors"
    save_file(load_file(folder / "unified.safetensors"), bad, metadata)
    arguments = ["--base", base, "--unified", bad, "--task", "sun", "--out", tmp_path / "out"]
    message = _mistake(capsys, *arguments)
    assert words in message
    assert f"{bad}: damaged" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [np.inf, np.nan, -1.0])
def test_scales_must_be_finite_and_not_negative(unified, tmp_path, capsys, scale):
    folder, base = unified
    with TensorFiles(folder / "unified.safetensors") as file:
        metadata = file.metadata
    tensors = load_file(folder / "unified.safetensors")
    tensors["scales"][1] = scale
    bad = tmp_path / "bad.safetensors"
    save_file(tensors, bad, metadata)
    arguments = ["--base", base, "--unified", bad, "--task", "sun", "--out", tmp_path / "out"]
    assert f"scales of dtd: {scale}" in _mistake(capsys, *arguments)


def test_integers_are_no_vector(unified, tmp_path, capsys):
    folder, base = unified
    with TensorFiles(folder / "unified.safetensors") as file:
        metadata = file.metadata
    tensors = load_file(folder / "unified.safetensors")
    bad = tmp_path / "bad.safetensors"
    more = {"vector.x": np.zeros(8, np.int64), "mask.x": np.zeros((3, 1), np.uint8)}
    save_file(tensors | more, bad, metadata)
    arguments = ["--base", base, "--unified", bad, "--task", "sun", "--out", tmp_path / "out"]
    assert "wrong tensors: mask.x, vector.x" in _mistake(capsys, *arguments)


def test_names_and_paths_are_printed_as_they_are(tmp_path, capsys):
    folder = tmp_path / "[bold] in [red]"
    paths = _save(folder, *_family())
    names = ["[red]", "[/]", ":fire:"]
    arguments = ["--base", paths[0], "--models", *paths[1:], "--names", *names]
    assert _run(*arguments, "--out", folder / "u[i]") == 0
    out = capsys.readouterr().out
    assert all(out.count(name) >= 2 for name in names)
    assert str(folder / "u[i]") in out
    arguments = ["--base", paths[0], "--unified", folder / "u[i]", "--out", folder / "[b]"]
    assert _run(*arguments, "--task", "[/]") == 0
    out = capsys.readouterr().out
    assert "[/]: scale" in out
    assert str(folder / "[b]") in out
    assert "no task '[x]'" in _mistake(capsys, *arguments[:-1], folder / "o", "--task", "[x]")


# ------------------------------------------------------------------ transformers


def test_transformers_checkpoints_from_end_to_end(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=8,
    )
    torch.manual_seed(0)
    base = transformers.CLIPVisionModelWithProjection(config)
    base.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text("{}")
    tuned = {}
    for task in ("cars", "dtd"):
        model = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        # Shards, as large models have them.
        model.save_pretrained(tmp_path / task, max_shard_size="5KB")
        assert (tmp_path / task / INDEX).exists()
        tuned[task] = model.state_dict()
    models = ["--models", tmp_path / "cars", tmp_path / "dtd"]
    base_path = ["--base", tmp_path / "clip"]

    def loaded(folder):
        read = transformers.CLIPVisionModelWithProjection.from_pretrained
        model, info = read(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert (folder / "preprocessor_config.json").exists()
        model(pixel_values=torch.zeros(1, 3, 16, 16))
        return {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    start = {name: tensor.numpy() for name, tensor in base.state_dict().items()}
    trees = [{name: t.numpy() for name, t in state.items()} for state in tuned.values()]
    floating = [name for name, array in start.items() if array.dtype == np.float32]
    floats = [{name: tree[name] for name in floating} for tree in (start, *trees)]

    assert _run(*base_path, *models, "--method", "arithmetic", "--out", tmp_path / "sum") == 0
    merged = loaded(tmp_path / "sum")
    for name in floating:
        expected = floats[0][name] + 0.3 * sum(tree[name] - floats[0][name] for tree in floats[1:])
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-6)

    assert _run(*base_path, *models, "--out", tmp_path / "u") == 0
    rebuilt = [*base_path, "--unified", tmp_path / "u", "--task", "dtd"]
    assert _run(*rebuilt, "--out", tmp_path / "again") == 0
    found = loaded(tmp_path / "again")
    vectors = matu.task_vectors(matu.stack(floats[1:]), floats[0])
    expected = matu.apply_vectors(floats[0], matu.modulate(matu.unify(vectors, magnitude="max")))
    for name in floating:
        np.testing.assert_allclose(found[name], expected[name][1], rtol=1e-5, atol=1e-6)
