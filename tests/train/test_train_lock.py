"""Two runs on one directory: the second is refused while the first lives, however the first ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tokenformer.errors import TokenFormerError
from tokenformer.train.lock import LOCK_FILE, is_in_use, run_lock

HOLD = """
import sys
from pathlib import Path
from tokenformer.train.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of ``run``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    with holder(run) as process:
        with (
            pytest.raises(
                TokenFormerError, match=rf"process {process.pid} on .*; wait for its end"
            ) as caught,
            run_lock(run),
        ):
            pass
        assert str(run) in str(caught.value)
        process.communicate(input="")
    with run_lock(run):
        assert (run / LOCK_FILE).exists()
    assert not run.exists()


def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with run_lock(tmp_path / "run"):
            pass


def test_children_do_not_hold_it(tmp_path: Path) -> None:
    """A data worker that outlives the run must not keep the next one away."""
    with run_lock(tmp_path / "run"):
        pid = os.fork()
        if pid == 0:
            signal.pause()
    try:
        with holder(tmp_path / "run"):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_nothing_is_left_of_a_run_that_wrote_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), run_lock(tmp_path / "a" / "b"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with run_lock(tmp_path / "empty"):
        assert not is_in_use(tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenFormerError, match="file"), run_lock(tmp_path / "file" / "run"):
        pass
    with pytest.raises(TokenFormerError, match="a file is already there"), run_lock(tmp_path / "file"):
        pass
