"""Pattention in float8 against the definition in float64: on a GPU, or by Triton's interpreter on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from tokenformer.ops.pattention import (
    NORM_ACTIVATIONS,
    WeightKind,
    pattention_projections,
    pattention_reference,
)
from tokenformer.ops.pattention_float8 import (
    has_float8,
    pattention_float8,
    pattention_float8_projections,
)

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if torch.cuda.is_available():
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not has_float8(torch.device("cuda")), reason="needs a GPU with float8"),
    ]

Tokens = list[list[Tensor]]
LARGER = pytest.param(  # a quarter of a minute by the interpreter
    512,
    256,
    (256, 128),
    3,
    marks=[pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")],
)


def draw(rows: int, d: int, groups: tuple[int, ...], projections: int) -> tuple[Tensor, Tokens, Tokens]:
    generator = torch.Generator().manual_seed(0)

    def normal(a: int, b: int, std: float) -> Tensor:
        return (std * torch.randn(a, b, generator=generator)).to(DEVICE).requires_grad_()

    n = sum(groups)
    keys = [[normal(g, d, d**-0.5) for g in groups] for _ in range(projections)]
    values = [[normal(g, d, n**-0.5) for g in groups] for _ in range(projections)]
    x = normal(rows, d, 1.0)
    with torch.no_grad():
        x *= torch.logspace(-3, 0.5, rows, device=DEVICE)[:, None]  # rows of very different size
    return x, keys, values


def results(
    path: Callable[..., list[Tensor]],
    x: Tensor,
    keys: Tokens,
    values: Tokens,
    kind: WeightKind,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Outputs, and gradients for a gradient of normal numbers."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().to(dtype, copy=True).requires_grad_()

    x, keys, values = leaf(x), [[leaf(k) for k in p] for p in keys], [[leaf(v) for v in p] for p in values]
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == torch.float32):
        outputs = path(x, keys, values, kind)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    leaves = [x, *(t for tokens in (keys, values) for p in tokens for t in p)]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def defined(x: Tensor, keys: Tokens, values: Tokens, kind: WeightKind) -> list[Tensor]:
    return [pattention_reference(x, k, v, kind) for k, v in zip(keys, values, strict=True)]


@pytest.mark.parametrize("norm_activation", NORM_ACTIVATIONS)
@pytest.mark.parametrize(
    ("rows", "d", "groups", "projections"),
    [(48, 32, (64,), 1), (32, 48, (48, 32), 3), (16, 16, (16, 16), 2), LARGER],
)
def test_error_is_that_of_four_bits_less(
    norm_activation: str, rows: int, d: int, groups: tuple[int, ...], projections: int
) -> None:
    """A mantissa of 3 bits instead of 7: every rounding is 16 times bfloat16's; and there are a few more of them."""
    x, keys, values = draw(rows, d, groups, projections)
    kind = WeightKind(norm_activation, float(sum(groups)))
    found = results(pattention_float8_projections, x, keys, values, kind, torch.float32)
    exact = results(defined, x, keys, values, kind, torch.float64)
    narrow = results(pattention_projections, x, keys, values, kind, torch.float32)
    for ours, wide, bfloat16 in zip(found, exact, narrow, strict=True):
        assert torch.isfinite(ours).all()
        assert (ours.double() - wide).norm() <= 24 * (bfloat16.double() - wide).norm() + 0.02 * wide.norm()
    for ours in found[projections:]:
        assert ours.dtype == torch.float32


def test_rows_of_zeros_do_not_drown_the_others() -> None:
    """Padding has no gradient, or no input; where gradients are small, a scale of one for it would be the largest."""
    x, keys, values = draw(48, 32, (64,), 1)
    with torch.no_grad():
        x[7] = 0
    grad = 1e-9 * torch.randn(48, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    grad[5] = 0
    kind = WeightKind("gelu", 64.0)
    leaves = (x, keys[0][0], values[0][0])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        (out,) = pattention_float8_projections(x, keys, values, kind)
    found = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    exact = torch.autograd.grad(pattention_reference(x, *keys, *values, kind), leaves, grad)
    for ours, wide in zip(found, exact, strict=True):
        assert (ours - wide).norm() <= 0.1 * wide.norm()
    assert found[0][5].count_nonzero() == 0


def test_other_sizes_and_dtypes_take_the_other_path() -> None:
    kind = WeightKind("gelu", 20.0)
    x, keys, values = draw(16, 16, (20,), 1)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(
            pattention_float8(x, keys[0], values[0], kind), pattention_projections(x, keys, values, kind)[0]
        )
    x, keys, values = draw(16, 16, (16,), 1)
    found = pattention_float8(x, keys[0], values[0], kind)
    assert torch.equal(found, pattention_projections(x, keys, values, kind)[0])


def test_compiled_is_plain() -> None:
    """Shapes and dtypes are those that the compiler was told, of outputs and of what is kept."""
    x, keys, values = draw(32, 48, (48, 32), 3)
    kind = WeightKind("l2_norm_gelu", 80.0)
    torch.compiler.reset()
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(pattention_float8_projections, dynamic=False, backend=backend)
    found = results(compiled, x, keys, values, kind, torch.float32)
    expected = results(pattention_float8_projections, x, keys, values, kind, torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= 1e-2 * b.norm()


@pytest.mark.parametrize("norm_activation", NORM_ACTIVATIONS)
@pytest.mark.parametrize("compiled", [False, True])
def test_scores_made_again_are_the_same_bits(norm_activation: str, compiled: bool) -> None:
    x, keys, values = draw(32, 48, (48, 32), 3)
    kind = WeightKind(norm_activation, 80.0)

    def found(recompute_scores: bool) -> tuple[set[tuple[int, ...]], list[Tensor]]:
        """Shapes of what is kept in bfloat16; outputs and gradients."""
        kept = set()

        def pack(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.bfloat16:
                kept.add(tuple(tensor.shape))
            return tensor

        torch.compiler.reset()
        path = partial(pattention_float8_projections, recompute_scores=recompute_scores)
        if compiled:
            path = torch.compile(path, dynamic=False, backend="aot_eager")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return kept, results(path, x, keys, values, kind, torch.float32)

    (kept, expected), (kept_less, again) = found(False), found(True)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert (96, 80) in kept
    assert (96, 80) not in kept_less
