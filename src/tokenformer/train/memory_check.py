"""Runs that cannot fit are refused before they start, instead of being ended by the system in the middle."""

from __future__ import annotations

from dataclasses import replace

import torch

from tokenformer.errors import TokenFormerError
from tokenformer.models.config import DecoderConfig
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.parallel.sizes import MeshSizes
from tokenformer.progress import short_number
from tokenformer.train.config import StageConfig
from tokenformer.train.device import compute_dtype, require_memory, total_memory, wants_compile
from tokenformer.train.memory import TrainingSetup, stage_setup, training_memory
from tokenformer.train.sections import ActivationCheckpointingConfig, Recompute

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
    if is_adapter:
        setup = replace(setup, trained=0.0)
    memory = training_memory(config, setup)
    parameters = short_number(config.num_parameters())
    sequences = f"{setup.micro_batch_size} sequences of {setup.sequence_length}"
    held = memory.weights + memory.gradients + memory.moments
    require_memory(held, device, f"model: training {parameters} parameters")
    require_memory(
        round(_SURELY * memory.peak),
        device,
        f"data.micro_batch_size: training {parameters} parameters, {sequences} at once,",
        advice=_advice(config, setup, device),
    )
    passes = forward_passes(stage, sizes)
    if passes > MAX_PASSES:
        raise TokenFormerError(
            f"data.batch_tokens: {stage.data.batch_tokens} tokens are {passes} forward passes of {sequences} in every "
            f"step on each device, expected at most {MAX_PASSES}; lower it or raise data.micro_batch_size"
        )


def _advice(config: DecoderConfig, setup: TrainingSetup, device: torch.device) -> str:
    """What to change: fewer sequences at once, or the least recomputation that is enough with as many."""
    what: tuple[Recompute, ...] = ("scores", "block") if isinstance(config, TokenFormerConfig) else ("block",)
    for recompute in what:
        full = ActivationCheckpointingConfig(mode="full", recompute=recompute)
        peak = training_memory(config, replace(setup, activation_checkpointing=full)).peak
        if _SURELY * peak <= total_memory(device):
            fields = "activation_checkpointing.mode=full"
            if recompute == "scores":
                fields += " activation_checkpointing.recompute=scores"
            return f"lower data.micro_batch_size, or set {fields}"
    return "lower data.micro_batch_size"


def forward_passes(stage: StageConfig, sizes: MeshSizes) -> int:
    """Forward passes of one full step on each device."""
    share = -(-stage.data.sequences_per_step // sizes.data)
    return -(-share // stage.data.sequences_per_forward)
