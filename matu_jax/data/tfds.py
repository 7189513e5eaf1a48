"""Reading TensorFlow Datasets: examples in a fixed order, as the files that were published.

Data that lies prepared on the disk in the array_record format is read without TensorFlow. Fetching
and converting what is not there is TFDS's own work, for which its built-in datasets need
TensorFlow. Both come with the extra `prepare`. The data lies where TFDS keeps it: in
`$TFDS_DATA_DIR`, else in `~/tensorflow_datasets`.
"""

import bisect
import importlib.util
import itertools
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matu_jax.data.class_names import readable
from matu_jax.data.datasets import Dataset, Example, Source

__all__ = ["source"]

_INSTALL = "install it with: pip install -e '.[prepare]'"


def source(dataset: Dataset) -> Source:
    """Opens a dataset of TFDS, downloading and converting it if need be.

    Args:
        dataset: A row whose `tfds` is not empty.

    Returns:
        Random access to the examples, in the order of TFDS's files, which its seed fixes.

    Raises:
        ValueError: If a package, the network, a file to be downloaded by hand or the builder is
            missing, the data is there in another format, or is not what the table says.
    """
    builder = _builder(dataset)
    if not _is_there(builder):
        _prepare(dataset, builder)
    where = f"dataset {dataset.name!r}: TFDS's {builder.info.full_name} in {builder.data_path}"
    label = builder.info.features[dataset.label]
    if label.num_classes != dataset.num_classes:
        raise ValueError(
            f"{where}: found {label.num_classes} classes, expected {dataset.num_classes}"
        )
    return Source(
        _Examples(where, dataset, builder, dataset.train.split("+")),
        _Examples(where, dataset, builder, [dataset.test]) if dataset.test else None,
        dataset.class_names or tuple(map(readable, label.names)),
        dataset.tfds,
        f"TFDS {builder.info.full_name}",
        deep=np.dtype(builder.info.features["image"].np_dtype).itemsize > 1,
    )


class _Examples(Sequence):
    """Random access to the examples of some splits, one split after the other."""

    def __init__(self, where: str, dataset: Dataset, builder: Any, splits: list[str]):
        from tensorflow_datasets import decode, features

        # The files as published: what decodes them here decodes the image folders, too.
        published = {
            name: decode.SkipDecoding()
            for name, feature in builder.info.features.items()
            if isinstance(feature, features.Image)
        }
        self.where, self.label, self.splits = where, dataset.label, splits
        self.transposed = dataset.transposed
        self.parts = []
        for split in splits:
            if split not in builder.info.splits:
                there = ", ".join(builder.info.splits)
                raise ValueError(f"{where}: found the splits {there}, expected {split}")
            try:
                part = builder.as_data_source(split=split, decoders=published)
                part[0]
            except (OSError, ValueError, RuntimeError, IndexError) as error:
                raise ValueError(
                    f"{where}: split {split!r} cannot be read ({_line(error)}); remove that "
                    "directory to fetch it anew"
                ) from None
            self.parts.append(part)
        self.ends = list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index):
        part = bisect.bisect_right(self.ends, index)
        if index < 0 or part == len(self.parts):
            raise IndexError(index)
        row = index - (self.ends[part] - len(self.parts[part]))
        example = self.parts[part][row]
        name = f"{self.where}: split {self.splits[part]!r}, example {row}"
        return Example(example["image"], int(example[self.label]), name, self.transposed)


def _builder(dataset: Dataset) -> Any:
    """The builder, which tells what the data is and where it lies, and uses no network."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            f"dataset {dataset.name!r}: reading it needs the package {error.name}; {_INSTALL}"
        ) from None
    where = f"dataset {dataset.name!r}: tensorflow-datasets {tfds.__version__}"
    try:
        builder = tfds.builder(dataset.tfds, try_gcs=False)
    except tfds.core.DatasetNotFoundError:
        raise ValueError(f"{where} has no builder {dataset.tfds!r}") from None
    except (ValueError, AssertionError) as error:  # the latter is how TFDS refuses a version
        raise ValueError(f"{where} refuses {dataset.tfds!r}: {_line(error)}") from None
    if not _is_there(builder):
        return tfds.builder(dataset.tfds, try_gcs=False, file_format="array_record")
    form = getattr(builder.info.file_format, "value", builder.info.file_format)
    if form != "array_record":
        raise ValueError(
            f"dataset {dataset.name!r}: {builder.data_path} holds it in the file format {form}, "
            "expected array_record; move that directory away, or set TFDS_DATA_DIR to another"
        )
    return builder


def _is_there(builder: Any) -> bool:
    return (Path(builder.data_path) / "dataset_info.json").exists()


def _prepare(dataset: Dataset, builder: Any) -> None:
    """Has TFDS download and convert the data."""
    where = f"dataset {dataset.name!r} is not in {builder.data_path}"
    root = Path(builder.data_path).parents[len(builder.info.full_name.split("/")) - 1]
    manual = root / "downloads" / "manual"
    if dataset.manual and not (manual.is_dir() and any(manual.iterdir())):
        raise ValueError(
            f"{where}, and must be downloaded by hand into {manual}: "
            f"{' '.join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())}"
        )
    if importlib.util.find_spec("tensorflow") is None:
        raise ValueError(f"{where}, and converting it needs TensorFlow; {_INSTALL}")
    # What was downloaded before, here or on another machine, TFDS takes from there.
    downloads = root / "downloads"
    there = downloads.is_dir() and any(path.is_file() for path in downloads.iterdir())
    if not dataset.manual and not there:
        _check_network(where, builder.url_infos or {})
    try:
        builder.download_and_prepare()
    except Exception as error:
        # TFDS runs the dataset's own code, which fails as it likes.
        raise ValueError(
            f"dataset {dataset.name!r}: TFDS could not download or convert "
            f"{builder.info.full_name}: {type(error).__name__}: {_line(error)}"
        ) from error


def _check_network(where: str, urls: Iterable[str]) -> None:
    """Refuses at once what TFDS would try for ten minutes: hosts that cannot be found.

    How long to look for them is the system's resolver's to say. A host that is found is left to
    TFDS, however slow it is.
    """
    hosts = sorted({urllib.parse.urlparse(url).hostname or "" for url in urls} - {""})
    if urllib.request.getproxies() or not hosts:
        return
    for host in hosts:
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            continue
        return
    raise ValueError(
        f"{where}, and cannot be downloaded: no network, {', '.join(hosts)} not found; prepare it "
        "on a machine with network and copy that directory"
    )


def _line(error: BaseException) -> str:
    """What an error says, without the pages that follow."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
