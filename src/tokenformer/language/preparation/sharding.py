"""The token stores of one split, in shards, with what is needed to go on after an interruption."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from pydantic import Field

from tokenformer.errors import TokenFormerError
from tokenformer.files import sync
from tokenformer.language.data_directory import Count
from tokenformer.language.store import data_path, index_path, shard_prefixes
from tokenformer.language.store_writer import TokenStoreWriter
from tokenformer.validation import StrictModel


class Written(StrictModel):
    """What a split holds: documents and tokens in all, and how many documents are in each shard."""

    documents: Count = 0
    tokens: Count = 0
    shard_documents: list[Count] = Field(default_factory=lambda: [0])


class ShardedWriter:
    """Appends documents to ``<split>-00000``, ``<split>-00001``, ... in ``directory``.

    A shard holds at most ``shard_tokens`` tokens, or a single longer document. The token counts of its documents
    are kept in ``<split>-00000.sizes`` in ``notes`` for a writer that goes on from ``written``.
    """

    def __init__(
        self,
        directory: Path,
        notes: Path,
        split: str,
        dtype: np.dtype,
        shard_tokens: int,
        written: Written | None = None,
    ) -> None:
        self.split = split
        self._directory, self._notes = directory, notes
        self._dtype, self._shard_tokens = dtype, shard_tokens
        self._pending: list[np.ndarray] = []
        if written is None:
            self._shard_documents: list[int] = []
            self._documents = self._tokens = 0
            self._open_shard(None)
        else:
            self._shard_documents = list(written.shard_documents[:-1])
            self._documents, self._tokens = written.documents, written.tokens
            self._open_shard(self._read_sizes(written.shard_documents[-1]))

    def append(self, tokens: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> None:
        """Append pieces that lie end to end [t], their lengths [pieces], and which of them end a document.

        Pieces of a document that did not end wait for those of the next call.
        """
        bounds = np.cumsum(lengths, dtype=np.int64)
        last = np.flatnonzero(ends)
        stops = bounds[last]  # of the documents that end here
        if not len(stops):
            self._pending.append(tokens)
            return
        sizes = np.diff(stops, prepend=0)
        done = 0
        if self._pending:
            first = np.concatenate([*self._pending, tokens[: stops[0]]])
            self._pending = []
            self._add(first, np.array([len(first)]))
            done, sizes = int(stops[0]), sizes[1:]
        self._add(tokens[done : stops[-1]], sizes)
        if stops[-1] < len(tokens):
            self._pending.append(tokens[stops[-1] :])

    def sync(self) -> Written:
        """Bring all documents to the disk, and say what there is; none may be incomplete."""
        assert not self._pending
        self._sync_files()
        return self.written()

    def written(self) -> Written:
        """What is written, on the disk or on its way there."""
        shards = [*self._shard_documents, self._writer.num_documents]
        return Written(documents=self._documents, tokens=self._tokens, shard_documents=shards)

    def close(self) -> None:
        """Write the index of the last shard; all is on the disk then."""
        self._sync_files()
        self._writer.close()
        self._sizes.close()
        sync(index_path(self._directory / self._name()))

    def abandon(self) -> None:
        """Close the files as they are."""
        self._writer.abandon()
        self._sizes.close()

    def _add(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        stops = np.cumsum(sizes, dtype=np.int64)
        begin = first = 0
        while first < len(sizes):
            room = self._shard_tokens - self._writer.num_tokens
            count = int(np.searchsorted(stops, begin + room, side="right")) - first
            if count == 0 and self._writer.num_documents == 0:
                count = 1
            if count:
                end = int(stops[first + count - 1])
                self._write(tokens[begin:end], sizes[first : first + count])
                begin, first = end, first + count
            if first < len(sizes):
                self._next_shard()

    def _write(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        self._writer.add_documents(tokens, sizes)
        self._sizes.write(np.asarray(sizes, dtype="<i4").tobytes())
        self._documents += len(sizes)
        self._tokens += len(tokens)

    def _next_shard(self) -> None:
        self.close()
        self._shard_documents.append(self._writer.num_documents)
        self._open_shard(None)

    def _sync_files(self) -> None:
        self._writer.sync()
        self._sizes.flush()
        os.fsync(self._sizes.fileno())

    def _name(self) -> str:
        return f"{self.split}-{len(self._shard_documents):05d}"

    def _sizes_path(self) -> Path:
        return self._notes / f"{self._name()}.sizes"

    def _open_shard(self, sizes: np.ndarray | None) -> None:
        self._writer = TokenStoreWriter(self._directory / self._name(), self._dtype, sizes=sizes)
        self._sizes = self._sizes_path().open("wb" if sizes is None else "r+b")
        if sizes is not None:
            self._sizes.truncate(4 * len(sizes))
            self._sizes.seek(0, os.SEEK_END)

    def _read_sizes(self, documents: int) -> np.ndarray:
        with self._sizes_path().open("rb") as file:
            sizes = np.frombuffer(file.read(4 * documents), dtype="<i4")
        if len(sizes) < documents:
            raise TokenFormerError(
                f"{self._sizes_path()}: truncated: found {len(sizes)} sizes, expected {documents}"
            )
        return sizes


def name_shards(directory: Path, split: str, shards: int) -> None:
    """Give the shards of a split their final names; those that have them already are left."""
    for number, prefix in enumerate(shard_prefixes(directory, split, shards)):
        for path_of in (data_path, index_path):
            made = path_of(directory / f"{split}-{number:05d}")
            if made.exists():
                made.rename(path_of(prefix))
