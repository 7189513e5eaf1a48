"""The table of real datasets: where each comes from, and what its splits and classes are.

A dataset is one line of `DATASETS`; a new one is one more line. Image folders of one's own need
none (`matu_jax.data.selection`). Where `tfds` is empty, or where the
folder `<folders>/<name>` exists, the images are read from that folder (`matu_jax.data.folders`),
otherwise from TensorFlow Datasets (`matu_jax.data.tfds`). A dataset whose `test` is empty was
published without a test split: a seeded fifth of its training images is used, the same always (of
an image folder, a fifth of each class).
"""
# ruff: noqa: E501 (a dataset is one line)

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from matu_jax.data.class_names import CLASS_NAMES

__all__ = ["DATASETS", "GENERAL_TEMPLATES", "SETS", "Dataset", "Example", "Source"]


@dataclass(frozen=True)
class Dataset:
    """One row of the table.

    Attributes:
        name: As in `config.data.tasks`.
        tfds: Builder of TensorFlow Datasets as `name/config:version`; "" where there is none that
            has labels for an official test split.
        train: Splits of the builder that may be trained on, joined by "+". Validation is taken from
            them by `validation_fraction`, unless an image folder brings a validation split that is
            not among them.
        test: The split that is reported; "" where none is published. Where an image folder has one
            all the same, it is taken.
        num_classes: Number of classes; 0 = as many as its image folder has.
        templates: Prompts with one `{}` for the class name.
        manual: Whether TFDS asks its user to download files by hand.
        url: Where to get a dataset that is not downloaded automatically.
        label: The feature of the builder that holds the label.
        class_names: In the order of the labels; empty where the source's own are used.
        transposed: Whether TFDS publishes the images with rows and columns exchanged; they are
            turned upright. Image folders are taken as they are.
    """

    name: str
    tfds: str
    train: str
    test: str
    num_classes: int
    templates: tuple[str, ...]
    manual: bool = False
    url: str = ""
    label: str = "label"
    class_names: tuple[str, ...] = ()
    transposed: bool = False


class Example(NamedTuple):
    """One example as it was published.

    Attributes:
        content: The image file, or its bytes.
        label: From 0 on.
        name: What messages call it: a path, or a split and a position.
        transposed: Whether its rows and columns are exchanged.
    """

    content: Path | bytes
    label: int
    name: str
    transposed: bool = False


class Source(NamedTuple):
    """The examples of a dataset as they were published.

    Attributes:
        train: Random access, in an order that never changes; images that the publisher validates on
            come last. What cannot be read raises a ValueError that names it.
        test: The same; None where no test split is published.
        class_names: One per label.
        version: What tells one state of the data from another.
        origin: For people: "TFDS mnist/3.0.1" or "folder /data/gtsrb".
        notes: For people: what was found and not used.
        deep: Whether there may be images of more than 8 bits a sample.
        validation: How many of `train` are the publisher's own validation split; 0 = none, and
            some are divided off.
        labels: Those of `train`, where they are known without reading it; else empty.
    """

    train: Sequence[Example]
    test: Sequence[Example] | None
    class_names: tuple[str, ...]
    version: str
    origin: str
    notes: tuple[str, ...] = ()
    deep: bool = True
    validation: int = 0
    labels: tuple[int, ...] = ()


