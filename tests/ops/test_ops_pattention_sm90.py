"""The kernel for Hopper GPUs: its arithmetic compiled for this processor, what it asks of its inputs, and on a GPU the
whole of it against a product and the passes behind it."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tokenformer.ops import pattention_sm90, pattention_sm90_driver
from tokenformer.ops.pattention import NORM_ACTIVATIONS, WeightKind, attention_weights

SOURCES = Path(pattention_sm90.__file__).parent
ON_A_PROCESSOR = """
#include <cmath>
#include <cstddef>
#include <cstring>
#define __device__
#define __forceinline__ inline
#define __noinline__
struct float2 { float x, y; };
inline float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
inline size_t __cvta_generic_to_shared(const void*) { return 0; }
"""
ROW = """
// A row of n scores and gradients of its weights; figures: its two figures.
extern "C" void row(const float* scores, const float* grads, int n, const float* figures, const float* scale,
                    float* weights, float* score_grads) {
    const Scale scales = {scale[0], scale[1], scale[2]};
    const float factor = row_factor(scales, figures[0], figures[1]);
    float along = 0.0f;
    for (int i = 0; i < n; ++i) {
        const Row row = {figures[0], factor, 0.0f};
        const Terms terms = backward_terms(scores[i], grads[i], row);
        weights[i] = weight_of(scores[i], row);
        score_grads[i] = terms.kept;
        along += terms.along;
    }
    const Row row = {figures[0], factor, along_row(scales, along, figures[1], factor)};
    for (int i = 0; i < n && NEEDS_ROW; ++i) score_grads[i] = score_gradient(scores[i], score_grads[i], row);
}
"""
LAYOUT = """
extern "C" size_t layout(int which) {
    const size_t all[] = {sizeof(Arguments), offsetof(Arguments, scores), offsetof(Arguments, weights),
        offsetof(Arguments, grads), offsetof(Arguments, statistics), offsetof(Arguments, partials),
        offsetof(Arguments, row_stride), offsetof(Arguments, statistics_stride), offsetof(Arguments, rows),
        offsetof(Arguments, n), offsetof(Arguments, inner), offsetof(Arguments, projections),
        offsetof(Arguments, scale)};
    return all[which];
}
extern "C" int constant(int which) {
    const int all[] = {TILE_M, TILE_N, TILE_K, THREADS};
    return all[which];
}
"""


def compiled(tmp_path: Path, parts: tuple[str, ...], code: str, **defines: int) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    source = tmp_path / "part.cpp"
    source.write_text(ON_A_PROCESSOR + "".join((SOURCES / part).read_text() for part in parts) + code)
    library = tmp_path / "part.so"
    options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", *(f"-D{k}={v}" for k, v in defines.items())]
    subprocess.run([compiler, *options, "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


def floats(values: Tensor | list[float]) -> ctypes.Array:
    items = [float(value) for value in values]
    return (ctypes.c_float * len(items))(*items)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("norm_activation", NORM_ACTIVATIONS)
def test_what_becomes_of_a_row_is_the_definition(
    norm_activation: str, approximate: str, tmp_path: Path
) -> None:
    number, tanh = NORM_ACTIVATIONS.index(norm_activation), int(approximate == "tanh")
    part = compiled(tmp_path, ("pattention_sm90_math.cuh",), ROW, KIND=number, TANH=tanh)
    n, tau, eps = 50, 30.0, 1e-2
    kind = WeightKind(norm_activation, tau, approximate, eps)
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(n, generator=generator)
    if norm_activation != "softmax":  # where one score that far above the others leaves no gradient
        scores[:4] = torch.tensor([0.0, -40.0, 40.0, 1e-3])
    grads = torch.randn(n, generator=generator)
    gelu_first = norm_activation == "gelu_l2_norm"
    counted = torch.nn.functional.gelu(scores, approximate=approximate) if gelu_first else scores
    figures = [1.0, float(counted.norm())]
    if norm_activation == "softmax":
        figures = [float(counted.max()), float((counted - counted.max()).exp().sum())]
    weights, score_grads = (floats([math.nan] * n) for _ in range(2))
    scale = floats([math.sqrt(tau), tau, eps])
    part.row(floats(scores), floats(grads), n, floats(figures), scale, weights, score_grads)

    wide = scores.double().requires_grad_()
    (expected,) = attention_weights([wide], kind)
    (expected_grads,) = torch.autograd.grad(expected, wide, grads.double())
    for found, exact in ((weights, expected.detach()), (score_grads, expected_grads)):
        error = (torch.tensor(list(found)).double() - exact).abs().max() / exact.abs().max()
        assert error < 3e-4  # the fit of GELU for bfloat16


def test_host_and_kernel_agree_on_sizes_and_arguments(tmp_path: Path) -> None:
    """The kernel asserts how much shared memory the host gives it when it is compiled, here too."""
    parts = ("pattention_sm90_math.cuh", "pattention_sm90_instructions.cuh")
    defines = {
        "KIND": 1,
        "TANH": 0,
        "BACKWARD": 1,
        "SHARED_BYTES_OF_HOST": pattention_sm90_driver.SHARED_BYTES,
        "BLOCKS_OF_CLUSTER": pattention_sm90.BLOCKS,
    }
    part = compiled(tmp_path, parts, LAYOUT, **defines)
    part.layout.restype = ctypes.c_size_t
    arguments = pattention_sm90._Arguments
    names = [name for name, _ in arguments._fields_]
    assert names[-3:] == ["root", "tau", "eps"]  # the kernel's `scale`
    found = [part.layout(which) for which in range(13)]
    assert found == [ctypes.sizeof(arguments), *(getattr(arguments, name).offset for name in names[:-2])]
    sizes = (pattention_sm90.TILE_ROWS, pattention_sm90.TILE_TOKENS, pattention_sm90.TILE_INNER)
    assert [part.constant(which) for which in range(4)] == [*sizes, pattention_sm90._THREADS]


@pytest.mark.parametrize(("resident", "n", "expected"), [(66, 768, 64), (66, 576, 66), (57, 6144, 32)])
def test_all_tiles_of_a_row_run_in_one_round(
    resident: int, n: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clusters take tiles in turn; those of one row wait for each other."""
    monkeypatch.setattr(pattention_sm90, "_resident", lambda device: resident)
    tiles = -(-n // pattention_sm90.TILE_TOKENS)
    clusters = pattention_sm90._clusters(0, tiles)
    assert clusters == expected
    rounds = [number // clusters for number in range(10 * tiles)]
    assert all(len({*rounds[first : first + tiles]}) == 1 for first in range(0, 10 * tiles, tiles))


def test_a_processor_is_not_served() -> None:
    x, key = torch.zeros(2048, 64, dtype=torch.bfloat16), torch.zeros(256, 64, dtype=torch.bfloat16)
    assert not pattention_sm90.takes(x, key, 256)
    assert not pattention_sm90.serves(x, key, 256, WeightKind("gelu", 256.0), backward=False)


def test_it_serves_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pattention_sm90, "takes", lambda a, b, n: True)
    monkeypatch.setattr(pattention_sm90, "PAYS", {("gelu", True): 512})
    x = torch.zeros(2048, 64)
    served = {
        (name, n, backward): pattention_sm90.serves(x, x, n, WeightKind(name, 1.0), backward=backward)
        for name in ("gelu", "softmax")
        for n in (504, 512)
        for backward in (False, True)
    }
    assert [case for case, serves in served.items() if serves] == [("gelu", 512, True)]


def test_a_kernel_that_cannot_be_had_is_said_once_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: int) -> int:
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(pattention_sm90, "_count_resident", fail)
    pattention_sm90._resident.cache_clear()
    try:
        with pytest.warns(UserWarning, match="not used: no such compiler"):
            assert pattention_sm90._clusters(0, 4) == 0
        assert pattention_sm90._clusters(0, 4) == 0  # without a further warning
    finally:
        pattention_sm90._resident.cache_clear()


