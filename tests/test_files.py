"""Outputs that appear when complete, and readers that explain."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from pathlib import Path

import pytest

from tokenformer import TokenFormerError
from tokenformer.files import (
    new_directory,
    read_json,
    read_text,
    require_free,
    restore_replaced,
    sha256,
    write_json,
    write_text,
)

DISK_FULL = OSError(28, "No space left on device")


def fail(*_arguments: object, **_options: object) -> None:
    raise DISK_FULL


def write(path: Path, name: str, error: BaseException | None = None, *, replace: bool = False) -> None:
    """A directory with one file; ``error`` comes after it."""
    with new_directory(path, replace=replace) as scratch:
        (scratch / name).write_text("x")
        if error is not None:
            raise error


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_new_directory_appears_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with new_directory(target) as scratch:
        assert not target.exists()
        assert scratch.parent == target.parent
        (scratch / "file").write_text("x")
        (scratch / "sub").mkdir()
    assert names(target) == ["file", "sub"]
    assert names(tmp_path / "deep") == ["out"]


def test_an_empty_directory_is_taken_and_one_with_content_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with new_directory(target) as scratch:
        (scratch / "file").write_text("x")
    with (
        pytest.raises(TokenFormerError, match="out: a directory with content is already there"),
        new_directory(target),
    ):
        pytest.fail("must not begin")
    (tmp_path / "text").write_text("x")
    with (
        pytest.raises(TokenFormerError, match="text: a file is already there"),
        new_directory(tmp_path / "text"),
    ):
        pytest.fail("must not begin")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TokenFormerError, match="already there"):
        require_free(tmp_path / "link")


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_an_error_inside_passes_through_and_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write(tmp_path / "out", "file", error)
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["mkdir", "rename", "fsync"])
def test_a_disk_error_becomes_one_message_and_leaves_nothing(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    with pytest.raises(TokenFormerError, match=r"out: could not be written \(No space left on device\)"):
        write(tmp_path / "out", "file")
    assert names(tmp_path) == []


def test_replacing_keeps_the_old_until_the_new_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "old")
    with pytest.raises(TokenFormerError, match="No space left"):
        write(target, "new", DISK_FULL, replace=True)
    assert names(target) == ["old"]
    with new_directory(target, replace=True) as scratch:
        (scratch / "new").write_text("y")
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_failed_exchange_puts_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    write(target, "old")
    rename = Path.rename
    monkeypatch.setattr(
        "tokenformer.files._exchange", lambda one, other: False
    )  # as where there is no renameat2
    monkeypatch.setattr(Path, "rename", lambda p, to: fail() if "incomplete" in p.name else rename(p, to))
    with pytest.raises(TokenFormerError, match="No space left"):
        write(target, "new", replace=True)
    assert names(target) == ["old"]
    assert names(tmp_path) == ["out"]


def test_crash_in_the_middle_of_an_exchange_is_put_right(tmp_path: Path) -> None:
    write(tmp_path / ".out.replaced-7", "old")
    write(tmp_path / ".out.incomplete-7", "new")
    restore_replaced(tmp_path / "out")
    assert names(tmp_path / "out") == ["old"]
    assert names(tmp_path) == ["out"]
    write(tmp_path / ".out.replaced-8", "older")
    restore_replaced(tmp_path / "out")
    assert names(tmp_path / "out") == ["old"]
    assert names(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_a_reader_never_finds_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "0")
    missed, stop = [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            if not target.is_dir():
                missed.append(target)

    reader = threading.Thread(target=read)
    reader.start()
    for index in range(50):
        write(target, str(index), replace=True)
    stop.set()
    reader.join()
    assert not missed


@pytest.mark.parametrize("path", [".", "..", "sub/.."])
def test_a_directory_without_a_name_of_its_own(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    with pytest.raises(TokenFormerError, match="expected the name of an output"), new_directory(path):
        pytest.fail("must not begin")


def test_text_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "grüße\n")
    assert path.read_bytes() == "grüße\n".encode()
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(
        TokenFormerError, match=r"file\.txt: could not be written \(No space left on device\)"
    ):
        write_text(path, "new")
    assert read_text(path, "a text") == "grüße\n"
    assert names(path.parent) == ["file.txt"]


def test_text_below_a_file_and_with_an_impossible_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TokenFormerError, match="could not be written"):
        write_text(tmp_path / "file" / "below.txt", "y")
    with pytest.raises(TokenFormerError, match="File name too long"):
        write_text(tmp_path / ("x" * 300), "y")
    with (
        pytest.raises(TokenFormerError, match="could not be written"),
        new_directory(tmp_path / "file" / "below"),
    ):
        pytest.fail("must not begin")


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"naïve": [1, 2.5, None], "nested": {"a": True}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json", "a test") == value
    assert (tmp_path / "a.json").read_text() == json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,}', r"a\.json: invalid JSON at line 1, column 9 .*; expected a test"),
        (b"{\n", "invalid JSON at line 2, column 1"),
        (b"", "invalid JSON at line 1, column 1"),
        (b"[1]", "found a JSON list, expected an object: a test"),
        (b"\xff\xfe{}", "not UTF-8 text at byte 0; expected a test"),
    ],
)
def test_json_that_is_wrong(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(TokenFormerError, match=message):
        read_json(tmp_path / "a.json", "a test")


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TokenFormerError, match=r"none\.txt: no such file; expected a test"):
        read_text(tmp_path / "none.txt", "a test")
    with pytest.raises(TokenFormerError, match=r"cannot be read \(Is a directory\); expected a test"):
        read_text(tmp_path, "a test")


def test_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 1000
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_an_error_inside_names_the_directory_as_the_user_does(tmp_path: Path) -> None:
    def fail() -> None:
        with new_directory(tmp_path / "out") as scratch:
            raise TokenFormerError(f"{scratch / 'file'}: could not be written")

    with pytest.raises(TokenFormerError, match=r"/out/file: could not be written$") as caught:
        fail()
    assert "incomplete" not in str(caught.value)
