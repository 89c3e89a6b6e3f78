"""Ranks that hang or are gone, over NCCL on two GPUs; :mod:`drills.ranks` does the same over gloo."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(sys.platform != "linux", reason="the drills look into /proc"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

from drills.processes import Trainer  # noqa: E402
from drills.ranks import absent_rank, lost_ranks  # noqa: E402


@pytest.mark.parametrize("what", ["sleeps", "is killed"])
def test_absent_rank_is_named(tmp_path: Path, what: str) -> None:
    outcome = absent_rank(tmp_path / "drill", Trainer(), what, device="cuda")
    assert not outcome.problems, outcome


def test_restart_after_a_lost_rank(tmp_path: Path) -> None:
    (outcome,) = lost_ranks(tmp_path / "drill", runs=1, seed=0, device="cuda")
    assert not outcome.problems, outcome
