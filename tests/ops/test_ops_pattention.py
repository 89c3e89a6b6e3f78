"""Pattention against a float64 formula written out here, on both paths, at the edges of the number formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenformer.ops import pattention_cpu
from tokenformer.ops.pattention import NORM_ACTIVATIONS, WeightKind, pattention, pattention_reference
from tokenformer.ops.pattention_cpu import pattention_row_blocks

PATHS = (pattention_reference, pattention_row_blocks)
NORMED = ("l2_norm_gelu", "gelu_l2_norm")
Path = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], WeightKind], Tensor]
Tokens = list[Tensor]


def formula(x: Tensor, keys: Tokens, values: Tokens, kind: WeightKind) -> np.ndarray:
    """Section 3.1 of the paper, score by score in Python floats."""
    all_keys = np.concatenate([k.detach().double().numpy() for k in keys])
    all_values = np.concatenate([v.detach().double().numpy() for v in values])
    rows = x.detach().double().numpy().reshape(-1, x.shape[-1])
    out = [_weights(row @ all_keys.T, kind) @ all_values for row in rows]
    return np.array(out).reshape(*x.shape[:-1], all_values.shape[1])


def _weights(scores: np.ndarray, kind: WeightKind) -> np.ndarray:
    def gelu(s: float) -> float:
        if kind.gelu_approximate == "tanh":
            return 0.5 * s * (1 + math.tanh(math.sqrt(2 / math.pi) * (s + 0.044715 * s**3)))
        return 0.5 * s * (1 + math.erf(s / math.sqrt(2)))

    if kind.norm_activation == "softmax":
        exponentials = [math.exp(s - max(scores)) for s in scores]
        return np.array([kind.tau * e / sum(exponentials) for e in exponentials])
    if kind.norm_activation == "gelu":
        return np.array([gelu(s) for s in scores])
    if kind.norm_activation == "l2_norm_gelu":
        norm = math.hypot(*scores) + kind.norm_eps
        return np.array([gelu(math.sqrt(kind.tau) * s / norm) for s in scores])
    activated = [gelu(s) for s in scores]
    norm = math.hypot(*activated) + kind.norm_eps
    return np.array([math.sqrt(kind.tau) * g / norm for g in activated])


def draw(
    shape: Sequence[int],
    d_out: int,
    groups: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tokens, Tokens]:
    """Input [*shape], keys and values of all groups, each requiring its gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype).requires_grad_()

    return normal(*shape), [normal(n, shape[-1]) for n in groups], [normal(n, d_out) for n in groups]


