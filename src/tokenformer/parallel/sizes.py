"""How many ranks replicate, shard and split what, checked before anything starts. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from tokenformer.errors import TokenFormerError
from tokenformer.models.config import DecoderConfig
from tokenformer.models.tokenformer.config import ROLES, TokenFormerConfig
from tokenformer.models.transformer.config import TransformerConfig

AXES = ("replicate", "shard", "tensor")


class MeshSizes(NamedTuple):
    """Ranks along each axis of the mesh; neighbours on ``tensor`` have neighbouring ranks.

    ``replicate`` x ``shard`` ranks each take a share of every global batch; over ``shard`` they also divide weights,
    gradients and moments. ``tensor`` ranks work on the same samples, each with its share of the parameter tokens.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def data(self) -> int:
        """Ranks that take different samples."""
        return self.replicate * self.shard

    @property
    def world(self) -> int:
        """All ranks."""
        return math.prod(self)


ALONE = MeshSizes()
"""One process."""


def mesh_sizes(replicate: int, shard: int, tensor: int, world_size: int) -> MeshSizes:
    """The sizes with the -1 among them (at most one) filled up to ``world_size``.

    Raises:
        TokenFormerError: they do not multiply to the number of processes.
    """
    sizes = [replicate, shard, tensor]
    given = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if world_size % given:
            raise TokenFormerError(f"parallel: {_describe(sizes)} does not divide {_count(world_size)}")
        sizes[sizes.index(-1)] = world_size // given
    if math.prod(sizes) != world_size:
        raise TokenFormerError(
            f"parallel: {_describe(sizes)} = {math.prod(sizes)} ranks, but there "
            f"{'is' if world_size == 1 else 'are'} {_count(world_size)}; "
            "put -1 for the size that follows from the others"
        )
    return MeshSizes(*sizes)


def check_tensor_split(config: DecoderConfig, tensor: int) -> None:
    """Refuse a model whose layers cannot be split evenly over ``tensor`` ranks.

    Raises:
        TokenFormerError: names the size that does not divide.
    """
    for name, size in _split_sizes(config):
        if size % tensor:
            raise TokenFormerError(f"parallel.tensor: {tensor} ranks do not divide {name} {size} evenly")


def _split_sizes(config: DecoderConfig) -> Iterator[tuple[str, int]]:
    if isinstance(config, TokenFormerConfig):
        for role in ROLES:
            for group, size in enumerate(config.groups(role)):
                yield f"model.param_token_groups.{role}.{group}", size
    elif isinstance(config, TransformerConfig):
        yield "model.num_attention_heads", config.num_attention_heads
        yield "model.intermediate_size", config.mlp_size
    else:
        raise TokenFormerError(f"parallel.tensor: a model of class {config.class_name} cannot be split")


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def _describe(sizes: list[int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True) if size != -1)
