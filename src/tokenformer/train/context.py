"""What the parts of a run share: the plan, the ranks, how the user is spoken to, and what the run leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenformer.adapters.config import EXPORT_DIRECTORY
from tokenformer.models.card import model_card
from tokenformer.models.config import DecoderConfig
from tokenformer.parallel.world import World
from tokenformer.train.card import training_facts
from tokenformer.train.checkpoint.ranks import Ranks
from tokenformer.train.heartbeat import Heartbeat
from tokenformer.train.interrupts import StopRequest
from tokenformer.train.plan import RunPlan
from tokenformer.train.state import TrainingState


@dataclass(frozen=True)
class RunContext:
    """A run under way. ``say`` prints a line for the user, on the first rank and unless it is to be quiet."""

    plan: RunPlan
    request: StopRequest
    world: World
    ranks: Ranks
    heartbeat: Heartbeat
    say: Callable[[str], None]
    quiet: bool

    @property
    def exported(self) -> Path:
        """What the run leaves for others."""
        return self.plan.out / ("model" if self.plan.adapter is None else EXPORT_DIRECTORY)

    def card(self, config: DecoderConfig, state: TrainingState, latest: Mapping[str, Any]) -> str:
        """The text of the card of what is exported; ``latest`` holds the newest metrics."""
        data = self.plan.tasks[state.stage].data
        facts = training_facts(data, self.plan.stages, state, latest)
        return (
            model_card(config, facts) if self.plan.adapter is None else self.plan.adapter.card(config, facts)
        )
