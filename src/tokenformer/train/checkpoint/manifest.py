"""The manifest of a checkpoint: size and SHA-256 of each of its files, written last. No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tokenformer.errors import TokenFormerError
from tokenformer.files import read_json, sha256, write_json
from tokenformer.validation import StrictModel, validate

MANIFEST_FILE = "manifest.json"

_THREADS = 8  # hashing leaves Python's lock, and disks answer several readers faster than one


class DamagedCheckpointError(TokenFormerError):
    """A checkpoint is not as it was written; the message names its first wrong file."""


class FileRecord(StrictModel):
    """Size in bytes and hex SHA-256 of a file."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class Manifest(StrictModel):
    """``files``: by path relative to the checkpoint, with forward slashes."""

    format_version: Literal[1] = 1
    files: dict[str, FileRecord]


def describe_files(directory: Path, files: Iterable[Path]) -> dict[str, FileRecord]:
    """Records of ``files``, which lie in ``directory``, by relative path."""
    paths = sorted(files)
    with ThreadPoolExecutor(_threads(len(paths))) as pool:
        records = pool.map(_record, paths)
        return {
            path.relative_to(directory).as_posix(): record
            for path, record in zip(paths, records, strict=True)
        }


def write_manifest(directory: Path, records: Mapping[str, FileRecord]) -> None:
    """Write ``manifest.json``: nothing may be written to ``directory`` after it."""
    manifest = Manifest(files=dict(sorted(records.items())))
    write_json(directory / MANIFEST_FILE, manifest.model_dump(mode="json"))


def require_whole(directory: Path | str) -> None:
    """Compare every file of a checkpoint with its manifest; reads all of them.

    Raises:
        DamagedCheckpointError: names the first file that is missing, cut short, changed, of another checkpoint or
            not listed, with what was found and expected.
    """
    directory = Path(directory)
    try:
        place = directory / MANIFEST_FILE
        manifest = validate(Manifest, read_json(place, "the manifest of a checkpoint"), source=str(place))
        expected = manifest.files
        found = {
            path.relative_to(directory).as_posix(): path
            for path in directory.rglob("*")
            if path.is_file() and path != place
        }
        for name in sorted(expected.keys() | found.keys()):
            _require_size(directory / name, found.get(name), expected.get(name))
        with ThreadPoolExecutor(_threads(len(found))) as pool:
            hashes = dict(zip(found, pool.map(sha256, found.values()), strict=True))
    except OSError as error:
        raise DamagedCheckpointError(
            f"{error.filename}: cannot be read ({error.strerror or error})"
        ) from error
    except TokenFormerError as error:
        raise DamagedCheckpointError(str(error)) from error
    for name, value in hashes.items():
        if value != expected[name].sha256:
            raise DamagedCheckpointError(
                f"{directory / name}: changed since it was written: found SHA-256 {value[:16]}..., expected "
                f"{expected[name].sha256[:16]}... by {MANIFEST_FILE}"
            )


def _require_size(path: Path, found: Path | None, expected: FileRecord | None) -> None:
    if expected is None:
        raise DamagedCheckpointError(
            f"{path}: does not belong to this checkpoint, {MANIFEST_FILE} does not list it"
        )
    if found is None:
        raise DamagedCheckpointError(f"{path}: missing; {MANIFEST_FILE} lists it with {expected.bytes} bytes")
    size = found.stat().st_size
    if size != expected.bytes:
        raise DamagedCheckpointError(
            f"{path}: found {size} bytes, expected {expected.bytes} by {MANIFEST_FILE}"
        )


def _record(path: Path) -> FileRecord:
    return FileRecord(bytes=path.stat().st_size, sha256=sha256(path))


def _threads(files: int) -> int:
    return max(1, min(files, _THREADS, os.cpu_count() or 1))
