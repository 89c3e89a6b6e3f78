"""``tokenformer prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tokenformer.errors import TokenFormerError
from tokenformer.language.sources.records import OnError

if TYPE_CHECKING:
    from tokenformer.language.data_directory import DataDirectory
    from tokenformer.language.preparation.engines import Engine

_EXAMPLES = """
**Examples**

`tokenformer prepare default --out data/default` : the standard library's Python source, as bytes

`tokenformer prepare book.txt notes/ corpus.jsonl.xz --out data/mine --tokenizer bpe:8192`

`tokenformer prepare train.jsonl --validation held-out.jsonl --out data/mine --tokenizer tokenizer.json`

`tokenformer prepare 'corpus/*.jsonl.zst' table.parquet --out data/mine --deduplicate --min-length 100 --on-error skip`

`tokenformer prepare preset:wikitext-2=downloads/wikitext-2 --out data/wikitext-2 --tokenizer bpe:8192`

`tokenformer prepare 'pile/*.jsonl.zst' --out data/pile --tokenizer tokenizer.json --engine ray --ray-address auto`

`tokenformer prepare hf:roneneldan/TinyStories --validation hf:roneneldan/TinyStories::validation --out data/stories`
"""


def _list_presets(wanted: bool) -> None:
    if not wanted:
        return
    from tokenformer.language.presets import PRESETS
    from tokenformer.report.tables import Table, print_tables

    rows = []
    for preset in PRESETS.values():
        hub = next(iter(preset.hub.values()))
        rows.append((preset.name, ", ".join(preset.hub), " ".join((hub.name, hub.config)), preset.summary))
    print_tables([Table("presets", ("name", "splits", "on the hub", "what"), rows)])
    raise typer.Exit


def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Text files, .jsonl, .json and .tfrecord (each also as .gz, .xz, .bz2, .zst, .zip), .parquet, "
            ".arrow, .array_record, .idx of Megatron (its tokens are copied), datasets written by save_to_disk, "
            "folders of these (read recursively), quoted globs; `hf:NAME[:config][:split]`, streamed from the "
            "Hugging Face hub, twice with bpe:N (split `train` unless given); `preset:NAME[=PATH]`, a well-known "
            "corpus with its published splits, from the hub or a local copy (`--list-presets`); or `default`: the "
            "Python source files of this interpreter's standard library. .zst, .parquet, .arrow, .tfrecord and the "
            "hub need `pip install 'tokenformer[data]'`.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The data directory to write; it must be new or empty.")
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="byte|bpe:N|FILE|hf:NAME",
            help="Bytes; a byte-level BPE of N ids trained on the training documents; a tokenizer.json or a folder "
            "with one; or one of the Hugging Face hub (`hf:EleutherAI/gpt-neox-20b`, `hf:NAME@REVISION`, or plain "
            "owner/name).",
        ),
    ] = "byte",
    validation: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Separate validation documents; may be given more than once.",
            show_default=False,
        ),
    ] = None,
    test: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Documents of a split `test`; may be given more than once.",
            show_default=False,
        ),
    ] = None,
    validation_fraction: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="Share of the documents held out for validation, by a hash of their text (of a single text: "
            "its end). Without separate validation documents 0.05.",
            show_default=False,
        ),
    ] = None,
    text_field: Annotated[
        str,
        typer.Option(metavar="NAME", help="The field of a JSON object, or the column, that holds the text."),
    ] = "text",
    min_length: Annotated[
        int, typer.Option(metavar="N", min=0, help="Leave out documents of fewer characters.")
    ] = 0,
    max_length: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Leave out documents of more characters.", show_default=False),
    ] = None,
    min_letters: Annotated[
        float,
        typer.Option(
            metavar="F", help="Leave out documents in which fewer than this share of characters are letters."
        ),
    ] = 0.0,
    include: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Only documents in whose text this is found.", show_default=False),
    ] = None,
    exclude: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX", help="Leave out documents in whose text this is found.", show_default=False
        ),
    ] = None,
    include_name: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="Only documents in whose name (path, path:line, path: row N) this is found.",
            show_default=False,
        ),
    ] = None,
    exclude_name: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX", help="Leave out documents in whose name this is found.", show_default=False
        ),
    ] = None,
    deduplicate: Annotated[
        bool, typer.Option("--deduplicate", help="Keep only the first of documents with the same text.")
    ] = False,
    on_error: Annotated[
        OnError,
        typer.Option(
            help="A broken document (not UTF-8, invalid JSON, no text field) stops with its file and line, or is "
            "skipped and counted.",
        ),
    ] = "stop",
    eos_token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="The token of a tokenizer.json that ends a document, where it is not found by itself.",
            show_default=False,
        ),
    ] = None,
    shard_size: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            min=1,
            help="A split of more tokens is written as several stores of at most so many each. 4,294,967,296 unless "
            "given.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Processes that tokenize; 1: none beside this one. All cores unless given. The files are the same.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(
            help="Where to tokenize: on this machine, or as tasks of a Ray cluster, which needs "
            "`pip install 'tokenformer[ray]'`. The files are the same."
        ),
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Of the Ray cluster: `auto`, HOST:PORT or ray://HOST:PORT. Without it $RAY_ADDRESS, else a cluster "
            "on this machine.",
            show_default=False,
        ),
    ] = None,
    _list: Annotated[
        bool,
        typer.Option("--list-presets", callback=_list_presets, is_eager=True, help="Show the presets."),
    ] = False,
) -> None:
    """Turn documents into a data directory: token stores, tokenizer.json and dataset.json.

    All cores are used. When it is interrupted, the same command goes on where it stopped.
    """
    from tokenformer.language.prepare import prepare as prepare_data
    from tokenformer.language.rules import DocumentRules
    from tokenformer.validation import validate

    rules = {
        "min_length": min_length,
        "max_length": max_length,
        "min_letters": min_letters,
        "include": include,
        "exclude": exclude,
        "include_name": include_name,
        "exclude_name": exclude_name,
        "deduplicate": deduplicate,
        "on_error": on_error,
    }

    data = prepare_data(
        sources,
        out,
        tokenizer=tokenizer,
        validation=validation or (),
        test=test or (),
        validation_fraction=validation_fraction,
        text_field=text_field,
        rules=validate(DocumentRules, rules, source="prepare"),
        eos_token=eos_token,
        shard_tokens=shard_size,
        engine=_engine(engine, workers, ray_address),
        say=lambda message: typer.echo(message, err=True),
    )
    _print_summary(data)


def _engine(kind: str, workers: int | None, ray_address: str | None) -> Engine | None:
    """What the options ask for; None is the default."""
    from tokenformer.language.preparation.engines import LocalEngine

    if kind == "ray":
        from tokenformer.language.preparation.ray_engine import RayEngine

        if workers is not None:
            raise TokenFormerError(
                "--workers: has no meaning with --engine ray, which uses its whole cluster"
            )
        return RayEngine(ray_address)
    if ray_address is not None:
        raise TokenFormerError("--ray-address: needs --engine ray")
    return None if workers is None else LocalEngine(workers)


def _print_summary(data: DataDirectory) -> None:
    from tokenformer.report.tables import Table, count, print_tables

    info = data.info
    splits = [
        (name, count(split.documents), count(split.tokens), count(split.utf8_bytes))
        for name, split in info.splits.items()
    ]
    print_tables([Table(str(data.path), ("split", "documents", "tokens", "UTF-8 bytes"), splits)])
    typer.echo(f"documents: {info.rules.describe()}")
    for reason, number in info.skipped.items():
        typer.echo(f"skipped: {count(number)} {reason}")
    typer.echo(f"tokenizer: {info.tokenizer}, {count(info.vocab_size)} ids")
    typer.echo(f"corpus SHA-256: {info.corpus_sha256}")
    typer.echo(f"next: tokenformer train RECIPE data.path={data.path}")


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("prepare", epilog=_EXAMPLES)(prepare)
