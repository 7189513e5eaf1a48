"""Reading TFDS: a builder of our own written as array_record, and all that can be missing."""

import dataclasses
import io
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from matu_jax.data import Transform, images, preparation, prepared, tfds
from matu_jax.data.datasets import DATASETS, Dataset

tensorflow_datasets = pytest.importorskip("tensorflow_datasets")
COUNTS = {"train": 20, "validation": 6, "test": 8}
TINY = Dataset("tiny", "matu_tiny:1.2.0", "train+validation", "test", 3, ("a {}.",))


def value(split, i):
    return {"train": 0, "validation": 100, "test": 200}[split] + i


class MatuTiny(tensorflow_datasets.core.GeneratorBasedBuilder):
    """Three classes; the red of an image tells its split, its number and, modulo 3, its class.

    The blue pixel is in the right upper corner.
    """

    VERSION = tensorflow_datasets.core.Version("1.2.0")

    def _info(self):
        features = tensorflow_datasets.features
        return tensorflow_datasets.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(
                {
                    "image": features.Image(shape=(None, None, 3)),
                    "segmentation_mask": features.Image(shape=(None, None, 1)),
                    "label": features.ClassLabel(names=["/a/first", "SecondClass", "n00000003-c"]),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in COUNTS}

    def _generate_examples(self, split):
        for i in range(COUNTS[split]):
            files = io.BytesIO(), io.BytesIO()
            image = Image.new("RGB", (12, 10), (value(split, i), 5, 5))
            image.putpixel((11, 0), (value(split, i), 5, 250))
            image.save(files[0], "png")
            Image.new("L", (12, 10), i).save(files[1], "png")
            for file in files:
                file.seek(0)
            yield i, {"image": files[0], "segmentation_mask": files[1], "label": i % 3}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    MatuTiny(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """Where TFDS looks for data during the test; its default is fixed when it is imported."""
    real = tensorflow_datasets.builder

    def builder(name, **options):
        return real(name, data_dir=tmp_path, **options)

    monkeypatch.setattr(tensorflow_datasets, "builder", builder)
    return tmp_path


@pytest.fixture
def tiny(data_dir, written):
    (data_dir / "matu_tiny").symlink_to(written / "matu_tiny")
    return TINY


def test_examples_in_a_fixed_order_over_all_splits(tiny):
    source = tfds.source(tiny)
    assert source.class_names == ("first", "second class", "c")
    assert source.version == "matu_tiny:1.2.0"
    assert source.origin == "TFDS matu_tiny/1.2.0"
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (26, 8)
    found = []
    for i in range(26):
        example = source.train[i]
        image, label, name = images.picture(example), example.label, example.name
        assert (image.mode, image.size) == ("RGB", (12, 10))
        found.append(image.getpixel((0, 0))[0])  # type: ignore[index]
        assert label == found[-1] % 100 % 3
        split, row = ("train", i) if i < 20 else ("validation", i - 20)
        assert f"split '{split}', example {row}" in name
    assert sorted(found[:20]) == [value("train", i) for i in range(20)]
    assert sorted(found[20:]) == [value("validation", i) for i in range(6)]
    again = tfds.source(tiny).train
    assert [images.picture(again[i]).getpixel((0, 0))[0] for i in range(26)] == found  # type: ignore[index]
    for index in (26, -1):
        with pytest.raises(IndexError):
            source.train[index]


@pytest.mark.parametrize(
    ("transposed", "size", "blue"), [(False, (12, 10), (11, 0)), (True, (10, 12), (0, 11))]
)
def test_transposed_images_are_turned(tiny, transposed, size, blue):
    image = images.picture(tfds.source(dataclasses.replace(tiny, transposed=transposed)).train[0])
    assert image.size == size
    assert image.getpixel(blue)[2] == 250  # type: ignore[index]


def test_tfds_is_imported_when_it_is_asked_for():
    code = (
        "import sys, matu_jax.data.tfds\nprint([m for m in sys.modules if m[:10] == 'tensorflow'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_table_decides_splits_label_and_names(tiny):
    renamed = dataclasses.replace(tiny, test="", class_names=("x", "y", "z"))
    source = tfds.source(renamed)
    assert source.test is None
    assert source.class_names == ("x", "y", "z")
    with pytest.raises(ValueError, match=r"matu_tiny/1\.2\.0 in .*: found 3 classes, expected 4"):
        tfds.source(dataclasses.replace(tiny, num_classes=4))
    with pytest.raises(ValueError, match="found the splits train, validation, test, expected dev"):
        tfds.source(dataclasses.replace(tiny, test="dev"))
    with pytest.raises(ValueError, match=r"has no builder 'matu_tinny'"):
        tfds.source(dataclasses.replace(tiny, tfds="matu_tinny"))
    with pytest.raises(ValueError, match=r"refuses 'matu_tiny:9\.9\.9': .*only: 1\.2\.0"):
        tfds.source(dataclasses.replace(tiny, tfds="matu_tiny:9.9.9"))


def test_prepared_from_tfds(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "tiny", tiny)
    monkeypatch.setattr(preparation, "CHUNK", 7)
    options = {"transform": Transform(8), "cache_dir": tmp_path / "cache"}
    metadata = preparation.prepare("tiny", **options)
    (task,) = prepared.load(["tiny"], **options)
    images = np.concatenate([task.train.images, task.validation.images])
    labels = np.concatenate([task.train.labels, task.validation.labels])
    assert sorted(images[:, 0, 0, 0]) == [*range(20), *range(100, 106)]
    assert ((images[:, 0, 0, 0] % 100) % 3 == labels).all()
    assert ((task.test.images[:, 0, 0, 0] - 200) % 3 == task.test.labels).all()
    assert metadata["origin"] == "TFDS matu_tiny/1.2.0"
    assert metadata["test_split"] == "official"


def test_labels_beyond_the_classes_are_named(tiny, tmp_path, monkeypatch):
    """Builders give -1 to the examples of a test split whose labels are secret."""
    monkeypatch.setitem(DATASETS, "tiny", tiny)
    real = tfds._Examples.__getitem__
    monkeypatch.setattr(
        tfds._Examples, "__getitem__", lambda self, i: real(self, i)._replace(label=-1)
    )
    with pytest.raises(ValueError, match=r"split 'train', example 0: its label is -1, expected 0"):
        preparation.prepare("tiny", transform=Transform(8), cache_dir=tmp_path / "cache")


def test_damaged_data_is_named(tiny, data_dir, written):
    (data_dir / "matu_tiny").unlink()
    shutil.copytree(written / "matu_tiny", data_dir / "matu_tiny")
    for file in data_dir.glob("matu_tiny/1.2.0/*test.array_record*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"split 'test' cannot be read .*remove that directory"):
        tfds.source(tiny)


def test_another_file_format_is_told(tiny, data_dir, written):
    (data_dir / "matu_tiny").unlink()
    shutil.copytree(written / "matu_tiny", data_dir / "matu_tiny")
    info = data_dir / "matu_tiny/1.2.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"in the file format tfrecord, expected array_record; "):
        tfds.source(tiny)


def tensorflow(monkeypatch, there):
    real = tfds.importlib.util.find_spec
    monkeypatch.setattr(
        tfds.importlib.util,
        "find_spec",
        lambda name: (there or None) if name == "tensorflow" else real(name),
    )


def test_without_tensorflow_the_extra_is_named(data_dir, monkeypatch):
    tensorflow(monkeypatch, there=False)
    with pytest.raises(ValueError, match=r"mnist/3\.0\.1.*TensorFlow.*pip install -e '\.\[prepare"):
        tfds.source(DATASETS["mnist"])


def test_without_tfds_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"needs the package tensorflow_datasets; .*\[prepare\]"):
        tfds.source(DATASETS["mnist"])


def test_a_manual_download_is_explained(data_dir, monkeypatch):
    tensorflow(monkeypatch, there=False)
    with pytest.raises(ValueError, match=r"by hand into .*downloads/manual: .*OneDrive.*rar"):
        tfds.source(DATASETS["resisc45"])
    (data_dir / "downloads/manual").mkdir(parents=True)
    (data_dir / "downloads/manual/NWPU-RESISC45").mkdir()
    with pytest.raises(ValueError, match="converting it needs TensorFlow"):
        tfds.source(DATASETS["resisc45"])


def test_no_network_is_told_at_once(data_dir, monkeypatch):
    def nowhere(host, port):
        raise socket.gaierror(-2, "Name or service not known")

    tensorflow(monkeypatch, there=True)
    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setattr(tfds.urllib.request, "getproxies", dict)
    with pytest.raises(
        ValueError, match=r"no network, www\.cs\.toronto\.edu not found; prepare it"
    ):
        tfds.source(DATASETS["cifar10"])

    # What was downloaded already needs no network: whether it is enough is TFDS's to say.
    def prepared(self):
        raise RuntimeError("TFDS was asked")

    monkeypatch.setattr(tensorflow_datasets.core.DatasetBuilder, "download_and_prepare", prepared)
    (data_dir / "downloads").mkdir()
    (data_dir / "downloads" / "cifar.tgz.INFO").write_text("{}")
    with pytest.raises(ValueError, match="TFDS was asked"):
        tfds.source(DATASETS["cifar10"])


def test_a_failing_download_is_one_line(data_dir, monkeypatch):
    def fail(self):
        raise RuntimeError("checksum of cifar.tgz\nmany\nmore lines")

    tensorflow(monkeypatch, there=True)
    monkeypatch.setattr(tfds.urllib.request, "getproxies", lambda: {"https": "proxy"})
    monkeypatch.setattr(tensorflow_datasets.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(ValueError, match=r"download or convert cifar10/3\.0\.2: Run.*: checksum of "
                       r"cifar\.tgz$"):  # fmt: skip
        tfds.source(DATASETS["cifar10"])


def test_a_download_makes_array_records(data_dir, monkeypatch):
    """The builder is asked for the format that can be read at random, and then read."""
    made, real = [], MatuTiny.download_and_prepare

    def download(self):
        made.append(self.info.file_format.value)
        real(self)

    tensorflow(monkeypatch, there=True)
    monkeypatch.setattr(MatuTiny, "download_and_prepare", download)
    assert len(tfds.source(TINY).train) == 26
    assert made == ["array_record"]
