"""The benchmark on several devices in a small form: every layout has the losses of one device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_train_parallel(tmp_path: Path, torchrun: Callable[..., Any]) -> None:
    small = [
        *("model.vocab_size=64", "model.hidden_size=16", "model.num_hidden_layers=1"),
        *("model.num_attention_heads=2", "model.qkv_param_tokens=8", "model.proj_param_tokens=8"),
        *("model.ffn_param_tokens=16", "data.sequence_length=16", "parallel.device=cpu"),
    ]
    written, script = tmp_path / "parallel.json", BENCHMARKS / "train_parallel.py"
    finished = torchrun(2, script, "--micro-batch", 2, "--steps", 4, "--out", written, *small)
    assert finished.code == 0, finished.err
    cases = {case["case"]: case for case in json.loads(written.read_text())["cases"]}
    assert list(cases) == ["one", "accumulated", "replicate", "shard", "tensor"]
    expected = cases["accumulated"]["losses"]
    for name in ("replicate", "shard", "tensor"):
        assert cases[name]["losses"] == pytest.approx(expected, rel=1e-5)
        assert (cases[name]["ranks"], cases[name]["sequences_per_step"]) == (2, 4)
        assert cases[name]["tokens_per_second"] > 0
