"""Tensor parallelism: each rank holds an equal share of every layer's parameter tokens (or, in a Transformer, of its
features) and works on the same samples.

A Pattention's share of the output needs the norm over all tokens, one small sum over the ranks, and the shares then
add up in another. Nothing is approximated: the gradients are those of the whole layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from tokenformer.layers.attention import SelfAttention
from tokenformer.layers.pattention import Pattention, PattentionOp
from tokenformer.models.transformer.model import MLP
from tokenformer.ops.pattention import RowReductions, WeightKind, pattention
from tokenformer.parallel.collectives import largest_of_ranks, sum_of_shares, to_ranks, total_of_ranks
from tokenformer.parallel.local import local_parts


def split_layers(module: nn.Module, mesh: DeviceMesh) -> None:
    """Split every Pattention, attention of linear layers and MLP inside ``module`` over the one-dimensional ``mesh``,
    in place; embeddings, norms and heads stay whole on every rank. A mesh of one rank changes nothing.

    All ranks must hold the same weights. Their parameters become DTensors, sharded over parameter tokens or features.
    """
    if mesh.size() == 1:
        return
    op = _op_over(mesh)
    for layer in list(module.modules()):
        if isinstance(layer, Pattention):
            _split_tokens(layer, mesh)
            layer.op = op  # one object for all: to the compiler they are then the same layer
        elif isinstance(layer, SelfAttention) and isinstance(layer.query, nn.Linear):
            _split_linear(
                layer, mesh, {"query": _IN, "key": _IN, "value": _IN, "proj": _OUT}
            )  # whole heads, since their number divides
            layer.num_heads //= mesh.size()
        elif isinstance(layer, MLP):
            _split_linear(layer, mesh, {"up": _IN, "down": _OUT})


_IN, _OUT = ColwiseParallel, RowwiseParallel


def _split_linear(layer: nn.Module, mesh: DeviceMesh, styles: dict[str, type[ParallelStyle]]) -> None:
    parallelize_module(layer, mesh, {name: style() for name, style in styles.items()}, src_data_rank=None)


def _split_tokens(layer: Pattention, mesh: DeviceMesh) -> None:
    for group in (layer.key_tokens, layer.value_tokens):
        for index, tokens in enumerate(group):
            # src_data_rank=None: every rank takes its part of what it has, nothing is sent
            split = distribute_tensor(tokens.detach(), mesh, [Shard(0)], src_data_rank=None)
            group[index] = nn.Parameter(split, tokens.requires_grad)


def _op_over(mesh: DeviceMesh) -> PattentionOp:
    group = mesh.get_group().group_name
    rows = RowReductions(
        largest=partial(largest_of_ranks, group=group), total=partial(total_of_ranks, group=group)
    )
    return partial(_split_pattention, rows=rows, group=group)


def _split_pattention(
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    kind: WeightKind,
    *,
    recompute_scores: bool = False,
    rows: RowReductions,
    group: str,
) -> Tensor:
    share = pattention(
        to_ranks(x, group),
        local_parts(keys),
        local_parts(values),
        kind,
        rows,
        recompute_scores=recompute_scores,
    )
    return sum_of_shares(share, group)
