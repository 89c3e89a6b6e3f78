"""Pattention's kernels on a GPU: as close to the definition in float64 as the definition in the same dtype."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from tokenformer.layers.block import Block
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.ops import pattention_cuda
from tokenformer.ops.pattention import (
    NORM_ACTIVATIONS,
    WeightKind,
    pattention,
    pattention_projections,
    pattention_reference,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = (
    (1, 8, 8, (1,)),
    (5, 7, 3, (13,)),
    (257, 96, 40, (768,)),
    (300, 64, 64, (1000,)),
    (70, 33, 65, (511, 30)),
)
LARGE = ((64, 64, 32, (4097,)), (33, 32, 16, (20000,)), (512, 768, 768, (3072,)))


def draw(shape: tuple, dtype: torch.dtype, scale: float = 1.0) -> tuple[list[Tensor], int]:
    """x, keys, values and the gradient of the result; and how many groups."""
    rows, d_in, d_out, groups = shape
    n = sum(groups)
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(a: int, b: int, std: float) -> Tensor:
        return (std * torch.randn(a, b, device="cuda", generator=generator)).to(dtype)

    tensors = [
        normal(rows, d_in, scale),
        *(normal(g, d_in, d_in**-0.5) for g in groups),
        *(normal(g, d_out, n**-0.5) for g in groups),
        normal(rows, d_out, 1.0),
    ]
    return tensors, len(groups)


def results(
    path: Callable[..., Tensor], tensors: list[Tensor], groups: int, kind: WeightKind, dtype: torch.dtype
):
    *inputs, grad = (t.to(dtype, copy=True) for t in tensors)
    inputs = [t.requires_grad_() for t in inputs]
    out = path(inputs[0], inputs[1 : 1 + groups], inputs[1 + groups :], kind)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def relative_error(found: Tensor, exact: Tensor) -> float:
    assert torch.isfinite(found).all()
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize("norm_activation", NORM_ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_error_is_that_of_the_definition(norm_activation: str, dtype: torch.dtype, shape: tuple) -> None:
    tensors, groups = draw(shape, dtype)
    for approximate, eps in (("none", 0.0), ("tanh", 1e-2)):
        kind = WeightKind(norm_activation, float(sum(shape[3])), approximate, eps)
        exact = results(pattention_reference, tensors, groups, kind, torch.float64)
        ours = results(pattention, tensors, groups, kind, dtype)
        defined = results(pattention_reference, tensors, groups, kind, dtype)
        slack = 1e-5 if dtype == torch.float32 else 3e-4
        if tensors[-1].numel() < 100:  # of so few numbers the error is one rounding or none
            slack = 2 * torch.finfo(dtype).eps
        for found, reference, wide in zip(ours, defined, exact, strict=True):
            assert found.dtype == dtype
            scale = 1e-6 * wide.numel() ** 0.5  # where the exact result is 0 but for rounding
            if wide.norm() > scale:
                assert relative_error(found, wide) <= 1.2 * relative_error(reference, wide) + slack
            else:
                assert found.double().norm() <= 3 * reference.double().norm() + scale


@pytest.mark.parametrize("norm_activation", NORM_ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e20, 1e-20, 0.0])
def test_huge_tiny_and_zero_inputs(norm_activation: str, dtype: torch.dtype, scale: float) -> None:
    tensors, groups = draw((40, 64, 32, (100, 28)), dtype, scale)
    kind = WeightKind(norm_activation, 128.0)
    out, *grads = results(pattention, tensors, groups, kind, dtype)
    assert all(torch.isfinite(t).all() for t in (out, *grads))
    if scale == 0 and norm_activation != "softmax":
        assert not out.any()
    if scale == 0 and norm_activation in ("l2_norm_gelu", "gelu_l2_norm"):
        assert not any(grad.any() for grad in grads)
    exact = results(pattention_reference, tensors, groups, kind, torch.float64)
    if scale != 0 and norm_activation in ("l2_norm_gelu", "gelu_l2_norm"):
        assert relative_error(out, exact[0]) < 1e-2


def test_projections_share_products_and_agree_with_one_at_a_time() -> None:
    kind = WeightKind("l2_norm_gelu", 96.0)
    triples = [draw((130, 64, 32, (64, 32)), torch.bfloat16)[0] for _ in range(3)]
    x = triples[0][0].requires_grad_()
    keys = [[k.requires_grad_() * (1 + i) for k in t[1:3]] for i, t in enumerate(triples)]
    values = [[v.requires_grad_() * (1 - i) for v in t[3:5]] for i, t in enumerate(triples)]
    together = pattention_projections(x, keys, values, kind)
    for out, k, v in zip(together, keys, values, strict=True):
        torch.testing.assert_close(out, pattention_reference(x, k, v, kind), rtol=2e-2, atol=2e-2)
    total = sum(out.float().square().sum() for out in together)
    (found,) = torch.autograd.grad(total, x)
    alone = sum(
        pattention_reference(x, k, v, kind).float().square().sum() for k, v in zip(keys, values, strict=True)
    )
    (expected,) = torch.autograd.grad(alone, x)
    assert relative_error(found, expected.double()) < 2e-2


def test_other_dtypes_and_transforms_take_the_definition() -> None:
    tensors, _ = draw((6, 8, 8, (5,)), torch.float64)
    kind = WeightKind("gelu", 5.0)
    assert not pattention_cuda.applies(tensors[0])
    expected = pattention_reference(tensors[0], tensors[1:2], tensors[2:3], kind)
    torch.testing.assert_close(pattention(tensors[0], tensors[1:2], tensors[2:3], kind), expected)
    narrow = [t.float() for t in tensors]
    rows = torch.func.vmap(lambda row: pattention(row, narrow[1:2], narrow[2:3], kind))(narrow[0])
    torch.testing.assert_close(rows, expected.float())


@pytest.mark.parametrize("norm_activation", NORM_ACTIVATIONS)
def test_a_compiled_block_is_one_graph_with_the_gradients_of_the_plain_one(norm_activation: str) -> None:
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"qkv_param_tokens": 48, "proj_param_tokens": 40, "ffn_param_tokens": 200}
    model = build_model(
        TokenFormerConfig(**sizes, **tokens, max_position_embeddings=32, norm_activation=norm_activation)
    ).cuda()
    inputs = torch.randint(128, (4, 32), device="cuda")

    def gradients() -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model(inputs).logits.float().square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    torch.compiler.reset()
    for block in model.blocks:
        assert isinstance(block, Block)
        block.compile(fullgraph=True)
    for found, expected in zip(gradients(), plain, strict=True):
        assert (found - expected).norm() <= 0.05 * expected.norm() + 1e-8


@pytest.mark.parametrize("groups", [(96,), (64, 32)])
def test_gradients_of_float32_tokens_are_not_rounded(groups: tuple[int, ...]) -> None:
    """Sums of many products: the rounding of the factors averages out, that of the sum to bfloat16 would not."""
    tensors, count = draw((40000, 64, 32, groups), torch.float32)
    kind = WeightKind("gelu", 96.0)
    x, grad = tensors[0].bfloat16(), tensors[-1].bfloat16()
    inputs = [t.requires_grad_() for t in tensors[1:-1]]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = pattention(x, inputs[:count], inputs[count:], kind)
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out, inputs, grad)
    exact = results(
        pattention_reference, [x, *(t.detach().bfloat16() for t in inputs), grad], count, kind, torch.float64
    )
    for ours, wide in zip(found, exact[2:], strict=True):
        assert ours.dtype == torch.float32
        assert relative_error(ours, wide) < 5e-3
        assert (ours.bfloat16().float() != ours).any()


@pytest.mark.parametrize("norm_activation", NORM_ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(300, 64, 64, (1000,)), (70, 33, 65, (511, 30)), (33, 32, 16, (20000,))])
def test_scores_made_again_are_the_same_bits(norm_activation: str, dtype: torch.dtype, shape: tuple) -> None:
    """Of few rows, where a product and a pass behind it serve."""
    tensors, groups = draw(shape, dtype)
    kind = WeightKind(norm_activation, float(sum(shape[3])))
    expected = results(pattention, tensors, groups, kind, dtype)
    found = results(partial(pattention, recompute_scores=True), tensors, groups, kind, dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("norm_activation", NORM_ACTIVATIONS)
def test_scores_made_again_differ_by_rounding_where_a_kernel_made_them(norm_activation: str) -> None:
    tensors, groups = draw((4096, 768, 768, (3072,)), torch.bfloat16)
    kind = WeightKind(norm_activation, 3072.0)
    exact = results(pattention_reference, tensors, groups, kind, torch.float64)
    kept = results(pattention, tensors, groups, kind, torch.bfloat16)
    found = results(partial(pattention, recompute_scores=True), tensors, groups, kind, torch.bfloat16)
    for again, before, wide in zip(found, kept, exact, strict=True):
        assert relative_error(again, wide) <= 1.05 * relative_error(before, wide)


def test_scores_are_not_kept_but_made_again() -> None:
    (x, key, value, grad), _ = draw((8192, 256, 256, (2048,)), torch.bfloat16)
    inputs = [t.requires_grad_() for t in (x, key, value)]
    kind = WeightKind("l2_norm_gelu", 2048.0)
    scores = 8192 * 2048 * 2

    def kept(recompute_scores: bool) -> int:
        before = torch.cuda.memory_allocated()
        out = pattention(x, [key], [value], kind, recompute_scores=recompute_scores)
        held = torch.cuda.memory_allocated() - before - out.nbytes
        torch.autograd.grad(out, inputs, grad)
        return held

    kept(False)  # warm
    assert kept(False) - kept(True) == pytest.approx(scores, rel=0.01)
