"""What any command does where the machine says no: one message, exit code 2, nothing half-written."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from tokenformer.cli import main as cli
from tokenformer.errors import TokenFormerError, ToldElsewhere
from tokenformer.files import require_free
from tokenformer.train.device import require_memory


def _run_main(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """``tokenformer inspect x``, where inspecting raises ``error``."""

    def fail(path: Path, *options: object) -> None:
        raise error

    monkeypatch.setattr("tokenformer.report.inspect.inspect_path", fail)
    monkeypatch.setattr(sys, "argv", ["tokenformer", "inspect", "x"])
    cli.main()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError(13, "Permission denied", "some/file"), "some/file: Permission denied"),
        (MemoryError(), "out of memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
            "Tried to allocate 2 GiB",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 4 bytes"), "out of memory"),
    ],
)
def test_what_the_machine_refuses_is_one_message(
    error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        _run_main(error, monkeypatch)
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="shapes do not match"):
        _run_main(RuntimeError("shapes do not match"), monkeypatch)


def test_what_another_rank_tells_is_not_told_again(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        _run_main(ToldElsewhere("told by another"), monkeypatch)
    assert ended.value.code == 2
    assert capfd.readouterr() == ("", "")


def test_an_output_below_a_file_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenFormerError, match="file is not a directory"):
        require_free(tmp_path / "file" / "new" / "out")


def test_an_output_where_nothing_can_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(TokenFormerError, match="is not writable"):
        require_free(tmp_path / "new" / "out")


def test_what_cannot_fit_the_memory_is_refused() -> None:
    require_memory(1 << 20, torch.device("cpu"), "model")
    with pytest.raises(TokenFormerError, match=r"model: takes at least .* GiB of memory, but cpu has"):
        require_memory(1 << 60, torch.device("cpu"), "model:")
