"""Outputs that appear under their final name only when complete, and readers that explain what is wrong."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tokenformer.errors import TokenFormerError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


def require_free(path: Path | str) -> Path:
    """Refuse a path that already holds something, or that cannot be made.

    Raises:
        TokenFormerError: ``path`` is a file or a directory that is not empty, or lies where nothing can be written.
    """
    path = Path(path)
    if path.name in ("", ".."):
        raise TokenFormerError(f"{path}: expected the name of an output, which is then made")
    _require_writable(path)
    try:
        if path.is_dir() and not any(path.iterdir()):
            return path
    except OSError as error:
        raise TokenFormerError(f"{path}: cannot be read ({error.strerror})") from error
    if path.exists() or path.is_symlink():
        what = "a directory with content" if path.is_dir() else "a file"
        raise TokenFormerError(f"{path}: {what} is already there; name another output or remove it first")
    return path


def _require_writable(path: Path) -> None:
    """Refuse an output below a file or in a directory that takes none, before hours of work go into it."""
    for place in path.absolute().parents:
        if place.is_dir():
            if not os.access(place, os.W_OK):
                raise TokenFormerError(f"{path}: could not be written ({place} is not writable)")
            return
        if place.exists():
            raise TokenFormerError(f"{path}: could not be written ({place} is not a directory)")


@contextmanager
def new_directory(path: Path | str, *, replace: bool = False) -> Iterator[Path]:
    """Yield a scratch directory that becomes ``path`` when the block ends without an error.

    The scratch directory lies beside ``path``, so that the final step is one rename. With ``replace`` an
    existing ``path`` is exchanged; it stays whole until the new content is complete.

    Raises:
        TokenFormerError: ``path`` holds something and ``replace`` is false, or the disk refuses.
    """
    path = Path(path)
    if not replace:
        require_free(path)
    scratch = path.with_name(f".{path.name}.incomplete-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        put_in_place(scratch, path)
    except TokenFormerError as error:
        if str(scratch) not in str(error):
            raise
        raise TokenFormerError(str(error).replace(str(scratch), str(path))) from error
    except OSError as error:
        raise TokenFormerError(f"{path}: could not be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def put_in_place(scratch: Path, path: Path) -> None:
    """Make the directory ``scratch`` become ``path``, beside it, once all of it is on the disk.

    What ``path`` holds is exchanged; it stays whole until then.

    Raises:
        OSError: the disk refuses.
    """
    for file in scratch.rglob("*"):
        if file.is_file():
            sync(file)
    if path.is_dir() and any(path.iterdir()):
        if _exchange(scratch, path):
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            _replace(scratch, path)
    else:
        if path.is_dir():
            path.rmdir()
        scratch.rename(path)
    sync(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; false where the system cannot."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux
        return False
    return bool(swap(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _replace(scratch: Path, path: Path) -> None:
    """The same in two steps; :func:`restore_replaced` puts right what a crash between them leaves."""
    old = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    path.rename(old)
    try:
        scratch.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def restore_replaced(path: Path | str) -> None:
    """Put back what stood at ``path`` if a crash came between taking it away and putting the new content there, and
    remove the scratch directories that crashes left beside it; nothing may be writing meanwhile."""
    path = Path(path)
    former = sorted(path.parent.glob(f".{path.name}.replaced-*"))
    if former and not path.exists():
        former.pop().rename(path)
    for remains in [*former, *path.parent.glob(f".{path.name}.incomplete-*")]:
        shutil.rmtree(remains, ignore_errors=True)


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` (UTF-8) so that readers see the old content or the new, never a part.

    Raises:
        TokenFormerError: the disk refuses.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.incomplete-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise TokenFormerError(f"{path}: could not be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON, complete or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_text(path: Path | str, what: str) -> str:
    """Read a UTF-8 file; ``what`` says in an error message what the file was expected to be.

    Raises:
        TokenFormerError: the file is missing, unreadable or not UTF-8.
    """
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise TokenFormerError(f"{path}: no such file; expected {what}") from error
    except UnicodeDecodeError as error:
        raise TokenFormerError(f"{path}: not UTF-8 text at byte {error.start}; expected {what}") from error
    except OSError as error:
        raise TokenFormerError(f"{path}: cannot be read ({error.strerror}); expected {what}") from error


def read_json(path: Path | str, what: str) -> dict[str, Any]:
    """Read a JSON object; errors as in :func:`read_text`, and for invalid JSON with line and column."""
    text = read_text(path, what)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise TokenFormerError(
            f"{path}: invalid JSON at line {error.lineno}, column {error.colno} ({error.msg}); expected {what}"
        ) from error
    if not isinstance(value, dict):
        raise TokenFormerError(f"{path}: found a JSON {type(value).__name__}, expected an object: {what}")
    return value


def sha256(path: Path | str) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
