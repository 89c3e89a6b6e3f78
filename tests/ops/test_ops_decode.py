"""The kernels of one token at a time, by Triton's interpreter in float32, against plain operations in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenformer.ops.pattention import NORM_ACTIVATIONS, WeightKind, pattention_reference
from tokenformer.ops.rotary import apply_rotary, rotary_angles

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 3e-6) -> None:
    """The largest error, in units of the largest entry."""
    assert torch.isfinite(found).all()
    error = (found.double() - expected).abs().max()
    assert error <= tolerance * expected.abs().max(), f"error {error:.3g}"


@pytest.mark.parametrize("norm_activation", NORM_ACTIVATIONS)
@pytest.mark.parametrize(
    ("batch", "d", "n", "approximate", "eps"), [(1, 48, 72, "none", 0.0), (3, 20, 33, "tanh", 1e-2)]
)
def test_pattention_of_normed_rows(
    norm_activation: str, batch: int, d: int, n: int, approximate: str, eps: float
) -> None:
    from tokenformer.ops.decode import Matrix, Normed, Tile, Weighed, multiply

    kind = WeightKind(norm_activation, 0.7 * n, approximate, eps)
    x, keys, values = random(batch, 1, d), random(3, n, d, seed=1), random(3, n, d, seed=2)
    residual = random(batch, 3, d, seed=3)
    scores, out = torch.full((batch, 3, n), torch.nan, device=DEVICE), residual.clone()
    tile = Tile(rows=16, piece=32, warps=4)
    multiply(x, Normed(1e-5), Matrix(keys), scores, activate=kind, tile=tile)
    transposed = Matrix(values.transpose(1, 2).contiguous())
    multiply(scores, Weighed(kind), transposed, out, residual=True, tile=tile)
    normed = F.layer_norm(x[:, 0].double(), (d,), eps=1e-5)
    expected = [
        pattention_reference(normed, [k.double()], [v.double()], kind)
        for k, v in zip(keys, values, strict=True)
    ]
    assert_close(out, residual + torch.stack(expected, dim=1))


def test_a_zero_row_of_scores_has_weights_zero() -> None:
    from tokenformer.ops.decode import Matrix, Tile, Weighed, multiply

    out = torch.full((1, 1, 4), torch.nan, device=DEVICE)
    kind = WeightKind("l2_norm_gelu", 8.0)
    multiply(
        torch.zeros(1, 1, 8, device=DEVICE), Weighed(kind), Matrix(random(1, 4, 8)), out, tile=Tile(4, 16, 4)
    )
    assert out.tolist() == [[[0.0] * 4]]


def test_a_linear_layer_with_norm_bias_and_scale() -> None:
    from tokenformer.ops.decode import Matrix, Normed, Tile, Weighed, multiply

    x, weight, bias = random(2, 1, 24), random(1, 40, 24, seed=1), random(1, 40, seed=2)
    gain, shift = random(24, seed=3), random(24, seed=4)
    down = random(1, 24, 40, seed=5)
    gelu = WeightKind("gelu", 1.0, "tanh")
    inner, out = torch.empty(2, 1, 40, device=DEVICE), torch.empty(2, 1, 24, device=DEVICE)
    tile = Tile(16, 16, 4)
    multiply(
        x, Normed(1e-3, gain, shift), Matrix(weight, bias=bias), inner, activate=gelu, alpha=0.5, tile=tile
    )
    multiply(inner, Weighed(gelu), Matrix(down), out, tile=tile)
    normed = F.layer_norm(x.double(), (24,), gain.double(), shift.double(), eps=1e-3)
    expected = F.gelu(0.5 * normed @ weight[0].double().t() + bias.double(), approximate="tanh")
    assert_close(inner, expected)
    assert_close(out, expected @ down[0].double().t())


@pytest.mark.parametrize(
    ("used", "starts"), [(29, (0, 5)), (5, (0, 5)), (6, (2, 5)), (0, (0, 0)), (70, (0, 1))]
)
@pytest.mark.parametrize("rotary", [0, 8])
def test_attention_over_a_cache(used: int, starts: tuple[int, int], rotary: int) -> None:
    from tokenformer.ops.decode import Attended, Matrix, Tile, attention, multiply

    b, h, e, capacity, splits = 2, 3, 12, 72, 2
    cos, sin = (angle[0, 0] for angle in rotary_angles(torch.arange(capacity)[None], max(rotary, 2), 10000.0))
    cos, sin = (angle[:, :rotary].contiguous().to(DEVICE) for angle in (cos, sin))
    keys, values = random(b, h, capacity, e, seed=1), random(b, h, capacity, e, seed=2)
    keys[:, :, used:], values[:, :, used:] = torch.nan, torch.nan  # never looked at
    qkv = random(b, 3, h * e)
    apart = torch.stack((qkv - 1, torch.full_like(qkv, 0.25), torch.full_like(qkv, 0.75)))  # parts of the sum
    first = torch.tensor(starts, device=DEVICE)
    parts = torch.full((b, splits, h, e), torch.nan, device=DEVICE)
    statistics = torch.full((b, splits, h), torch.nan, device=DEVICE)
    length, positions = torch.tensor([used], device=DEVICE), used - first
    whole = torch.full((b, 2, 1, h * e), torch.nan, dtype=torch.float16, device=DEVICE)
    attention(apart, (keys.clone(), values.clone()), (cos, sin), length, first, positions, whole, None)
    before = keys.clone(), values.clone()
    attention(qkv[None], (keys, values), (cos, sin), length, first, positions, parts, statistics)
    out, identity = torch.empty(b, 1, h * e, device=DEVICE), torch.eye(h * e, device=DEVICE)[None]
    multiply(parts, Attended(statistics), Matrix(identity), out, tile=Tile(16, 64, 4))

    q, k, v = (part.view(b, h, 1, e) for part in qkv.unbind(1))
    if rotary:
        angles = cos[positions][:, None, None], sin[positions][:, None, None]
        q, k = apply_rotary(q, *angles), apply_rotary(k, *angles)
    torch.testing.assert_close(keys[:, :, used : used + 1], k)
    assert torch.equal(values[:, :, used : used + 1], v)
    others = [index for index in range(capacity) if index != used]
    for cache, old in zip((keys, values), before, strict=True):
        torch.testing.assert_close(cache[:, :, others], old[:, :, others], rtol=0, atol=0, equal_nan=True)
    seen = (torch.arange(used + 1, device=DEVICE) >= first[:, None])[:, None, None]
    k, v = keys[:, :, : used + 1].double(), values[:, :, : used + 1].double()
    expected = F.scaled_dot_product_attention(q.double(), k, v, attn_mask=seen)
    expected = expected.transpose(1, 2).flatten(1)
    assert_close(out[:, 0], expected)
    assert_close(whole[:, :, 0].float().sum(1), expected)


def test_embedding_rows() -> None:
    from tokenformer.ops.decode import look_up

    table, out = random(9, 21), torch.empty(3, 1, 21, device=DEVICE)
    look_up(torch.tensor([[4], [0], [8]], device=DEVICE), table, out)
    assert torch.equal(out[:, 0], table[[4, 0, 8]])
