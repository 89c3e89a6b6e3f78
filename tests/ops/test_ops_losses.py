"""The chunked cross-entropy against torch's own over all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenformer.ops import losses
from tokenformer.ops.losses import linear_cross_entropy

V = 11


@pytest.fixture(params=[1, 3 * V, 4 * V, 10**6], ids=["one row", "3 rows", "4 rows", "one chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", request.param)
    return request.param


def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [2, 5, 6], weight [v, 6], targets [2, 5] of which 3 are ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(V, (2, 5), generator=generator)
    targets[0, 0] = targets[1, 3] = targets[1, 4] = -100
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:
    logits = (hidden @ weight.T * scale).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), reduction="sum")


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("chunk")
def test_value_and_gradients(scale: float, dtype: torch.dtype) -> None:
    tensors = draw(dtype)
    found = linear_cross_entropy(*tensors, logit_scale=scale)
    expected = plain(*tensors, scale)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)
    for found_grad, expected_grad in zip(
        torch.autograd.grad(found / 7, tensors[:2]),
        torch.autograd.grad(expected / 7, tensors[:2]),
        strict=True,
    ):
        torch.testing.assert_close(found_grad, expected_grad)


@pytest.mark.usefixtures("chunk")
def test_gradcheck() -> None:
    hidden, weight, targets = draw(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, logit_scale=0.7), (hidden, weight)
    )


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_argument_costs_no_product(frozen: int, product_counter) -> None:
    tensors = draw()
    expected = torch.autograd.grad(linear_cross_entropy(*tensors), tensors[1 - frozen])
    tensors[frozen].requires_grad_(False)
    with product_counter() as counter:
        loss = linear_cross_entropy(*tensors)
        (found,) = torch.autograd.grad(loss, tensors[1 - frozen])
    assert torch.equal(found, expected[0])
    assert counter.count == 2  # the logits and one gradient


def test_evaluation_computes_no_gradient(product_counter) -> None:
    tensors = draw()
    with torch.no_grad(), product_counter() as counter:
        loss = linear_cross_entropy(*tensors)
    assert counter.count == 1
    assert torch.equal(loss, linear_cross_entropy(*tensors).detach())


def test_ignored_targets_count_nothing() -> None:
    hidden, weight, targets = draw()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    assert loss == 0
    loss.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    other = linear_cross_entropy(hidden, weight, torch.where(targets == -100, 3, targets), ignore_index=3)
    kept = (targets != -100) & (targets != 3)
    torch.testing.assert_close(other, plain(hidden, weight, torch.where(kept, targets, -100), 1.0))


def test_bfloat16_sums_in_float32_and_scales_its_gradient_exactly() -> None:
    hidden, weight, targets = draw(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    expected = plain(*wide, targets, 1.0)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    count = 1000 / 3  # no power of two
    unscaled = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    scaled = torch.autograd.grad(loss / count, (hidden, weight))
    for found, before, wide_grad in zip(scaled, unscaled, torch.autograd.grad(expected, wide), strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, (before.float() / count).bfloat16())
        torch.testing.assert_close(before.float(), wide_grad, rtol=5e-2, atol=2e-2)


def test_autocast_takes_products_in_its_dtype() -> None:
    hidden, weight, targets = draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    narrow = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(loss, narrow)
    loss.backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("v", [1, 11, 4096, 5000])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_kernel_in_the_interpreter(v: int, scale: float) -> None:
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(6, v, generator=generator)
    targets = torch.randint(v, (6,), generator=generator)
    targets[2] = -100
    expected, expected_grad = losses._rows_plain(logits.double(), targets, scale, -100, True)
    without, unchanged = losses._rows_by_triton(logits, targets, scale, -100, False)
    assert unchanged is logits
    found, grad = losses._rows_by_triton(logits.clone(), targets, scale, -100, True)
    assert torch.equal(found, without)
    torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(grad, expected_grad.float())
    targets[0] = v
    assert losses._rows_by_triton(logits, targets, scale, -100, False)[0].isnan()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "v"), [(3, 11), (5000, 257), (300, 50304), (12000, 50304)])
def test_on_a_gpu_it_is_the_definition(dtype: torch.dtype, rows: int, v: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(rows, 64, device="cuda", generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(v, 64, device="cuda", generator=generator) / 8).to(dtype).requires_grad_()
    targets = torch.randint(v, (rows,), device="cuda", generator=generator)
    targets[1::7] = -100
    found = linear_cross_entropy(hidden, weight, targets, logit_scale=0.8)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = torch.zeros((), device="cuda", dtype=torch.float64)
    for part in range(0, rows, 4000):
        chosen = slice(part, part + 4000)
        logits = wide[0][chosen] @ wide[1].T * 0.8
        expected = expected + F.cross_entropy(logits, targets[chosen], reduction="sum")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance / 10, atol=0)
    for a, b in zip(
        torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(expected, wide), strict=True
    ):
        assert (a.double() - b).norm() <= tolerance * b.norm()
