"""Tables of examples: columns, splits by group, and what is wrong with file and line."""

import collections
import contextlib
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from matu_jax.data import SPLITS, ImageTask, Transform, manifest, num_examples, rows, sites, table

SMALL = Transform(8)
GROUPED = st.lists(  # of group, task and site
    st.tuples(st.integers(0, 12), st.sampled_from("AB"), st.sampled_from("xy")),
    min_size=30,
    max_size=80,
)


def tasks_of(found, **changes):
    options = {"transform": SMALL, "validation_fraction": 0.2, "seed": 0}
    return rows.tasks_of(found, **{**options, **changes})


def notes_of(task):
    """All but how splits were drawn."""
    return tuple(note for note in task.notes if "drawn" not in note)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MATU_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(24):
        pixels = rng.integers(0, 256, (10, 12, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def written(folder, text, name="m.csv"):
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_images_with_everything_given(pictures):
    lines = ["path,label,site,task,split,group"]
    for i in range(24):
        split = ("train", "val", "test")[i // 2 % 3]
        lines.append(f"{i}.png,{'ab'[i % 2]},north,eyes,{split},p{i}")
    (task,) = tasks_of(manifest.read(written(pictures, "\ufeff" + "\n".join(lines) + "\n")))
    assert isinstance(task, ImageTask)
    assert (task.name, task.class_names) == ("eyes", ("a", "b"))
    assert [len(getattr(task, part).labels) for part in SPLITS] == [8, 8, 8]
    assert task.sites == {part: ["north"] * 8 for part in SPLITS}
    with Image.open(pictures / "1.png") as picture:
        from matu_jax.data import images

        expected = images.apply(picture.convert("RGB"), SMALL)
    np.testing.assert_array_equal(task.train.images[1], expected)
    assert task.train.labels[:2].tolist() == [0, 1]


def test_images_are_read_again_where_a_file_has_changed(pictures):
    file = written(pictures, "path,label\n" + "".join(f"{i}.png,{i % 2}\n" for i in range(24)))
    (before,) = tasks_of(manifest.read(file))
    (same,) = tasks_of(manifest.read(file))
    assert before.fingerprint == same.fingerprint
    for i in range(24):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(pictures / f"{i}.png")
    (after,) = tasks_of(manifest.read(file))
    assert after.fingerprint != before.fingerprint
    assert after.train.images[..., 1:].max() == 0
    # What was kept of the files as they were is gone, and of two tables each keeps its own.
    (kept,) = (pictures / "cache" / "rows").iterdir()
    tasks_of(manifest.read(written(pictures, file.read_text(), "other.csv")))
    assert len(list((pictures / "cache" / "rows").iterdir())) == 2
    kept.write_bytes(kept.read_bytes()[:200])  # damaged
    assert tasks_of(manifest.read(file))[0].fingerprint == after.fingerprint
    assert len(list((pictures / "cache" / "rows").iterdir())) == 2
    assert before.sites == {}  # nobody's: dealt out


def test_features_and_numbers_are_a_regression(tmp_path):
    text = "age,dose,label,task\n"
    text += "".join(f"{i},{i / 2},{-i},{'ab'[i % 2]}\n" for i in range(40))
    one, other = tasks_of(manifest.read(written(tmp_path, text)))
    assert (one.name, other.name) == ("a", "b")
    for part in SPLITS:
        split = getattr(one, part)
        assert (split["x"].dtype, split["y"].dtype) == (np.float32, np.float32)
        np.testing.assert_array_equal(split["y"], -split["x"][:, 0])
    assert sum(len(getattr(one, part)["y"]) for part in SPLITS) == 20


def test_features_and_words_are_classes(tmp_path):
    text = "x,label\n" + "".join(f"{i},{('no', 'yes', '3')[i % 3]}\n" for i in range(30))
    (task,) = tasks_of(manifest.read(written(tmp_path, text, "flu.csv")))
    assert task.name == "flu"
    assert notes_of(task) == ("features, in the order of x: x", "classes: 0 = 3, 1 = no, 2 = yes")
    assert task.train["y"].dtype == np.int32
    np.testing.assert_array_equal(task.train["y"], (task.train["x"][:, 0].astype(int) + 1) % 3)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (("1234567", "none", "other"), "0 = 1234567, 1 = none, 2 = other"),
        (("1", "21", "x", "y"), "0 = 1, 1 = 21, 2 = x, 3 = y"),
        (("1_0", "10", "x"), "0 = 10, 1 = 1_0, 2 = x"),
        (("nan", "inf", "3"), "0 = 3, 1 = inf, 2 = nan"),
    ],
)
def test_names_that_look_like_numbers_stay_as_they_are(labels, classes, tmp_path):
    text = "a,label\n" + "".join(f"{i},{labels[i % len(labels)]}\n" for i in range(60)) + "  \n"
    (task,) = tasks_of(manifest.read(written(tmp_path, text)))
    assert task.notes[-1] == f"classes: {classes}"
    assert set(task.train["y"]) == {*range(len(labels))}


@pytest.mark.parametrize("odd", ["NA", "12.5 mm", "nan", "-inf", "1e39", "1_0"])
def test_one_label_that_is_no_number_among_numbers_is_refused(odd, tmp_path):
    lines = [f"{i},{odd if i == 7 else i / 4}" for i in range(40)]
    found = manifest.read(written(tmp_path, "x,label\n" + "\n".join(lines)))
    words = rf"m\.csv, line 9: `label`: found '{odd}', no finite number, while 39 of the 40 diff"
    with pytest.raises(ValueError, match=words + r".*'class 0\.0' in place of '0\.0'"):
        tasks_of(found)


def test_tasks_of_numbers_and_of_words_are_chosen_apart(tmp_path):
    lines = [f"{i},{i / 4},size\n{i},{('no', 'yes')[i % 2]},ill" for i in range(40)]
    found = manifest.read(written(tmp_path, "x,label,task\n" + "\n".join(lines)))
    words = r"line 4: task 'size' .*such as '0\.25', and task 'ill' .*'no' \(line 3\).*data\.tasks"
    with pytest.raises(ValueError, match=words):
        tasks_of(found)
    (size,), (ill,) = tasks_of(found, wanted="size"), tasks_of(found, wanted="ill")
    assert [task.train["y"].dtype for task in (size, ill)] == [np.float32, np.int32]
    # Whole numbers are names, beside words.
    whole = manifest.read(written(tmp_path, "x,label,task\n" + "\n".join(lines).replace(".", "")))
    assert [task.train["y"].dtype for task in tasks_of(whole)] == [np.int32, np.int32]


def test_features_that_a_model_sees_as_equal_are_in_the_later_of_two_splits(tmp_path):
    numbers = {"train": ("0.1", "0", "7", "8"), "val": ("7", "9"), "test": ("0.10000000001", "-0")}
    lines = [f"{x},{i},{part}" for part, xs in numbers.items() for i, x in enumerate(xs)]
    (task,) = tasks_of(manifest.read(written(tmp_path, "a,label,split\n" + "\n".join(lines))))
    kept = {part: getattr(task, part)["x"][:, 0].tolist() for part in SPLITS}
    assert kept == {"train": [8], "validation": [7, 9], "test": pytest.approx([0.1, 0])}
    assert "examples left out, since a later split has the same features: 3" in task.notes


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 30),
            st.sampled_from(("one", "two")),
            st.sampled_from(("north", "south")),
            st.sampled_from(("", "", "", "train", "val", "test")),
        ),
        min_size=60,
        max_size=90,
    ),
    st.booleans(),
)
def test_equal_features_are_in_one_split_of_all_tasks_and_sites(drawn, all_open):
    lines = ["x,label,task,site,split"]
    lines += [f"{x},{x / 2},{task},{site},{'' if all_open else s}" for x, task, site, s in drawn]
    with tempfile.TemporaryDirectory() as folder:
        found, made = manifest.read(written(Path(folder), "\n".join(lines))), ()
        with contextlib.suppress(ValueError):  # a site or a task is left without a split
            made = tasks_of(found)
    assume(made)
    seen = {p: {x for task in made for x in getattr(task, p)["x"][:, 0].tolist()} for p in SPLITS}
    assert not seen["train"] & (seen["validation"] | seen["test"])
    assert not seen["validation"] & seen["test"]
    kept = sum(len(getattr(task, part)["x"]) for task in made for part in SPLITS)
    tested = sum(len(task.test["x"]) for task in made)
    if all_open:
        assert kept == len(drawn)
    else:
        assert tested >= sum(split == "test" for *_, split in drawn)


