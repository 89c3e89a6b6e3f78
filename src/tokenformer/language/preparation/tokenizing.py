"""The main pass: documents to tokens on the disk, from wherever an earlier run stopped."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import IO

import numpy as np

from tokenformer.errors import TokenFormerError
from tokenformer.language.pieces import pieces
from tokenformer.language.preparation.blocks import Block, State, make_blocks, whole
from tokenformer.language.preparation.corpus import Corpus, Position, Reading
from tokenformer.language.preparation.encoding import Encoded, Encoder
from tokenformer.language.preparation.engines import Engine
from tokenformer.language.preparation.sharding import ShardedWriter
from tokenformer.language.preparation.tokens import Body
from tokenformer.language.preparation.work import Progress, WorkDirectory
from tokenformer.language.store import token_dtype
from tokenformer.language.tokenizers import Tokenizer

COMMIT_SECONDS = 2.0
"""Between two records of progress, since bringing files to the disk takes time."""

_DIGEST_BYTES = 32


class Tokenizing:
    """Appends the tokens of a corpus, block by block, to the stores of its splits in a work directory."""

    def __init__(
        self,
        corpus: Corpus,
        work: WorkDirectory,
        progress: Progress,
        tokenizer: Tokenizer,
        splits: Sequence[str],
        shard_tokens: int,
    ) -> None:
        self._corpus, self._work, self._progress = corpus, work, progress
        self._tokenizer, self._splits, self._shard_tokens = tokenizer, splits, shard_tokens
        self._dtype = token_dtype(tokenizer.padded_vocab_size)

    def run(self, engine: Engine, on_progress: Callable[[Progress], None]) -> Progress:
        """Do what is left; ``on_progress`` hears of each block. The result is recorded and ``sealed``."""
        progress = self._progress
        with ExitStack() as stack:
            digests = stack.enter_context(self._open_digests())
            writers = {split: self._writer(split) for split in self._splits}
            for writer in writers.values():
                stack.callback(writer.abandon)
            reading = Reading(
                self._corpus, Position(*progress.position), progress.skipped, self._known_digests()
            )
            committed = time.monotonic()
            encoder = Encoder.of(self._tokenizer, self._dtype)
            for block, encoded in engine.map_ordered(encoder, self._items(reading)):
                _append(writers, block, encoded)
                digests.write(block.digests)
                progress = _advance(progress, block)
                if block.state is not None and time.monotonic() - committed >= COMMIT_SECONDS:
                    progress = self._commit(progress, writers, digests)
                    committed = time.monotonic()
                on_progress(progress)
            at_end = {"position": tuple(reading.position), "skipped": dict(reading.skipped)}
            progress = progress.model_copy(update=at_end)
            progress = self._commit(progress, writers, digests)
            for writer in writers.values():
                writer.close()
        progress = progress.model_copy(update={"sealed": True})
        self._work.record(progress)
        return progress

    def corpus_sha256(self) -> str:
        """SHA-256 of the digests of all documents, in their order."""
        with self._work.digests.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _items(self, reading: Reading) -> Iterator[tuple[Block, tuple[list[Body], list[bool]]]]:
        done = sum(self._progress.utf8_bytes.values())
        cut = pieces if self._tokenizer.works_in_pieces else whole
        for block in make_blocks(reading, done, self._progress.rule, cut):
            yield block.without_bodies(), (block.bodies, block.ends)

    def _writer(self, split: str) -> ShardedWriter:
        return ShardedWriter(
            self._work.data,
            self._work.notes,
            split,
            self._dtype,
            self._shard_tokens,
            self._progress.splits.get(split),
        )

    def _open_digests(self) -> IO[bytes]:
        path, size = self._work.digests, self._progress.documents * _DIGEST_BYTES
        file = path.open("r+b" if path.exists() else "w+b")
        if file.seek(0, os.SEEK_END) < size:
            file.close()
            raise TokenFormerError(f"{path}: truncated, expected {size} bytes; remove {self._work.path}")
        file.truncate(size)
        file.seek(size)
        return file

    def _known_digests(self) -> Iterator[bytes]:
        with self._work.digests.open("rb") as file:
            while digest := file.read(_DIGEST_BYTES):
                yield digest

    def _commit(self, progress: Progress, writers: dict[str, ShardedWriter], digests: IO[bytes]) -> Progress:
        digests.flush()
        os.fsync(digests.fileno())
        written = {split: writer.sync() for split, writer in writers.items()}
        progress = progress.model_copy(update={"splits": written})
        self._work.record(progress)
        return progress


def _append(writers: dict[str, ShardedWriter], block: Block, encoded: Encoded) -> None:
    bounds = np.concatenate(([0], np.cumsum(encoded.lengths, dtype=np.int64)))
    ends = np.array(block.ends)
    first = 0
    for split, count in Counter(block.splits).items():  # in their order: the block is sorted by split
        last = first + count
        tokens = encoded.tokens[bounds[first] : bounds[last]]
        writers[split].append(tokens, encoded.lengths[first:last], ends[first:last])
        first = last


def _advance(progress: Progress, block: Block) -> Progress:
    utf8_bytes = Counter(progress.utf8_bytes)
    utf8_bytes.update(block.split_bytes)
    found = {
        "blocks": progress.blocks + 1,
        "documents": progress.documents + len(block.digests) // _DIGEST_BYTES,
        "utf8_bytes": dict(utf8_bytes),
    }
    return progress.model_copy(update=found | _place(block.state))


def _place(state: State | None) -> dict[str, object]:
    return {} if state is None else {"position": tuple(state.position), "skipped": state.skipped}
