"""``tokenformer evaluate``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenformer.errors import TokenFormerError

_EXAMPLES = """
**Examples**

`tokenformer evaluate runs/first --data data/default`

`tokenformer evaluate models/150m --data data/mine --split train --sequence-length 512 --json result.json`

`tokenformer evaluate models/150m --data data/wikitext-2 --split test --stride 512 --word-perplexity`

`tokenformer evaluate models/150m --adapter runs/shakespeare --data data/shakespeare`

`tokenformer evaluate models/150m --tasks lambada_openai,hellaswag,piqa,arc_easy,arc_challenge,winogrande`

`tokenformer evaluate models/150m --tasks lambada_jsonl=lambada_test.jsonl --limit 500`

`tokenformer evaluate models/150m --tasks piqa,arc_easy --update-card`

`torchrun --nproc-per-node 8 -m tokenformer evaluate models/150m --tasks hellaswag --dtype bfloat16`
"""


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory, or a run directory.")],
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A data directory made with the model's tokenizer.")
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR", help="An adapter of the model, or its run directory; may be given more than once."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Tasks of lm-evaluation-harness, with commas between; `lambada_jsonl=FILE` reads a local file.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of the data: `train`, `validation` (the default), or `test` where there is one.",
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(min=1, metavar="T", help="Tokens that the model sees. Default: the model's context."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="S",
            help="Of data: windows overlap, and each but the first scores its last S tokens. Default: no overlap.",
        ),
    ] = None,
    per_document: Annotated[
        bool,
        typer.Option("--per-document", help="Of data: each document by itself, as the Pile is evaluated."),
    ] = False,
    word_perplexity: Annotated[
        bool,
        typer.Option("--word-perplexity", help="Of data: perplexity per word too, as of WikiText."),
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Sequences at a time; changes the speed, not the result."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Of tasks: examples before each question.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of tasks: only their first N documents.")
    ] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A folder with task files of your own.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(metavar="DTYPE", help="Of tasks: auto (as stored), float32, bfloat16 or float16."),
    ] = "auto",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result to this file as well.")
    ] = None,
    update_card: Annotated[
        bool,
        typer.Option(
            "--update-card",
            help="Add the result to the model's card (README.md), or the adapter's; what is there stays.",
        ),
    ] = False,
) -> None:
    """Loss, perplexity and bits per byte over a whole split, or zero-shot tasks."""
    from tokenformer.evaluation.card import add_to_card, card_of, perplexity_rows, task_rows
    from tokenformer.files import require_free, write_json
    from tokenformer.report.evaluations import perplexity_table, task_table
    from tokenformer.report.tables import print_tables

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    _check_options(
        data,
        names,
        of_data={
            "--split": split,
            "--stride": stride,
            "--per-document": per_document or None,
            "--word-perplexity": word_perplexity or None,
        },
        of_tasks={
            "--num-fewshot": num_fewshot,
            "--limit": limit,
            "--include-path": include_path,
            "--dtype": None if dtype == "auto" else dtype,
        },
    )
    if json_file is not None:
        require_free(json_file)
    adapters = adapter or []
    card = card_of(model, adapters) if update_card else None
    if data is not None:
        from tokenformer.evaluation.perplexity import evaluate_model
        from tokenformer.train.device import find_device

        result = evaluate_model(
            model,
            data,
            adapters=adapters,
            split=split or "validation",
            sequence_length=sequence_length,
            stride=stride,
            per_document=per_document,
            word_perplexity=word_perplexity,
            batch_size=batch_size,
            device=find_device(device),
            progress=True,
        )
        table, values, rows = perplexity_table(result), result.to_json(), perplexity_rows(result)
    else:
        scores = _load_harness()(
            model,
            names,
            adapters=adapters,
            include_paths=include_path or [],
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            max_length=sequence_length,
            dtype=dtype,
            device=device,
        )
        if scores is None:
            return  # another process has them
        table, values, rows = task_table(scores), scores.to_json(), task_rows(scores)
    print_tables([table])
    if json_file is not None:
        write_json(json_file, values)
    if card is not None:
        add_to_card(card, rows)


def _check_options(
    data: Path | None, tasks: list[str], *, of_data: dict[str, Any], of_tasks: dict[str, Any]
) -> None:
    if (data is None) == (not tasks):
        found = "both" if tasks else "neither"
        raise TokenFormerError(
            f"evaluate: found {found} of --data DIR and --tasks NAMES, expected one of them"
        )
    for name, value in (of_tasks if data is not None else of_data).items():
        if value is not None:
            raise TokenFormerError(
                f"{name}: has no meaning with {'--data' if data is not None else '--tasks'}"
            )


def _load_harness() -> Any:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars; read when tqdm is first imported
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise TokenFormerError(
            "--tasks: lm-evaluation-harness is not installed; install it with pip install 'tokenformer[eval]'"
        ) from error
    from tokenformer.evaluation.harness.run import evaluate_tasks

    return evaluate_tasks


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("evaluate", epilog=_EXAMPLES)(evaluate)