_PHOTO = ("a photo of a {}.", "a photo of the {}.", "a close-up photo of a {}.")
_SCENE = ("a photo of a {}.", "a photo of the {}.", "a view of a {}.")
_NUMBER = ('a photo of the number "{}".', 'a street sign with the number "{}".')
_DIGIT = ('a photo of the handwritten digit "{}".', 'the digit "{}" in white on black.')
_CHARACTER = ('a photo of the handwritten character "{}".', "a scan of the {}, handwritten.")
_SATELLITE = ("a satellite photo of {}.", "an aerial photo of {}.", "{}, seen from above.")
_TEXTURE = ("a photo of a {} texture.", "a photo of something {}.", "a {} pattern.")
_SIGN = ('a photo of a "{}" traffic sign.', 'a close-up of the traffic sign "{}".')
_CAR = ("a photo of a {}.", "a photo of my new {}.", "a photo of the car {}.")
_FOOD = ("a photo of {}, a type of food.", "a plate of {}.")
_PET = ("a photo of a {}, a type of pet.", "a portrait of a {}.")
_BIRD = ("a photo of a {}, a type of bird.", "a {} in the wild, a bird.")
_DOG = ("a photo of a {}, a type of dog.", "a portrait of a {}, a dog.")
_FLOWER = ("a photo of a {}, a type of flower.", "a close-up of a {} in blossom.")
_LEAF = ("a photo of a plant leaf: {}.", "a leaf with the condition {}.")
_WEED = ("a photo of {}, a weed.", "{} growing in a field.")
_CLOTHES = ("a photo of a {}.", "a product photo of a {}, a piece of clothing.")
_TISSUE = ("a microscope image of {} tissue.", "a histology slide that shows {}.")
_CELL = ("a microscope image of a {} blood cell.", "a {} cell in a blood smear.")
_ENDOSCOPY = ("an endoscopic image of {}.", "endoscopy of the bowel: {}.")
_WEATHER = ("a photo of {}, a kind of weather.", "a landscape with {}.")
_FRUIT = ("a photo of {}, a fruit or vegetable.", "{} on a white background.")
_WASTE = ("a photo of {} waste.", "a piece of garbage made of {}.")
_KANA = ('a photo of the handwritten hiragana "{}".', 'the Japanese character "{}".')

GENERAL_TEMPLATES = ("a photo of a {}.", "an image of a {}.", "a picture of {}.")
"""Prompts for classes of which nothing is known but their names."""

_KAGGLE = "https://www.kaggle.com/datasets/"

