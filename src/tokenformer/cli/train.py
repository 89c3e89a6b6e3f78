"""``tokenformer train``: from scratch, from a model directory, or up a ladder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_EXAMPLES = """
**Examples**

    tokenformer train recipes/small.yaml

    tokenformer train recipes/small.yaml optimizer.lr=3e-4 steps=2000 --out runs/lower-lr

    tokenformer train recipes/ladder.yaml stages.1.grow.factor=4

    tokenformer train recipes/ladder.yaml --resume
"""


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: the configuration of the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FIELD=VALUE]...", help="Fields to change, e.g. optimizer.lr=3e-4 stages.0.steps=10."
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

    The run directory holds the effective configuration, metrics.jsonl, TensorBoard events, checkpoints and, at the
    end of each stage, the model. Ctrl-C ends a run after a checkpoint; --resume goes on from there, exactly.
    """
    from tokenformer.train.config import load_run_config

    config = load_run_config(recipe, overrides or [])

    from tokenformer.train.interrupts import RunInterrupted
    from tokenformer.train.run import train as train_model

    try:
        train_model(config, out or Path("runs") / recipe.stem, resume=resume, quiet=quiet)
    except RunInterrupted as interruption:
        typer.echo(str(interruption), err=True)
        raise typer.Exit(128 + interruption.signal_number) from None


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("train", epilog=_EXAMPLES)(train)
