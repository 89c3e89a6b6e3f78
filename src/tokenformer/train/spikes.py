"""Loss spikes: found by the losses before them, left by going back to a checkpoint and past the data. No torch here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from tokenformer.files import read_json, write_json
from tokenformer.train.sections import SpikeConfig
from tokenformer.train.state import Rollback, TrainingState
from tokenformer.validation import validate

JOURNAL_FILE = "rollback.json"
"""In a run directory: where the run stood after its newest rollback, until a checkpoint says so too."""


class LossSpike(Exception):
    """The run is to go back to its newest checkpoint; ``rollback`` says why, and which samples to leave out."""

    def __init__(self, rollback: Rollback) -> None:
        super().__init__(f"loss {rollback.loss:g} at step {rollback.step}")
        self.rollback = rollback


def find_spike(
    recent: Sequence[float], losses: Sequence[float], config: SpikeConfig
) -> tuple[int, float] | None:
    """The first of ``losses`` (nats a target, one for each step) that is a spike, and the limit it is above.

    The limit is the mean of the ``window`` losses before it plus ``sigma`` standard deviations, at least ``min_rise``;
    before there are as many, nothing is a spike. ``recent`` are the losses before the first.
    """
    for index in range(len(losses)):
        before = [*recent, *losses[:index]][-config.window :]
        if len(before) < config.window:
            continue
        limit = statistics.fmean(before) + max(config.sigma * statistics.pstdev(before), config.min_rise)
        if losses[index] > limit:
            return index, limit
    return None


def rolled_back(state: TrainingState, rollback: Rollback) -> TrainingState:
    """``state`` of the checkpoint gone back to, with the samples up to the spike passed over."""
    return passed_over(state.model_copy(update={"rollbacks": (*state.rollbacks, rollback)}))


def passed_over(state: TrainingState) -> TrainingState:
    """``state`` with the samples that rollbacks of its stage left out behind it."""
    ends = [r.to_sample for r in state.rollbacks if r.stage == state.stage]
    return state.model_copy(update={"next_sample": max([state.next_sample, *ends])})


def write_journal(run: Path, state: TrainingState) -> None:
    """Make a rollback outlive the process."""
    write_json(run / JOURNAL_FILE, state.model_dump(mode="json"))


def after_journal(run: Path, state: TrainingState) -> TrainingState:
    """``state`` of a checkpoint, or where the run stood after it had gone back to this very checkpoint."""
    path = run / JOURNAL_FILE
    if not path.is_file():
        return state
    noted = validate(TrainingState, read_json(path, "a run's rollback"), source=str(path))
    changed = {"rollbacks", "next_sample"}
    same = noted.model_dump(exclude=changed) == state.model_dump(exclude=changed)
    return noted if same and len(noted.rollbacks) > len(state.rollbacks) else state
