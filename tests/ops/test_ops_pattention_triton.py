"""The GPU path of Pattention, run by Triton's interpreter in float32 on the CPU, against the definition in float64."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenformer.ops.pattention import (
    NORM_ACTIVATIONS,
    WeightKind,
    attention_weights,
    pattention_reference,
)

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

Tokens = list[list[Tensor]]


def assert_close_to_scale(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """The largest error, in units of the largest entry."""
    assert torch.isfinite(found).all()
    error = (found.double() - expected.double()).abs().max()
    assert error <= tolerance * expected.double().abs().max(), f"error {error:.3g}"


@pytest.mark.parametrize("norm_activation", NORM_ACTIVATIONS)
@pytest.mark.parametrize(
    ("rows", "n", "approximate", "eps", "size"),
    [
        (1, 1, "none", 0.0, 1.0),
        (7, 24, "tanh", 1e-2, 1.0),
        (37, 5, "none", 0.0, 1.0),
        (3, 768, "none", 0.0, 3.0),
        (2, 3072, "tanh", 0.0, 1.0),
        (2, 17000, "none", 0.0, 1.0),
        (2, 17000, "tanh", 1e-1, 1e-25),
        (5, 100, "none", 0.0, 1e25),
        (5, 100, "tanh", 0.0, 1e25),
        (5, 100, "none", 1e-2, 1e-25),
    ],
)
def test_both_passes_over_the_scores(
    norm_activation: str, rows: int, n: int, approximate: str, eps: float, size: float
) -> None:
    from tokenformer.ops.pattention_rows import weights_backward, weights_forward

    kind = WeightKind(norm_activation, 0.7 * n, approximate, eps)
    generator = torch.Generator().manual_seed(n)
    scores = size * torch.randn(rows, n, generator=generator)
    scores[rows // 2] = 0
    grads = torch.randn(rows, n, generator=generator)
    wide = scores.double().requires_grad_()
    (expected,) = attention_weights([wide], kind)
    (expected_grad,) = torch.autograd.grad(expected, wide, grads.double())
    weights, statistics = weights_forward(scores, kind, keep=True)
    again, score_grads = weights_backward(scores, grads.clone(), statistics, kind)
    assert_close_to_scale(weights, expected)
    assert_close_to_scale(again, expected)
    assert_close_to_scale(score_grads, expected_grad)
    if norm_activation != "softmax":
        assert torch.equal(weights[rows // 2], torch.zeros(n))
    if norm_activation in ("l2_norm_gelu", "gelu_l2_norm"):
        assert torch.equal(score_grads[rows // 2], torch.zeros(n))
    in_place, grads_in_place = weights_backward(scores.clone(), grads.clone(), statistics, kind, keep=False)
    assert torch.equal(in_place, again)
    assert torch.equal(grads_in_place, score_grads)
    in_place, _ = weights_forward(scores, kind, keep=False)
    assert in_place is scores
    assert torch.equal(in_place, weights)


def draw(
    shape: Sequence[int], d_out: int, groups: Sequence[int], projections: int, frozen: Sequence[int] = ()
) -> tuple[Tensor, Tokens, Tokens]:
    """Input, keys and values by projection and group; the groups in ``frozen`` require no gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def tokens(features: int) -> Tokens:
        return [
            [normal(n, features).requires_grad_(g not in frozen) for g, n in enumerate(groups)]
            for _ in range(projections)
        ]

    return normal(*shape).requires_grad_(), tokens(shape[-1]), tokens(d_out)


def fused(
    x: Tensor, keys: Tokens, values: Tokens, kind: WeightKind, *, recompute_scores: bool = False
) -> list[Tensor]:
    from tokenformer.ops.pattention_cuda import pattention_fused

    return pattention_fused(x, keys, values, kind, recompute_scores=recompute_scores)


def defined(x: Tensor, keys: Tokens, values: Tokens, kind: WeightKind) -> list[Tensor]:
    return [pattention_reference(x, k, v, kind) for k, v in zip(keys, values, strict=True)]


def assert_same(found: list[Tensor], expected: list[Tensor], leaves: list[Tensor]) -> None:
    """Outputs, and gradients of a sum with unequal factors."""

    def gradients(outputs: list[Tensor]) -> tuple[Tensor, ...]:
        total = sum((out * torch.linspace(-1, 1.5, out.numel()).view_as(out)).sum() for out in outputs)
        return torch.autograd.grad(total, leaves)

    for a, b in zip([*found, *gradients(found)], [*expected, *gradients(expected)], strict=True):
        assert_close_to_scale(a, b, 1e-5)


