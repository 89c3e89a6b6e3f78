"""Files as they are or packed (.gz, .xz, .bz2, .zst, .zip of one file), read as a stream of bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from tokenformer.errors import TokenFormerError
from tokenformer.language.sources.records import import_extra

_BLOCK = 1 << 17
_LARGEST_WINDOW = 1 << 31  # what 'zstd --ultra --long=31' writes


def plain_name(path: Path) -> str:
    """The file's name without the suffix of its compression."""
    return path.name.removesuffix(path.suffix) if path.suffix in _OPENERS else path.name


def open_bytes(path: Path) -> IO[bytes]:
    """Open for reading, unpacked by suffix.

    Raises:
        TokenFormerError: a .zst file without the package ``zstandard``; a .zip of several files, or encrypted.
    """
    opener = _OPENERS.get(path.suffix)
    return cast(IO[bytes], opener(path)) if opener else path.open("rb")


@contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Turn what reading ``path`` may raise into an error that names it."""
    try:
        yield
    except (lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise TokenFormerError(f"{path}: damaged or not a {path.suffix} file ({error})") from error
    except OSError as error:
        if error.errno is None:  # not from the system: what bz2 and pyarrow raise for wrong content
            raise TokenFormerError(f"{path}: damaged or not a {path.suffix} file ({error})") from error
        raise TokenFormerError(f"{path}: cannot be read ({error.strerror or error})") from error


class _ZstandardReader(io.RawIOBase):
    """Frames one after another, as ``pzstd`` and ``cat`` make them.

    The package's own reader takes a file that is cut off for one that ends; this one raises EOFError.
    """

    def __init__(self, path: Path, zstandard: Any) -> None:
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame = self._decompressor.decompressobj()
        self._inside = True  # an empty file is no .zst file
        self._waiting = b""
        self._file = path.open("rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        while not self._waiting:
            packed = (not self._inside and self._frame.unused_data) or self._file.read(_BLOCK)
            if not packed:
                if self._inside:
                    raise EOFError("it ends inside a frame")
                return 0
            self._waiting = self._unpack(packed)
        count = min(len(view), len(self._waiting))
        view[:count] = self._waiting[:count]
        self._waiting = self._waiting[count:]
        return count

    def _unpack(self, packed: bytes) -> bytes:
        if not self._inside:
            self._frame = self._decompressor.decompressobj()
        try:
            content = self._frame.decompress(packed)
        except self._error as error:
            raise EOFError(str(error)) from error
        self._inside = not self._frame.eof
        return cast(bytes, content)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_zstandard(path: Path) -> IO[bytes]:
    zstandard = import_extra("zstandard", str(path))
    return io.BufferedReader(_ZstandardReader(path, zstandard), _BLOCK)


class _ZipReader(io.BufferedReader):
    """The one file in an archive; its checksum is verified at its end."""

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path)
        members = [member for member in self._archive.infolist() if not member.is_dir()]
        if len(members) != 1 or members[0].flag_bits & 1:
            found = f"{len(members)} files" if len(members) != 1 else "an encrypted file"
            self._archive.close()
            raise TokenFormerError(f"{path}: an archive of {found}, expected one file; unpack it first")
        super().__init__(self._archive.open(members[0]), _BLOCK)  # type: ignore[arg-type]

    def close(self) -> None:
        super().close()
        self._archive.close()


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".xz": lzma.open,
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".zst": _open_zstandard,
    ".zip": _ZipReader,
}