# fmt: off
_TABLE = (
    # From TFDS, with the official test split.
    Dataset("mnist", "mnist:3.0.1", "train", "test", 10, _DIGIT),
    Dataset("fashion_mnist", "fashion_mnist:3.0.1", "train", "test", 10, _CLOTHES),
    Dataset("kmnist", "kmnist:3.0.1", "train", "test", 10, _KANA),
    Dataset("emnist", "emnist/balanced:3.1.0", "train", "test", 47, _CHARACTER, transposed=True),
    Dataset("cmaterdb", "cmaterdb/bangla:1.0.0", "train", "test", 10, _DIGIT),
    Dataset("cifar10", "cifar10:3.0.2", "train", "test", 10, _PHOTO),
    Dataset("cifar100", "cifar100:3.0.2", "train", "test", 100, _PHOTO),
    Dataset("svhn", "svhn_cropped:3.1.0", "train", "test", 10, _NUMBER),
    Dataset("stl10", "stl10:1.0.0", "train", "test", 10, _PHOTO),
    Dataset("beans", "beans:0.1.0", "train+validation", "test", 3, _LEAF),
    Dataset("caltech101", "caltech101:3.0.2", "train", "test", 102, _PHOTO),
    Dataset("caltech_birds2011", "caltech_birds2011:0.2.0", "train", "test", 200, _BIRD),
    Dataset("cars", "cars196:2.1.0", "train", "test", 196, _CAR),
    Dataset("cassava", "cassava:0.1.0", "train+validation", "test", 5, _LEAF),
    Dataset("dtd", "dtd:3.0.1", "train+validation", "test", 47, _TEXTURE),
    Dataset("horses_or_humans", "horses_or_humans:3.0.0", "train", "test", 2, _PHOTO),
    Dataset("oxford_flowers102", "oxford_flowers102:2.1.1", "train+validation", "test", 102, _FLOWER),
    Dataset("oxford_iiit_pet", "oxford_iiit_pet:4.0.0", "train", "test", 37, _PET),
    Dataset("stanford_dogs", "stanford_dogs:0.2.0", "train", "test", 120, _DOG),
    Dataset("sun397", "sun397/standard-part1-120k:4.0.0", "train", "test", 397, _SCENE),
    # TFDS calls the official test split of these two "validation".
    Dataset("food101", "food101:2.0.0", "train", "validation", 101, _FOOD),
    Dataset("imagenette", "imagenette/full-size-v2:1.0.0", "train", "validation", 10, _PHOTO),
    # From TFDS; no official test split is published.
    Dataset("cats_vs_dogs", "cats_vs_dogs:4.0.1", "train", "", 2, _PET),
    Dataset("colorectal_histology", "colorectal_histology:2.0.0", "train", "", 8, _TISSUE),
    Dataset("deep_weeds", "deep_weeds:3.0.0", "train", "", 9, _WEED),
    Dataset("eurosat", "eurosat/rgb:2.0.0", "train", "", 10, _SATELLITE),
    Dataset("malaria", "malaria:1.0.0", "train", "", 2, _CELL),
    Dataset("plant_village", "plant_village:1.0.2", "train", "", 38, _LEAF),
    Dataset("tf_flowers", "tf_flowers:3.0.1", "train", "", 5, _FLOWER),
    Dataset("uc_merced", "uc_merced:2.0.0", "train", "", 21, _SATELLITE),
    Dataset("resisc45", "resisc45:3.0.0", "train", "", 45, _SATELLITE, manual=True),
    # Folders with a train and a test split. TFDS has a version of GTSRB in
    # visual_domain_decathlon, but without the labels of its test split.
    Dataset("gtsrb", "", "train", "test", 43, _SIGN, url="https://benchmark.ini.rub.de/"),
    Dataset("vegetables", "", "train", "test", 15, _FRUIT, url=_KAGGLE + "misrakahmed/vegetable-image-dataset"),
    Dataset("intel_images", "", "train", "test", 6, _SCENE, url=_KAGGLE + "puneet6060/intel-image-classification"),
    Dataset("landscape", "", "train", "test", 5, _SCENE, url=_KAGGLE + "utkarshsaxenadn/landscape-recognition-image-dataset-12k-images"),
    Dataset("animal10n", "", "train", "test", 10, _PHOTO, url="https://dm.kaist.ac.kr/datasets/animal-10n/"),
    Dataset("fruits360", "", "train", "test", 131, _FRUIT, url=_KAGGLE + "moltean/fruits (version of 2020)"),
    # Folders; no official test split is published.
    Dataset("kvasir_v2", "", "train", "", 8, _ENDOSCOPY, url="https://datasets.simula.no/kvasir/"),
    Dataset("weather", "", "train", "", 11, _WEATHER, url=_KAGGLE + "jehanbhathena/weather-dataset"),
    Dataset("mango_leaf_bd", "", "train", "", 8, _LEAF, url="https://data.mendeley.com/datasets/hxsnvwty3r/1"),
    Dataset("flowers_recognition", "", "train", "", 5, _FLOWER, url=_KAGGLE + "alxmamaev/flowers-recognition"),
    Dataset("kenyan_food13", "", "train", "", 13, _FOOD, url="https://github.com/monajalal/Kenyan-Food"),
    Dataset("garbage", "", "train", "", 6, _WASTE, url=_KAGGLE + "asdasdasasdas/garbage-classification"),
)
# fmt: on

DATASETS: dict[str, Dataset] = {
    row.name: dataclasses.replace(row, class_names=CLASS_NAMES.get(row.name, ())) for row in _TABLE
}
"""All datasets by name."""

# fmt: off
SETS: dict[str, tuple[str, ...]] = {
    "vision8": ("sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"),
    "tfds30": tuple(row.name for row in _TABLE if row.tfds and not row.manual),
    "emr30": (
        "mnist", "cifar10", "vegetables", "food101", "kvasir_v2", "intel_images", "cars",
        "eurosat", "weather", "cats_vs_dogs", "mango_leaf_bd", "beans", "cifar100", "gtsrb",
        "svhn", "stanford_dogs", "fashion_mnist", "oxford_iiit_pet", "landscape",
        "flowers_recognition", "stl10", "caltech_birds2011", "emnist", "dtd", "resisc45",
        "sun397", "kenyan_food13", "animal10n", "garbage", "fruits360",
    ),
}
# fmt: on
"""Named sets of datasets.

- `vision8`: the eight of task arithmetic (Ilharco et al. 2023, arXiv 2212.04089);
- `tfds30`: the thirty that TFDS downloads by itself;
- `emr30`: the thirty of EMR-Merging (Huang et al. 2024, arXiv 2405.17461). Of EMNIST the balanced
  split is taken; there, and where no test split is published, the paper may have done otherwise.
"""
