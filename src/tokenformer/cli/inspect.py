"""``tokenformer inspect``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

_EXAMPLES = """
**Examples**

`tokenformer inspect runs/first/model` : parameters, growth history, memory, FLOPs

`tokenformer inspect runs/first` : stages, latest metrics, checkpoints

`tokenformer inspect recipes/published/pile-450m.yaml` : stages, parameters, memory of training

`tokenformer inspect recipes/published/pile-1.5b.yaml --devices 8` : the same on each of 8 GPUs

`tokenformer inspect runs/first/model --micro-batch-size 16 --devices 8 --activation-checkpointing full`

`tokenformer inspect data/default --json`
"""


class _Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class _Mode(StrEnum):
    none = "none"
    selective = "selective"
    full = "full"


class _Recompute(StrEnum):
    block = "block"
    scores = "scores"


class _Optimizer(StrEnum):
    adamw = "adamw"
    muon = "muon"


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A model, adapter, run or data directory, a training checkpoint, or a recipe.",
        ),
    ],
    micro_batch_size: Annotated[
        int, typer.Option(min=1, help="Memory of training a model: sequences in one forward pass.")
    ] = 1,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="The same: tokens of each. Default: the model's context.")
    ] = None,
    dtype: Annotated[_Dtype, typer.Option(help="The same: of the forward pass.")] = _Dtype.bfloat16,
    activation_checkpointing: Annotated[
        _Mode,
        typer.Option(help="The same: which blocks compute again what they did not keep: every second, all."),
    ] = _Mode.none,
    recompute: Annotated[
        _Recompute,
        typer.Option(help="The same: what those blocks compute again, all or only Pattention's scores."),
    ] = _Recompute.block,
    optimizer: Annotated[_Optimizer, typer.Option(help="The same.")] = _Optimizer.adamw,
    devices: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="GPUs that shard a model; all those of a recipe's mesh. Default: 1, or what the mesh asks for.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Show what a directory holds.

    A model: parameters by part, growth history, memory and FLOPs. A run: configuration, stages, latest
    metrics, checkpoints. An adapter: its base, size and training. A data directory: counts, tokenizer, sample
    documents. Memory of training is predicted for a recipe or run as it says, for a model as the options say.
    """
    import json
    from functools import partial

    from tokenformer.report.inspect import inspect_path
    from tokenformer.report.tables import print_tables
    from tokenformer.train.memory import TrainingSetup
    from tokenformer.train.sections import ActivationCheckpointingConfig

    setup = partial(
        TrainingSetup,
        micro_batch_size,
        dtype=dtype.value,
        activation_checkpointing=ActivationCheckpointingConfig(
            mode=activation_checkpointing.value, recompute=recompute.value
        ),
        optimizer=optimizer.value,
        shard=devices or 1,
    )
    inspection = inspect_path(path, lambda context: setup(sequence_length or context), devices)
    if as_json:
        print(json.dumps(inspection.data, indent=2, ensure_ascii=False))
    else:
        print_tables(inspection.tables)


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("inspect", epilog=_EXAMPLES)(inspect)
