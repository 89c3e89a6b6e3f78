"""The learning rate over one stage, as a pure function of the step."""

from __future__ import annotations

import math

from tokenformer.train.sections import ScheduleConfig


def warmup_steps(schedule: ScheduleConfig, total_steps: int) -> int:
    """Steps of linear warm-up, at most the whole stage."""
    if schedule.warmup_steps is not None:
        return min(schedule.warmup_steps, total_steps)
    return round(schedule.warmup_fraction * total_steps)


def lr_factor(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Factor of the peak learning rate at update ``step`` (from 0) of ``total_steps``.

    The last warm-up step stands at the peak (factor 1), the last step of a decay at ``final_lr_fraction``.
    """
    warmup = warmup_steps(schedule, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "constant":
        return 1.0
    decay = total_steps - warmup
    if schedule.name == "wsd":
        decay = min(decay, round(schedule.decay_fraction * total_steps))
    done = min(1.0, (step + 1 - (total_steps - decay)) / max(1, decay))
    if done <= 0:
        return 1.0
    shape = 0.5 * (1 + math.cos(math.pi * done)) if schedule.name == "cosine" else 1 - done
    return schedule.final_lr_fraction + (1 - schedule.final_lr_fraction) * shape
