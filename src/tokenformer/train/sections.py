"""The sections of a run configuration. No torch here; each field's default is the published training setup
(arXiv 2410.23168) where that has one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from tokenformer.models.config import PositiveFloat, PositiveInt
from tokenformer.validation import Float, Int, StrictModel

Fraction = Annotated[Float, Field(ge=0, le=1)]
NonNegativeInt = Annotated[Int, Field(ge=0)]


def _not_zero(ranks: int) -> int:
    if ranks == 0:
        raise ValueError("found 0, expected a number of ranks, or -1 for as many as there are")
    return ranks


Recompute = Literal["block", "scores"]
Ranks = Annotated[Int, Field(ge=-1), AfterValidator(_not_zero)]


class OptimizerConfig(StrictModel):
    """``adamw``, or ``muon`` for the matrices inside the blocks with AdamW for the rest. ``lr_multipliers`` scales the
    learning rate of a role (``embedding``, ``norm``, ``qkv``, ...) or of a growth group (``"group:1"``, 0 is the
    oldest); both apply where both match. Frozen groups and roles stay bit-identical.

    Muon alone: ``adamw_lr`` is the rate of the rest (null: ``lr``); ``adjust_lr`` how the rate follows from a matrix's
    shape: ``match_rms_adamw`` (0.2 sqrt(max(n, m)): rate and decay of AdamW serve) or ``original``
    (sqrt(max(1, n / m)), whose rates are about 0.02)."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat = 6e-4
    adamw_lr: PositiveFloat | None = None
    momentum: Annotated[Float, Field(ge=0, lt=1)] = 0.95
    nesterov: bool = True
    ns_steps: Annotated[Int, Field(gt=0, le=20)] = 5
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    betas: tuple[Annotated[Float, Field(ge=0, lt=1)], Annotated[Float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[Float, Field(ge=0)] = 0.1
    grad_clip: PositiveFloat | None = 1.0
    lr_multipliers: dict[str, PositiveFloat] = Field(default_factory=dict)
    frozen_groups: tuple[NonNegativeInt, ...] = ()
    frozen_roles: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_name(self) -> OptimizerConfig:
        for field in ("adamw_lr", "momentum", "nesterov", "ns_steps", "adjust_lr"):
            if self.name != "muon" and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"{field} belongs to muon, but the optimizer's name is '{self.name}'")
        return self

    @field_validator("lr_multipliers")
    @classmethod
    def _check_keys(cls, multipliers: dict[str, float]) -> dict[str, float]:
        for key in multipliers:
            if key.startswith("group") and not re.fullmatch(r"group:\d+", key):
                raise ValueError(f"found '{key}', expected a role or 'group:K' with K a number from 0")
        return multipliers


class ScheduleConfig(StrictModel):
    """How the learning rate moves over one stage, as a factor of ``optimizer.lr``.

    Linear warm-up over ``warmup_steps`` (or ``warmup_fraction`` of the stage), then ``cosine`` or ``linear`` down
    to ``final_lr_fraction``; ``wsd`` stays at the peak and goes down linearly over the last ``decay_fraction`` of the
    stage; ``constant`` stays.
    """

    name: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: NonNegativeInt | None = None
    warmup_fraction: Fraction = 0.01
    final_lr_fraction: Fraction = 0.1
    decay_fraction: Fraction = 0.2


class PrecisionConfig(StrictModel):
    """``dtype`` of the forward pass (weights and moments stay float32); ``auto`` is bfloat16 autocast on CUDA
    hardware that has it, else float32. ``float16`` comes with dynamic loss scaling. ``compile: auto`` compiles the
    blocks on CUDA. ``cuda_graphs`` launches forward and backward of a step whole (one CUDA device, not float16);
    ``auto``: where blocks are compiled. ``float8`` takes the products of Pattention in float8 (e4m3, scaled as they
    come) with bfloat16 around them, on a GPU that has it."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compile: Literal["auto", True, False] = "auto"
    cuda_graphs: Literal["auto", True, False] = "auto"
    float8: bool = False
    deterministic: bool = False


class ParallelConfig(StrictModel):
    """Where the run computes. ``replicate``, ``shard`` and ``tensor`` are ranks along the axes of the mesh, -1 (one of
    them at most) what the number of processes leaves; ``reshard_after_forward``: whether gathered weights of a block
    are dropped between forward and backward. ``timeout_seconds``: how long ranks wait for each other. ``num_threads``:
    CPU threads of torch, null for its own choice."""

    device: str = "auto"
    replicate: Ranks = 1
    shard: Ranks = -1
    tensor: Ranks = 1
    reshard_after_forward: bool = True
    timeout_seconds: PositiveFloat = 600.0
    num_threads: PositiveInt | None = None

    @model_validator(mode="after")
    def _check_mesh(self) -> ParallelConfig:
        if (self.replicate, self.shard, self.tensor).count(-1) > 1:
            raise ValueError(
                f"replicate {self.replicate}, shard {self.shard}, tensor {self.tensor}: expected -1 once at most"
            )
        return self

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
            raise ValueError(f"found '{device}', expected auto, cpu, cuda, cuda:N or mps")
        return device


class ActivationCheckpointingConfig(StrictModel):
    """Which blocks keep less for the backward and compute it again there: ``none``, ``selective`` (every ``every``-th,
    or ``blocks`` of them, evenly spread), or ``full`` (all). ``recompute``: what they compute again: the whole
    ``block`` from its input, or the ``scores`` of its Pattention layers alone, at one product of the six of a layer."""

    mode: Literal["none", "selective", "full"] = "none"
    every: PositiveInt = 2
    blocks: PositiveInt | None = None
    recompute: Recompute = "block"

    def recomputed_blocks(self, num_blocks: int) -> Sequence[int]:
        """Which of the blocks 0 to ``num_blocks`` - 1 compute something again."""
        if self.mode == "none":
            return range(0)
        if self.mode == "selective" and self.blocks is not None:
            count = min(self.blocks, num_blocks)
            return [(index + 1) * num_blocks // count - 1 for index in range(count)]
        every = 1 if self.mode == "full" else self.every
        return range(every - 1, num_blocks, every)


class SpikeConfig(StrictModel):
    """A step whose loss is above the mean of the ``window`` steps before it by ``sigma`` standard deviations and by
    ``min_rise`` nats is a spike. With ``rollback`` the run goes back to its newest checkpoint and leaves out the
    samples from there up to the spike, ``max_rollbacks`` times at most; else spikes are only noted."""

    sigma: PositiveFloat = 6.0
    window: Annotated[Int, Field(ge=2, le=10_000)] = 100
    min_rise: PositiveFloat = 0.2
    rollback: bool = True
    max_rollbacks: PositiveInt = 3


class StabilityConfig(StrictModel):
    """What is done about sick training. ``max_nonfinite_steps``: updates left out in a row (loss or gradient not
    finite) that end the run. ``spike``: what is done about a sudden rise of the loss (null: nothing)."""

    max_nonfinite_steps: PositiveInt = 5
    spike: SpikeConfig | None = None


class CheckpointConfig(StrictModel):
    """A checkpoint every so many steps (null: at the end of each stage and on interruption only).

    The newest ``keep_last`` are kept, and for good those of steps that ``keep_every_steps`` divides. ``asynchronous``:
    write while the training goes on, by a ``thread`` of it or a ``process`` beside it (true: on CUDA a process, else a
    thread; ``auto``: on CUDA only). ``when_busy``: of one that becomes due while the former is still being written,
    skip it (never the last of a stage, that of a signal, or one that is kept for good), or wait. ``export``: make the
    model directory of each checkpoint, not only of the last of a stage.
    """

    every_steps: PositiveInt | None = 1000
    keep_last: PositiveInt = 2
    keep_every_steps: PositiveInt | None = None
    asynchronous: Literal["auto", "thread", "process", True, False] = "auto"
    when_busy: Literal["skip", "wait"] = "skip"
    export: bool = True

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` is kept for good."""
        return self.keep_every_steps is not None and step % self.keep_every_steps == 0


class EvaluationConfig(StrictModel):
    """Validation every so many steps (null: at the end of each stage only), on at most ``max_tokens`` (null:
    the whole split), ``batch_size`` sequences at a time (null: as many as are convenient)."""

    every_steps: PositiveInt | None = 500
    max_tokens: PositiveInt | None = None
    batch_size: PositiveInt | None = None


class WandbConfig(StrictModel):
    """Weights & Biases: ``name`` of the run (null: the run directory's), ``entity`` (null: the account's own)."""

    project: str
    name: str | None = None
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class LoggingConfig(StrictModel):
    """A line on the console and in metrics.jsonl every so many steps; TensorBoard events beside it, and Weights &
    Biases (the extra ``wandb``) where it is configured."""

    every_steps: PositiveInt = 10
    tensorboard: bool = True
    wandb: WandbConfig | None = None
