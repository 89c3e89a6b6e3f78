"""Loss, perplexity and bits per byte of a model directory over a split of a data directory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenformer.adapters.apply import load_with_adapters
from tokenformer.errors import TokenFormerError
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.scoring import Evaluation, score
from tokenformer.language.tokenizers import load_tokenizer
from tokenformer.models.paths import resolve_model_directory
from tokenformer.models.registry import load_config


class EvaluationResult(NamedTuple):
    """What was scored, and the counts and measures (:class:`~tokenformer.language.scoring.Evaluation`).

    ``words``: of the split, where they were asked for (:func:`count_words`).
    """

    model: Path
    data: Path
    split: str
    sequence_length: int
    evaluation: Evaluation
    stride: int | None = None
    per_document: bool = False
    words: int | None = None
    adapters: tuple[Path, ...] = ()

    @property
    def word_perplexity(self) -> float | None:
        """exp(nats / words); None where words were not counted, infinite where that is too large for a float."""
        if not self.words:
            return None
        nats = self.evaluation.nats / self.words
        return math.exp(nats) if nats < 709 else math.inf

    def to_json(self) -> dict[str, Any]:
        """All fields and measures; a perplexity too large for a float is null."""
        measures = self.evaluation.metrics()
        words = {}
        if self.word_perplexity is not None:
            words = {"words": self.words}
            measures["word_perplexity"] = self.word_perplexity
        return {
            "model": str(self.model),
            "adapters": [str(path) for path in self.adapters],
            "data": str(self.data),
            "split": self.split,
            "sequence_length": self.sequence_length,
            "stride": self.stride or self.sequence_length,
            "per_document": self.per_document,
            **words,
            **self.evaluation._asdict(),
            **{name: value if math.isfinite(value) else None for name, value in measures.items()},
        }


def evaluate_model(
    model: Path | str,
    data: Path | str,
    *,
    adapters: Sequence[Path] = (),
    split: str = "validation",
    sequence_length: int | None = None,
    stride: int | None = None,
    per_document: bool = False,
    word_perplexity: bool = False,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> EvaluationResult:
    """Score every token of ``split`` but the first, or, ``per_document``, all text of every document by itself.

    Args:
        model: a model directory, or a run directory with one in it.
        data: a data directory made with the model's tokenizer.
        adapters: directories of adapters of the model, or their runs.
        split: ``train``, ``validation`` or ``test``.
        sequence_length: tokens of one window; by default the model's context (``max_position_embeddings``).
        stride: new tokens that each window but the first scores, after what fits before them; all by default.
        per_document: begin each document anew, after the end-of-document id; its own end is not scored.
        word_perplexity: count the words of the split as well.
        batch_size: windows at a time; the result does not depend on it. By default about 16,384 tokens.
        device: where the model runs.
        progress: show a progress bar on a terminal.

    Raises:
        TokenFormerError: a missing or damaged directory, an adapter of another model, another tokenizer than the
            model's, a split that is not there, a ``sequence_length`` beyond the context, a ``stride`` beyond the
            window, a loss that is not finite.
    """
    directory = resolve_model_directory(model)
    config = load_config(directory)
    length = config.max_position_embeddings if sequence_length is None else sequence_length
    if not 1 <= length <= config.max_position_embeddings:
        raise TokenFormerError(
            f"sequence_length is {length}, expected 1 to {config.max_position_embeddings}, the model's context"
        )
    if batch_size is not None and batch_size < 1:
        raise TokenFormerError(f"batch_size is {batch_size}, expected at least 1")
    opened = DataDirectory.open(data)
    opened.check_model(config, _tokenizer_hash(directory))
    opened.split(split)
    evaluation = score(
        load_with_adapters(directory, adapters, device=device),
        opened,
        sequence_length=length,
        batch_size=batch_size,
        device=device,
        split=split,
        stride=stride,
        per_document=per_document,
        progress=f"Evaluating {split}" if progress else None,
    )
    if not math.isfinite(evaluation.nats):
        raise TokenFormerError(
            f"{directory}: the loss is not finite (NaN or infinity); its weights may be damaged"
        )
    words = count_words(opened, split) if word_perplexity else None
    return EvaluationResult(
        directory, Path(data), split, length, evaluation, stride, per_document, words, tuple(adapters)
    )


def count_words(data: DataDirectory, split: str) -> int:
    """Words of a split as WikiText counts its tokens: parts between white space, and the end of each line.

    The test split of WikiText-2 has 245,569 of them, that of WikiText-103 as many.
    """
    stream = data.split(split)
    texts = (data.tokenizer.decode(stream.document(number)) for number in range(stream.num_documents))
    return sum(len(text.split()) + text.count("\n") for text in texts)


def _tokenizer_hash(directory: Path) -> str | None:
    return load_tokenizer(directory).sha256 if (directory / "tokenizer.json").is_file() else None
