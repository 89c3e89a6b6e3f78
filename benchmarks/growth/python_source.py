"""Python source as a second domain: the packages installed beside an interpreter, split by file."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

SPLITS = ("train", "validation", "test")
_HELD_OUT = 40  # one file in so many goes to validation, and one to test


def prepare_python(source: Path, out: Path, megabytes: float, tokenizer: str) -> None:
    """Write the data directory ``out`` from the ``.py`` files under ``source``: each text once, in an order and a split
    that follow from its hash, until there are ``megabytes``."""
    from tokenformer.language.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        paths = {split: Path(folder) / f"{split}.jsonl" for split in SPLITS}
        files = {split: path.open("w", encoding="utf-8") for split, path in paths.items()}
        left = megabytes * 1e6
        for digest, text in sorted(_texts(source)):
            turn = int.from_bytes(digest[-2:], "big") % _HELD_OUT
            split = {0: "validation", 1: "test"}.get(turn, "train")
            files[split].write(json.dumps({"text": text}) + "\n")
            left -= len(text)
            if left < 0:
                break
        for file in files.values():
            file.close()
        prepare(
            [paths["train"]], out, tokenizer=tokenizer, validation=[paths["validation"]], test=[paths["test"]]
        )


def _texts(source: Path) -> Iterator[tuple[bytes, str]]:
    seen = set()
    for path in source.rglob("*.py"):
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) >= 200 and digest not in seen:
            seen.add(digest)
            yield digest, text
