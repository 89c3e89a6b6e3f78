"""Sources to documents: text files, folders, JSON lines, their compressed forms, and the default corpus."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from tokenformer.errors import TokenFormerError
from tokenformer.language.standard_library import standard_library_files

DEFAULT_CORPUS = "default"
"""The name of the embedded corpus: the Python source files of the running interpreter's standard library."""

_OPENERS = {".xz": lzma.open, ".gz": gzip.open}
_BINARY_PROBE = 8192


class Document(NamedTuple):
    """A text, and where it came from: a path, or ``path:line`` in JSON lines."""

    text: str
    name: str


def check_sources(sources: Sequence[str | Path]) -> None:
    """Refuse sources that cannot be read, before any reading starts.

    Raises:
        TokenFormerError: no source at all, or one that is neither a file, a folder nor ``default``.
    """
    if not sources:
        raise TokenFormerError("sources: none given; expected text files, folders, .jsonl files or 'default'")
    for source in sources:
        if str(source) != DEFAULT_CORPUS and not Path(source).exists():
            raise TokenFormerError(
                f"{source}: no such file or folder; expected a text file, a folder, a .jsonl file "
                f"(each also as .xz or .gz) or '{DEFAULT_CORPUS}'"
            )


def read_documents(
    source: str | Path, *, text_field: str = "text", skipped: Counter[str] | None = None
) -> Iterator[Document]:
    """Stream the documents of one source, in a fixed order.

    A file is one document; a ``.jsonl`` file holds one in ``text_field`` of each line; a folder is read
    recursively in sorted order, without hidden files. Names ending in ``.xz`` or ``.gz`` are unpacked.
    ``skipped`` counts, by reason, what was left out: ``binary`` files of a folder (a NUL byte near the start)
    and ``not UTF-8`` files of the default corpus.

    Raises:
        TokenFormerError: a file that is missing, damaged or not UTF-8 (with the byte), or a line that is not
            a JSON object with ``text_field`` (with the line).
    """
    skipped = Counter() if skipped is None else skipped
    if str(source) == DEFAULT_CORPUS:
        yield from _read_standard_library(skipped)
    elif Path(source).is_dir():
        for path in _folder_files(Path(source)):
            if _is_binary(path):
                skipped["binary"] += 1
            else:
                yield from _read_file(path, text_field)
    else:
        check_sources([source])
        yield from _read_file(Path(source), text_field)


def _read_standard_library(skipped: Counter[str]) -> Iterator[Document]:
    for path, name in standard_library_files():
        with _explain_damage(path):
            content = path.read_bytes()
        try:
            yield Document(content.decode("utf-8"), name)
        except UnicodeDecodeError:
            skipped["not UTF-8"] += 1


def _folder_files(folder: Path) -> list[Path]:
    found = []
    for directory, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(directory, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _is_binary(path: Path) -> bool:
    with _explain_damage(path), _open(path) as file:
        return b"\0" in file.read(_BINARY_PROBE)


def _read_file(path: Path, text_field: str) -> Iterator[Document]:
    name = path.name.removesuffix(path.suffix) if path.suffix in _OPENERS else path.name
    if name.endswith(".jsonl"):
        yield from _read_json_lines(path, text_field)
        return
    with _explain_damage(path), _open(path) as file:
        content = file.read()
    yield Document(_decode(content, path), str(path))


def _read_json_lines(path: Path, text_field: str) -> Iterator[Document]:
    offset = 0
    with _explain_damage(path), _open(path) as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, line=number, offset=offset).removeprefix("\ufeff")
            offset += len(line)
            if text.strip():
                yield Document(_text_of_line(text, f"{path}:{number}", text_field), f"{path}:{number}")


def _text_of_line(line: str, place: str, text_field: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise TokenFormerError(f"{place}: invalid JSON at column {error.colno} ({error.msg})") from error
    except RecursionError as error:
        raise TokenFormerError(f"{place}: JSON nested too deeply") from error
    if not isinstance(record, dict):
        raise TokenFormerError(
            f"{place}: found a JSON {type(record).__name__}, expected an object with the field '{text_field}'"
        )
    if text_field not in record:
        raise TokenFormerError(f"{place}: no field '{text_field}'; found {', '.join(record) or 'none'}")
    text = record[text_field]
    if not isinstance(text, str):
        raise TokenFormerError(f"{place}: field '{text_field}' is a {type(text).__name__}, expected a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is no character
        raise TokenFormerError(
            f"{place}: field '{text_field}' holds half a surrogate pair at character {error.start}; "
            "expected Unicode text"
        ) from error
    return text


def _decode(content: bytes, path: Path, *, line: int | None = None, offset: int = 0) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"{path}:{line}" if line else str(path)
        raise TokenFormerError(
            f"{place}: not UTF-8 text: byte 0x{content[error.start]:02x} at offset {offset + error.start}; "
            "expected UTF-8 text"
        ) from error


def _open(path: Path) -> IO[bytes]:
    opener = _OPENERS.get(path.suffix, open)
    return opener(path, "rb")  # type: ignore[operator]


@contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise TokenFormerError(f"{path}: damaged or not a {path.suffix} file ({error})") from error
    except OSError as error:
        raise TokenFormerError(f"{path}: cannot be read ({error.strerror or error})") from error