SHAPES = (  # rows, d_in, d_out, n, projections
    (1024, 64, 64, 256, 1),
    (1024, 64, 128, 128, 1),
    (2048, 768, 768, 768, 3),
    (1500, 72, 40, 1000, 2),
    (4097, 128, 136, 264, 3),
    (33000, 256, 512, 3072, 1),
)


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(found).all()
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm_activation", NORM_ACTIVATIONS)
@pytest.mark.parametrize("size", [1.0, 1e15, 1e-15, 0.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_whole_is_a_product_and_its_passes(
    norm_activation: str, size: float, shape: tuple[int, ...]
) -> None:
    from tokenformer.ops.pattention_rows import weights_backward, weights_forward

    rows, d_in, d_out, n, projections = shape
    kind = WeightKind(norm_activation, float(n), "tanh" if size == 1 and n == 264 else "none")
    forward = norm_activation in pattention_sm90.FORWARD_KINDS
    generator = torch.Generator("cuda").manual_seed(n)

    def normal(a: int, b: int, std: float) -> Tensor:
        return (std * torch.randn(a, b, device="cuda", generator=generator)).bfloat16()

    x, key = normal(rows, d_in, size), normal(projections * n, d_in, d_in**-0.5)
    value = normal(projections * n, d_out, n**-0.5)
    grads = [normal(rows, d_out, 1.0) for _ in range(projections)]
    if not pattention_sm90.takes(x, key, n):
        pytest.skip("needs a Hopper GPU")
    scores = torch.mm(x, key.t()).view(-1, n)
    weights, statistics = weights_forward(scores, kind, keep=True)
    if forward:
        found = pattention_sm90.scores_and_weights(x, key, projections, kind)
        assert relative_error(found[0], scores) < 1e-4
        assert relative_error(found[1], weights) < 2e-3
        if norm_activation != "gelu" and size != 0:  # of rows of zeros the norm is infinite
            assert relative_error(found[2], statistics) < 5e-4  # of what is not rounded yet
        for keep_scores in (True, False):
            again = pattention_sm90.scores_and_weights(x, key, projections, kind, keep_scores=keep_scores)
            assert torch.equal(again[1], found[1])
        assert again[0] is None

    found = pattention_sm90.weights_and_score_grads(grads, value, scores, statistics, kind)
    weight_grads = torch.empty_like(scores)
    by_projection = weight_grads.view(-1, projections, n).unbind(1)
    for grad, tokens, out in zip(grads, value.view(projections, n, -1), by_projection, strict=True):
        torch.mm(grad, tokens.t(), out=out)
    expected = weights_backward(scores, weight_grads, statistics, kind)
    assert relative_error(found[0], expected[0]) < 2e-3
    assert relative_error(found[1], expected[1]) < 4e-3  # one rounding more on the way
