"""Less memory for more arithmetic: what blocks do not keep for the backward they compute again in it.

That is the whole block from its input alone, or the scores of its Pattention layers. A policy over torch's operations,
as selective checkpointing commonly has it, would not find the scores: they are inside Pattention's own paths (row
blocks on a CPU, kernels on a GPU), which keep little else and make scores again themselves. All scores cost the same
for a byte, one product in the layer's width; so all the layers of a block do the same, and the number of blocks is what
there is to choose.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from tokenformer.layers.pattention import Pattention
from tokenformer.models.base import LanguageModel
from tokenformer.train.sections import ActivationCheckpointingConfig


def apply_activation_checkpointing(model: LanguageModel, config: ActivationCheckpointingConfig) -> None:
    """Checkpoint ``model.blocks`` as configured, in place; an earlier choice is undone.

    Of a whole block it replaces the forward, so that names of parameters stay. Before ``compile`` and ``fully_shard``:
    then the compiler sees the whole block, and weights are gathered once for recomputation and backward.
    Gradients are bit for bit the same where kernels repeat their sums in the same order.
    """
    recomputed = config.recomputed_blocks(len(model.blocks))
    for index, block in enumerate(model.blocks):
        block.__dict__.pop("forward", None)
        _recompute_scores(block, index in recomputed and config.recompute == "scores")
        if index in recomputed and config.recompute == "block":
            # no block draws random numbers, so there is no generator to set back
            again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            block.forward = again


def _recompute_scores(block: nn.Module, recompute: bool) -> None:
    for layer in block.modules():
        if isinstance(layer, Pattention):
            layer.recompute_scores = recompute
