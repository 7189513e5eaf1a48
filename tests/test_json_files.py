"""JSON of others ends in a value or in one message, whatever it holds."""

import os
import subprocess
import sys
from typing import Annotated

import pytest
from pydantic import BaseModel, Field

from matu_jax.json_files import (
    checked,
    is_own,
    name_inside,
    parse_json,
    read_json,
    remove_unfinished,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff\xfe{}", "not UTF-8 at byte 0"),
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"[" * 200_000, "nested more than 100 deep"),
        (b"[" * 102 + b"]" * 102, "nested more than 100 deep"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested more than 100 deep"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udc00": 1}', "surrogate"),
        (b"1" * 5000, "not JSON"),
    ],
)
def test_what_is_no_json_says_why(tmp_path, text, words):
    file = tmp_path / "some.json"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=words) as caught:
        read_json(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(file))


def test_what_is_json_is_read(tmp_path):
    file = tmp_path / "some.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": [1, "\xc3\xa4"]}')  # with a byte order mark
    assert read_json(file) == {"a": [1, "ä"]}
    assert parse_json("[" * 100 + "]" * 100) is not None
    assert parse_json('"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


def test_what_cannot_be_read_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing.json")
    with pytest.raises(IsADirectoryError):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_json(tmp_path / "pipe")


class _Schema(BaseModel):
    size: Annotated[int, Field(ge=1)]
    rate: float
    names: list[str]


def test_a_schema_names_every_field_that_is_wrong():
    good = {"size": 3, "rate": 1, "names": ["a"]}
    assert checked(_Schema, good | {"more": None}, "it").model_dump() == good
    with pytest.raises(ValueError, match=r"^some\.json:") as caught:
        checked(_Schema, {"size": 0, "names": ["a", 5]}, "some.json")
    text = str(caught.value)
    assert "size: found 0" in text
    assert "rate: missing" in text
    assert "names.1: found 5" in text
    for value in (None, 5, [], "x" * 10_000):
        with pytest.raises(ValueError, match="found") as caught:
            checked(_Schema, value, "some.json")
        assert len(str(caught.value)) < 200
    for wrong in (True, "3", 3.0, None):
        with pytest.raises(ValueError, match="size"):
            checked(_Schema, good | {"size": wrong}, "some.json")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", "", ".", "a\0b"])
def test_names_that_lead_out_of_the_folder_are_refused(name):
    with pytest.raises(ValueError, match="a file in the same folder"):
        name_inside(name)
    assert name_inside("a/b..c") == "a/b..c"


def test_own_files_are_those_inside_and_the_blobs_of_a_cached_snapshot(tmp_path):
    folder = tmp_path / "models--x" / "snapshots" / "0123"
    blobs = tmp_path / "models--x" / "blobs"
    for path in (folder, blobs, tmp_path / "models--y" / "blobs", tmp_path / "plain"):
        path.mkdir(parents=True)
    secret = tmp_path / "secret"
    for file in (secret, blobs / "b", tmp_path / "models--y" / "blobs" / "b", folder / "a"):
        file.write_text("{}")
    (blobs / "out").symlink_to(secret)
    links = {
        "inside": ("a", True),
        "blob": ("../../blobs/b", True),
        "of another repository": ("../../../models--y/blobs/b", False),
        "through a blob": ("../../blobs/out", False),
        "out": (secret, False),
    }
    for name, (target, own) in links.items():
        (folder / name).symlink_to(target)
        assert is_own(folder / name) == own, name
    (tmp_path / "plain" / "b").symlink_to(blobs / "b")
    assert not is_own(tmp_path / "plain" / "b")
    (tmp_path / "link").symlink_to(folder)
    assert is_own(tmp_path / "link" / "a")
    assert is_own(tmp_path / "link" / "blob")
    (tmp_path / "models--z" / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "models--z" / "blobs").symlink_to(tmp_path)
    hidden = tmp_path / "models--z" / "snapshots" / "1" / "x"
    hidden.symlink_to("../../blobs/secret")
    assert not is_own(hidden)


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine, init = os.getpid(), 1
    left = [f".a.json.{ended.pid}.tmp", f".b.json.{ended.pid}.tmp", f".a.json.{'9' * 30}.tmp"]
    kept = [f".a.json.{mine}.tmp", f".a.json.{init}.tmp", "a.json", ".a.json.tmp", "a.json.1.tmp"]
    for name in left + kept:
        (tmp_path / name).touch()
    (tmp_path / f".c.{ended.pid}.tmp").mkdir()
    remove_unfinished(tmp_path, "b.json")
    assert not (tmp_path / left[1]).exists()
    assert (tmp_path / left[0]).exists()
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, f".c.{ended.pid}.tmp"}
    remove_unfinished(tmp_path / "not there")
