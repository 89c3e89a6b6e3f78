"""``tokenformer grow``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tokenformer.train.grow import GrowthReport

_EXAMPLES = """
**Examples**

`tokenformer grow runs/small --out models/large --factor 3.5` : the model of a run, 3.5 times the parameter tokens

`tokenformer grow models/small --out models/large --qkv 1792 --proj 1792 --ffn 7168 --data data/default`

`tokenformer grow models/small --out models/large --factor 2 --init copies` : also for `softmax`

`tokenformer grow models/small --out models/large --factor 4 --new-tokens zero_values` : for `gelu`

`tokenformer grow runs/small/checkpoints/step-00002000 --out grown --factor 2` : a checkpoint to train on from, with
`init_from: grown` in a recipe
"""


def grow(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A model directory, a run directory, or a training checkpoint."),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The directory to write; it must be new or empty.")
    ],
    factor: Annotated[
        float | None,
        typer.Option(metavar="X", help="Multiply the parameter tokens of every layer.", show_default=False),
    ] = None,
    qkv: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="New total of parameter tokens of each query, key and value layer.",
            show_default=False,
        ),
    ] = None,
    proj: Annotated[
        int | None,
        typer.Option(metavar="N", help="New total of the attention output layers.", show_default=False),
    ] = None,
    ffn: Annotated[
        int | None,
        typer.Option(metavar="N", help="New total of the feed-forward layers.", show_default=False),
    ] = None,
    init: Annotated[
        str,
        typer.Option(
            metavar="exact|copies|random",
            help="`exact`: the function does not move (not for softmax). `copies`: whole multiples, "
            "copies of the old tokens. `random`: the authors' way, the function moves.",
        ),
    ] = "exact",
    new_tokens: Annotated[
        str,
        typer.Option(
            metavar="zero_keys|zero_values",
            help="What is zero in the tokens of exact growth. `zero_values`: keys drawn as at the start; only for "
            "`gelu`.",
        ),
    ] = "zero_keys",
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A data directory: measure how far the logits move on its validation text, not on random ids.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**63 - 1, help="Draws the new tokens.")] = 0,
    hidden_size: Annotated[int | None, typer.Option(hidden=True)] = None,
    num_hidden_layers: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Make a model larger by adding parameter tokens; width and depth stay.

    A model directory becomes a model directory. A training checkpoint becomes a checkpoint, with the optimiser's
    moments, step counters and data position, that `tokenformer train` goes on with.
    """
    from tokenformer.growth.spec import GrowthSpec
    from tokenformer.validation import validate

    asked = {
        "factor": factor,
        "qkv": qkv,
        "proj": proj,
        "ffn": ffn,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
    }
    values = {
        "init": init,
        "new_tokens": new_tokens,
        **{name: value for name, value in asked.items() if value is not None},
    }
    spec = validate(GrowthSpec, values, source="grow")

    from tokenformer.train.grow import grow_directory

    _print_report(grow_directory(model, out, spec, data=data, seed=seed))


def _print_report(report: GrowthReport) -> None:
    from tokenformer.report.tables import Table, count, print_tables

    before, after = report.before, report.after
    rows = [
        (
            f"{role} tokens",
            count(before.param_tokens(role)),
            count(after.param_tokens(role)),
            f"{getattr(before.tau, role):g}",
            f"{getattr(after.tau, role):g}",
        )
        for role in ("qkv", "proj", "ffn")
    ]
    rows.append(("parameters", count(before.num_parameters()), count(after.num_parameters()), "", ""))
    done = after.growth_history[-1]
    title = f"Growth ({done.init}{done.note})"
    print_tables([Table(title, ("", "before", "after", "tau before", "tau after"), rows)])
    print(f"\nLargest change of a logit: {report.logit_change:.2g} of their spread, on {report.measured_on}")
    if report.broke_exactness:
        typer.secho(
            "WARNING: exact growth must not move the logits by more than 1e-6 of their spread, but it did; "
            "do not rely on this model, and report it with the command and the model's config.json",
            fg=typer.colors.RED,
            bold=True,
            err=True,
        )
    following = (
        f"tokenformer train RECIPE, with init_from: {report.directory} in place of its model section"
        if report.is_checkpoint
        else f"tokenformer inspect {report.directory}"
    )
    print(f"Written to {report.directory}. Next: {following}")


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("grow", epilog=_EXAMPLES)(grow)
