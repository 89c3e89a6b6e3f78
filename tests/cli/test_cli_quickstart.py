"""What ``tokenformer quickstart`` refuses before it begins; the story itself is in tests/quickstart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RunCommand = Callable[..., Any]


def test_a_directory_with_something_else(tmp_path: Path, run_command: RunCommand) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "mine.txt"):
        refused = run_command("quickstart", "--out", out)
        assert (refused.code, refused.out) == (2, "")
        assert f"{out}: is there already and holds something else; name another --out" in refused.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs.small.stepz=3"], "error: quickstart: runs.small.stepz: unknown field; did you mean 'steps'?"),
        (["runs.small.model.qkv_param_tokens=0"], "runs.small.model.qkv_param_tokens: found 0"),
        (["corpus"], "error: corpus: expected field=value"),
        (["grow.factor=1"], "error: quickstart: grow"),
        (["--outt", "x"], "--outt"),
    ],
)
def test_wrong_arguments(tmp_path: Path, run_command: RunCommand, arguments: list[str], message: str) -> None:
    refused = run_command("quickstart", "--out", tmp_path / "out", *arguments)
    assert (refused.code, refused.out) == (2, "")
    assert message in refused.err
    assert "Traceback" not in refused.err
    assert not (tmp_path / "out").exists()


def test_a_plan_that_is_damaged(tmp_path: Path, run_command: RunCommand) -> None:
    (tmp_path / "plan.yaml").write_text("corpus: [default\n")
    (tmp_path / "data").mkdir()
    refused = run_command("quickstart", "--out", tmp_path)
    assert refused.code == 2
    assert f"{tmp_path / 'plan.yaml'}: invalid YAML at line 2" in refused.err
