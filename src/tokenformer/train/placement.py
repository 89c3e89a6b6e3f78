"""A model where it is trained: on its device, or spread over the ranks of a run; and whole again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from tokenformer.layers.pattention import Pattention
from tokenformer.models.base import LanguageModel
from tokenformer.ops.pattention import pattention
from tokenformer.ops.pattention_float8 import pattention_float8
from tokenformer.parallel.shard import shard_blocks, whole_model, whole_tensors
from tokenformer.parallel.tensor import split_layers
from tokenformer.parallel.world import World
from tokenformer.train.activation_checkpointing import apply_activation_checkpointing
from tokenformer.train.checkpoint.contents import load_model_into, load_moments, read_checkpoint
from tokenformer.train.config import StageConfig
from tokenformer.train.device import compute_dtype, wants_compile
from tokenformer.train.optimizer import Moments


class Placement:
    """Where the stages of a run train their models: ``device`` of this rank, and the ``world`` it belongs to."""

    def __init__(self, device: torch.device, world: World, *, reshard_after_forward: bool) -> None:
        self.device = device
        self.world = world
        self._reshard_after_forward = reshard_after_forward

    def place(self, model: LanguageModel, stage: StageConfig) -> LanguageModel:
        """``model`` (whole, the same on all ranks) ready to be trained in ``stage``; it is changed in place. An outline
        on the meta device comes out without defined values, to be filled."""
        mesh = self.world.mesh
        if mesh is not None:
            split_layers(model, mesh["tensor"])
        _choose_products(model, float8=stage.precision.float8)
        apply_activation_checkpointing(model, stage.activation_checkpointing)
        if wants_compile(stage.precision, self.device):
            torch.compiler.reset()  # each stage has its own shapes; old ones would use up the recompile limit
            for block in model.blocks:
                if mesh is None:
                    block.compile(dynamic=False)
                else:  # the forward alone: what FSDP does before and after it stays outside
                    block.forward = torch.compile(block.forward, dynamic=False)
        if mesh is not None:
            dtype = compute_dtype(stage.precision, self.device)
            shard_blocks(model, mesh, compute_dtype=dtype, reshard_after_forward=self._reshard_after_forward)
        is_outline = any(parameter.is_meta for parameter in model.parameters())
        placed = model.to_empty(device=self.device) if is_outline else model.to(self.device)
        return placed.train()

    def placed(self, model: LanguageModel, stage: StageConfig) -> LanguageModel:
        """``model`` as it is where it is placed already, else as from :meth:`place`."""
        if self.world.mesh is None:
            return model.to(self.device)
        return model if _is_spread(model) else self.place(model, stage)

    def read(
        self, checkpoint: Path, outline: LanguageModel, stage: StageConfig
    ) -> tuple[LanguageModel, Moments]:
        """Model and moments of ``checkpoint``, placed: where they are spread, each rank reads its own part alone.

        Raises:
            TokenFormerError: missing or damaged files.
        """
        if self.world.mesh is None:
            whole = read_checkpoint(checkpoint, verify=False)
            return self.place(whole.model, stage), whole.moments
        model = self.place(outline, stage)
        load_model_into(checkpoint, model)
        return model, load_moments(checkpoint, model)

    def gather(self, model: LanguageModel, moments: Moments) -> tuple[LanguageModel, Moments]:
        """The model and its optimiser's moments whole: as they are where they are not spread, else copies on the CPU
        of every rank. All ranks must call this."""
        if not _is_spread(model):
            return model, moments
        whole = {name: whole_tensors(entry) for name, entry in moments.items()}
        return whole_model(model), whole


def _choose_products(model: LanguageModel, *, float8: bool) -> None:
    """Pattention in float8, or as ever; layers whose tokens are split over ranks stay as they are."""
    for layer in model.modules():
        if isinstance(layer, Pattention) and layer.op in (pattention, pattention_float8):
            layer.op = pattention_float8 if float8 else pattention


def _is_spread(model: LanguageModel) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
