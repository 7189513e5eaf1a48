"""Which datasets the settings name, what each is, and where it is read from.

`config.data.tasks` names tasks of the embedded benchmark, datasets of the table
(`matu_jax.data.datasets`), or image folders of one's own: a folder below `config.data.folders` is a
dataset without an entry anywhere. Its name is the folder's, its classes are those found in it, and
its prompts are general ones.
"""

import difflib
import hashlib
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from matu_jax.data.datasets import DATASETS, GENERAL_TEMPLATES, SETS, Dataset

__all__ = [
    "GENERATED",
    "SPLITS",
    "cache",
    "check_directory",
    "check_once",
    "check_utf8",
    "composed",
    "find",
    "image_folder",
    "is_generated",
    "is_hidden",
    "is_utf8",
    "place_of",
    "resolve",
    "short_name",
    "twins",
]

GENERATED = ("embedded8", "embedded30")
"""Named sets of tasks of the embedded benchmark, the keys of `matu_jax.data.embedded_tasks.SETS`,
which take Pillow to load."""
ALL_FOLDERS = "folders"
"""The set of all image folders there are."""
SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation"), "validation"
)
"""What the folders of splits are called, in lower case, and the split that each holds."""

_Folder = str | os.PathLike[str]


def cache(cache_dir: _Folder | None = None) -> Path:
    """The cache directory: by default `$MATU_JAX_CACHE`, else `~/.cache/matu_jax`."""
    return Path(cache_dir or os.environ.get("MATU_JAX_CACHE") or Path.home() / ".cache/matu_jax")


def is_generated(tasks: str, folders: _Folder = "") -> bool:
    """Whether these are tasks of the embedded benchmark, whose names have a slash.

    Args:
        tasks: As in `config.data.tasks`.
        folders: As in `config.data.folders`.
    """
    tasks = tasks.strip()
    return tasks in GENERATED or "/" in tasks or not (tasks or folders)


def resolve(tasks: str, folders: _Folder = "", cache_dir: _Folder | None = None) -> tuple[str, ...]:
    """Turns the text of `config.data.tasks` into names of tasks.

    Args:
        tasks: A key of `GENERATED` or of `SETS`; "folders", which is all image folders; or names
            separated by commas; "" = "folders" where `folders` is given, else "embedded8".
        folders: Where the image folders are; "" = `$MATU_JAX_FOLDERS`, or `folders` in the cache.
        cache_dir: See `cache`.

    Returns:
        Names of tasks of the embedded benchmark (not checked), or of datasets that `find` knows, in
        the order given.

    Raises:
        ValueError: If a name is unknown (with "did you mean") or given twice, or there is none.
    """
    tasks = tasks.strip()
    if tasks == ALL_FOLDERS:
        root = folders or os.environ.get("MATU_JAX_FOLDERS") or cache(cache_dir) / "folders"
        return _all_folders(Path(root))
    if folders and is_generated(tasks):
        if tasks:
            raise ValueError(
                f"config.data.tasks: found {tasks!r}, the embedded benchmark, which is generated, "
                f"beside config.data.folders = {os.fspath(folders)!r}; for all image folders in "
                "there set config.data.tasks = '' (--config.data.tasks=), or name some of them"
            )
        return _all_folders(Path(folders))
    if is_generated(tasks):
        from matu_jax.data import embedded_tasks  # here, since it loads Pillow

        return embedded_tasks.SETS.get(tasks or "embedded8") or _words(tasks)
    if tasks in SETS:
        return SETS[tasks]
    names = _words(tasks)
    if not names:
        raise ValueError(
            f"config.data.tasks: found no name in {tasks!r}; give a set "
            f"({', '.join([*GENERATED, *SETS, ALL_FOLDERS])}), or names of datasets or image "
            "folders, separated by commas"
        )
    try:
        for name in names:
            if name in SETS or name in (*GENERATED, ALL_FOLDERS):
                raise ValueError(f"{name!r} is a set of tasks, which stands alone; found {names}")
        found = tuple(find(name, folders, cache_dir).name for name in names)
        check_once(found)
    except ValueError as error:
        raise ValueError(f"config.data.tasks: {error}") from None
    return found


def check_once(names: Sequence[str]) -> None:
    """Checks that no dataset is named twice.

    Raises:
        ValueError: Otherwise.
    """
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"dataset {name!r} is named more than once")


