"""Where a run stands: the counters that a checkpoint carries. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tokenformer.files import read_json
from tokenformer.train.sections import NonNegativeInt
from tokenformer.validation import StrictModel, validate

STATE_FILE = "state.json"

NonNegativeFloat = Annotated[float, Field(ge=0)]


class Rollback(StrictModel):
    """A return to a checkpoint: the ``stage`` and ``step`` of the spike, its ``loss`` and the ``limit`` it was above;
    the run goes on from ``from_step``, and samples ``from_sample`` to ``to_sample`` - 1 of that stage are left out."""

    stage: NonNegativeInt
    step: NonNegativeInt
    loss: float
    limit: float
    to_sample: NonNegativeInt
    from_step: NonNegativeInt = 0
    from_sample: NonNegativeInt = 0


class TrainingState(StrictModel):
    """Counters after ``step`` optimiser steps; all but ``stage_step`` are cumulative over the stages.

    ``next_sample`` is the global index of the first training window not yet seen, the whole state of the data order.
    ``seconds`` counts training alone, without evaluation and checkpoints. ``skipped_steps`` counts the updates left
    out because loss or gradient was not finite. ``loss_scale`` and the finite steps since it last changed are
    float16's (null where it was never used). ``rollbacks`` of the run, oldest first; ``recent_losses`` (nats a target)
    are what the next loss is compared with to tell a spike. ``window_nats`` and ``window_targets`` are the sums since
    the last metrics line, so that the next one is of all its steps. ``data``: what the data directories of the run were
    (:attr:`~tokenformer.language.data_directory.DataDirectory.identity`), by path.
    """

    format_version: Literal[1] = 1
    step: NonNegativeInt = 0
    stage: NonNegativeInt = 0
    stage_step: NonNegativeInt = 0
    tokens: NonNegativeInt = 0
    flops: NonNegativeFloat = 0.0
    seconds: NonNegativeFloat = 0.0
    next_sample: NonNegativeInt = 0
    skipped_steps: NonNegativeInt = 0
    loss_scale: Annotated[float, Field(gt=0)] | None = None
    loss_scale_steps: NonNegativeInt | None = None
    rollbacks: tuple[Rollback, ...] = ()
    recent_losses: tuple[float, ...] = ()
    window_nats: float = 0.0
    window_targets: NonNegativeFloat = 0.0
    seed: int = 0
    data_seed: int = 0
    data: dict[str, dict[str, str | int]] = Field(default_factory=dict)

    def counters(self) -> dict[str, float]:
        """What every metrics line begins with."""
        return {
            "step": self.step,
            "stage": self.stage,
            "tokens": self.tokens,
            "flops": self.flops,
            "seconds": round(self.seconds, 3),
        }


def read_state(checkpoint: Path | str) -> TrainingState:
    """The counters of a checkpoint directory.

    Raises:
        TokenFormerError: ``state.json`` is missing or invalid.
    """
    path = Path(checkpoint) / STATE_FILE
    return validate(TrainingState, read_json(path, "the state of a training checkpoint"), source=str(path))


def is_checkpoint(directory: Path | str) -> bool:
    """Whether ``directory`` is a training checkpoint (a model directory has no ``state.json``)."""
    return (Path(directory) / STATE_FILE).is_file()
