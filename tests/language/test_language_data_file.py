"""Reading under faults: what passes is tried again and counted, what does not is named with its place."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from tokenformer.errors import DataError, TokenFormerError
from tokenformer.language import data_file
from tokenformer.language.data_file import DataFile

CONTENT = bytes(range(200))


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were taken, without taking them; and the file is looked at in every read."""
    taken: list[float] = []
    monkeypatch.setattr(data_file.time, "sleep", taken.append)
    monkeypatch.setattr(data_file, "LOOK_SECONDS", 0.0)
    return taken


@pytest.fixture
def file(tmp_path: Path) -> DataFile:
    (tmp_path / "a.bin").write_bytes(CONTENT)
    return DataFile(tmp_path / "a.bin", "bytes")


def fail(monkeypatch: pytest.MonkeyPatch, *codes: int) -> None:
    """The next reads fail with these errors."""
    left, pread = list(codes), os.pread

    def failing(descriptor: int, length: int, offset: int) -> bytes:
        if left:
            raise OSError(left[0], os.strerror(left.pop(0)))
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", failing)


def test_any_part_is_read(file: DataFile) -> None:
    assert file.size == 200
    assert file.read(0, 200) == CONTENT
    assert file.read(150, 50) == CONTENT[150:]
    assert file.read(200, 0) == b""
    assert pickle.loads(pickle.dumps(file)).read(3, 4) == CONTENT[3:7]  # noqa: S301


def test_short_reads_are_completed(file: DataFile, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(
        os, "pread", lambda descriptor, length, offset: pread(descriptor, min(length, 7), offset)
    )
    assert file.read(5, 100) == CONTENT[5:105]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_errors_that_pass_are_retried_and_counted(
    file: DataFile, pauses: list[float], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    fail(monkeypatch, code, code, code)
    assert file.read(10, 20) == CONTENT[10:30]
    assert file.retries == 3
    assert pauses == sorted(pauses)
    assert len(pauses) == 3


def test_errors_that_stay_end_after_several_attempts(
    file: DataFile, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, *[errno.EIO] * 100)
    with pytest.raises(
        DataError, match=r"a\.bin: cannot be read \(Input/output error, tried 10 times\), .* byte 40"
    ):
        file.read(40, 20)
    assert pauses == list(data_file.RETRY_SECONDS)


def test_errors_that_cannot_pass_are_not_retried(
    file: DataFile, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, errno.EACCES)
    with pytest.raises(
        DataError, match=r"a\.bin: cannot be read \(Permission denied\), while reading at byte 40"
    ):
        file.read(40, 20)
    assert not pauses


def test_a_file_that_is_cut_off_is_an_error_and_not_a_signal(
    file: DataFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.truncate(file.path, 50)
    message = r"a\.bin: cut off: holds 50 bytes, expected 200, while reading at byte 100"
    with pytest.raises(DataError, match=message):
        file.read(100, 20)
    monkeypatch.setattr(data_file, "LOOK_SECONDS", 1000.0)
    file._next_look = 1e12  # not looked at: the read itself finds the end
    with pytest.raises(DataError, match=message):
        file.read(100, 20)
    os.truncate(file.path, 0)
    file.path.write_bytes(CONTENT)
    assert file.read(100, 20) == CONTENT[100:120], "a file put back is read on"


def test_a_file_that_is_gone_is_named(file: DataFile, pauses: list[float]) -> None:
    file.path.rename(file.path.with_name("b.bin"))
    with pytest.raises(
        DataError, match=r"a\.bin: cannot be read \(No such file or directory\), .* at byte 7"
    ):
        file.read(7, 2)
    assert not pauses
    file.path.with_name("b.bin").rename(file.path)
    assert file.read(7, 2) == CONTENT[7:9]


def test_a_file_that_was_never_there(tmp_path: Path) -> None:
    with pytest.raises(TokenFormerError, match=r"b\.bin: cannot be read \(No such file .*; expected bytes"):
        DataFile(tmp_path / "b.bin", "bytes")
