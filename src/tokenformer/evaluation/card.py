"""Results of evaluations in the card (``README.md``) of what was evaluated."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tokenformer.adapters.config import resolve_adapter_directory
from tokenformer.errors import TokenFormerError
from tokenformer.files import read_text, write_text
from tokenformer.models.card import model_card
from tokenformer.models.paths import is_model_directory, resolve_model_directory
from tokenformer.models.registry import load_config

if TYPE_CHECKING:
    from tokenformer.evaluation.harness.run import HarnessResult
    from tokenformer.evaluation.perplexity import EvaluationResult

TITLE = "## Evaluations"
_HEADER = ("| date | evaluated on | measure | value | how |", "| --- | --- | --- | --- | --- |")


class CardRow(NamedTuple):
    """One measure of an evaluation, in the words of the card."""

    date: str
    subject: str
    measure: str
    value: str
    how: str

    def line(self) -> str:
        """The row in Markdown."""
        return "| " + " | ".join(part.replace("|", "\\|").replace("\n", " ") for part in self) + " |"


def card_of(model: Path | str, adapters: Sequence[Path] = ()) -> Path:
    """The card in which an evaluation of ``model`` is recorded, or of it with one adapter on top: that of the adapter.

    Raises:
        TokenFormerError: several adapters, whose sum has no card; a directory that is not there or read-only.
    """
    if len(adapters) > 1:
        raise TokenFormerError(
            f"--update-card: found {len(adapters)} adapters, expected one at most: several together have no card. "
            "Merge them with convert native native, and evaluate that"
        )
    directory = resolve_adapter_directory(adapters[0]) if adapters else resolve_model_directory(model)
    if not os.access(directory, os.W_OK):
        raise TokenFormerError(f"--update-card: {directory}: cannot be written to")
    return directory / "README.md"


def add_to_card(card: Path, rows: Sequence[CardRow]) -> None:
    """Add rows to the evaluations in a card; all else in it stays as it is.

    A row that is there already, but for its date, is not repeated. A model directory without a card gets one.

    Raises:
        TokenFormerError: the card is not UTF-8, or the disk refuses.
    """
    if card.exists():
        text = read_text(card, "a model card")
    else:
        text = model_card(load_config(card.parent)) if is_model_directory(card.parent) else ""
    write_text(card, _with_rows(text, rows))


def perplexity_rows(result: EvaluationResult) -> list[CardRow]:
    """The measures of a split, and how it was cut into windows."""
    how = [f"windows of {result.sequence_length:,} tokens"]
    how += [f"stride {result.stride:,}"] if result.stride is not None else []
    how += ["each document by itself"] if result.per_document else []
    subject = f"{result.split} of `{result.data.name}`, {result.evaluation.tokens:,} tokens"
    measures = dict(result.evaluation.metrics())
    if result.word_perplexity is not None:
        measures["perplexity per word"] = result.word_perplexity
    return [
        CardRow(_today(), subject, name.replace("_", " "), _number(value), ", ".join(how))
        for name, value in measures.items()
    ]


def task_rows(result: HarnessResult) -> list[CardRow]:
    """The measures of every task, with the version of the task and of the harness."""
    harness = f"{result.settings['harness']} {result.settings['harness_version']}, {result.settings['dtype']}"
    rows = []
    for score in result.scores:
        parts = [f"`{score.task}`", f"version {score.version}"]
        parts += [f"{score.num_fewshot}-shot"] if score.num_fewshot is not None else []
        parts += [f"{score.samples:,} documents"] if score.samples is not None else []
        spread = "" if score.stderr is None else f" ± {_number(score.stderr)}"
        rows.append(CardRow(_today(), ", ".join(parts), score.metric, _number(score.value) + spread, harness))
    return rows


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) and abs(value) < 1e6 else f"{value:.4g}"


def _with_rows(text: str, rows: Sequence[CardRow]) -> str:
    lines = text.rstrip("\n").split("\n")
    if TITLE not in lines:
        lines += ["", TITLE]
    start = lines.index(TITLE) + 1
    end = next((place for place in range(start, len(lines)) if lines[place].startswith("#")), len(lines))
    table = [place for place in range(start, end) if lines[place].startswith("|")]
    known = {_undated(lines[place]) for place in table}
    new = [line for line in (row.line() for row in rows) if _undated(line) not in known]
    if not table:
        new = ["", *_HEADER, *new]
    place = table[-1] + 1 if table else start
    return "\n".join([*lines[:place], *new, *lines[place:]]) + "\n"


def _undated(line: str) -> str:
    return line.split("|", 2)[-1]
