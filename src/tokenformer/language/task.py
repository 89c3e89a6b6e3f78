"""Language modelling as the training loop sees it: batches, loss, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import torch

from tokenformer.errors import TokenFormerError
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.loss import Batch, LossSum, loss_sum
from tokenformer.language.pipeline import IGNORED, TrainingWindows
from tokenformer.language.scoring import Evaluation, score
from tokenformer.models.base import LanguageModel
from tokenformer.models.config import DecoderConfig
from tokenformer.parallel.share import WHOLE, Share

_EVALUATED_TOKENS = 16384
"""Tokens in one evaluated batch, where the caller does not say."""


class LanguageModelingTask:
    """Predict the next token of a data directory's text, in windows of ``sequence_length`` tokens.

    The order of training samples follows from ``seed`` and the data alone.

    Raises:
        TokenFormerError: ``train`` is shorter than one window, or ``seed`` is out of range.
    """

    def __init__(self, data: DataDirectory, sequence_length: int, seed: int) -> None:
        if sequence_length < 1:
            raise TokenFormerError(f"sequence_length: found {sequence_length}, expected at least 1")
        self.data = data
        self.sequence_length = sequence_length
        self.windows = TrainingWindows(data.split("train"), sequence_length, seed)

    def check_model(self, config: DecoderConfig, tokenizer_sha256: str | None) -> None:
        """Refuse a model that was not made for this data; ``tokenizer_sha256`` of the model, where known.

        Raises:
            TokenFormerError: another tokenizer, or another vocabulary size.
        """
        self.data.check_model(config, tokenizer_sha256)

    def batches(self, micro_batches: Callable[[int], range], *, workers: int = 0) -> Iterator[Batch]:
        """Endless batches: number k holds the samples ``micro_batches(k)`` (global sample indices), or, where there are
        none, one sequence without targets. A background thread reads ahead."""
        with closing(self.windows.batches(micro_batches)) as windows:
            for tokens in windows:
                if not len(tokens):
                    empty = torch.zeros(1, self.sequence_length, dtype=torch.int64)
                    yield Batch(empty, torch.full_like(empty, IGNORED))
                    continue
                window = torch.from_numpy(tokens)  # [b, t + 1]
                yield Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous())

    def loss(self, model: LanguageModel, batch: Batch) -> LossSum:
        """Loss of a batch that lies on the model's device."""
        return loss_sum(model, batch)

    def evaluate(
        self,
        model: LanguageModel,
        device: torch.device | str,
        max_tokens: int | None = None,
        batch_size: int | None = None,
        share: Share = WHOLE,
    ) -> dict[str, float]:
        """``loss``, ``perplexity`` and ``bits_per_byte`` over validation, at most ``max_tokens`` targets;
        ``batch_size`` windows at a time, which does not change the result. Of several ranks each does its
        ``share``, and all get the whole result."""
        evaluation = self.score(
            model, device=device, max_tokens=max_tokens, batch_size=batch_size, share=share
        )
        return evaluation.metrics()

    def score(
        self,
        model: LanguageModel,
        *,
        device: torch.device | str,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        split: str = "validation",
        progress: str | None = None,
        share: Share = WHOLE,
    ) -> Evaluation:
        """:func:`~tokenformer.language.scoring.score` of a split at this task's sequence length."""
        return score(
            model,
            self.data,
            sequence_length=self.sequence_length,
            batch_size=batch_size or max(1, _EVALUATED_TOKENS // self.sequence_length),
            device=device,
            split=split,
            max_tokens=max_tokens,
            progress=progress,
            share=share,
        )
