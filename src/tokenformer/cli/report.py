"""``tokenformer report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_EXAMPLES = """
**Examples**

`tokenformer report runs/ladder runs/from-scratch --out reports/growth`

`tokenformer report runs/mine+runs/larger runs/from-scratch --out reports/growth` : the larger model's compute includes
that of the small one it was grown from
"""


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Run directories to compare. `A+B`: run B went on from the model or a checkpoint of A.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", help="The directory to write; it must be new or empty."),
    ],
) -> None:
    """Figures of runs side by side: loss against compute over runs and growth stages."""
    from tokenformer.report.runs import report_runs

    typer.echo(f"report: {report_runs(runs, out)}")


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("report", epilog=_EXAMPLES)(report)
