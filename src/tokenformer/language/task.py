"""Language modelling as the training loop sees it: batches, loss, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Literal

import torch

from tokenformer.errors import TokenFormerError
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.data_mixture import DataMixture
from tokenformer.language.loss import Batch, LossSum, loss_sum
from tokenformer.language.packing import DocumentWindows
from tokenformer.language.pipeline import TrainingSamples
from tokenformer.language.scoring import mixture_metrics, score
from tokenformer.language.windows import StreamWindows
from tokenformer.models.base import LanguageModel
from tokenformer.models.config import DecoderConfig
from tokenformer.parallel.share import WHOLE, Share

Packing = Literal["windows", "documents"]


class LanguageModelingTask:
    """Predict the next token of a data directory's text, or of a mixture of several, in windows of
    ``sequence_length`` tokens: of the stream, or of whole ``documents`` packed.

    The order of training samples follows from ``seed``, the data and the weights alone.

    Raises:
        TokenFormerError: ``train`` is shorter than one window, or ``seed`` is out of range.
    """

    def __init__(
        self,
        data: DataDirectory | DataMixture,
        sequence_length: int,
        seed: int,
        packing: Packing = "windows",
    ) -> None:
        if sequence_length < 1:
            raise TokenFormerError(f"sequence_length: found {sequence_length}, expected at least 1")
        self.data = DataMixture.of(data)
        self.sequence_length = sequence_length
        windows = DocumentWindows if packing == "documents" else StreamWindows
        self.sources = [windows(part.data.split("train"), sequence_length) for part in self.data.components]
        self.samples = TrainingSamples(self.sources, [part.weight for part in self.data.components], seed)
        self._retries = 0

    def check_model(self, config: DecoderConfig, tokenizer_sha256: str | None) -> None:
        """Refuse a model that was not made for this data; ``tokenizer_sha256`` of the model, where known.

        Raises:
            TokenFormerError: another tokenizer, or another vocabulary size.
        """
        self.data.check_model(config, tokenizer_sha256)

    def batches(
        self, micro_batches: Callable[[int], range], *, workers: int = 0
    ) -> Generator[Batch, None, None]:
        """Endless batches: number k holds the samples ``micro_batches(k)`` (global sample indices), or, where there are
        none, one sequence without targets. ``workers`` processes read ahead (0: a thread of this process does).

        Raises:
            DataError: the data cannot be read any more.
        """
        with closing(self.samples.batches(micro_batches, workers=workers)) as batches:
            for inputs, targets, documents, retries in batches:
                self._retries += retries
                yield Batch(
                    torch.from_numpy(inputs),
                    torch.from_numpy(targets),
                    None if documents is None else torch.from_numpy(documents),
                )

    def counters(self) -> dict[str, int]:
        """``data_retries`` (reads tried again) and ``data_restarts`` (of worker processes) so far, where there were
        any."""
        counts = {"data_retries": self._retries, "data_restarts": self.samples.restarts}
        return {name: count for name, count in counts.items() if count}

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
        """``loss``, ``perplexity`` and ``bits_per_byte`` over validation, at most ``max_tokens`` targets of each
        component; ``batch_size`` windows at a time, which does not change the result. Validation takes plain windows
        under either packing. Of several ranks each does its ``share``, and all get the whole result.

        Of a mixture these are of the text that it yields (:func:`~tokenformer.language.scoring.mixture_metrics`),
        and ``loss/NAME`` is that of each component.
        """
        found = [
            score(
                model,
                part.data,
                sequence_length=self.sequence_length,
                batch_size=batch_size,
                device=device,
                max_tokens=max_tokens,
                share=share,
            )
            for part in self.data.components
        ]
        if len(found) == 1:
            return found[0].metrics()
        parts = zip(self.data.components, found, strict=True)
        return mixture_metrics(found, self.data.shares) | {
            f"loss/{part.name}": evaluation.loss for part, evaluation in parts
        }
