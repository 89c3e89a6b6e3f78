"""The growth between two stages: a larger model, moments that follow, and how far the function moved."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import torch

from tokenformer.growth.grow import grow_model
from tokenformer.growth.measure import logit_change
from tokenformer.language.task import LanguageModelingTask
from tokenformer.models.base import LanguageModel
from tokenformer.parallel.shard import drop_gathered
from tokenformer.progress import short_number
from tokenformer.train.config import StageConfig
from tokenformer.train.micro_batches import MicroBatches
from tokenformer.train.optimizer import Moments
from tokenformer.train.placement import Placement
from tokenformer.train.state import TrainingState
from tokenformer.train.step import to_device

_MEASURED_SEQUENCES = 4


@dataclass(frozen=True)
class Rung:
    """``logit_change``: the largest change of a logit on a real batch, in units of their spread."""

    model: LanguageModel
    moments: Moments
    init: str
    former_parameters: int
    parameters: int
    logit_change: float

    def describe(self) -> str:
        """One line for the user."""
        return (
            f"grown ({self.init}) from {short_number(self.former_parameters)} to {short_number(self.parameters)} "
            f"parameters; logits moved by {self.logit_change:.2g} of their spread"
        )


def grow_for_stage(
    model: LanguageModel,
    moments: Moments,
    stage: StageConfig,
    task: LanguageModelingTask,
    state: TrainingState,
    seed: int,
    placement: Placement,
) -> Rung:
    """Grow ``model`` as ``stage.grow`` says, and place it; new tokens are drawn from ``seed`` and the stage.

    Raises:
        TokenFormerError: the model cannot grow that way.
    """
    assert stage.grow is not None
    model.zero_grad(set_to_none=True)
    model.requires_grad_(True)  # what the former stage froze is its own affair
    former, moments = placement.gather(model, moments)
    former_parameters = model.config.num_parameters()
    grown = grow_model(former, stage.grow, seed=seed + state.stage, step=state.step)
    before, larger = placement.placed(model, stage), placement.place(grown.model, stage)
    sequences = min(_MEASURED_SEQUENCES, stage.data.sequences_per_forward)
    first = MicroBatches(state.next_sample, sequences, sequences)
    with closing(task.batches(first)) as batches:
        batch = to_device(next(batches), placement.device)
    with torch.compiler.set_stance("force_eager"):  # fused kernels of two models round differently
        change = logit_change(before, larger, batch.inputs)
    drop_gathered(larger)
    return Rung(
        model=larger,
        moments=grown.moments(moments),
        init=stage.grow.init,
        former_parameters=former_parameters,
        parameters=larger.config.num_parameters(),
        logit_change=change,
    )