@pytest.mark.parametrize("norm_activation", NORM_ACTIVATIONS)
@pytest.mark.parametrize(
    ("projections", "groups", "frozen", "compiled"),
    [
        (1, (5,), (), False),
        (1, (4, 3, 6), (1,), False),
        (3, (4, 3, 2), (0,), True),
        (2, (1, 1, 1, 1), (2, 3), False),
    ],
)
def test_projections_and_groups(
    norm_activation: str,
    projections: int,
    groups: tuple[int, ...],
    frozen: tuple[int, ...],
    compiled: bool,
) -> None:
    x, keys, values = draw((2, 5, 6), 4, groups, projections, frozen)
    kind = WeightKind(norm_activation, float(sum(groups)))
    torch.compiler.reset()
    path = torch.compile(fused, backend="aot_eager", fullgraph=True) if compiled else fused
    leaves = [t for t in (x, *chain(*keys, *values)) if t.requires_grad]
    assert_same(path(x, keys, values, kind), defined(x, keys, values, kind), leaves)


@settings(max_examples=10)
@given(
    st.sampled_from(NORM_ACTIVATIONS),
    st.integers(0, 70),
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(1, 3),
)
def test_any_shape(
    norm_activation: str, rows: int, d_in: int, d_out: int, groups: list[int], projections: int
) -> None:
    x, keys, values = draw((rows, d_in), d_out, groups, projections)
    kind = WeightKind(norm_activation, 3.0)
    found, expected = fused(x, keys, values, kind), defined(x, keys, values, kind)
    if rows == 0:
        assert [out.shape for out in found] == [out.shape for out in expected]
    else:
        assert_same(found, expected, [x, *chain(*keys, *values)])


def test_what_needs_no_gradient_is_not_computed() -> None:
    x, keys, values = draw((4, 6), 3, (5,), 1)
    kind = WeightKind("gelu", 5.0)
    with torch.no_grad():
        (out,) = fused(x, keys, values, kind)
    assert not out.requires_grad
    for leaf in (x, keys[0][0], values[0][0]):
        leaves = [t.detach().requires_grad_(t is leaf) for t in (x, keys[0][0], values[0][0])]
        wanted = next(t for t in leaves if t.requires_grad)
        (found,) = torch.autograd.grad(
            fused(leaves[0], [[leaves[1]]], [[leaves[2]]], kind)[0].sum(), [wanted]
        )
        (expected,) = torch.autograd.grad(defined(x, keys, values, kind)[0].sum(), [leaf])
        torch.testing.assert_close(found, expected)


def test_projections_that_nothing_depends_on() -> None:
    x, keys, values = draw((4, 6), 3, (5, 2), 3)
    kind = WeightKind("gelu_l2_norm", 7.0)
    leaves = [x, *chain(*keys, *values)]
    found = torch.autograd.grad(fused(x, keys, values, kind)[1].sum(), leaves, materialize_grads=True)
    expected = torch.autograd.grad(defined(x, keys, values, kind)[1].sum(), leaves, materialize_grads=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_graph_can_be_walked_twice() -> None:
    x, keys, values = draw((4, 6), 3, (5,), 1)
    total = fused(x, keys, values, WeightKind("l2_norm_gelu", 5.0))[0].sum()
    first, second = (torch.autograd.grad(total, [x, *keys[0]], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("norm_activation", NORM_ACTIVATIONS)
@pytest.mark.parametrize(
    ("projections", "groups", "frozen", "compiled"),
    [(1, (5,), (), True), (3, (4, 3, 2), (0,), False), (3, (4, 3, 2), (0,), True), (1, (17000,), (), False)],
)
def test_scores_made_again_are_the_same_bits(
    norm_activation: str,
    projections: int,
    groups: tuple[int, ...],
    frozen: tuple[int, ...],
    compiled: bool,
) -> None:
    x, keys, values = draw((2, 5, 6), 4, groups, projections, frozen)
    kind = WeightKind(norm_activation, float(sum(groups)))
    leaves = [t for t in (x, *chain(*keys, *values)) if t.requires_grad]

    def results(recompute_scores: bool) -> tuple[set[tuple[int, ...]], list[Tensor]]:
        """Shapes of what is kept; outputs and gradients."""
        kept = set()

        def pack(tensor: Tensor) -> Tensor:
            kept.add(tuple(tensor.shape))
            return tensor

        torch.compiler.reset()
        path = partial(fused, recompute_scores=recompute_scores)
        if compiled:
            path = torch.compile(path, backend="aot_eager", fullgraph=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = path(x, keys, values, kind)
        total = sum((out * torch.linspace(-1, 1.5, out.numel()).view_as(out)).sum() for out in outputs)
        return kept, [*outputs, *torch.autograd.grad(total, leaves)]

    (kept, expected), (kept_less, found) = results(False), results(True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    scores = (10 * projections, sum(groups))
    assert scores in kept
    assert scores not in kept_less


@pytest.mark.parametrize("recompute_scores", [False, True])
def test_the_operators_keep_their_contract_with_torch(recompute_scores: bool) -> None:
    from tokenformer.ops.pattention_cuda import pattention_forward

    x, keys, values = draw((4, 6), 3, (2, 3), 1)
    key, value = (torch.cat(tokens[0]).detach() for tokens in (keys, values))
    arguments = (
        x,
        key,
        value,
        keys[0],
        values[0],
        1,
        "l2_norm_gelu",
        5.0,
        "none",
        0.0,
        True,
        recompute_scores,
    )
    torch.library.opcheck(pattention_forward, arguments)
