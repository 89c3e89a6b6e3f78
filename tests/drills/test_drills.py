"""The short form of the drills; ``python -m drills`` is the long one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the drills look into /proc")

from drills.__main__ import DRILLS, main  # noqa: E402


def drill(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> dict[str, str]:
    """What came of each part, and that the command says so."""
    report = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["drills", "--json", str(report), *arguments])
    code = main()
    outcomes = json.loads(report.read_text())["outcomes"]
    problems = {outcome["what"]: outcome["problems"] for outcome in outcomes if outcome["problems"]}
    assert not problems
    assert code == 0
    return {outcome["what"]: outcome["word"] for outcome in outcomes}


def test_killed_runs_end_as_one_that_was_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = drill(monkeypatch, tmp_path, "--runs", "1", "--only", "kills")
    assert list(done.values()) == ["ok"]


@pytest.mark.slow
def test_every_drill(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = drill(
        monkeypatch, tmp_path, "--runs", "5", "--only", *(name for name in DRILLS if name != "kills")
    )
    assert set(done.values()) <= {"ok", "skipped"}
    assert sum(word == "ok" for word in done.values()) >= 16
