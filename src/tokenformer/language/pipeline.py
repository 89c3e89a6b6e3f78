"""Token streams to windows: shuffled without end for training, each target once for validation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from typing import NamedTuple

import numpy as np

from tokenformer.errors import TokenFormerError
from tokenformer.language.token_stream import TokenStream

# grain warns on import where JAX is not installed, which it does not need here
_level = logging.root.manager.disable
logging.disable(logging.WARNING)
import grain  # noqa: E402

logging.disable(_level)

IGNORED = -100
"""Target that no loss counts: the padding of the last validation window."""

_LARGEST_SEED = 2**32 - 1
_LARGEST_EPOCH = 2**32 - 1
_PREFETCHED_BATCHES = 4
_ENDLESS = 2**62


class TrainingWindows:
    """Windows of T + 1 tokens, one every T tokens of the stream, in a shuffled order that never ends.

    Sample i is a pure function of (seed, data, T, i) for every i >= 0. The samples of an epoch,
    ``windows_per_epoch`` from a multiple of it on, hold every window once; each epoch has its own order.

    Raises:
        TokenFormerError: the store is shorter than one window, or the seed is out of range.
    """

    def __init__(self, store: TokenStream, sequence_length: int, seed: int) -> None:
        if store.num_tokens < sequence_length + 1:
            raise TokenFormerError(
                f"{store.prefix}: holds {store.num_tokens} tokens, expected at least {sequence_length + 1} "
                f"(sequence_length {sequence_length} + 1)"
            )
        if not 0 <= seed <= _LARGEST_SEED:
            raise TokenFormerError(f"seed: found {seed}, expected a whole number from 0 to {_LARGEST_SEED}")
        self.sequence_length = sequence_length
        source = _Windows(store, sequence_length)
        self.windows_per_epoch = len(source)
        if self.windows_per_epoch > _LARGEST_EPOCH:
            raise TokenFormerError(
                f"{store.prefix}: {self.windows_per_epoch} windows of {sequence_length} tokens, "
                f"expected at most {_LARGEST_EPOCH}; use a larger sequence_length"
            )
        self._samples = grain.MapDataset.source(source).seed(seed).shuffle().repeat()

    def __getitem__(self, i: int) -> np.ndarray:
        """Sample ``i``: ids [T + 1] int64."""
        if i < 0:
            raise IndexError(f"sample {i}; samples count from 0")
        window: np.ndarray = self._samples[i]
        return window

    def batches(self, micro_batches: Callable[[int], range]) -> Generator[np.ndarray, None, None]:
        """Endless batches [b, T + 1] int64: number k holds the samples ``micro_batches(k)``, and none of them where
        that is empty. They are read ahead in a background thread, which ends when the iterator is closed or
        dropped."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
        batches = grain.MapDataset.source(_Batches(self, micro_batches))
        iterator = iter(batches.to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()


class _Batches:
    """Batch k: the samples ``micro_batches(k)`` [b, T + 1]."""

    def __init__(self, windows: TrainingWindows, micro_batches: Callable[[int], range]) -> None:
        self._windows = windows
        self._micro_batches = micro_batches

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, k: int) -> np.ndarray:
        samples = [self._windows[i] for i in self._micro_batches(k)]
        return np.stack(samples) if samples else np.empty((0, self._windows.sequence_length + 1), np.int64)


class _Windows:
    """Window w: ids [T + 1] int64 from token w T on."""

    def __init__(self, store: TokenStream, sequence_length: int) -> None:
        self._store = store
        self._length = sequence_length

    def __len__(self) -> int:
        return (self._store.num_tokens - 1) // self._length

    def __getitem__(self, index: int) -> np.ndarray:
        start = int(index) * self._length
        return self._store.tokens(start, start + self._length + 1).astype(np.int64)


class Window(NamedTuple):
    """``inputs`` [T] int64, and ``targets`` [T] int64: the token after each, or ``IGNORED``."""

    inputs: np.ndarray
    targets: np.ndarray


class ValidationWindows:
    """Windows that hold every token of a stream but the first exactly once as a target, in order.

    The last one is filled up: its inputs with the id 0, its targets with ``IGNORED``. ``max_targets`` ends
    the stream after so many targets; ``num_targets`` says how many there are.

    Raises:
        TokenFormerError: the store holds fewer than two tokens, or ``max_targets`` is below 1.
    """

    def __init__(self, store: TokenStream, sequence_length: int, max_targets: int | None = None) -> None:
        if store.num_tokens < 2:
            raise TokenFormerError(f"{store.prefix}: holds {store.num_tokens} tokens, expected at least 2")
        if max_targets is not None and max_targets < 1:
            raise TokenFormerError(f"max_tokens: found {max_targets}, expected at least 1")
        available = store.num_tokens - 1
        self.num_targets = available if max_targets is None else min(max_targets, available)
        self._store = store
        self._length = sequence_length

    def __len__(self) -> int:
        return -(-self.num_targets // self._length)

    def empty(self) -> Window:
        """A window without targets."""
        return Window(np.zeros(self._length, np.int64), np.full(self._length, IGNORED, np.int64))

    def __getitem__(self, index: int) -> Window:
        """Window ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self._length
        stop = min(start + self._length, self.num_targets)
        tokens = self._store.tokens(start, stop + 1).astype(np.int64)
        window = self.empty()
        window.inputs[: stop - start] = tokens[:-1]
        window.targets[: stop - start] = tokens[1:]
        return window
