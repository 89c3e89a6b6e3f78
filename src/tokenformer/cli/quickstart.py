"""``tokenformer quickstart``."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

_EXAMPLES = """
**Examples**

`tokenformer quickstart`

`tokenformer quickstart --out runs/longer runs.small.steps=2000 runs.grown.steps=1000`

`tokenformer quickstart --out runs/random grow.init=random` : growing the authors' way, for comparison
"""


def quickstart(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FIELD=VALUE", help="Fields of the plan to change, e.g. runs.small.steps=100."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where everything goes.")] = Path(
        "runs/quickstart"
    ),
) -> None:
    """The whole story on this machine, small: prepare, train, grow, train on, compare, evaluate, generate, report.

    It takes a few minutes on two CPU cores and needs no download: the text is the Python source of the running
    interpreter's standard library. Interrupted, the same command goes on where it stopped.
    """
    from tokenformer.quickstart.plan import load_plan

    plan = load_plan(overrides or [])

    from tokenformer.quickstart.page import results_table, summary
    from tokenformer.quickstart.story import TITLES, read_results, run_quickstart
    from tokenformer.report.tables import print_tables
    from tokenformer.train.interrupts import RunInterrupted

    try:
        report = run_quickstart(plan, out, say=typer.echo)
    except KeyboardInterrupt as interruption:
        typer.echo("stopped; the same command goes on from here", err=True)
        number = interruption.signal_number if isinstance(interruption, RunInterrupted) else signal.SIGINT
        raise typer.Exit(128 + number) from None
    results = read_results(out)
    print_tables([results_table(results, TITLES)])
    typer.echo(summary(results))
    typer.echo(f"report: {report.resolve()}")


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("quickstart", epilog=_EXAMPLES)(quickstart)
