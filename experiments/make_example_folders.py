"""Image folders to try `experiments/own_folders.py` with, out of pictures that are on this machine.

    python experiments/make_example_folders.py my-images
    python experiments/make_example_folders.py my-scans --scanners   # for own_images.py
    python experiments/make_example_folders.py my-sites --sites 3    # my-sites/lab 1/<task>/...

Nothing is downloaded. Tasks are `my-images/<task>/{train,test}/<class>/<number>.png`:

    digits               which of ten digits (scikit-learn's 8 x 8 scans)
    digits turned        by which quarter turns such a scan was turned
    photographs          from which of three photographs a crop is (two of scikit-learn's, one of
                         matplotlib's)
    photographs turned   by which quarter turns such a crop was turned
    clothes              ten kinds of clothes (Fashion-MNIST), where Debian's package
                         dataset-fashion-mnist is installed (apt install dataset-fashion-mnist)

With --scanners, digits, whether they are even, and photographs, each as several scanners show them:
plain, as a negative or on its side (`SCANS`). With --sites, as many laboratories share the number
of pictures, and each has drawn its own.

Test crops come from another part of the photographs than training crops, but from the same three:
"photographs" is easy. Test digits are other scans than training digits, whatever is asked of them.
Made in a few seconds; the same call makes the same files.
"""

import argparse
import gzip
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

FASHION = Path("/usr/share/datasets/fashion-mnist")
CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat")  # in the order of its labels
CLOTHES += ("sandal", "shirt", "sneaker", "bag", "ankle boot")
TURNS = ("upright", "a quarter", "upside down", "three quarters")
PIXELS = 64  # height and width of what is written
COUNTS = {"train": 480, "test": 240}  # images of a task

Pictures = Iterator[tuple[np.ndarray, str]]
Tasks = dict[str, Callable[[str, int, np.random.Generator], Pictures]]


def digits(part: str, count: int, rng: np.random.Generator) -> Pictures:
    """Digits and their names; train and test are different scans."""
    scans, names = load_digits(return_X_y=True)
    rows = np.arange(1200) if part == "train" else np.arange(1200, len(scans))
    for row in rng.choice(rows, min(count, len(rows)), replace=False):
        yield (255 - scans[row].reshape(8, 8) * 255 / 16).astype(np.uint8), str(names[row])


def photographs(part: str, count: int, rng: np.random.Generator) -> Pictures:
    """Square crops of photographs, by turns; test crops are of their right third."""
    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    china, flower = load_sample_images().images
    pictures = {"china": china, "flower": flower, "portrait": np.asarray(Image.open(hopper))}
    for i in range(count):
        name = list(pictures)[i % len(pictures)]
        picture = pictures[name]
        edge = picture.shape[1] * 2 // 3
        picture = picture[:, :edge] if part == "train" else picture[:, edge:]
        side = int(rng.integers(60, min(picture.shape[:2], default=60) + 1))
        top, left = (int(rng.integers(0, extent - side + 1)) for extent in picture.shape[:2])
        yield picture[top : top + side, left : left + side], name


def clothes(part: str, count: int, rng: np.random.Generator) -> Pictures:
    """Fashion-MNIST's images and their classes."""
    stem = "train" if part == "train" else "t10k"
    with gzip.open(FASHION / f"{stem}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    with gzip.open(FASHION / f"{stem}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    for row in rng.choice(len(labels), count, replace=False):
        yield images[row], CLOTHES[labels[row]]


def turned(pictures: Pictures) -> Pictures:
    """Every picture turned by nothing, one, two or three quarters, which is its class now."""
    for i, (picture, _) in enumerate(pictures):
        yield np.rot90(picture, i // 3 % 4), TURNS[i // 3 % 4]


def parity(pictures: Pictures) -> Pictures:
    """Digits, and whether they are even, which is their class now."""
    for picture, name in pictures:
        yield picture, "odd" if int(name) % 2 else "even"


def negative(pictures: Pictures) -> Pictures:
    """Pictures with dark and light exchanged."""
    for picture, name in pictures:
        yield 255 - picture, name


def sideways(pictures: Pictures) -> Pictures:
    """Pictures turned by one quarter."""
    for picture, name in pictures:
        yield np.rot90(picture), name


TASKS: Tasks = {
    "digits": digits,
    "digits turned": lambda *given: turned(digits(*given)),
    "photographs": photographs,
    "photographs turned": lambda *given: turned(photographs(*given)),
    "clothes": clothes,
}
SCANS: Tasks = {
    "digits": digits,
    "digits negative": lambda *given: negative(digits(*given)),
    "digits sideways": lambda *given: sideways(digits(*given)),
    "parity": lambda *given: parity(digits(*given)),
    "parity negative": lambda *given: negative(parity(digits(*given))),
    "parity sideways": lambda *given: sideways(parity(digits(*given))),
    "photographs": photographs,
    "photographs negative": lambda *given: negative(photographs(*given)),
}


def write(
    folder: Path, task: str, counts: dict[str, int], tasks: Tasks = TASKS, site: int = 0
) -> None:
    """Writes one task's folder.

    Args:
      folder: where the task's own folder goes.
      task: one of `tasks`.
      counts: images in "train" and "test".
      tasks: `TASKS` or `SCANS`.
      site: its number; 0 = none.
    """
    for part, count in counts.items():
        key = (sorted(tasks).index(task), part == "test", site)
        rng = np.random.default_rng(key if site else key[:2])
        for i, (picture, name) in enumerate(tasks[task](part, count, rng)):
            path = folder / task / part / name / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            size = (PIXELS, PIXELS)
            Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC).save(path)


def main(argv: list[str]) -> int:
    """Runs the program; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--scanners", action="store_true", help="the tasks of own_images.py")
    parser.add_argument("--sites", type=int, default=0, help="how many sites; 0 = no sites")
    given = parser.parse_args(argv[1:])
    folder, tasks = given.folder, SCANS if given.scanners else TASKS
    if folder.exists():
        print(f"{folder} is there already. Give a new folder.", file=sys.stderr)
        return 2
    counts = {part: count // (given.sites or 1) for part, count in COUNTS.items()}
    for task in tasks:
        if task == "clothes" and not FASHION.is_dir():
            print(f"left out: clothes, since {FASHION} is not there (dataset-fashion-mnist)")
            continue
        for site in range(1, given.sites + 1) or [0]:
            place = folder / f"lab {site}" if site else folder
            write(place, task, counts, tasks, site)
            print(
                f"{place / task}: {counts['train']} images to train on, {counts['test']} to test on"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
