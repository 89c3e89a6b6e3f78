"""The layer norm that keeps its result, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenformer.ops.layer_norm import layer_norm

EPS = 1e-5


def draw() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(6, 5, 64, generator=generator) + 1
    x[0, 0] = 2.0  # no variance
    return x, torch.randn(6, 5, 64, generator=generator)


def results(x: Tensor, grad: Tensor, *, autocast: bool) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = layer_norm(x, EPS)
    return out.detach(), torch.autograd.grad(out, x, grad.to(out.dtype))[0]


def test_without_autocast_it_is_torchs() -> None:
    x, grad = draw()
    wide = x.clone().requires_grad_()
    expected = F.layer_norm(wide, (64,), eps=EPS)
    out, grad_x = results(x, grad, autocast=False)
    assert torch.equal(out, expected)
    assert torch.equal(grad_x, torch.autograd.grad(expected, wide, grad)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_autocast_it_is_the_rounded_result(dtype: torch.dtype) -> None:
    x, grad = draw()
    x, grad = x.to(dtype), grad.bfloat16()
    wide = x.double().requires_grad_()
    expected = F.layer_norm(wide, (64,), eps=EPS)
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer_norm(x, EPS)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5)
    found, grad_x = results(x.float(), grad, autocast=True)
    assert torch.equal(found, out)
    assert grad_x.dtype == torch.float32
    varied = slice(1, None)  # rows without variance have gradients of 1 / sqrt(eps)
    error = (grad_x.double() - expected_grad)[varied].norm() / expected_grad[varied].norm()
    assert error < 2e-3
    torch.testing.assert_close(grad_x.double(), expected_grad, rtol=0.02, atol=0.02)


def test_only_the_result_and_a_number_a_row_are_kept() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        out = layer_norm(draw()[0].requires_grad_(), EPS)
    assert sorted(tensor.numel() for tensor in kept) == [30, 30 * 64]
    assert any(tensor.data_ptr() == out.data_ptr() for tensor in kept)


def test_compiled_and_transformed() -> None:
    x, grad = draw()
    torch.compiler.reset()
    compiled = torch.compile(layer_norm, backend="aot_eager", fullgraph=True)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = compiled(leaf, EPS)
        rows = torch.func.vmap(lambda row: layer_norm(row, EPS))(x)
    expected, expected_grad = results(x, grad, autocast=True)
    assert torch.equal(out, expected)
    assert torch.equal(rows, expected)
    assert torch.equal(torch.autograd.grad(out, leaf, grad.bfloat16())[0], expected_grad)
    torch.compiler.reset()
