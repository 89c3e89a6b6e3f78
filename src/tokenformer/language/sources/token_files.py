"""Documents that are tokenized already: Megatron's ``.bin`` and ``.idx``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenformer.language.sources.records import Document, Faults
from tokenformer.language.store import TokenStore, data_path, index_path

INDEX_SUFFIX, DATA_SUFFIX = ".idx", ".bin"


def token_index(path: Path) -> Path | None:
    """The index of the store that ``path`` names by its index, its data or without a suffix; None where it is none."""
    if path.suffix in (INDEX_SUFFIX, DATA_SUFFIX):
        path = path.with_suffix("")
    elif path.exists():
        return None
    index = index_path(path)
    return index if index.is_file() else None


def read_token_store(index: Path, text_field: str, faults: Faults) -> Iterator[Document]:
    """The documents of a store in their order, each with its ids as they are.

    Raises:
        TokenFormerError: a file is missing, cut off or corrupt.
    """
    store = TokenStore(index.with_suffix(""))
    for number in range(store.num_documents):
        yield Document("", f"{index}: document {number + 1}", store.document(number))


def store_files(index: Path) -> list[Path]:
    """Both files of a store."""
    return [data_path(index.with_suffix("")), index]
