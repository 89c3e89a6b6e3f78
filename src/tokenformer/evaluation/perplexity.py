"""Loss, perplexity and bits per byte of a model directory over a split of a data directory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenformer.errors import TokenFormerError
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.scoring import Evaluation, score
from tokenformer.language.tokenizers import load_tokenizer
from tokenformer.models.directory import load_model
from tokenformer.models.paths import resolve_model_directory
from tokenformer.models.registry import load_config


class EvaluationResult(NamedTuple):
    """What was scored, and the counts and measures (:class:`~tokenformer.language.scoring.Evaluation`)."""

    model: Path
    data: Path
    split: str
    sequence_length: int
    evaluation: Evaluation

    def to_json(self) -> dict[str, Any]:
        """All fields and measures; a perplexity too large for a float is null."""
        measures = self.evaluation.metrics()
        return {
            "model": str(self.model),
            "data": str(self.data),
            "split": self.split,
            "sequence_length": self.sequence_length,
            **self.evaluation._asdict(),
            **{name: value if math.isfinite(value) else None for name, value in measures.items()},
        }


def evaluate_model(
    model: Path | str,
    data: Path | str,
    *,
    split: str = "validation",
    sequence_length: int | None = None,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> EvaluationResult:
    """Score every token of ``split`` but the first.

    Args:
        model: a model directory, or a run directory with one in it.
        data: a data directory made with the model's tokenizer.
        split: ``train`` or ``validation``.
        sequence_length: tokens of one window; by default the model's context (``max_position_embeddings``).
        batch_size: windows at a time; the result does not depend on it. By default about 16,384 tokens.
        device: where the model runs.
        progress: show a progress bar on a terminal.

    Raises:
        TokenFormerError: a missing or damaged directory, another tokenizer than the model's, a split that is not
            there, a ``sequence_length`` beyond the context, or a loss that is not finite.
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
        load_model(directory, device=device),
        opened,
        sequence_length=length,
        batch_size=batch_size,
        device=device,
        split=split,
        progress=f"Evaluating {split}" if progress else None,
    )
    if not math.isfinite(evaluation.nats):
        raise TokenFormerError(
            f"{directory}: the loss is not finite (NaN or infinity); its weights may be damaged"
        )
    return EvaluationResult(directory, Path(data), split, length, evaluation)


def _tokenizer_hash(directory: Path) -> str | None:
    return load_tokenizer(directory).sha256 if (directory / "tokenizer.json").is_file() else None
