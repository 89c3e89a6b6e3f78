"""A data directory in numbers, with a look at its documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.rules import DocumentRules
from tokenformer.language.store import data_path
from tokenformer.language.token_stream import TokenStream
from tokenformer.report.tables import Table, byte_size, count

_SAMPLES = 3
_SAMPLE_TOKENS = 256  # read of each: at least one a character shown, also of bytes
_SAMPLE_CHARACTERS = 100


def describe_data(path: Path) -> tuple[dict[str, Any], list[Table]]:
    """Facts and tables of a data directory; sample documents come from evenly spaced places of each split.

    Raises:
        TokenFormerError: a missing, truncated or corrupt file.
    """
    data = DataDirectory.open(path)
    facts = {"kind": "data", "path": str(path), **data.info.model_dump(mode="json")}
    facts["samples"] = []
    for name, split in facts["splits"].items():
        stream = data.split(name)
        split["bytes_on_disk"] = sum(data_path(shard.prefix).stat().st_size for shard in stream.shards)
        split["tokens_per_document"] = split["tokens"] / max(split["documents"], 1)
        split["utf8_bytes_per_token"] = split["utf8_bytes"] / max(split["tokens"], 1)
        facts["samples"] += [{"split": name, **sample} for sample in _samples(data, stream)]
    return facts, _tables(facts)


def _samples(data: DataDirectory, stream: TokenStream) -> list[dict[str, Any]]:
    number = min(_SAMPLES, stream.num_documents)
    chosen = [index * stream.num_documents // number for index in range(number)]
    samples = []
    for index in chosen:
        tokens = stream.document(index)
        text = data.tokenizer.decode(tokens[:_SAMPLE_TOKENS].tolist())
        samples.append({"document": index, "tokens": len(tokens), "text": _shorten(text)})
    return samples


def _shorten(text: str) -> str:
    """The beginning of a text on one line, control characters left out."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    line = " ".join(line.split())
    return line if len(line) <= _SAMPLE_CHARACTERS else line[:_SAMPLE_CHARACTERS] + "..."


def _tables(facts: dict[str, Any]) -> list[Table]:
    rule = facts["split_rule"]
    overview = [
        ("sources", ", ".join(facts["sources"])),
        *(
            (f"{split} sources", ", ".join(facts[f"{split}_sources"]))
            for split in ("validation", "test")
            if facts[f"{split}_sources"]
        ),
        ("split rule", ", ".join(f"{name} {value}" for name, value in rule.items() if value is not None)),
        ("documents", DocumentRules(**facts["rules"]).describe()),
        ("tokenizer", facts["tokenizer"]),
        ("tokenizer hash", facts["tokenizer_sha256"][:16]),
        ("vocabulary", f"{count(facts['vocab_size'])} ids, {count(facts['padded_vocab_size'])} with padding"),
        ("tokens stored as", facts["dtype"]),
        ("corpus hash", facts["corpus_sha256"][:16]),
        *((f"skipped: {reason}", count(number)) for reason, number in facts["skipped"].items()),
    ]
    splits = [
        (
            name,
            count(split["documents"]),
            count(split["tokens"]),
            byte_size(split["utf8_bytes"]),
            byte_size(split["bytes_on_disk"]),
            count(split["shards"]),
            f"{split['tokens_per_document']:.1f}",
            f"{split['utf8_bytes_per_token']:.2f}",
        )
        for name, split in facts["splits"].items()
    ]
    columns = ("split", "documents", "tokens", "text", "on disk", "shards", "tokens/document", "bytes/token")
    samples = [(s["split"], count(s["document"]), count(s["tokens"]), s["text"]) for s in facts["samples"]]
    return [
        Table(f"data directory: {facts['path']}", ("field", "value"), overview),
        Table("Splits", columns, splits),
        Table("Sample documents", ("split", "document", "tokens", "beginning"), samples),
    ]
