"""``tokenformer inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_EXAMPLES = """
**Examples**

`tokenformer inspect runs/first/model` : parameters, growth history, memory, FLOPs

`tokenformer inspect runs/first` : stages, latest metrics, checkpoints

`tokenformer inspect data/default --json`
"""


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A model, run or data directory, or a training checkpoint.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Show what a directory holds.

    A model: parameters by part, growth history, memory and FLOPs. A run: configuration, stages, latest
    metrics, checkpoints. A data directory: counts, tokenizer, sample documents.
    """
    import json

    from tokenformer.report.inspect import inspect_path
    from tokenformer.report.tables import print_tables

    inspection = inspect_path(path)
    if as_json:
        print(json.dumps(inspection.data, indent=2, ensure_ascii=False))
    else:
        print_tables(inspection.tables)


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("inspect", epilog=_EXAMPLES)(inspect)