def gradients(path: Path, x: Tensor, keys: Tokens, values: Tokens, kind: WeightKind) -> list[Tensor]:
    """Of a sum of the outputs with unequal factors: for x, every group's keys, every group's values."""
    out = path(x, keys, values, kind)
    factors = torch.linspace(-1, 1.5, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    return list(torch.autograd.grad((out * factors).sum(), (x, *keys, *values)))


def assert_close_to_scale(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest error, in units of the largest entry."""
    assert torch.isfinite(found).all()
    error = (found.double() - expected.double()).abs().max()
    assert error <= tolerance * expected.double().abs().max(), f"error {error:.3g}"


@pytest.mark.parametrize("kind", NORM_ACTIVATIONS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(
    ("shape", "d_out", "groups"),
    [((7,), 5, (3,)), ((1, 1), 1, (1,)), ((2, 3, 4, 6), 9, (11,)), ((13, 5), 5, (4, 1, 7))],
    ids=["one vector", "all ones", "leading shape", "three groups"],
)
def test_value_follows_the_formula(
    kind: str, approximate: str, shape: tuple[int, ...], d_out: int, groups: tuple[int, ...]
) -> None:
    x, keys, values = draw(shape, d_out, groups)
    for tau, eps in ((float(sum(groups)), 0.0), (2.5, 1e-2)):
        weight_kind = WeightKind(kind, tau, approximate, eps)
        found = pattention(x, keys, values, weight_kind)
        assert found.shape == (*shape[:-1], d_out)
        assert found.dtype == torch.float32
        expected = formula(x, keys, values, weight_kind)
        np.testing.assert_allclose(
            found.detach().numpy(), expected, rtol=1e-5, atol=2e-6 * np.abs(expected).max()
        )
        wide = [t.detach().double() for t in (x, *keys, *values)]
        found = pattention(wide[0], wide[1 : 1 + len(keys)], wide[1 + len(keys) :], weight_kind)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", NORM_ACTIVATIONS)
def test_equals_the_authors_plain_formula_where_nothing_special_happens(kind: str) -> None:
    x, keys, values = draw((50, 32), 24, (40,))
    with torch.no_grad():
        scores, n = x @ keys[0].T, 40
        gelu = torch.nn.functional.gelu
        match kind:
            case "gelu":
                weights = gelu(scores)
            case "l2_norm_gelu":
                weights = gelu(scores / torch.norm(scores, p=2, dim=-1, keepdim=True) * math.sqrt(n))
            case "gelu_l2_norm":
                activated = gelu(scores)
                weights = activated / torch.norm(activated, p=2, dim=-1, keepdim=True) * math.sqrt(n)
            case "softmax":
                weights = torch.softmax(scores, dim=-1) * n
        found = pattention(x, keys, values, WeightKind(kind, n))
    assert_close_to_scale(found, weights @ values[0], 1e-6)


@pytest.mark.parametrize("kind", NORM_ACTIVATIONS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("groups", [(9,), (4, 5, 1)], ids=["one group", "three groups"])
def test_row_blocks_equal_the_reference(
    kind: str, approximate: str, groups: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pattention_cpu, "_BLOCK_ELEMENTS", 1
    )  # the smallest blocks, and the last one not full
    x, keys, values = draw((3, 51, 6), 7, groups, dtype=torch.float64)
    with torch.no_grad():
        x[1, :20] = 0
    for eps in (0.0, 1e-3):
        weight_kind = WeightKind(kind, 11.0, approximate, eps)
        found, expected = (path(x, keys, values, weight_kind) for path in reversed(PATHS))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            assert torch.equal(pattention_row_blocks(x, keys, values, weight_kind), found)
        for found_grad, expected_grad in zip(
            gradients(pattention_row_blocks, x, keys, values, weight_kind),
            gradients(pattention_reference, x, keys, values, weight_kind),
            strict=True,
        ):
            torch.testing.assert_close(found_grad, expected_grad, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", NORM_ACTIVATIONS)
@pytest.mark.parametrize("eps", [0.0, 0.3])
@pytest.mark.parametrize(("groups", "approximate"), [((5,), "none"), ((2, 3), "tanh")])
def test_gradcheck(path: Path, kind: str, eps: float, groups: tuple[int, ...], approximate: str) -> None:
    x, keys, values = draw((2, 3), 2, groups, dtype=torch.float64)
    weight_kind = WeightKind(kind, 3.7, approximate, eps)

    def function(*tensors: Tensor) -> Tensor:
        return path(tensors[0], tensors[1 : 1 + len(groups)], tensors[1 + len(groups) :], weight_kind)

    assert torch.autograd.gradcheck(function, (x, *keys, *values))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", NORM_ACTIVATIONS)
def test_a_frozen_group_gets_no_gradient_and_no_weight_gradient_product(
    path: Path, kind: str, product_counter
) -> None:
    x, keys, values = draw((10, 6), 4, (5, 3))

    def products_of_backward() -> int:
        out = path(x, keys, values, WeightKind(kind, 8.0))
        with product_counter() as counter:
            out.sum().backward()
        return counter.count

    all_trained = products_of_backward()
    others = [x.grad.clone(), keys[1].grad.clone(), values[1].grad.clone()]
    for tensor in (x, *keys, *values):
        tensor.grad = None
    keys[0].requires_grad_(False)
    values[0].requires_grad_(False)
    assert products_of_backward() == all_trained - 2
    assert keys[0].grad is None
    assert values[0].grad is None
    for found, expected in zip((x.grad, keys[1].grad, values[1].grad), others, strict=True):
        assert torch.equal(found, expected)


def test_without_gradients_only_the_forward_is_computed(product_counter) -> None:
    x, keys, values = draw((10, 6), 4, (5,))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), product_counter() as counter:
            out = pattention(x, keys, values, WeightKind("gelu", 5.0))
        assert counter.count == 2
        assert not out.requires_grad


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("kind", NORMED)
def test_rows_without_a_direction_give_zero_and_have_gradient_zero(path: Path, kind: str, eps: float) -> None:
    x, keys, values = draw((4, 6), 3, (5, 2))
    with torch.no_grad():
        x[1] = 0
        if kind == "gelu_l2_norm":  # GELU is exactly 0 for every score of this row
            for k in keys:
                k[:, 0] = 1
            x[2] = torch.tensor([-1e3, 0, 0, 0, 0, 0])
    rest = [row for row in range(4) if x[row].abs().max() not in (0, 1e3)]
    weight_kind = WeightKind(kind, 7.0, "none", eps)
    out = path(x, keys, values, weight_kind)
    out.sum().backward()
    alone = [t.detach().clone().requires_grad_() for t in (x[rest], *keys, *values)]
    path(alone[0], alone[1:3], alone[3:], weight_kind).sum().backward()
    for row in set(range(4)) - set(rest):
        assert torch.equal(out[row], torch.zeros(3))
        assert torch.equal(x.grad[row], torch.zeros(6))
    torch.testing.assert_close(x.grad[rest], alone[0].grad)
    for found, expected in zip((*keys, *values), alone[1:], strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_a_zero_row_of_softmax_is_the_scaled_mean_of_the_values() -> None:
    x, keys, values = draw((1, 6), 3, (5, 2))
    out = pattention(torch.zeros_like(x), keys, values, WeightKind("softmax", 4.0))
    torch.testing.assert_close(out[0], 4 * torch.cat(values).mean(0))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", NORM_ACTIVATIONS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("size", [1e30, 1e20, 1e-20, 1e-30])
def test_huge_and_tiny_inputs_in_float32(
    path: Path, kind: str, approximate: str, eps: float, size: float
) -> None:
    x, keys, values = draw((6, 8), 5, (4, 3))
    x = (x.detach() * size).requires_grad_()
    weight_kind = WeightKind(kind, 7.0, approximate, eps)
    wide = [t.detach().double().requires_grad_() for t in (x, *keys, *values)]
    wide_keys, wide_values = wide[1:3], wide[3:]
    assert_close_to_scale(
        path(x, keys, values, weight_kind),
        pattention_reference(wide[0], wide_keys, wide_values, weight_kind),
        1e-5,
    )
    found = gradients(path, x, keys, values, weight_kind)
    expected = gradients(pattention_reference, wide[0], wide_keys, wide_values, weight_kind)
    for found_grad, expected_grad in zip(found, expected, strict=True):
        assert_close_to_scale(found_grad, expected_grad, 1e-5)


@pytest.mark.parametrize("kind", NORM_ACTIVATIONS)
@pytest.mark.parametrize("size", [1e20, 1.0, 1e-20])
def test_bfloat16_at_every_size(kind: str, size: float) -> None:
    x, keys, values = draw((6, 32), 8, (24, 8))
    narrow = [
        (t.detach() * scale).bfloat16() for t, scale in ((x, size), *((t, 0.1) for t in (*keys, *values)))
    ]
    x, keys, values = narrow[0].requires_grad_(), narrow[1:3], narrow[3:]
    weight_kind = WeightKind(kind, 32.0)
    out = pattention(x, keys, values, weight_kind)
    assert out.dtype == torch.bfloat16
    wide = [t.detach().double() for t in narrow]
    wide_x = wide[0].requires_grad_()
    expected = pattention_reference(wide_x, wide[1:3], wide[3:], weight_kind)
    if (
        kind != "softmax" or size < 1e20
    ):  # which of two nearly equal scores of 1e20 wins is a matter of rounding
        assert_close_to_scale(out, expected, 0.03)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("kind", NORM_ACTIVATIONS)
def test_float16_where_scores_leave_its_range_and_results_do_not(kind: str) -> None:
    x, keys, values = draw((6, 64), 8, (24,))
    narrow = [
        (t.detach() * scale).half().requires_grad_()
        for t, scale in ((x, 300.0), (keys[0], 40.0), (values[0], 1e-3))
    ]
    wide = [t.detach().double().requires_grad_() for t in narrow]
    largest = torch.finfo(torch.float16).max
    assert (wide[0] @ wide[1].T).abs().max() > largest
    weight_kind = WeightKind(kind, 24.0)
    out = pattention(narrow[0], narrow[1:2], narrow[2:], weight_kind)
    assert out.dtype == torch.float16
    expected = pattention_reference(wide[0], wide[1:2], wide[2:], weight_kind)
    assert_close_to_scale(out, expected, 2e-3)
    out.sum().backward()
    expected.sum().backward()
    for found, exact in zip(
        narrow, wide, strict=True
    ):  # gradients of values are scores, some beyond the range
        assert torch.equal(found.grad.isfinite(), exact.grad.abs() < largest)


@pytest.mark.parametrize("kind", NORM_ACTIVATIONS)
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters(kind: str) -> None:
    x, keys, values = draw((6, 16), 8, (12, 3))
    weight_kind = WeightKind(kind, 15.0)
    expected = pattention(x, keys, values, weight_kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pattention(x, keys, values, weight_kind)
        wide = [t.detach().double() for t in (x, *keys, *values)]
        assert pattention(wide[0], wide[1:3], wide[3:], weight_kind).dtype == torch.float64
    assert found.dtype == torch.bfloat16
    assert_close_to_scale(found, expected, 0.03)
    found.float().sum().backward()
    assert {t.grad.dtype for t in (x, *keys, *values)} == {torch.float32}


def test_shapes_are_inferred_on_the_meta_device() -> None:
    x, keys, values = draw((2, 3, 6), 4, (5, 2))
    meta = [t.to("meta") for t in (x, *keys, *values)]
    assert pattention(meta[0], meta[1:3], meta[3:], WeightKind("softmax", 7.0)).shape == (2, 3, 4)


def test_empty_batches_and_views_work() -> None:
    x, keys, values = draw((4, 6), 3, (5,))
    kind = WeightKind("l2_norm_gelu", 5.0)
    assert pattention(x[:0], keys, values, kind).shape == (0, 3)
    strided = x.detach().t().contiguous().t()
    assert torch.equal(pattention(strided, keys, values, kind), pattention(x, keys, values, kind))


@pytest.mark.parametrize("kind", NORM_ACTIVATIONS)
def test_function_transforms(kind: str) -> None:
    x, keys, values = draw((4, 6), 3, (5, 2), dtype=torch.float64)
    weight_kind = WeightKind(kind, 7.0)
    rows = torch.func.vmap(lambda row: pattention(row, keys, values, weight_kind))(x)
    torch.testing.assert_close(rows, pattention(x, keys, values, weight_kind))
    found = torch.func.grad(lambda inputs: pattention(inputs, keys, values, weight_kind).sum())(x.detach())
    (expected,) = torch.autograd.grad(pattention(x, keys, values, weight_kind).sum(), x)
    torch.testing.assert_close(found, expected)


def test_traces_without_a_graph_break() -> None:
    x, keys, values = draw((4, 6), 3, (5, 2))
    kind = WeightKind("l2_norm_gelu", 7.0)
    traced = torch.compile(
        lambda inputs: pattention(inputs, keys, values, kind), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(traced(x), pattention(x, keys, values, kind))


def kept_and_gradients(
    x: Tensor, keys: Tokens, values: Tokens, kind: WeightKind, *, recompute_scores: bool
) -> tuple[int, list[Tensor]]:
    """Bytes that autograd keeps of a call beside its arguments; output and gradients."""
    arguments = {t.data_ptr() for t in (x, *keys, *values)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in arguments:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = pattention(x, keys, values, kind, recompute_scores=recompute_scores)
    found = torch.autograd.grad(out.float().square().sum(), (x, *keys, *values))
    return sum(tensor.nbytes for tensor in kept.values()), [out, *found]


@pytest.mark.parametrize("kind", NORM_ACTIVATIONS)
@pytest.mark.parametrize("groups", [(32,), (20, 7, 5)], ids=["one group", "three groups"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["row blocks", "definition"])
def test_scores_made_again_are_the_same_bits_and_none_are_kept(
    kind: str, groups: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pattention_cpu, "_BLOCK_ELEMENTS", 64 * 32)  # several blocks of rows
    x, keys, values = draw((3, 70, 8), 6, groups, dtype=dtype)
    weight_kind = WeightKind(kind, 32.0)
    most, expected = kept_and_gradients(x, keys, values, weight_kind, recompute_scores=False)
    least, found = kept_and_gradients(x, keys, values, weight_kind, recompute_scores=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    scores = 3 * 70 * 32 * dtype.itemsize
    assert least <= most - scores
    assert least <= 3 * 70 * 4  # the norms of the rows
    with torch.no_grad():
        assert torch.equal(pattention(x, keys, values, weight_kind, recompute_scores=True), expected[0])
