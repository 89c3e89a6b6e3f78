"""``tokenformer train``: from scratch, from a model directory, or up a ladder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenformer.errors import TokenFormerError

_EXAMPLES = """
**Examples**

`tokenformer train recipes/small.yaml data.path=data/mine --out runs/mine`

`tokenformer train recipes/small.yaml optimizer.lr=3e-4 steps=2000 --out runs/lower-lr`

`tokenformer train recipes/ladder.yaml stages.1.grow.factor=3` : train, grow, train, in one run

`tokenformer train recipes/ladder.yaml --resume` : goes on exactly where it stopped
"""


def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A YAML file: the configuration of the run.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FIELD=VALUE", help="Fields to change, e.g. optimizer.lr=3e-4 stages.0.steps=10."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="RUN", help="Run directory. Default: runs/<recipe's name>."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint; start if there is none yet.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Train a model: from fresh weights, from a model directory or checkpoint, or up a ladder of growth stages.

    The run directory holds the effective configuration, metrics.jsonl, TensorBoard events and checkpoints; the model
    at the end of each stage; report.html with its figures at the end of the run. Ctrl-C ends a run after a
    checkpoint; --resume goes on from there, exactly.
    """
    from tokenformer.parallel.launch import find_launch
    from tokenformer.train.config import load_run_config

    config = load_run_config(recipe, overrides or [])

    from tokenformer.train.interrupts import RunInterrupted
    from tokenformer.train.run import train as train_model

    try:
        result = train_model(config, out or Path("runs") / recipe.stem, resume=resume, quiet=quiet)
    except RunInterrupted as interruption:
        if find_launch().rank == 0:
            typer.echo(str(interruption), err=True)
        raise typer.Exit(128 + interruption.signal_number) from None
    if find_launch().rank == 0:
        _report(result.out, quiet)


def _report(run: Path, quiet: bool) -> None:
    """Write the run's report; a training that is done does not fail for want of one."""
    from tokenformer.report.runs import report_run

    try:
        report = report_run(run)
    except TokenFormerError as error:
        typer.echo(f"no report: {error}", err=True)
        return
    if not quiet:
        typer.echo(f"report: {report}")


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("train", epilog=_EXAMPLES)(train)
