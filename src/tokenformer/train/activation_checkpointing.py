"""Less memory for more arithmetic: blocks that keep their input alone and are computed again in the backward.

By whole blocks, not by operations: Pattention's own paths (row blocks on a CPU, kernels on a GPU) already keep no
more than the results of matrix products, and their parts are out of reach of a policy over torch's operations.
"""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from tokenformer.models.base import LanguageModel
from tokenformer.train.sections import ActivationCheckpointingConfig


def apply_activation_checkpointing(model: LanguageModel, config: ActivationCheckpointingConfig) -> None:
    """Checkpoint ``model.blocks`` as configured, in place; an earlier choice is undone.

    It replaces the forward of a block, so that names of parameters stay. Before ``compile`` and ``fully_shard``:
    then the compiler sees the whole block, and weights are gathered once for recomputation and backward.
    Gradients are bit for bit the same where kernels repeat their sums in the same order.
    """
    recomputed = config.recomputed_blocks(len(model.blocks))
    for index, block in enumerate(model.blocks):
        block.__dict__.pop("forward", None)
        if index in recomputed:
            # no block draws random numbers, so there is no generator to set back
            again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            block.forward = again
