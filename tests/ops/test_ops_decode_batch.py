"""The kernels of one token of a few sequences, against plain operations in float64: by Triton's interpreter, which has
no bfloat16, or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenformer.ops.pattention import NORM_ACTIVATIONS, WeightKind, pattention_reference

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = pytest.param(
    torch.bfloat16, marks=[pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]
)
DTYPES = [torch.float32, torch.float16, ON_GPU]
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype, tolerance: float | None = None) -> None:
    """The largest error, in units of the largest entry. For weights of fewer bits than float32 GELU is a fit, and on a
    GPU made of an instruction with an error of 2^-11."""
    if tolerance is None:
        tolerance = 3e-6 if dtype == torch.float32 else 1e-4 if DEVICE == "cpu" else 1e-3
    assert torch.isfinite(found).all()
    error = (found.double() - expected).abs().max()
    assert error <= tolerance * expected.abs().max(), f"error {error:.3g}"


def early() -> Any:
    """How kernels of a token are started on this device."""
    from tokenformer.ops.decode import Launch

    return Launch(hopper=DEVICE == "cuda" and torch.cuda.get_device_capability() >= (9, 0))


def vectors_for(batch: int, projections: int, size: int, dtype: torch.dtype) -> Tensor:
    from tokenformer.ops.decode_batch import terms_of

    return torch.full((batch, terms_of(dtype), projections, size), torch.nan, dtype=dtype, device=DEVICE)


def product(vectors: Tensor, matrix: Any, tile: Any, **options: Any) -> Tensor:
    """The parts [k, b, p, rows] of a product."""
    from tokenformer.ops.decode_batch import multiply_batch

    projections, rows, columns = matrix.weight.shape
    shape = tile.splits(columns), vectors.shape[0], projections, rows
    out = torch.full(shape, torch.nan, device=DEVICE)
    multiply_batch(vectors, matrix, out, tile=tile, launch=early(), **options)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_activation", NORM_ACTIVATIONS)
@pytest.mark.parametrize(
    ("batch", "d", "n", "approximate", "eps"),
    [(2, 48, 72, "none", 0.0), (3, 20, 33, "tanh", 1e-2), (16, 50, 20, "none", 0.0)],
)
def test_pattention_of_normed_rows(
    norm_activation: str, batch: int, d: int, n: int, approximate: str, eps: float, dtype: torch.dtype
) -> None:
    from tokenformer.ops.decode import Matrix, Normed, Weighed
    from tokenformer.ops.decode_batch import BatchTile, make_vectors

    kind = WeightKind(norm_activation, 0.7 * n, approximate, eps)
    x, before = random(batch, 1, d), random(2, batch, 1, d, seed=4)
    keys, values = random(3, n, d, seed=1).to(dtype), random(3, n, d, seed=2).to(dtype)
    normed, weights = vectors_for(batch, 1, d, dtype), vectors_for(batch, 3, n, dtype)
    stream = x.clone()
    make_vectors(before, Normed(1e-5), normed, stream=stream, launch=early())
    scores = product(normed, Matrix(keys), BatchTile(16, 16, 1, 1))
    assert scores.shape[0] > 1
    make_vectors(scores, Weighed(kind), weights, launch=early())
    found = product(weights, Matrix(values.transpose(1, 2).contiguous()), BatchTile(32, 16, 3, 1)).sum(0)

    x = x.double() + before.double().sum(0)
    assert_close(stream, x, torch.float32)
    x = F.layer_norm(x[:, 0], (d,), eps=1e-5)
    expected = [
        pattention_reference(x, [k.double()], [v.double()], kind) for k, v in zip(keys, values, strict=True)
    ]
    assert_close(found, torch.stack(expected, dim=1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most_splits", [16, 1])
def test_a_matrix_of_8_bits_with_norm_bias_and_factor(most_splits: int, dtype: torch.dtype) -> None:
    from tokenformer.ops.decode import Matrix, Normed
    from tokenformer.ops.decode_batch import choose_batch_tile, make_vectors

    x, gain, shift = random(3, 1, 140), random(140, seed=3), random(140, seed=4)
    weight = torch.arange(36 * 140, device=DEVICE).mul(37).remainder(256).sub(128).view(1, 36, 140)
    scale, bias = random(1, 36, seed=1), random(1, 36, seed=2)
    vectors = vectors_for(3, 1, 140, dtype)
    make_vectors(None, Normed(1e-3, gain, shift), vectors, stream=x.clone(), launch=early())
    tile = choose_batch_tile(36, 140, most_splits, vectors=6)
    parts = product(vectors, Matrix(weight.to(torch.int8), scale, bias), tile, alpha=0.5)
    assert parts.shape[0] == (2 if most_splits > 1 else 1)
    x = F.layer_norm(x[:, 0].double(), (140,), gain.double(), shift.double(), eps=1e-3)
    expected = 0.5 * x @ (scale[0, :, None] * weight[0]).double().t() + bias.double()
    assert_close(parts.sum(0)[:, 0], expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_in_parts_is_put_together(dtype: torch.dtype) -> None:
    from tokenformer.ops.decode import Attended
    from tokenformer.ops.decode_batch import join_attention

    parts, statistics = random(3, 2, 3, 12), random(3, 2, 3, seed=1)
    statistics[1, 1] = -torch.inf  # a part without a token
    vectors = vectors_for(3, 1, 36, dtype)
    join_attention(parts, Attended(statistics), vectors, launch=early())
    whole = (parts.double() * statistics.double().softmax(dim=1)[..., None]).sum(1).flatten(1)
    # a sum of two numbers in bfloat16 is within 2^-17
    tolerance = 1e-5 if dtype == torch.bfloat16 else 3e-6
    assert_close(vectors.double().sum(1)[:, 0], whole, dtype, tolerance)


def test_a_zero_row_of_scores_has_weights_zero() -> None:
    from tokenformer.ops.decode import Weighed
    from tokenformer.ops.decode_batch import make_vectors

    vectors = vectors_for(2, 1, 8, torch.float16)
    make_vectors(torch.zeros(3, 2, 1, 8, device=DEVICE), Weighed(WeightKind("l2_norm_gelu", 8.0)), vectors)
    assert not vectors.any()


@pytest.mark.parametrize("vectors", [4, 16, 32, 64])
def test_tiles_keep_the_memory_at_work(vectors: int) -> None:
    from tokenformer.ops.decode_batch import choose_batch_tile, width_of

    for rows, columns in ((768, 768), (3 * 768, 768), (1536, 6144), (6144, 1536), (4608, 1536), (8192, 2048)):
        tile = choose_batch_tile(rows, columns, vectors=vectors)
        programs = -(-rows // tile.rows) * tile.splits(columns)
        assert programs >= (88 if vectors <= 16 else 44) or tile.pieces == 1
        pieces = tile.held if tile.held == tile.pieces else 1 + tile.stages
        shared = 2 * (tile.rows + width_of(vectors)) * tile.piece * pieces
        assert shared <= 227 * 1024
        if tile.warps == 8:
            assert programs <= 132 * (228 * 1024 // (shared + 1024))  # all have a place at once


@pytest.mark.parametrize("vectors", [4, 16, 32, 64])
def test_a_smaller_gpu_has_room_for_its_tiles(vectors: int) -> None:
    """100 KB of shared memory, as GPUs for desks have."""
    from tokenformer.ops.decode_batch import Gpu, choose_batch_tile, width_of

    for rows, columns in ((768, 768), (4608, 1536), (6144, 1536), (1536, 6144), (8192, 2048), (50304, 1536)):
        for most_splits in (1, 16):
            tile = choose_batch_tile(rows, columns, most_splits, vectors=vectors, gpu=Gpu(128, 100 * 1024))
            pieces = tile.held if tile.held == tile.pieces else 1 + tile.stages
            assert 2 * (tile.rows + width_of(vectors)) * tile.piece * pieces <= 99 * 1024


@pytest.mark.parametrize(("vectors", "stages"), [(8, 4), (32, 3), (64, 2)])
def test_two_programs_of_a_head_find_a_place(vectors: int, stages: int) -> None:
    from tokenformer.ops.decode_batch import BatchTile, choose_batch_tile

    assert choose_batch_tile(50304, 1536, 1, vectors=vectors) == BatchTile(64, 128, 12, 1, stages=stages)


@pytest.mark.parametrize("vectors", [4, 32])
def test_splits_are_no_more_than_allowed_and_cover_all_columns(vectors: int) -> None:
    from tokenformer.ops.decode_batch import choose_batch_tile

    for rows in (20, 500, 1024, 5000, 50304):
        for columns in (8, 140, 2176, 2304, 4096, 8192):
            for most_splits in (1, 4, 16):
                tile = choose_batch_tile(rows, columns, most_splits, vectors=vectors)
                assert 1 <= tile.splits(columns) <= most_splits
                assert 1 <= tile.held <= tile.pieces <= -(-columns // tile.piece)


def test_few_splits_leave_more_pieces_than_are_held() -> None:
    from tokenformer.ops.decode_batch import choose_batch_tile

    tile = choose_batch_tile(6144, 2048, 4, vectors=16)
    assert (tile.pieces, tile.held, tile.splits(2048)) == (4, 1, 4)
