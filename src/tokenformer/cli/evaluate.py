"""``tokenformer evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tokenformer.evaluation.perplexity import EvaluationResult

_EXAMPLES = """
**Examples**

`tokenformer evaluate runs/first --data data/default`

`tokenformer evaluate models/150m --data data/mine --split train --sequence-length 512 --json result.json`
"""


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory, or a run directory.")],
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="A data directory made with the model's tokenizer.")
    ],
    split: Annotated[
        str, typer.Option(metavar="NAME", help="`train`, `validation`, or `test` where there is one.")
    ] = "validation",
    sequence_length: Annotated[
        int | None,
        typer.Option(min=1, metavar="T", help="Tokens of one window. Default: the model's context."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Windows at a time; changes the speed, not the result."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result to this file as well.")
    ] = None,
) -> None:
    """Loss, perplexity and bits per byte over a whole split."""
    from tokenformer.files import require_free, write_json

    if json_file is not None:
        require_free(json_file)
    from tokenformer.evaluation.perplexity import evaluate_model
    from tokenformer.train.device import find_device

    result = evaluate_model(
        model,
        data,
        split=split,
        sequence_length=sequence_length,
        batch_size=batch_size,
        device=find_device(device),
        progress=True,
    )
    _print_result(result)
    if json_file is not None:
        write_json(json_file, result.to_json())


def _print_result(result: EvaluationResult) -> None:
    from tokenformer.report.tables import Table, count, print_tables

    evaluation = result.evaluation
    rows = [
        ("loss (nats a token)", f"{evaluation.loss:.6f}"),
        ("perplexity", f"{evaluation.perplexity:.4f}"),
        ("bits per byte", f"{evaluation.bits_per_byte:.6f}"),
        ("tokens scored", count(evaluation.tokens)),
        ("UTF-8 bytes scored", count(evaluation.bytes)),
        ("window (tokens)", count(result.sequence_length)),
    ]
    print_tables([Table(f"{result.model} on {result.split} of {result.data}", ("measure", "value"), rows)])


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("evaluate", epilog=_EXAMPLES)(evaluate)