def find(name: str, folders: _Folder = "", cache_dir: _Folder | None = None) -> Dataset:
    """What is known of a dataset: its row in the table, else what an image folder needs.

    Args:
        name: A key of `DATASETS`, or the name of a folder in `folders`. Names that differ only in
            their Unicode normalisation (NFC or NFD) are the same. A folder that was removed after
            its preparation is still known.
        folders: See `resolve`.
        cache_dir: See `cache`.

    Returns:
        The row. That of a folder which the table does not know has no number of classes (0), since
        this is the folder's; `name` is spelled as the folder is.

    Raises:
        ValueError: If there is neither, with "did you mean".
    """
    if name in DATASETS:
        return DATASETS[name]
    root = _root(folders, cache_dir)
    there = _directories(root)
    same = [other for other in there if composed(other) == composed(name)]
    if name in there or len(same) == 1:
        return _own(name if name in there else same[0])
    if len(same) > 1:
        raise twins(root, same)
    if any((cache(cache_dir) / "prepared").glob(f"{_escaped(short_name(name))}-{'[0-9a-f]' * 16}")):
        return _own(name)
    known = [*DATASETS, *SETS, *GENERATED]
    close = difflib.get_close_matches(name, [*there, *known], n=1, cutoff=0.5)
    if close:
        hint = f"did you mean {close[0]!r}? There is no folder {root / name} either"
    else:
        hint = f"folders in {root}: {', '.join(there) or 'none'}; sets: "
        hint += f"{', '.join([*GENERATED, *SETS])}; datasets: {', '.join(DATASETS)}"
    with_comma = [other for other in there if "," in other and name in _words(other)]
    if with_comma:
        hint = (
            f"the folder {str(root / with_comma[0])!r} has a comma in its name, which separates "
            "names here: rename it, or set config.data.tasks = '' for all folders"
        )
    raise ValueError(f"unknown dataset {name!r}; {hint}")


def image_folder(name: str, folders: _Folder = "", cache_dir: _Folder | None = None) -> Path | None:
    """Returns the image folder that a dataset is read from; None if it is read from TFDS.

    Raises:
        ValueError: If the name is unknown; see `find`.
    """
    dataset = find(name, folders, cache_dir)
    folder = _root(folders, cache_dir) / dataset.name
    return folder if folder.is_dir() or not dataset.tfds else None


def short_name(name: str) -> str:
    """A dataset's name as it begins the name of a directory in the cache, which may be too long."""
    return name.encode(errors="surrogateescape")[:120].decode(errors="ignore")


def place_of(name: str, folders: _Folder = "", cache_dir: _Folder | None = None) -> str:
    """What tells one source of a dataset from another: its TFDS builder, or its folder's path.

    A folder may be called as another one elsewhere, even if the table knows a dataset of this name.
    """
    folder = image_folder(name, folders, cache_dir)
    if folder is None:
        return DATASETS[name].tfds
    path = os.fsencode(os.path.realpath(folder))
    return f"folder {hashlib.sha256(path).hexdigest()}"


def _own(name: str) -> Dataset:
    """A dataset that is not in the table: whatever its folder holds."""
    return Dataset(name, "", "train", "", 0, GENERAL_TEMPLATES)


def _root(folders: _Folder, cache_dir: _Folder | None) -> Path:
    return Path(folders or os.environ.get("MATU_JAX_FOLDERS") or cache(cache_dir) / "folders")


def _all_folders(root: Path) -> tuple[str, ...]:
    """All image folders of a directory, as tasks."""
    check_directory(root)
    names = _directories(root)
    if not names:
        raise ValueError(
            f"config.data.folders: {root}: found no folder in it, expected one per task, laid out "
            f"as {root}/<task>/train/<class>/<image> and {root}/<task>/test/<class>/<image>"
        )
    if all(name.lower() in SPLITS for name in names):
        raise ValueError(
            f"config.data.folders: {root}: found {', '.join(names)} in it, which are splits of one "
            f"task; give the directory above, {root.absolute().parent}, and config.data.tasks = "
            f"{root.absolute().name!r}"
        )
    for name in names:
        check_utf8(name, root)
        if name in SETS or name in (*GENERATED, ALL_FOLDERS):
            raise ValueError(
                f"{root / name}: {name!r} is the name of a set of datasets; rename the folder"
            )
        same = [other for other in names if composed(other) == composed(name)]
        if len(same) > 1:
            raise twins(root, same)
    return tuple(names)


def check_directory(folders: _Folder) -> None:
    """Checks that the directory of image folders is there.

    Raises:
        ValueError: Otherwise.
    """
    if not Path(folders).is_dir():
        raise ValueError(
            f"config.data.folders: {os.fspath(folders)}: there is no such directory; give one that "
            "holds a folder per task"
        )


def check_utf8(name: str, folder: Path) -> None:
    """Checks that the name of a file can be printed and stored.

    Raises:
        ValueError: Otherwise.
    """
    if not is_utf8(name):
        raise ValueError(f"{folder}: the name {name!a} in it is not UTF-8; rename it")


def is_utf8(text: str) -> bool:
    """Whether a text can be printed and stored: names of files may hold bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_hidden(name: str) -> bool:
    """Whether a file or folder is passed over because of its name."""
    return name.startswith(".") or name == "__MACOSX"


def _directories(root: Path) -> list[str]:
    """Names of the directories in a directory, but for hidden ones; none if it is not there."""
    try:
        with os.scandir(root) as entries:
            return sorted(e.name for e in entries if not is_hidden(e.name) and is_directory(e))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ValueError(f"{root} cannot be listed: {error.strerror}") from None


def is_directory(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a directory, or a link to one that is there."""
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def twins(root: Path, names: Sequence[str]) -> ValueError:
    """What to say of names in a folder that differ in nothing but their Unicode normalisation."""
    spelled = " and ".join(ascii(str(root / name)) for name in names)
    return ValueError(
        f"{spelled} are called the same, spelled with different Unicode characters; rename one"
    )


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", name)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)
