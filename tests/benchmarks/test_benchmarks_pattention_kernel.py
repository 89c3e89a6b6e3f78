"""The benchmark of the kernel for Hopper GPUs where there is none, and what it concludes from its numbers."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have the kernel")
def test_without_such_a_gpu_it_says_so() -> None:
    command = [sys.executable, str(BENCHMARKS / "pattention_kernel.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "pattention_kernel.py needs a Hopper GPU, Triton and cuda-bindings\n"


def test_from_where_on_the_kernel_pays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("pattention_kernel")
    ratios = {  # by numbers of parameter tokens
        ("gelu", "forward"): [(768, 0.9), (4096, 0.8)],
        ("gelu", "backward"): [(768, 0.8), (3072, 1.1), (4096, 0.7), (6144, 0.9)],
        ("softmax", "forward"): [(768, 0.9), (4096, 1.2)],
        ("softmax", "backward"): [(768, 0.9), (768, 0.995), (4096, 0.9)],
    }
    results = [
        {"kind": kind, "way": way, "tokens": n, "ratio": ratio}
        for (kind, way), of_case in ratios.items()
        for n, ratio in of_case
    ]
    pays = benchmark.pays_from(results, margin=0.99)
    assert pays == dict(zip(ratios, [768, 4096, None, 4096], strict=True))
    benchmark.print_pays(pays)
    assert "gelu forward                  from n = 768 on (" in capsys.readouterr().out
