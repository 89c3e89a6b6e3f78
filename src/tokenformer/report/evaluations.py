"""Tables of what ``evaluate`` finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenformer.report.tables import Table, count

if TYPE_CHECKING:
    from tokenformer.evaluation.harness.run import HarnessResult
    from tokenformer.evaluation.perplexity import EvaluationResult


def perplexity_table(result: EvaluationResult) -> Table:
    """The measures of a split."""
    evaluation = result.evaluation
    rows = [
        ("loss (nats a token)", f"{evaluation.loss:.6f}"),
        ("perplexity", f"{evaluation.perplexity:.4f}"),
        ("bits per byte", f"{evaluation.bits_per_byte:.6f}"),
        ("tokens scored", count(evaluation.tokens)),
        ("UTF-8 bytes scored", count(evaluation.bytes)),
        ("window (tokens)", count(result.sequence_length)),
        *(("adapter", str(path)) for path in result.adapters),
    ]
    if result.stride is not None:
        rows.append(("stride (tokens)", count(result.stride)))
    if result.word_perplexity is not None:
        rows.insert(3, ("perplexity per word", f"{result.word_perplexity:.4f}"))
        rows.append(("words", count(result.words or 0)))
    return Table(f"{result.model} on {result.split} of {result.data}", ("measure", "value"), rows)


def task_table(result: HarnessResult) -> Table:
    """The measures of every task, with its version."""
    columns = ("task", "version", "few-shot", "documents", "measure", "value", "stderr")
    rows = [
        (
            score.task,
            score.version,
            "" if score.num_fewshot is None else str(score.num_fewshot),
            "" if score.samples is None else count(score.samples),
            score.metric,
            f"{score.value:.4f}",
            "" if score.stderr is None else f"{score.stderr:.4f}",
        )
        for score in result.scores
    ]
    harness = f"{result.settings['harness']} {result.settings['harness_version']}"
    return Table(f"{result.model}: {harness}, {result.settings['dtype']}", columns, rows)
