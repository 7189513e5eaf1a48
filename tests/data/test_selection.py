"""What config.data.tasks and config.data.folders stand for."""

import errno
import os
import unicodedata

import pytest

from matu_jax.data import embedded_tasks, selection
from matu_jax.data.datasets import DATASETS, GENERAL_TEMPLATES, SETS
from matu_jax.data.embedded_tasks import EIGHT, TASKS
from matu_jax.data.selection import find, image_folder, is_generated, resolve

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Käse") for form in ("NFC", "NFD"))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A directory of image folders; nothing in the environment or the cache."""
    monkeypatch.setenv("MATU_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MATU_JAX_FOLDERS", raising=False)
    (tmp_path / "folders").mkdir()
    return tmp_path / "folders"


def make(root, *names):
    for name in names:
        (root / name).mkdir()


def test_sets_and_names(root):
    assert resolve("vision8") == SETS["vision8"]
    assert resolve(" dtd, mnist ,") == ("dtd", "mnist")
    assert resolve("embedded30") == tuple(TASKS)
    assert resolve("hue/noise, tilt/noise") == ("hue/noise", "tilt/noise")
    assert resolve("") == EIGHT, "without folders, the benchmark that comes with the code"
    assert [is_generated(tasks) for tasks in ("", "embedded8", "hue/noise", "mnist")] == [
        True, True, True, False,
    ]  # fmt: skip


def test_folders_alone_are_enough(root):
    make(root, "ward", "Ziegel und Stein", "眼科", "mnist", ".hidden", "__MACOSX")
    (root / "notes.txt").write_text("no folder")
    assert not is_generated("", root)
    assert resolve("", root) == ("Ziegel und Stein", "mnist", "ward", "眼科")
    assert resolve("眼科, Ziegel und Stein", root) == ("眼科", "Ziegel und Stein")
    assert find("mnist", root) == DATASETS["mnist"], "the table knows more of it"
    assert image_folder("mnist", root) == root / "mnist"
    own = find("ward", root)
    assert (own.name, own.tfds, own.test, own.num_classes) == ("ward", "", "", 0)
    assert own.templates == GENERAL_TEMPLATES
    assert image_folder("ward", root) == root / "ward"


def test_all_folders_can_be_asked_for_and_then_nothing_else_is_taken(root, tmp_path, monkeypatch):
    """A forgotten directory is a message, not another benchmark."""
    make(root, "ward")
    assert resolve("folders", root) == resolve("", root)
    assert not is_generated("folders")
    monkeypatch.setenv("MATU_JAX_FOLDERS", str(root))
    assert resolve("folders") == resolve("", root)
    monkeypatch.delenv("MATU_JAX_FOLDERS")
    with pytest.raises(ValueError, match=r"config\.data\.folders: .* there is no such directory"):
        resolve("folders", cache_dir=tmp_path / "empty")
    with pytest.raises(ValueError, match="is a set of tasks, which stands alone"):
        resolve("folders,mnist", root)


def test_folders_of_the_environment_and_the_cache_are_known_by_name(root, tmp_path, monkeypatch):
    monkeypatch.setenv("MATU_JAX_FOLDERS", str(root))
    make(root, "ward")
    assert resolve("ward") == ("ward",)
    assert resolve("") == EIGHT, "what a run is about does not hang on the environment"
    monkeypatch.delenv("MATU_JAX_FOLDERS")
    with pytest.raises(ValueError, match="unknown dataset 'ward'"):
        resolve("ward")
    (tmp_path / "cache/folders/ward").mkdir(parents=True)
    assert resolve("ward") == ("ward",)


def test_what_was_prepared_is_known_without_its_folder(root, tmp_path):
    (tmp_path / "cache/prepared/ward [a]-0123456789abcdef").mkdir(parents=True)
    assert find("ward [a]", root).name == "ward [a]"
    with pytest.raises(ValueError, match="unknown dataset 'ward'"):
        find("ward", root)


def test_one_name_in_two_spellings(root):
    make(root, DECOMPOSED)
    assert resolve(COMPOSED, root) == (DECOMPOSED,), "as macOS may have written it"
    make(root, COMPOSED)
    assert find(DECOMPOSED, root).name == DECOMPOSED
    with pytest.raises(ValueError, match=r"Ka\\u0308se.* and .*K\\xe4se.* are called the same"):
        resolve("", root)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("mnits", "unknown dataset 'mnits'; did you mean 'mnist'"),
        (
            "radiologie",
            r"did you mean 'radiology'\? There is no folder .*folders/radiologie either",
        ),
        ("visoin8", "did you mean 'vision8'"),
        (
            "qqqqqqq",
            "folders in .*/folders: radiology, x,y; sets: embedded8, .*; datasets: mnist, ",
        ),
        ("..", "unknown dataset '..'"),
        ("mnist,mnist", "'mnist' is named more than once"),
        ("mnist,vision8", "'vision8' is a set of tasks, which stands alone"),
        ("x,y", "the folder '.*/x,y' has a comma in its name.* rename it, or set"),
        (" , ", "found no name in ','"),
        ("embedded8", "found 'embedded8', the embedded benchmark, .* beside config.data.folders"),
    ],
)
def test_what_is_wrong_is_named(root, tasks, message):
    make(root, "radiology", "x,y")
    with pytest.raises(ValueError, match=rf"config\.data\.tasks: .*{message}"):
        resolve(tasks, root)


def test_directories_that_are_no_place_of_tasks(root):
    with pytest.raises(ValueError, match=r"config\.data\.folders: .*found no folder in it, expec"):
        resolve("", root)
    with pytest.raises(ValueError, match=r"config\.data\.folders: .*nowhere: there is no such dir"):
        resolve("", root / "nowhere")
    make(root, "Train", "test")
    with pytest.raises(ValueError, match=r"found Train, test in it, .* config.data.tasks = 'fold"):
        resolve("", root)
    make(root, "vision8")
    with pytest.raises(ValueError, match="'vision8' is the name of a set"):
        resolve("", root)


def test_names_that_are_not_utf_8_are_refused(root):
    os.mkdir(os.fsencode(root) + b"/\xff")
    with pytest.raises(ValueError, match="is not UTF-8; rename it"):
        resolve("", root)


def test_the_sets_of_the_embedded_benchmark_are_those_that_are_named_here():
    assert tuple(embedded_tasks.SETS) == selection.GENERATED


def test_a_directory_that_is_not_there_is_told(root):
    with pytest.raises(ValueError, match=r"config\.data\.folders: .*/none: there is no such dir"):
        selection.check_directory(root / "none")
    with pytest.raises(ValueError, match=r"config\.data\.folders: .*/none: there is no such dir"):
        selection.resolve("", root / "none")
    selection.check_directory(root)


def test_a_link_to_itself_hides_no_folder_beside_it(root):
    make(root, "birds", "cars")
    (root / "loop").symlink_to("loop")
    (root / "gone").symlink_to("nowhere")
    assert resolve("", root) == ("birds", "cars")
    assert find("birds", root).name == "birds"


def test_a_directory_that_may_not_be_listed_is_not_called_empty(root, monkeypatch):
    make(root, "birds")

    def refused(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "scandir", refused)
    for tasks in ("", "birds"):
        with pytest.raises(ValueError, match=r"folders? cannot be listed: Permission denied"):
            resolve(tasks, root)
