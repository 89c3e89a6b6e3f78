"""Tensors in float8 and their transposed copies, byte for byte: on a GPU, or by Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenformer.ops.pattention_float8 import has_float8
from tokenformer.ops.pattention_float8_copies import (
    FLOAT8,
    both_transposed,
    rows_to_float8,
    tokens_to_float8,
    transposed,
)

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


def assert_same_bytes(found: Tensor, expected: Tensor) -> None:
    differs = found.view(torch.uint8) != expected
    if DEVICE == "cpu":  # where kernels round for the interpreter, subnormal numbers are rounded twice
        differs &= (expected & 127) > 8
    wrong = differs.nonzero()
    assert len(wrong) == 0, f"{len(wrong)} of {expected.numel()} bytes, the first at {wrong[0].tolist()}"


COPIES = [(16, 16), (48, 32), (240, 48), (128, 128), (144, 272)]
if DEVICE == "cuda":
    COPIES += [(384, 256), (1152, 256), (1008, 784), (4096, 1024), (2064, 4112)]


@pytest.mark.parametrize(("rows", "features"), COPIES)
def test_copies_are_those_of_torch(rows: int, features: int) -> None:
    """Every byte of what is quantised and of what is transposed, in full tiles and in ragged ones."""
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    numbers = torch.full((8, 4), 7.0, device=DEVICE)
    tokens = (x, torch.cat([4 * x, x[:, :16]], dim=1))  # a tile more, now and then
    found = tokens_to_float8(*tokens, numbers)
    assert numbers[2:].count_nonzero() == 0
    for i, of_tokens in enumerate(tokens):
        scale = scale_of(of_tokens.abs().max())
        assert numbers[i, 0] == scale
        assert_same_bytes(found[2 * i], expected_bytes(of_tokens, scale))
        assert_same_bytes(found[2 * i + 1], expected_bytes(of_tokens, scale).t())
    x *= torch.logspace(-1, 0.5, rows, device=DEVICE, dtype=torch.bfloat16)[:, None]
    x[3] = 0
    both, scales = rows_to_float8([x, 2 * x], numbers[4])
    exact = [scale_of(many.abs().amax(1).float().clamp(min=1e-30)) for many in (x, 2 * x)]
    largest = exact[1].max()
    assert numbers[4, 0] == largest
    for i, of_rows in enumerate(exact):
        assert torch.equal(scales[i].double(), of_rows)
        assert_same_bytes(both[i], expected_bytes((i + 1) * x, of_rows[:, None]))
    wide, wide_scales = rows_to_float8([tokens[1], 3 * tokens[1]], numbers[5])
    of_both = [(both, scales, numbers[4]), (wide, wide_scales, numbers[5])]
    turned = both_transposed(*of_both)
    for copies, (narrow, of_rows, of_all) in zip(turned, of_both, strict=True):
        assert torch.equal(copies.view(torch.uint8), transposed(narrow, of_rows, of_all).view(torch.uint8))
        for found, matrix, rows_scales in zip(copies, narrow, of_rows, strict=True):
            wanted = matrix.double() * rows_scales[:, None].double()
            assert_same_bytes(found, expected_bytes(wanted, of_all[0].double()).t())


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_rows_of_several_tensors(count: int) -> None:
    """More than one launch takes, too; one whose rows lie apart; a row of zeros."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(48, 80, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(count)]
    tensors[-1] = tensors[-1].t().contiguous().t() * 2**count
    tensors[0][7] = 0
    largest = torch.zeros(4, device=DEVICE)
    quantized, scales = rows_to_float8(tensors, largest)
    for tensor, narrow, of_rows in zip(tensors, quantized, scales, strict=True):
        exact = scale_of(tensor.abs().amax(1).float().clamp(min=1e-30))
        assert torch.equal(of_rows.double(), exact)
        assert_same_bytes(narrow, expected_bytes(tensor, exact[:, None]))
    assert largest[0] == scales.max()