@pytest.mark.parametrize("kind", ["numbers", "images"])
def test_without_examples_to_validate_on_a_part_of_train_is_taken(kind, pictures):
    lines = ["path,label,split,group" if kind == "images" else "x,label,split,group"]
    for i in range(24):
        example = f"{i}.png" if kind == "images" else i
        lines.append(f"{example},{'ab'[i % 2]},{'train' if i < 20 else 'test'},{i // 2}")
    (task,) = tasks_of(manifest.read(written(pictures, "\n".join(lines))))
    assert [num_examples(getattr(task, part)) for part in SPLITS] == [16, 4, 4]
    assert "validation: 4 of 20 of train, drawn by config.data.seed" in task.notes
    if kind == "numbers":
        groups = [set((getattr(task, part)["x"][:, 0] // 2).tolist()) for part in SPLITS]
        assert sum(map(len, groups)) == 12  # none in two
        assert groups[2] == {10, 11}


@pytest.mark.parametrize("kind", ["numbers", "images"])
def test_a_part_of_train_is_validated_on_where_groups_have_the_rest(kind, pictures):
    lines = ["path,label,split,group" if kind == "images" else "x,label,split,group"]
    for i in range(24):
        example = f"{i}.png" if kind == "images" else i
        part = ("" if i % 2 else "train") if i < 20 else ("" if i % 2 else "test")
        lines.append(f"{example},{'ab'[i % 2]},{part},{i // 2}")
    (task,) = tasks_of(manifest.read(written(pictures, "\n".join(lines))))
    assert [num_examples(getattr(task, part)) for part in SPLITS] == [16, 4, 4]
    assert [note for note in task.notes if "drawn" in note] == [
        "validation: 4 of 20 of train, drawn by config.data.seed"
    ]
    if kind == "numbers":
        groups = [set((getattr(task, part)["x"][:, 0] // 2).tolist()) for part in SPLITS]
        assert sum(map(len, groups)) == 12  # none in two
        assert groups[2] == {10, 11}


@pytest.mark.parametrize(("largest", "warned"), [(1, False), (50, True)])
def test_splits_far_from_what_was_asked_for_are_told(largest, warned, tmp_path):
    """Of three groups, each of which is a split of its own, none is as small as it should be."""
    lines = [f"{i},{i / 4},{i // largest}" for i in range(150)]
    file = written(tmp_path, "\n".join(["x,label,group", *lines]))
    (task,) = tasks_of(manifest.read(file))
    found = [note for note in task.notes if note.startswith("warning: validation: drawn")]
    assert [note.partition(":")[2].partition(" for")[0] for note in found] == (
        [" validation: drawn 33 % of the examples, where 16 % were asked"] if warned else []
    )


@settings(max_examples=40, deadline=None)
@given(
    GROUPED,
    st.integers(0, 99),
)
def test_groups_never_straddle_splits(drawn, seed):
    found = [
        table.Row(f"line {i}", task, site, str(i), SPLITS, (group,), None, (float(i),))
        for i, (group, task, site) in enumerate(drawn)
    ]
    splits = table.divided(found, 0.2, seed)
    by_group = collections.defaultdict(set)
    for row, split in zip(found, splits, strict=True):
        by_group[row.groups].add(split)
    assert all(len(each) == 1 for each in by_group.values())
    assert splits == table.divided(found, 0.2, seed)


@pytest.mark.parametrize("groups", ["both", "one", "none"])
def test_an_image_of_two_tasks_is_in_one_split_whatever_its_groups(groups, pictures):
    lines = ["path,label,task,group"]
    for i in range(24):
        one, other = {"both": (f"p{i}", f"q{i}"), "one": (f"p{i}", ""), "none": ("", "")}[groups]
        lines += [f"{i}.png,{'ab'[i % 2]},t,{one}", f"{i}.png,{'ab'[i % 2]},u,{other}"]
    t, u = tasks_of(manifest.read(written(pictures, "\n".join(lines))))
    seen = {
        part: {x.tobytes() for task in (t, u) for x in getattr(task, part).images}
        for part in SPLITS
    }
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & (seen["train"] | seen["test"])
    assert sum(map(len, seen.values())) == 24
    assert notes_of(t) == notes_of(u) == ("classes: 0 = a, 1 = b",)


def test_what_a_later_split_shows_too_is_left_out_and_told(tmp_path):
    root = tmp_path / "data"
    for site in ("north", "south"):
        for part, first in (("train", 0), ("val", 100), ("test", 200)):
            for i in range(8):
                level = first + i + 50 * (site == "south")
                picture(root / site / "eyes" / part / "ab"[i % 2] / f"{i}.png", level)
    picture(root / "south" / "eyes" / "test" / "a" / "copy.png", 0)  # north trains on it
    picture(root / "north" / "eyes" / "train" / "b" / "copy.png", 200)  # and tests on this
    (task,) = tasks_of(sites.read(root))
    assert isinstance(task, ImageTask)
    levels = {part: set(getattr(task, part).images[:, 0, 0, 0].tolist()) for part in SPLITS}
    assert not levels["train"] & (levels["validation"] | levels["test"])
    assert task.sites["train"].count("north") == 7
    assert "images left out, since a later split has the same pixels: 2" in task.notes


def test_shares_are_kept_task_by_task_and_site_by_site():
    found = [
        table.Row(f"line {i}", "AB"[i % 2], "xyz"[i % 3], "0", SPLITS, (i,), None, (0.0,))
        for i in range(600)
    ]
    splits = table.divided(found, 0.25, 3)
    counted = collections.Counter(
        (row.task, row.site, split) for row, split in zip(found, splits, strict=True)
    )
    for task in "AB":
        for site in "xyz":
            assert [counted[task, site, split] for split in SPLITS] == [60, 20, 20]


@settings(max_examples=40, deadline=None)
@given(
    GROUPED,
    st.randoms(use_true_random=False),
)
def test_the_order_of_rows_is_of_no_account(drawn, random):
    found = [
        table.Row("", task, site, "0", SPLITS, (group, f"row {i}"), None, (float(i),))
        for i, (group, task, site) in enumerate(drawn)
    ]
    order = random.sample(range(len(found)), len(found))
    splits = table.divided(found, 0.2, 0)
    assert table.divided([found[i] for i in order], 0.2, 0) == [splits[i] for i in order]


def test_a_row_more_moves_few_of_the_others(tmp_path):
    lines = [f"{i},{i / 4},{'ab'[i % 2]}" for i in range(401)]

    def split_of(count):
        text = "\n".join(["x,label,task", *lines[:count]])
        made = tasks_of(manifest.read(written(tmp_path, text)))
        return {x: s for task in made for s in SPLITS for x in getattr(task, s)["x"][:, 0].tolist()}

    before = split_of(300)
    for count in range(301, 401, 10):
        after, one_more = split_of(count), split_of(count + 1)
        assert sum(after[x] != one_more[x] for x in after) <= 3
    # Independent draws agree in the sum of the squared shares, 0.64, 0.16 and 0.2: in 48 % of rows.
    assert sum(before[x] == after[x] for x in before) > 0.8 * len(before)


def test_a_folder_that_has_moved_has_the_same_splits(pictures, monkeypatch):
    text = "path,label\n" + "".join(f"{i}.png,{i % 2}\n" for i in range(24))
    file = written(pictures, text)
    there = [table.divided(manifest.read(file).rows, 0.2, 0)]
    monkeypatch.chdir(pictures)
    there.append(table.divided(manifest.read("m.csv").rows, 0.2, 0))
    monkeypatch.chdir(pictures.rename(pictures.with_name("moved")))
    there.append(table.divided(manifest.read("m.csv").rows, 0.2, 0))
    assert there[0] == there[1] == there[2]


def test_a_large_group_among_small_ones_is_trained_on():
    """Wherever its turn is, it would make another split several times as large as it should be."""
    found = [
        table.Row("", "t", "", "0", SPLITS, (f"p{max(i, 48)}",), None, (float(i),))
        for i in range(100)
    ]
    for seed in range(20):
        counted = collections.Counter(table.divided(found, 0.1, seed))
        assert counted["validation"] == 8
        assert 18 <= counted["test"] <= 21


def test_a_group_with_a_split_takes_those_without_one_along():
    found = [
        table.Row("line 2", "t", "", "0", ("test",), ("p",), None, (0.0,)),
        *(table.Row(f"line {i}", "t", "", "0", SPLITS, ("p",), None, (0.0,)) for i in range(3, 9)),
    ]
    assert table.divided(found, 0.2, 0) == ["test"] * 7


GIVEN = "path,label,site,task,split,group\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: found no header"),
        (GIVEN, "found a header and no row"),
        ("path\n0.png\n", "line 1: found path, but no column `label`"),
        ("path,Label\n0.png,a\n", 'line 1: found path, Label, but no .* Did you mean "Label"'),
        (
            "path,label,age,patient\n0.png,a,3,4\n",
            "line 1: found `path` and age, patient, expected a column `path` of images.*`group`",
        ),
        ("path,label,hospital\n0.png,a,n\n", "whose an image is, is called `site`; one that"),
        (",x,label\n0,1,a\n", "line 1: found no name of column 1, .* `to_csv` .*index=False"),
        ("x,label,,\n1,a,,\n", "line 1: found no name of column 3, 4, expected one each"),
        ("Unnamed: 0,x,label\n0,1,a\n", "line 1: found no name of column 1, .*index=False"),
        ("x,label,Group\n1,a,3\n", "line 1: found the column 'Group', .*; spell it `group`"),
        ("label,site\na,b\n", "line 1: found label, site, expected a column `path` of images too"),
        ("x;y;label\n1;2;a\n", "line 1: found columns that semicolons separate, expected commas"),
        ('"x, y";"label"\n"1";"a"\n', "line 1: found columns that semicolons separate"),
        ("\ufeffx\ty\tlabel\n1\t2\ta\n", "line 1: found columns that tabs separate"),
        (
            "patient,label\np7,1\n",
            "line 2: `patient`: found 'p7', .* called as what it is: `site` if .*, `group` if",
        ),
        ("path,label,label\n0.png,a,a\n", "found the column 'label' 2 times"),
        ("path,label\n0.png\n", "line 2: found 1 values, expected 2"),
        ("path,label\n0.png,\n", "line 2: `label` is empty"),
        ("path,label,site\n0.png,a,\n", "line 2: `site` is empty"),
        ("path,label,split\n0.png,a,tset\n", "line 2: split: found 'tset', expected one of train"),
        ("x,label\n1,2\nnan,3\n", "line 3: `x`: found 'nan', expected a finite number"),
        ("x,label\nold,1\n", "line 2: `x`: found 'old'"),
        (
            "path,label\n0.png,a\n./0.png,b\n",
            "line 3: .*0.png stands in line 2 of the task already",
        ),
        (
            GIVEN + "0.png,a,s,t,train,p\n1.png,a,s,t,test,p\n",
            "line 3: is in test, and line 2, of the same group 'p', in train",
        ),
        (
            GIVEN + "0.png,a,s,t,train,\n0.png,a,s,u,test,\n",
            r"line 3: is in test, and line 2, of the same image .*0\.png, in train",
        ),
        (
            GIVEN + "0.png,a,s,t,train,p\n0.png,a,s,u,,q\n1.png,a,s,u,test,q\n",
            "line 4: is in test, and line 2, of a group by way of other rows, in train",
        ),
        ("x,label\n1e39,1\n", "line 2: `x`: found '1e39', expected a finite number"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text, words, pictures):
    with pytest.raises(ValueError, match=words):
        manifest.read(written(pictures, text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            GIVEN + "0.png,a,s,t,train,\n1.png,b,s,t,val,\n2.png,a,n,t,test,\n",
            "line 4: site 'n' has an example of task 't' in test, and none in train; sites that "
            "have: s",
        ),
        (
            GIVEN + "0.png,a,north,t,train,\n1.png,b,north,t,val,\n2.png,a,nroth,t,test,\n",
            "sites that have: north. Is 'north' meant?",
        ),
        (GIVEN + "0.png,a,s,t,train,\n1.png,b,s,t,test,\n", "none of them in the split 'validati"),
        (
            GIVEN + "0.png,a,s,t,train,\n1.png,b,s,t,train,\n",
            r"none of them in the split 'test'\. Give it some, or more groups to divide\.$",
        ),
        ("path,label\n" + "".join(f"{i}.png,a\n" for i in range(9)), "found one class, 'a', exp"),
        (
            "path,label\n" + "".join(f"{i}.png,{i / 4}\n" for i in range(24)),
            r"'m': found 18 labels that are numbers and not whole, such as '0\.25', expected names",
        ),
        (
            "x,label,split\n0,1,train\n1,2,train\n1,2,test\n0,1,test\n3,2,val\n",
            "none of them in the split 'train'. examples left out, .* the same features: 2. Give",
        ),
        (
            "x,label,split,site\n0,1,train,s\n0,2,test,s\n1,2,train,n\n2,3,test,n\n3,2,val,n\n",
            r"'s' has .* in test, and none in train \(examples left out, .* features: 1\); sites",
        ),
        (
            "path,label\n0.png,a\n1.png,b\nno.png,c\n3.png,b\n",
            r"m\.csv, line 4: .*no.png: No such file",
        ),
        (
            "path,label\n0.png,a\n1.png,b\nm.csv,c\n3.png,b\n",
            r"m\.csv: images that cannot be used: 1\n  line 4: .*m.csv",
        ),
    ],
)
def test_what_is_wrong_with_examples_is_said(text, words, pictures):
    with pytest.raises(ValueError, match=words):
        tasks_of(manifest.read(written(pictures, text)))


def test_a_class_that_is_not_trained_is_refused_or_told(pictures):
    lines = [f"{i}.png,{'ab'[i % 2]},{('train', 'test')[i // 2 % 2]}" for i in range(20)]
    text = "\n".join(["path,label,split", *lines, "20.png,zebra,test"])
    words = (
        r"m.csv, line 22: task '\S+': found the class 'zebra' in test, which train lacks; it has a"
    )
    with pytest.raises(ValueError, match=words):
        tasks_of(manifest.read(written(pictures, text)))
    drawn = text.replace(",train", ",").replace(",test", ",")
    found = [tasks_of(manifest.read(written(pictures, drawn)), seed=s)[0].notes for s in range(9)]
    words = "warning: classes that train lacks, by the draw: 'zebra' (line 22)"
    assert 0 < sum(words in notes for notes in found) < 9


def test_labels_that_are_nearly_all_different_are_no_classes(tmp_path):
    lines = [f'{i},"{i},5"' for i in range(30)]
    with pytest.raises(
        ValueError, match=r"30 different labels in 30 rows, such as '\d+,5' \(line "
    ):
        tasks_of(manifest.read(written(tmp_path, "\n".join(["size,label", *lines]))))


def test_equal_rows_are_told(tmp_path):
    lines = [f"{i // 2},{i // 2}" for i in range(40)]
    (task,) = tasks_of(manifest.read(written(tmp_path, "\n".join(["size,label", *lines]))))
    assert "rows equal to another, in features, label and site: 20" in task.notes
    assert sum(num_examples(getattr(task, part)) for part in SPLITS) == 40


def test_a_file_that_is_not_there_and_one_that_is_no_text(tmp_path):
    with pytest.raises(ValueError, match=r"manifest: .*none\.csv: No such file"):
        manifest.read(tmp_path / "none.csv")
    (tmp_path / "m.csv").write_bytes(b"path,label\n\xff,a\n")
    with pytest.raises(ValueError, match="no UTF-8"):
        manifest.read(tmp_path / "m.csv")


def picture(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), (level, level, level)).save(path)


def test_folders_of_sites(tmp_path):
    root, level = tmp_path / "data", itertools.count()
    for site, classes in (("north", "ab"), ("south", "bc")):
        for kind in classes:
            for i in range(10):
                picture(root / site / "eyes" / "train" / kind / f"{i}.png", next(level))
            picture(root / site / "eyes" / "test" / kind / "0.png", 200 + next(level))
    for i in range(10):
        picture(root / "south" / "skin" / "train" / "x" / f"{i}.png", next(level))
        picture(root / "south" / "skin" / "train" / "y" / f"{i}.png", next(level))
    eyes, skin = tasks_of(sites.read(root))
    assert isinstance(eyes, ImageTask)
    assert eyes.class_names == ("a", "b", "c")
    assert collections.Counter(eyes.sites["test"]) == {"north": 2, "south": 2}
    assert (eyes.test.images >= 200).all()
    held = {
        s: set(eyes.train.labels[np.array(eyes.sites["train"]) == s]) for s in ("north", "south")
    }
    assert held == {"north": {0, 1}, "south": {1, 2}}
    assert set(skin.sites["train"]) == {"south"}
    assert [len(skin.sites[part]) for part in SPLITS] == [12, 4, 4]
    (only,) = tasks_of(sites.read(root), wanted="skin")
    assert only.name == "skin"
    assert only.sites == skin.sites
    with pytest.raises(ValueError, match=r'found .skni., no task of .*Did you mean "skin"'):
        tasks_of(sites.read(root), wanted="skni")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (
            "train/a/0.png",
            "found 'train' in it, which is the name of a split, expected one per site",
        ),
        ("eyes/train/a/0.png", "found 'train' in it, .* expected one per task"),
        (
            "eyes/train/a/0.png",
            "If .*/data is the folder of one site, give the one above, .*[0-9]$",
        ),
        ("eyes/a/0.png", "If .*/data is the folder of one site, give the one above, .*[0-9]$"),
        ("data/n/eyes/train/a/0.png", r"eyes/train: .* where .*/data/data/n is the folder of a si"),
        ("n/eyes/train/0.png", "The layout is .*<site>/<task>/<split>/<class>/<image>"),
    ],
)
def test_one_level_too_many_or_too_few_is_said(path, words, tmp_path):
    picture(tmp_path / "data" / path, 0)
    with pytest.raises(ValueError, match=words):
        sites.read(tmp_path / "data")
    with pytest.raises(ValueError, match="there is no such directory"):
        sites.read(tmp_path / "nowhere")


NFC, NFD = "caf\u00e9", "cafe\u0301"


def test_names_of_two_unicode_forms_are_one_at_sites(tmp_path):
    root, level = tmp_path / "data", itertools.count()
    for site, task, kind in (("n", NFC, NFD), ("s", NFD, NFC)):
        for name in (kind, "tea"):
            for i in range(10):
                picture(root / site / task / name / f"{i}.png", next(level))
    (task,) = tasks_of(sites.read(root), wanted=NFD)
    assert isinstance(task, ImageTask)
    assert (task.name, task.class_names) == (NFC, (NFC, "tea"))
    (root / "s" / NFD).rename(root / "s" / "cups")
    picture(root / NFC / "cups" / "a" / "0.png", 0)
    picture(root / NFD / "cups" / "a" / "0.png", 0)
    with pytest.raises(ValueError, match=r"data/cafe\\u0301' and '.*data/caf\\xe9' are called the"):
        sites.read(root)


def test_names_of_two_unicode_forms_are_one_in_a_manifest(tmp_path):
    lines = ["x,label,site,task,group,split"]
    for i in range(40):
        one = (NFC, NFD)[i % 2]
        lines.append(f"{i},{(one, 'tea')[i // 2 % 2]},{one},{one},{one}{i // 4},")
    (task,) = tasks_of(manifest.read(written(tmp_path, "\n".join(lines))))
    assert (task.name, set(task.sites["train"])) == (NFC, {NFC})
    assert task.notes[-1] == f"classes: 0 = {NFC}, 1 = tea"
    halves = [{x // 4 for x in getattr(task, part)["x"][:, 0]} for part in SPLITS]
    assert not halves[0] & halves[2]
    assert not halves[1] & (halves[0] | halves[2])


def test_files_of_sites_that_are_no_images_are_told_as_those_of_folders(tmp_path):
    root, level = tmp_path / "data", itertools.count()
    for site in ("north", "south"):
        for kind in "ab":
            for i in range(10):
                picture(root / site / "eyes" / "train" / kind / f"{i}.png", next(level))
        (root / site / "eyes" / "read me.txt").touch()
    picture(tmp_path / "other" / "x.png", 99)
    (root / "south" / "eyes" / "train" / "a" / "out.png").symlink_to(tmp_path / "other" / "x.png")
    (task,) = tasks_of(sites.read(root))
    assert notes_of(task) == (
        f"files that are no images: 2, such as {root}/north/eyes/read me.txt",
        f"links out of the folder: 1, such as {root}/south/eyes/train/a/out.png",
        "classes: 0 = a, 1 = b",
    )


def notes_on(lines, folder):
    return notes_of(tasks_of(manifest.read(written(folder, "\n".join(lines))))[0])


def test_notes_say_how_a_task_was_read(tmp_path):
    assert notes_on(["age,dose,label", *(f"{i},0,{i / 4}" for i in range(40))], tmp_path) == (
        "features, in the order of x: age, dose",
        "a regression of `label`, from 0 to 9.75",
    )
    assert notes_on(["age,label", *(f"{i},{i % 2}" for i in range(40))], tmp_path)[-1] == (
        "a regression of `label`, from 0 to 1 (names in place of numbers, such as 'class 0', would "
        "be classes)"
    )
    many = ["x,label", *(f"{i},{'a' * (i % 25 + 1)}" for i in range(100))]
    assert notes_on(many, tmp_path)[-1].endswith(f", 19 = {'a' * 20} and 5 more")


@pytest.mark.parametrize(
    ("name", "numbers", "warned"),
    [
        *((name, range(8), True) for name in ("patient", "Subject No", "pat_id", "ID", "visitId")),
        ("Hospital", range(8), True),
        *((name, range(8), False) for name in ("age", "humid", "ACID", "ideal", "paid")),
        ("patient", range(80), False),  # each its own
        ("patient", [0.5, 1.5], False),
    ],
)
def test_a_column_that_may_be_a_group_is_told(name, numbers, warned, tmp_path):
    numbers = list(numbers)
    lines = [f"x,{name},label"]
    lines += [f"{i},{numbers[i % len(numbers)]},{i / 4}" for i in range(80)]
    found = [note for note in notes_on(lines, tmp_path) if note.startswith("warning")]
    told = (f"{name!r}, whole numbers", "`group`", "`site`")
    assert [all(word in note for word in told) for note in found] == ([True] if warned else [])


def test_classes_and_sites_that_are_spelled_twice_are_told(tmp_path):
    sites = ("north", "North", "5", "05")
    lines = [
        f"{i},{('1', '1.0', '01', 'x', 'y', 'z')[i % 6]},{sites[i // 6 % 4]}" for i in range(80)
    ]
    notes = notes_on(["x,label,site", *lines], tmp_path)
    assert [note for note in notes if note.startswith("warning")] == [
        "warning: 'North' and 'north' are 2 sites that differ only in case and spaces; spell them "
        "alike if they are one",
        "warning: '05' and '5' are 2 sites that are equal as numbers; spell them alike if they are "
        "one",
        "warning: '01' and '1' and '1.0' are 3 classes that are equal as numbers; spell them alike "
        "if they are one",
    ]


def test_classes_that_may_be_misspelled_are_told(pictures):
    labels = ["big cat", "dog"] * 11 + ["Big  cat", "dgo"]
    lines = ["path,label,split", *(f"{i}.png,{label}," for i, label in enumerate(labels))]
    classes, alike, rare, *drawn = notes_on(lines, pictures)
    assert all("by the draw" in note for note in drawn)
    assert classes == "classes: 0 = Big  cat, 1 = big cat, 2 = dgo, 3 = dog"
    assert alike.startswith(
        "warning: 'Big  cat' and 'big cat' are 2 classes that differ only in case"
    )
    assert rare == (
        "warning: classes with one or two examples, if not misspelled: 'Big  cat' (1, line 24), "
        "'dgo' (1, line 25)"
    )
    text = "\n".join(lines).replace("Big  cat", "Dog")
    with pytest.raises(ValueError, match=r"'Dog' \(line 24\) and 'dog' \(line 3\) both read as 'd"):
        tasks_of(manifest.read(written(pictures, text)))
