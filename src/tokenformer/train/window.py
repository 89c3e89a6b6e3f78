"""Sums over the steps since the last metrics line; they stay on the device until they are read."""

from __future__ import annotations

import torch

from tokenformer.errors import TokenFormerError
from tokenformer.train.state import TrainingState
from tokenformer.train.step import StepResult


class MetricsWindow:
    """Loss of the steps since the last :meth:`read`, and how many updates were skipped.

    Args:
        device: where the steps run.
        max_nonfinite_steps: sick steps in a row that :meth:`check` ends the run at.
        state: brings the sums of the window in which a checkpoint was written.
    """

    def __init__(
        self, device: torch.device, max_nonfinite_steps: int, state: TrainingState | None = None
    ) -> None:
        self._device = device
        self._max_nonfinite_steps = max_nonfinite_steps
        self._skipped = torch.zeros((), device=device)
        self._in_a_row = torch.zeros((), device=device)
        self._losses: list[torch.Tensor] = []
        self._reset()
        if state is not None:
            self._nats += state.window_nats
            self._targets += state.window_targets

    def _reset(self) -> None:
        self._nats = torch.zeros((), device=self._device)
        self._targets = torch.zeros((), device=self._device)
        self._grad_norm = torch.zeros((), device=self._device)

    def add(self, result: StepResult) -> None:
        """Take in one step; skipped ones count only as skipped."""
        finite = result.finite.bool()
        self._nats += torch.where(finite, result.nats, 0)
        self._targets += torch.where(finite, result.targets, 0)
        self._grad_norm = result.grad_norm
        self._losses.append(result.nats / result.targets)
        self._skipped += 1 - result.finite
        self._in_a_row = (self._in_a_row + 1) * result.sick

    def state(self) -> dict[str, float]:
        """``window_nats`` and ``window_targets`` of a :class:`~tokenformer.train.state.TrainingState`; waits for the
        device."""
        return {"window_nats": self._nats.item(), "window_targets": self._targets.item()}

    def take_losses(self) -> list[float]:
        """The loss of each step since the last call; waits for the device."""
        losses: list[float] = torch.stack(self._losses).tolist() if self._losses else []
        self._losses.clear()
        return losses

    def take_skipped(self) -> int:
        """Updates skipped since the last call; waits for the device."""
        skipped = int(self._skipped.item())
        self._skipped.zero_()
        return skipped

    def check(self, step: int) -> None:
        """Wait for the device, and end the run when nothing but skipped updates happens.

        Raises:
            TokenFormerError: the last ``max_nonfinite_steps`` updates were all skipped.
        """
        in_a_row = int(self._in_a_row.item())
        if in_a_row >= self._max_nonfinite_steps:
            raise TokenFormerError(
                f"step {step}: loss or gradient was not finite for {in_a_row} steps in a row, so "
                "nothing was learned in them; lower optimizer.lr, lengthen the warm-up (schedule.warmup_steps), or "
                "try precision.dtype=float32. The last checkpoint is unharmed"
            )

    def read(self) -> dict[str, float]:
        """``loss`` (nats a target, weighted by targets) and the newest ``grad_norm``; begins a new window."""
        values = {
            "loss": (self._nats / self._targets).item(),
            "grad_norm": self._grad_norm.item(),
        }
        self._reset()
        return values
