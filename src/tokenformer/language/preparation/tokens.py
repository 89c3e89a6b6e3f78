"""Documents that came as ids: what is checked of them, and the little that is done with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenformer.errors import TokenFormerError
from tokenformer.language.rules import DocumentRules
from tokenformer.language.sources.records import BrokenDocument, Document, Faults
from tokenformer.language.tokenizers import TOKENIZER_FILE, Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Tokens:
    """Ids of a document [t] without the end-of-document id, and the UTF-8 bytes of the text that they stand for."""

    ids: np.ndarray
    utf8_bytes: int

    def __len__(self) -> int:
        return len(self.ids)


Body = str | Tokens
"""What a document consists of."""


def utf8_size(body: Body) -> int:
    """UTF-8 bytes of its text."""
    return len(body.encode("utf-8")) if isinstance(body, str) else body.utf8_bytes


def check_store(index: Path, tokenizer: Tokenizer | None, rules: DocumentRules) -> None:
    """Refuse, before any reading, a store whose ids cannot be taken.

    Raises:
        TokenFormerError: no tokenizer is given, or another than the ``tokenizer.json`` beside the store; or a rule
            that looks at text.
    """
    if tokenizer is None:
        raise TokenFormerError(
            f"{index}: tokenized already; name the tokenizer that made it with --tokenizer (bpe:N is trained on text)"
        )
    if rules.on_text():
        raise TokenFormerError(
            f"{index}: tokenized already, but {', '.join(rules.on_text())} looks at text; leave it out for such sources"
        )
    beside = index.parent / TOKENIZER_FILE
    if beside.is_file() and (own := load_tokenizer(beside)).sha256 != tokenizer.sha256:
        raise TokenFormerError(
            f"{index}: its tokenizer (hash {own.sha256[:16]}) is not the one given (hash {tokenizer.sha256[:16]}); "
            f"use --tokenizer {beside}"
        )


def checked(documents: Iterable[Document], tokenizer: Tokenizer | None, faults: Faults) -> Iterator[Document]:
    """The documents; those of ids without their end-of-document id.

    Raises:
        BrokenDocument: an id that the tokenizer does not have.
    """
    for document in documents:
        if document.tokens is None:
            yield document
            continue
        assert tokenizer is not None
        with faults:
            yield document._replace(tokens=_checked(document.tokens, document.name, tokenizer))


def _checked(ids: np.ndarray, name: str, tokenizer: Tokenizer) -> np.ndarray:
    wrong = np.flatnonzero((ids < 0) | (ids >= tokenizer.vocab_size))
    if len(wrong):
        raise BrokenDocument(
            f"{name}: token {wrong[0] + 1} is {ids[wrong[0]]}, expected 0 to {tokenizer.vocab_size - 1}: these are not "
            "ids of the tokenizer given; name the one that made them with --tokenizer",
            "not in the vocabulary",
        )
    return ids[:-1] if len(ids) and ids[-1] == tokenizer.eos_token_id else ids
