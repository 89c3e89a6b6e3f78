"""``tokenformer evaluate``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenformer.errors import TokenFormerError

if TYPE_CHECKING:
    from tokenformer.evaluation.harness.run import HarnessResult
    from tokenformer.evaluation.perplexity import EvaluationResult

_EXAMPLES = """
**Examples**

`tokenformer evaluate runs/first --data data/default`

`tokenformer evaluate models/150m --data data/mine --split train --sequence-length 512 --json result.json`

`tokenformer evaluate models/150m --data data/wikitext-2 --split test --stride 512 --word-perplexity`

`tokenformer evaluate models/150m --adapter runs/shakespeare --data data/shakespeare`

`tokenformer evaluate models/150m --tasks lambada_openai,hellaswag,piqa,arc_easy,arc_challenge,winogrande`

`tokenformer evaluate models/150m --tasks lambada_jsonl=lambada_test.jsonl --limit 500`

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
) -> None:
    """Loss, perplexity and bits per byte over a whole split, or zero-shot tasks."""
    from tokenformer.files import require_free, write_json

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
    if data is not None:
        from tokenformer.evaluation.perplexity import evaluate_model
        from tokenformer.train.device import find_device

        result = evaluate_model(
            model,
            data,
            adapters=adapter or [],
            split=split or "validation",
            sequence_length=sequence_length,
            stride=stride,
            per_document=per_document,
            word_perplexity=word_perplexity,
            batch_size=batch_size,
            device=find_device(device),
            progress=True,
        )
        _print_result(result)
        found: dict[str, Any] = result.to_json()
    else:
        evaluate_tasks = _load_harness()
        scores = evaluate_tasks(
            model,
            names,
            adapters=adapter or [],
            include_paths=include_path or [],
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            max_length=sequence_length,
            dtype=dtype,
            device=device,
        )
        if scores is None:
            return
        _print_scores(scores)
        found = scores.to_json()
    if json_file is not None:
        write_json(json_file, found)


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
        *(("adapter", str(path)) for path in result.adapters),
    ]
    if result.stride is not None:
        rows.append(("stride (tokens)", count(result.stride)))
    if result.word_perplexity is not None:
        rows.insert(3, ("perplexity per word", f"{result.word_perplexity:.4f}"))
        rows.append(("words", count(result.words or 0)))
    print_tables([Table(f"{result.model} on {result.split} of {result.data}", ("measure", "value"), rows)])


def _print_scores(result: HarnessResult) -> None:
    from tokenformer.report.tables import Table, count, print_tables

    columns = ("task", "version", "few-shot", "documents", "measure", "value", "stderr")
    rows = [
        (
            score.task,
            score.version,
            "" if score.num_fewshot is None else str(score.num_fewshot),
            "" if score.samples is None else count(score.samples),
            score.metric,
            f"{score.value:.4f}",
            "" if score.stderr is None else f"{score.stderr:.4f}",
        )
        for score in result.scores
    ]
    harness = f"{result.settings['harness']} {result.settings['harness_version']}"
    print_tables([Table(f"{result.model}: {harness}, {result.settings['dtype']}", columns, rows)])


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("evaluate", epilog=_EXAMPLES)(evaluate)
