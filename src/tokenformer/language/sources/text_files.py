"""Files that are one document each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenformer.language.sources.compression import explain_damage, open_bytes
from tokenformer.language.sources.records import BrokenDocument, Document, Faults

_BINARY_PROBE = 8192


def read_text_file(path: Path, faults: Faults) -> Iterator[Document]:
    """The whole file as one document."""
    with explain_damage(path), open_bytes(path) as file:
        content = file.read()
    with faults:
        yield Document(decode(content, str(path)), str(path))


def is_binary(path: Path) -> bool:
    """Whether there is a NUL byte near the start."""
    with explain_damage(path), open_bytes(path) as file:
        return b"\0" in file.read(_BINARY_PROBE)


def decode(content: bytes, place: str, offset: int = 0) -> str:
    """UTF-8 text found at ``place``; ``offset`` is where ``content`` begins in its file.

    Raises:
        BrokenDocument: a byte that is not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BrokenDocument(
            f"{place}: not UTF-8 text: byte 0x{content[error.start]:02x} at offset {offset + error.start}; "
            "expected UTF-8 text",
            "not UTF-8",
        ) from error
