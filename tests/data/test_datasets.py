"""The table of datasets: consistent with itself, and with what TFDS says about its builders."""

import functools
import inspect
import sys

import pytest

from matu_jax.data import Transform, synthetic
from matu_jax.data.class_names import CLASS_NAMES, readable
from matu_jax.data.datasets import DATASETS, SETS, Dataset

# Of Imagenette's classes, from the tench to the parachute, in WordNet.
SYNSETS = "n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 "
SYNSETS += "n03445777 n03888257"


@pytest.fixture(scope="module")
def builders(tmp_path_factory):
    """Every builder of the table; they describe themselves without a download."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")
    return {
        name: tfds.builder(dataset.tfds, data_dir=folder, try_gcs=False)
        for name, dataset in DATASETS.items()
        if dataset.tfds
    }


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=lambda dataset: dataset.name)
def test_every_line_is_consistent(dataset: Dataset):
    assert 2 <= dataset.num_classes <= 400
    assert len(dataset.class_names) in (0, dataset.num_classes)
    assert len(set(dataset.class_names)) == len(dataset.class_names)
    assert dataset.train
    assert dataset.test not in dataset.train.split("+")
    assert dataset.templates
    assert len(set(dataset.templates)) == len(dataset.templates)
    for template in dataset.templates:
        assert template.count("{}") == 1
        assert template.count("{") == template.count("}") == 1
    if dataset.tfds:
        assert dataset.tfds.count(":") == 1, "the version is part of what was prepared"
    else:
        assert dataset.url.startswith("https://"), "people must be told where to get it"


def test_sets():
    assert {name: len(set(names)) for name, names in SETS.items()} == {
        "vision8": 8,
        "tfds30": 30,
        "emr30": 30,
    }
    for names in SETS.values():
        assert set(names) <= set(DATASETS)
    assert set(CLASS_NAMES) <= set(DATASETS)
    assert all(DATASETS[name].tfds and not DATASETS[name].manual for name in SETS["tfds30"])


def test_tfds_agrees_with_the_table(builders):
    for name, builder in builders.items():
        dataset = DATASETS[name]
        features = builder.info.features
        assert features[dataset.label].num_classes == dataset.num_classes, name
        assert "image" in features, name
        assert bool(builder.MANUAL_DOWNLOAD_INSTRUCTIONS) == dataset.manual, name
        assert f":{builder.version}" == dataset.tfds[dataset.tfds.index(":") :], name


def test_splits_are_named_in_the_builders_source(builders):
    """TFDS knows its splits only once the data is there; until then its source tells."""
    words = {"train": ("TRAIN", "train"), "test": ("TEST", "test")}
    words["validation"] = ("VALIDATION", "validation")
    for name, builder in builders.items():
        text = inspect.getsource(type(builder)._split_generators)
        dataset = DATASETS[name]
        there = {
            split
            for split, (constant, plain) in words.items()
            if f"Split.{constant}" in text
            or any(f"{quote}{plain}{quote}:" in text for quote in "\"'")
            or any(f"name={quote}{plain}{quote}" in text for quote in "\"'")
        }
        used = {*dataset.train.split("+"), *filter(None, [dataset.test])}
        assert used <= there, name
        # Nothing that is published for testing may be overlooked or trained on.
        if not dataset.test:
            assert there == {"train"}, name
        if "test" in there:
            assert dataset.test == "test", name
        if name != "sun397":  # whose validation split is in another configuration
            assert there == used, name


def test_names_of_the_table_are_in_the_order_of_tfds(builders):
    checked = []
    for name, builder in builders.items():
        label = builder.info.features[DATASETS[name].label]
        ours = DATASETS[name].class_names
        if not label._int2str:  # TFDS finds the names in the download
            continue
        theirs = tuple(map(readable, label.names))
        assert len(set(theirs)) == len(theirs), name
        if ours and name not in ("cassava", "imagenette"):
            checked.append(name)
            for one, other in zip(ours, theirs, strict=True):
                first = other.split()[0].lower().rstrip("s")
                first = {"herbaceou": "meadow"}.get(first, first)
                assert first in one.replace(" ", "") or first in one, (name, one, other)
    assert {"fashion_mnist", "kmnist", "beans", "eurosat"} <= set(checked)
    codes = builders["cassava"].info.features["label"].names
    assert codes == ["cbb", "cbsd", "cgm", "cmd", "healthy"]
    for code, words in zip(codes[:4], DATASETS["cassava"].class_names, strict=False):
        initials = "c" + "".join(word[0] for word in words.split())
        assert initials[:3] == code[:3], (code, words)
    assert builders["imagenette"].info.features["label"].names == SYNSETS.split()


def test_no_class_is_called_by_its_number(builders):
    """Where a builder has no names, neither of its own nor from the download, the table has."""
    for name, builder in builders.items():
        if not builder.info.features[DATASETS[name].label]._int2str:
            found = inspect.getsource(sys.modules[type(builder).__module__])
            assert DATASETS[name].class_names or ".names = " in found, name


def test_what_tfds_publishes_transposed_is_turned(builders):
    for name, builder in builders.items():
        turned = "rotated 90 anti-clockwise" in (builder.info.description or "")
        assert turned == DATASETS[name].transposed, name


def test_well_known_orders():
    """Alphabetical, as their authors say, and of the published lengths."""
    for name in ("cifar10", "cifar100", "stl10"):
        assert list(CLASS_NAMES[name]) == sorted(CLASS_NAMES[name])
    signs = CLASS_NAMES["gtsrb"]
    assert (len(signs), signs[14], signs[13], signs[12], signs[40]) == (
        43,
        "stop",
        "yield",
        "priority road",
        "roundabout",
    )
    assert CLASS_NAMES["emnist"][10] == "capital letter A"
    assert CLASS_NAMES["emnist"][46] == "small letter t"
    birds = CLASS_NAMES["caltech_birds2011"]  # by their numbers, from 1
    assert (birds[0], birds[99], birds[199]) == (
        "black footed albatross",
        "brown pelican",
        "common yellowthroat",
    )


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("/a/abbey", "abbey"),
        ("/c/church/outdoor", "church outdoor"),
        ("AnnualCrop", "annual crop"),
        ("SeaLake", "sea lake"),
        ("001.Black_footed_Albatross", "black footed albatross"),
        ("n02085620-chihuahua", "chihuahua"),
        ("american_bulldog", "american bulldog"),
        ("AM General Hummer SUV 2000", "AM General Hummer SUV 2000"),
        ("hard-leaved pocket orchid", "hard-leaved pocket orchid"),
        ("00012", "00012"),
        ("7", "7"),
        ("HTTPServer", "http server"),
        ("___", "___"),
    ],
)
def test_readable(label, name):
    assert readable(label) == name


def test_stand_ins_of_an_own_folder_have_its_classes(tmp_path):
    for name in ("left", "right", "up"):
        (tmp_path / "arrows/train" / name).mkdir(parents=True)
        (tmp_path / "arrows/train" / name / "1.png").touch()
    (task,) = synthetic.load(["arrows"], transform=Transform(8), image_folders=tmp_path)
    assert task.class_names == ("left", "right", "up")
    assert task.train.images.shape[1:] == (8, 8, 3)
    with pytest.raises(ValueError, match="unknown dataset 'arrow'; did you mean 'arrows'"):
        synthetic.load(["arrow"], transform=Transform(8), image_folders=tmp_path)


def test_stand_ins_look_like_their_dataset():
    load = functools.partial(
        synthetic.load,
        ["mnist", "dtd"],
        transform=Transform(16),
        train_examples=40,
        validation_examples=20,
        test_examples=20,
    )
    tasks = load()
    for task, name in zip(tasks, ("mnist", "dtd"), strict=True):
        dataset = DATASETS[name]
        assert task.name == name
        assert task.num_classes == dataset.num_classes
        assert task.templates == dataset.templates
        assert task.train.images.shape[1:] == (16, 16, 3)
        assert task.fingerprint
    again, other = load(), load(seed=1)
    assert [task.fingerprint for task in again] == [task.fingerprint for task in tasks]
    assert not {task.fingerprint for task in other} & {task.fingerprint for task in tasks}
