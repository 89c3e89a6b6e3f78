"""All layers of one token in one kernel: how its weights are laid out, and its launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenformer.ops.decode import KEYS_A_BLOCK
from tokenformer.ops.decode_layers_triton import ATTENTION, PRODUCTS, WHOLE, layers
from tokenformer.ops.pattention import NORM_ACTIVATIONS, WeightKind

ROWS = 8
"""Rows of the model's width in a chunk; so many times the width a Pattention may have parameter tokens."""

_LARGEST_PIECE = 512
_SHARED_MEMORY = 200_000  # bytes of a multiprocessor for chunks on their way
_MOST_STAGES = 16
_WARPS = 8


class Shape(NamedTuple):
    """Of all layers: d, heads, and the parameter tokens of the projections, of attention's output and of ffn."""

    hidden: int
    heads: int
    qkv: int
    proj: int
    ffn: int

    def phases(self) -> list[int]:
        """Chunks of the six phases of a layer."""
        tokens = (3 * self.qkv, 3 * self.qkv, self.proj, self.proj, self.ffn, self.ffn)
        return [n // ROWS for n in tokens]

    def is_served(self) -> bool:
        """Whether the kernel's chunks fit it."""
        ratios = [n / self.hidden for n in (self.qkv, self.proj, self.ffn)]
        return self.hidden % 16 == 0 and all(ratio in (1, 2, 4, 8) for ratio in ratios)


class Tau(NamedTuple):
    """The scale of the weights of each role."""

    qkv: float
    proj: float
    ffn: float


class Cache(NamedTuple):
    """``keys`` and ``values`` [L, 1, h, T, e], and where in them a token is; see :func:`ops.decode.attention`."""

    keys: Tensor
    values: Tensor
    lengths: Tensor
    starts: Tensor
    positions: Tensor


def programs_on(device: torch.device) -> int:
    """As many as there are multiprocessors, or one or two fewer: the three projections share them evenly."""
    if device.type != "cuda":
        return 3
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return max(count - count % 3, 3)


def values_order(chunks: int, programs: int) -> Tensor:
    """Which of the projections' ``chunks`` of values comes when: each third of the programs has its own projection as
    long as all take part, so that a program makes one vector only."""
    third, full = programs // 3, chunks // programs
    left = chunks // 3 - full * third
    number = torch.arange(chunks)
    rank, turn = number % programs, number // programs
    is_full = turn < full
    projection = torch.where(is_full, rank // third, rank // max(left, 1))
    within = torch.where(is_full, turn * third + rank % third, full * third + rank % max(left, 1))
    return projection * (chunks // 3) + within


class Space:
    """The vectors between the phases, float32, and the counters by which programs meet."""

    def __init__(self, shape: Shape, splits: int, device: torch.device) -> None:
        d = shape.hidden
        self.splits = splits
        size = d + 3 * d + 3 * shape.qkv + shape.proj + shape.ffn + splits * (d + shape.heads)
        self.memory = torch.zeros(size, dtype=torch.float32, device=device)
        self.counters = torch.zeros(2, dtype=torch.int32, device=device)

    def residual(self, hidden: int) -> Tensor:
        """[1, 1, d], before and after the layers."""
        return self.memory[:hidden].view(1, 1, hidden)


def run_layers(
    stream: Tensor,
    space: Space,
    cache: Cache,
    angles: tuple[Tensor, Tensor],
    shape: Shape,
    kind: WeightKind,
    tau: Tau,
    layer_norm_eps: float,
    *,
    programs: int,
    meet: bool,
    stages: int | None = None,
    piece: int | None = None,
) -> None:
    """The residual stream in ``space`` through all layers; the token's keys and values into the cache.

    Args:
        stream: the layers' weights in the order of :func:`decode_layers_triton.layers`.
        space: vectors; its counters are zero.
        cache: of one sequence.
        angles: cosine and sine [T, r] float32.
        shape: of the layers.
        kind: of the weights, but for tau.
        tau: of each role.
        layer_norm_eps: of the norms, which have no parameters.
        programs: of the launch, a multiple of 3; :func:`values_order` has had the same.
        meet: all in one launch, on a GPU. Otherwise a launch for each phase.
        stages: chunks on the way, for measurements.
        piece: columns of a piece, for measurements.
    """
    d, head_size = shape.hidden, shape.hidden // shape.heads
    phases = shape.phases()
    count = cache.keys.shape[0] * sum(phases)
    piece = piece or min(d & -d, _LARGEST_PIECE)
    chunk_bytes = ROWS * d * stream.element_size()
    stages = stages or max(2, min(_MOST_STAGES, _SHARED_MEMORY // chunk_bytes + 1))

    def launch(begin: int, end: int, part: int) -> None:
        options: dict[str, Any] = {"launch_cooperative_grid": True} if meet else {}
        layers[(programs,)](
            stream,
            space.memory,
            space.counters,
            cache.keys,
            cache.values,
            *angles,
            cache.lengths,
            cache.starts,
            cache.positions,
            begin,
            end,
            cache.keys.shape[3],
            d,
            shape.qkv,
            shape.proj,
            shape.ffn,
            head_size,
            head_size**-0.5,
            layer_norm_eps,
            *tau,
            kind.norm_eps,
            KIND=NORM_ACTIVATIONS.index(kind.norm_activation),
            TANH=kind.gelu_approximate == "tanh",
            EXACT=stream.dtype == torch.float32,
            SPLITS=space.splits,
            ROTARY=angles[0].shape[-1],
            FEATURES=max(16, 1 << (head_size - 1).bit_length()),
            BLOCK=KEYS_A_BLOCK,
            ROWS=ROWS,
            PIECE=piece,
            PIECES=d // piece,
            STAGES=stages,
            TURNS=-(-end // programs) - begin // programs,
            PART=part,
            MEET=meet,
            num_warps=_WARPS,
            **options,
        )

    if meet:
        launch(0, count, WHOLE.value)
        return
    begin = 0
    for number in range(6 * cache.keys.shape[0]):
        end = begin + phases[number % 6]
        if number % 6 == 2:
            launch(begin, end, ATTENTION.value)
        launch(begin, end, PRODUCTS.value)
        begin = end
