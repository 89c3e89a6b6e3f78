"""What the training loop knows of a modality: batches, loss, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenformer.models.base import LanguageModel
from tokenformer.parallel.share import Share


class LossSum(Protocol):
    """A differentiable sum of losses in nats (float32) and the number of targets it is over."""

    @property
    def nats(self) -> Tensor: ...

    @property
    def count(self) -> int | Tensor: ...


class Task(Protocol):
    """A source of batches and the loss over them; batches are NamedTuples of CPU tensors."""

    def batches(self, micro_batches: Callable[[int], range], *, workers: int = 0) -> Iterator[Any]:
        """Endless batches: number k holds the samples ``micro_batches(k)`` (global sample indices), or, where there are
        none, one sequence without targets. ``workers`` processes read ahead (0: a thread of this process does); they
        change nothing else. ``micro_batches`` is pure and can be pickled.

        Raises:
            DataError: the data cannot be read any more.
        """
        ...

    def counters(self) -> dict[str, int]:
        """Counts of what happened to the data so far, for the metrics, such as reads that were tried again."""
        ...

    def loss(self, model: LanguageModel, batch: Any) -> LossSum:
        """Loss of a batch that lies on the model's device."""
        ...

    def evaluate(
        self,
        model: LanguageModel,
        device: torch.device,
        max_tokens: int | None,
        batch_size: int | None,
        share: Share,
    ) -> dict[str, float]:
        """Loss and what follows from it over the validation samples, at most ``max_tokens`` targets; this rank does
        its ``share``."""
        ...
