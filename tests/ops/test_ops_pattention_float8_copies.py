"""Tensors in float8 and their transposed copies, byte for byte: on a GPU, or by Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenformer.ops.pattention_float8 import has_float8
from tokenformer.ops.pattention_float8_copies import FLOAT8, rows_to_float8, tokens_to_float8, transposed

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if torch.cuda.is_available():
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not has_float8(torch.device("cuda")), reason="needs a GPU with float8"),
    ]


def scale_of(largest: Tensor) -> Tensor:
    """The smallest power of two that leaves at most 448."""
    fraction, exponent = torch.frexp(largest.double().cpu() / 448)
    power = torch.where(fraction == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(fraction), power).to(DEVICE)


def expected_bytes(x: Tensor, scale: Tensor) -> Tensor:
    return (x.double() / scale).float().to(FLOAT8).view(torch.uint8)


def assert_same_bytes(found: Tensor, expected: Tensor, *, rounded_twice: bool = False) -> None:
    differs = found.view(torch.uint8) != expected
    if rounded_twice and DEVICE == "cpu":  # subnormal numbers, where kernels round for the interpreter
        differs &= (expected & 127) > 8
    wrong = differs.nonzero()
    assert len(wrong) == 0, f"{len(wrong)} of {expected.numel()} bytes, the first at {wrong[0].tolist()}"


COPIES = [(16, 16), (48, 32), (240, 48), (128, 128), (144, 272)]
if DEVICE == "cuda":
    COPIES += [(384, 256), (1152, 256), (1008, 784), (4096, 1024), (8192, 1536), (4608, 1536)]


@pytest.mark.parametrize(("rows", "features"), COPIES)
def test_copies_are_those_of_torch(rows: int, features: int) -> None:
    """Every byte of what is quantised and of what is transposed, in full tiles and in ragged ones."""
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    narrow = 3 * x[:, :16].contiguous()
    tokens = tokens_to_float8(x, narrow)
    for matrix, copy, turned, found in (
        (x, tokens.key, tokens.key_transposed, tokens.scales[0]),
        (narrow, tokens.value, tokens.value_transposed, tokens.scales[1]),
    ):
        scale = scale_of(matrix.abs().max())
        assert found[0] == scale
        assert_same_bytes(copy, expected_bytes(matrix, scale))
        assert_same_bytes(turned, expected_bytes(matrix, scale).t())
    x *= torch.logspace(-1, 0.5, rows, device=DEVICE, dtype=torch.bfloat16)[:, None]
    others = torch.stack([2.0 ** (torch.arange(rows, device=DEVICE) % 7 - i) for i in (3, 5)])
    largest = torch.zeros(2, 4, device=DEVICE)
    both = rows_to_float8([x, 2 * x], others, largest)
    turned = transposed(both.rows, both.scales, others, largest)
    for i in range(2):
        exact = (i + 1) * scale_of(x.abs().amax(1))
        assert torch.equal(both.scales[i].double(), exact)
        expected = expected_bytes((i + 1) * x, exact[:, None])
        assert_same_bytes(both.rows[i], expected)
        assert_same_bytes(both.transposed[i], expected.t())
        top = (exact * others[i]).max()
        assert largest[i, 0] == top
        in_one = both.rows[i].float() * (exact * others[i])[:, None]
        assert_same_bytes(turned[i], expected_bytes(in_one, top).t(), rounded_twice=True)


def test_numbers_round_as_those_of_torch() -> None:
    """Ties, subnormal numbers, the largest, zeros of both signs and NaN."""
    halves = torch.arange(0, 256 * 16, device=DEVICE) / 16.0
    x = torch.cat([448 * halves / 256 * 2.0**-k for k in (0, 3, 12, 16)])
    x = torch.cat([x, -x]).view(16, -1).to(torch.bfloat16)
    x[:, 0], x[3, 7] = 448.0, torch.nan
    found = rows_to_float8([x])
    assert (found.scales == 1).all()
    assert_same_bytes(found.rows[0], expected_bytes(x, torch.ones((), device=DEVICE)))


def test_rows_of_zeros_have_a_scale_that_is_never_the_largest() -> None:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)).mul(1e-12).to(DEVICE, torch.bfloat16)
    x[5] = 0
    largest = torch.zeros(1, 4, device=DEVICE)
    found = rows_to_float8([x], torch.full((1, 32), 0.5, device=DEVICE), largest)
    assert largest[0, 0] == 0.5 * scale_of(x.abs().max())
    assert found.rows[0, 5].float().count_nonzero() == 0
    others = torch.zeros(1, 32, device=DEVICE)  # products of scales that are too small for a number
    copy = transposed(found.rows, found.scales, others, torch.zeros(1, 4, device=DEVICE))
    assert copy.float().count_nonzero() == 0
