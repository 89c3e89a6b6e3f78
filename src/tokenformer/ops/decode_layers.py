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

_LARGEST_PIECE = 256
_SHARED_MEMORY = 190_000  # bytes of a multiprocessor for chunks on their way
_MOST_STAGES = 16


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


def pieces_and_stages(hidden: int, element_size: int) -> tuple[int, int]:
    """Columns of a chunk taken at once, and chunks on the way (that at work included). At d = 1536 and 768 they are the
    fastest of those in docs/performance.md."""
    chunk_bytes = ROWS * hidden * element_size
    stages = max(2, min(_MOST_STAGES, _SHARED_MEMORY // chunk_bytes + 1))
    return min(hidden & -hidden, _LARGEST_PIECE), stages


class Tau(NamedTuple):
    """The scale of the weights of each role."""

    qkv: float
    proj: float
    ffn: float


class Cache(NamedTuple):
    """``keys`` and ``values`` [L, 1, h, T, e], and where in them a token is, as for :func:`ops.decode.attention`."""

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


class Layers(NamedTuple):
    """The layers of one token in one kernel.

    ``stream``: their weights in the order of :func:`decode_layers_triton.layers`; ``angles``: cosine and sine [T, r]
    float32; ``kind``: of the weights, but for tau; ``layer_norm_eps``: of the norms, which have no parameters;
    ``programs``: of a launch, a multiple of 3, the same as for :func:`values_order`. ``stages``, chunks on the way,
    ``piece``, columns taken at once, and ``warps`` are for measurements.
    """

    stream: Tensor
    space: Space
    angles: tuple[Tensor, Tensor]
    shape: Shape
    kind: WeightKind
    tau: Tau
    layer_norm_eps: float
    programs: int
    stages: int | None = None
    piece: int | None = None
    warps: int = 8

    def run(self, cache: Cache, *, meet: bool) -> None:
        """The residual stream in ``space``, whose counters are zero, through all layers; the token's keys and values
        into the cache. ``meet``: all in one launch, on a GPU; otherwise a launch for each phase."""
        phases, layers = self.shape.phases(), cache.keys.shape[0]
        if meet:
            self.launch(cache, 0, layers * sum(phases), WHOLE.value, meet=True)
            return
        begin = 0
        for number in range(6 * layers):
            end = begin + phases[number % 6]
            if number % 6 == 2:
                self.launch(cache, begin, end, ATTENTION.value, meet=False)
            self.launch(cache, begin, end, PRODUCTS.value, meet=False)
            begin = end

    def launch(self, cache: Cache, begin: int, end: int, part: int, *, meet: bool) -> None:
        """Chunks ``begin`` to ``end``."""
        d, head_size = self.shape.hidden, self.shape.hidden // self.shape.heads
        piece, stages = pieces_and_stages(d, self.stream.element_size())
        piece, stages = self.piece or piece, self.stages or stages
        turns = -(-end // self.programs) - begin // self.programs
        options: dict[str, Any] = {"launch_cooperative_grid": True} if meet else {}
        layers[(self.programs,)](
            self.stream,
            self.space.memory,
            self.space.counters,
            cache.keys,
            cache.values,
            *self.angles,
            cache.lengths,
            cache.starts,
            cache.positions,
            begin,
            end,
            turns,
            cache.keys.shape[3],
            d,
            *((n // d).bit_length() - 1 for n in (self.shape.qkv, self.shape.proj, self.shape.ffn)),
            head_size,
            head_size**-0.5,
            self.layer_norm_eps,
            *self.tau,
            self.kind.norm_eps,
            KIND=NORM_ACTIVATIONS.index(self.kind.norm_activation),
            TANH=self.kind.gelu_approximate == "tanh",
            EXACT=self.stream.dtype == torch.float32,
            SPLITS=self.space.splits,
            ROTARY=self.angles[0].shape[-1],
            FEATURES=max(16, 1 << (head_size - 1).bit_length()),
            BLOCK=KEYS_A_BLOCK,
            ROWS=ROWS,
            PIECE=piece,
            PIECES=d // piece,
            STAGES=stages,
            TURNS=None if self.stream.is_cuda else turns,
            PART=part,
            MEET=meet,
            num_warps=self.warps,
            **options,
        )
