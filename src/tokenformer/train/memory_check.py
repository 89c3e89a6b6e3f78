"""Runs that cannot fit are refused before they start, instead of being ended by the system in the middle."""

from __future__ import annotations

from dataclasses import replace

import torch

from tokenformer.errors import TokenFormerError
from tokenformer.models.config import DecoderConfig
from tokenformer.parallel.sizes import MeshSizes
from tokenformer.progress import short_number
from tokenformer.train.config import StageConfig
from tokenformer.train.device import compute_dtype, require_memory, wants_compile
from tokenformer.train.memory import stage_setup, training_memory

_SURELY = 0.85
"""Share of a prediction that is needed in any case: predictions are right to 15 %."""

MAX_PASSES = 100_000
"""Forward passes of one step beyond which nobody waits for its end."""


def check_training_memory(
    config: DecoderConfig,
    stage: StageConfig,
    device: torch.device,
    sizes: MeshSizes,
    *,
    reshard_after_forward: bool = True,
    is_adapter: bool = False,
) -> None:
    """Refuse a stage whose model, moments and activations cannot fit ``device``, or whose steps would never end. Of an
    adapter's run the gradients and moments count for nothing.

    Raises:
        TokenFormerError: with what to change.
    """
    setup = stage_setup(
        stage,
        dtype=str(compute_dtype(stage.precision, device)).removeprefix("torch."),
        compiled=wants_compile(stage.precision, device),
        device_type=device.type,
        sizes=sizes,
        reshard_after_forward=reshard_after_forward,
    )
    memory = training_memory(config, replace(setup, trained=0.0) if is_adapter else setup)
    parameters = short_number(config.num_parameters())
    sequences = f"{setup.micro_batch_size} sequences of {setup.sequence_length}"
    held = memory.weights + memory.gradients + memory.moments
    require_memory(held, device, f"model: training {parameters} parameters")
    require_memory(
        round(_SURELY * memory.peak),
        device,
        f"data.micro_batch_size: training {parameters} parameters, {sequences} at once,",
        advice="lower data.micro_batch_size, or set activation_checkpointing.mode=full",
    )
    passes = forward_passes(stage, sizes)
    if passes > MAX_PASSES:
        raise TokenFormerError(
            f"data.batch_tokens: {stage.data.batch_tokens} tokens are {passes} forward passes of {sequences} in every "
            f"step on each device, expected at most {MAX_PASSES}; lower it or raise data.micro_batch_size"
        )


def forward_passes(stage: StageConfig, sizes: MeshSizes) -> int:
    """Forward passes of one full step on each device."""
    share = -(-stage.data.sequences_per_step // sizes.data)
    return -(-share // stage.data.sequences_per_forward)
