"""Writing the Megatron indexed format, whose layout :mod:`tokenformer.language.store` gives."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from tokenformer.errors import TokenFormerError
from tokenformer.language.store import DTYPES, HEADER, MAGIC, VERSION, data_path, index_path

_LARGEST_SEQUENCE = np.iinfo(np.int32).max
_INDEX_BLOCK = 1 << 20


class TokenStoreWriter:
    """Streams documents to ``<prefix>.bin``; the index is written when the ``with`` block ends well.

    With ``sizes``, the tokens of each document that an interrupted writer wrote, it goes on after those; what
    lies behind them in the file is cut off.

    Raises:
        TokenFormerError: ``sizes`` say more than the file holds.
    """

    def __init__(
        self, prefix: Path | str, dtype: np.dtype | type[np.integer], *, sizes: np.ndarray | None = None
    ) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next(code for code, known in DTYPES.items() if np.dtype(known) == np.dtype(dtype))
        self._sizes = array("i", np.asarray([] if sizes is None else sizes, dtype=np.int32).tobytes())
        self.num_tokens = int(np.frombuffer(self._sizes, np.int32).sum(dtype=np.int64)) if self._sizes else 0
        self._file = data_path(prefix).open("wb" if sizes is None else "r+b")
        if sizes is not None:
            self._cut_off()

    @property
    def num_documents(self) -> int:
        """Documents written."""
        return len(self._sizes)

    def add_document(self, tokens: np.ndarray) -> None:
        """Append one document, ids [t]; its end-of-document id is the caller's to include.

        Raises:
            TokenFormerError: an id that the dtype cannot hold, or a document of 2^31 tokens or more.
        """
        self.add_documents(tokens, np.array([len(tokens)]))

    def add_documents(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        """Append documents that lie end to end, ids [t], of so many tokens each [documents], which add up to t.

        Raises:
            TokenFormerError: as :meth:`add_document`.
        """
        limits = np.iinfo(self._dtype)
        if len(tokens) and not limits.min <= tokens.min() <= tokens.max() <= limits.max:
            raise TokenFormerError(
                f"{data_path(self._prefix)}: token ids from {tokens.min()} to {tokens.max()} "
                f"do not fit {self._dtype}"
            )
        if len(sizes) and sizes.max() > _LARGEST_SEQUENCE:
            raise TokenFormerError(
                f"{data_path(self._prefix)}: a document of {sizes.max()} tokens; "
                f"the format holds at most {_LARGEST_SEQUENCE} in one"
            )
        self._file.write(np.ascontiguousarray(tokens, dtype=self._dtype).data)
        self._sizes.frombytes(np.asarray(sizes, dtype=np.int32).tobytes())
        self.num_tokens += len(tokens)

    def sync(self) -> None:
        """Bring all tokens to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and write the index."""
        self._file.close()
        with index_path(self._prefix).open("wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, self._code, len(self._sizes), len(self._sizes) + 1))
            for part in self._index():
                file.write(part.tobytes())

    def abandon(self) -> None:
        """Close the file without an index."""
        self._file.close()

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _cut_off(self) -> None:
        expected = self.num_tokens * self._dtype.itemsize
        found = self._file.seek(0, os.SEEK_END)
        if found < expected:
            self._file.close()
            raise TokenFormerError(
                f"{data_path(self._prefix)}: truncated: found {found} bytes, expected {expected}"
            )
        self._file.truncate(expected)
        self._file.seek(expected)

    def _index(self) -> Iterator[np.ndarray]:
        """The three arrays of the index, in blocks."""
        sizes = np.frombuffer(self._sizes, dtype=np.int32) if self._sizes else np.empty(0, np.int32)
        yield sizes.astype("<i4", copy=False)
        start = 0
        for first in range(0, len(sizes), _INDEX_BLOCK):
            part = sizes[first : first + _INDEX_BLOCK].astype(np.int64) * self._dtype.itemsize
            ends = start + np.cumsum(part)
            yield (ends - part).astype("<i8")
            start = int(ends[-1])
        for first in range(0, len(sizes) + 1, _INDEX_BLOCK):
            yield np.arange(first, min(first + _INDEX_BLOCK, len(sizes) + 1), dtype="<i8")
