"""What the quickstart measured, as it is written to ``results.json``."""

from __future__ import annotations

from tokenformer.quickstart.plan import RunName
from tokenformer.validation import StrictModel


class GrowthResult(StrictModel):
    """One growth: loss (nats a token) on one batch before and after, and the largest change of a logit in units
    of their spread."""

    parameters_before: int
    parameters_after: int
    loss_before: float
    loss_after: float
    logit_change: float


class ModelResult(StrictModel):
    """One finished run; ``flops``, ``tokens`` and ``seconds`` count all its growth stages."""

    name: RunName
    parameters: int
    steps: int
    tokens: int
    flops: float
    seconds: float
    lr: float
    initializer: str
    bits_per_byte: float
    loss: float
    bytes_scored: int
    sample: str


class QuickstartResults(StrictModel):
    """All of it, models in the order of the story."""

    growth: GrowthResult
    models: list[ModelResult]

    def of(self, name: RunName) -> ModelResult:
        """The result of one run."""
        return next(model for model in self.models if model.name == name)
