"""How many sequences each optimiser step of a stage takes. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizes:
    """Sequences of a step as a pure function of the stage's step: ``full``, after a linear rise from ``first`` over
    the first ``warmup_steps`` (0: no rise)."""

    full: int
    first: int
    warmup_steps: int = 0

    def at(self, step: int) -> int:
        """Sequences of step ``step`` (from 0)."""
        if step >= self.warmup_steps:
            return self.full
        return self.first + (self.full - self.first) * step // self.warmup_steps

    def before(self, step: int) -> int:
        """Sequences of the steps 0 to ``step`` - 1."""
        rising = min(step, self.warmup_steps)
        return sum(map(self.at, range(rising))) + self.full * (step - rising)

    def steps_for(self, sequences: int) -> int:
        """The fewest steps that take at least ``sequences``."""
        taken = 0
        for step in range(self.warmup_steps):
            if taken >= sequences:
                return step
            taken += self.at(step)
        return self.warmup_steps + max(0, -(-(sequences - taken) // self.full))
