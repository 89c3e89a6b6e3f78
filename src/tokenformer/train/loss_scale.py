"""Dynamic loss scaling for float16 (arXiv 1710.03740), with the rules of ``torch.amp.GradScaler``."""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL_SCALE = 65536.0
GROWTH_FACTOR, BACKOFF_FACTOR, GROWTH_INTERVAL = 2.0, 0.5, 2000


class LossScale:
    """What the loss is multiplied by, so that small gradients do not vanish in float16; on the device throughout.

    A step whose gradient overflowed is left out and halves the scale; 2000 others in a row double it. Not
    ``GradScaler`` itself, because that looks for overflow in each rank's share of the gradients alone; here it
    is the global norm that decides.

    Args:
        device: where the steps run.
        scale: from a checkpoint; at first 65536.
        finite_steps: steps since the scale last changed.
    """

    def __init__(
        self, device: torch.device, scale: float | None = None, finite_steps: int | None = None
    ) -> None:
        self.scale = torch.tensor(INITIAL_SCALE if scale is None else scale, device=device)
        self.finite_steps = torch.tensor(float(finite_steps or 0), device=device)

    def update(self, finite: Tensor) -> None:
        """Move on after a step; ``finite`` is 1.0, or 0.0 where the step was left out."""
        steps = (self.finite_steps + 1) * finite
        grow = steps >= GROWTH_INTERVAL
        factor = torch.where(finite.bool(), torch.where(grow, GROWTH_FACTOR, 1.0), BACKOFF_FACTOR)
        self.scale = self.scale * factor
        self.finite_steps = torch.where(grow, 0.0, steps)

    def state(self) -> dict[str, float | int]:
        """``loss_scale`` and ``loss_scale_steps`` of a :class:`~tokenformer.train.state.TrainingState`; waits for
        the device."""
        return {"loss_scale": self.scale.item(), "loss_scale_steps": int(self.finite_steps.item())}
