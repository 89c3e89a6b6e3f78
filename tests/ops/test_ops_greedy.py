"""The likeliest token by kernels, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose(logits: torch.Tensor, vocab_size: int) -> tuple[list[int], list[int]]:
    """The ids, and the row that is written into the log."""
    from tokenformer.ops.greedy import GreedyChoice

    b = logits.shape[0]
    tokens = torch.full((b, 1), -7, device=DEVICE)
    log, count = torch.full((4, b + 1), -7, device=DEVICE), torch.tensor([2], device=DEVICE)
    GreedyChoice(b, vocab_size, DEVICE)(logits.to(DEVICE), tokens, log, count)
    assert count.item() == 3
    assert (log[[0, 1, 3]] == -7).all()
    return tokens[:, 0].tolist(), log[2].tolist()


@pytest.mark.parametrize(("batch", "v", "vocab_size"), [(1, 5, 5), (3, 2500, 2300), (5, 1024, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_of_the_largest(batch: int, v: int, vocab_size: int, dtype: torch.dtype) -> None:
    logits = torch.randn(batch, v, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[-1, 1:] = logits[-1, 1:].max()  # equal ones
    expected = [int((row == row.max()).nonzero()[0]) for row in logits[:, :vocab_size]]
    tokens, logged = choose(logits, vocab_size)
    assert tokens == expected
    assert logged == [*expected, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_told_and_not_taken(bad: float) -> None:
    logits = torch.zeros(2, 1500)
    logits[1, 1400], logits[0, 3] = bad, 1.0
    tokens, logged = choose(logits, 1500)
    assert tokens == logged[:2] == [3, 0]
    assert logged[2] == 0
    assert 0 <= choose(torch.full((1, 9), bad), 9)[0][0] < 9
