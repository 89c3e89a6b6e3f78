"""``tokenformer convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_EXAMPLES = """
**Examples**

`tokenformer convert official native TokenFormer-150M models/150m` : a checkpoint of the authors' code
(`config.json` and `pytorch_model.bin`) to a model directory

`tokenformer convert official native TokenFormer-150M models/150m --config configs/tokenformer/150M_eval.yml` : the same
with the YAML configuration of the authors' code, which is found by itself where it lies beside the weights

`tokenformer convert native official models/mine checkpoint` : a model or run directory to a checkpoint for the authors'
code; a grown model is rewritten to compute the same there

`tokenformer convert gpt-neox native pythia-160m models/pythia-160m` : a directory of GPT-NeoX or Pythia in
transformers' format to a Transformer of ours; `convert native gpt-neox` goes back

`tokenformer convert native native models/base models/merged --adapter runs/mine` : a model with an adapter in it;
with `--consolidate` its parameter tokens become one group

`tokenformer convert native arrayrecord data/mine exported` : the documents of a data directory to ArrayRecord files of
`tf.train.Example` for the authors' JAX edition
"""


def convert(
    source_format: Annotated[
        str, typer.Argument(metavar="FROM", help="The format of SRC: `official`, `gpt-neox` or `native`.")
    ],
    target_format: Annotated[
        str,
        typer.Argument(
            metavar="TO",
            help="The format of DST: `native`, `official`, `gpt-neox`; of a data directory `arrayrecord`.",
        ),
    ],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The directory to read.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The directory to write; new or empty.")],
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Of `official`: its configuration, JSON or YAML, where it does not lie in SRC.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Of `native` to `native`: an adapter to merge in, or its run; may be given more than once.",
            show_default=False,
        ),
    ] = None,
    consolidate: Annotated[
        bool,
        typer.Option(
            "--consolidate",
            help="Of `native` to `native`: make one group of all parameter tokens of a layer.",
        ),
    ] = False,
) -> None:
    """Convert a model or data between formats; every tensor and document is accounted for, nothing is guessed."""
    from tokenformer.interop.formats import ConvertedData, find_conversion

    run = find_conversion(
        source_format, target_format, config=config, adapters=adapter or [], consolidate=consolidate
    )
    converted = run(source, target)
    if isinstance(converted, ConvertedData):
        for split, documents in converted.documents.items():
            print(f"{split}: {documents:,} documents")
        print(f"Written to {converted.directory}.")
        return
    made = converted.config
    tokenizer = "tokenizer.json copied" if converted.has_tokenizer else "no tokenizer.json in the source"
    print(f"{made.class_name}, {made.num_parameters():,} parameters, context {made.max_position_embeddings}")
    print(f"{converted.tensors} tensors ({converted.dtype}) mapped, none left over; {tokenizer}")
    for change in converted.changes:
        print(change)
    following = f" Next: tokenformer inspect {converted.directory}" if target_format == "native" else ""
    print(f"Written to {converted.directory}.{following}")


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("convert", epilog=_EXAMPLES)(convert)
