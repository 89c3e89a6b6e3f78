"""Gradients, their norm and the state of a model do not depend on the ranks it is spread over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("gradient_parity.py")
Torchrun = Callable[..., Any]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_do_not_depend_on_the_layout(processes: int, torchrun: Torchrun, tmp_path: Path) -> None:
    finished = torchrun(processes, SCRIPT, tmp_path / "differences.json")
    assert finished.code == 0, finished.err
    differences = json.loads((tmp_path / "differences.json").read_text())
    layouts = {2: 3, 4: 6}[processes]
    assert len(differences) == 5 * layouts  # four kinds and a Transformer
    assert max(differences.values()) < 1e-5, differences
