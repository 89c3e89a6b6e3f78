"""Training batches: windows in a pure order, read ahead by a thread or by worker processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenformer.errors import DataError
from tokenformer.language.sample_order import SampleOrder
from tokenformer.language.windows import IGNORED, PADDING_DOCUMENT, WindowSource

# grain warns on import where JAX is not installed, which it does not need here
_level = logging.root.manager.disable
logging.disable(logging.WARNING)
import grain  # noqa: E402

logging.disable(_level)

_PREFETCHED_BATCHES = 4
_ENDLESS = 2**62
_MOST_RESTARTS = 3


class TokenBatch(NamedTuple):
    """``inputs``, ``targets`` and, of packed documents, ``documents`` [b, T] int64; ``retries``: reads that had to be
    tried again for it."""

    inputs: np.ndarray
    targets: np.ndarray
    documents: np.ndarray | None
    retries: int


class TrainingSamples:
    """An endless shuffled sequence of windows from one source or a weighted mixture of several.

    Sample i is a pure function of (seed, data, T, weights, i) for every i >= 0; see
    :class:`~tokenformer.language.sample_order.SampleOrder`. ``restarts`` counts how often worker processes had
    to be started anew.

    Raises:
        TokenFormerError: the seed is out of range, or a source has too many windows.
    """

    def __init__(self, sources: Sequence[WindowSource], weights: Sequence[float], seed: int) -> None:
        self._sources = tuple(sources)
        self._order = SampleOrder([len(source) for source in sources], weights, seed)
        self._has_documents = any(source.has_documents for source in sources)
        self.sequence_length = sources[0].sequence_length
        self.restarts = 0

    def read(self, samples: range) -> TokenBatch:
        """The samples as one batch; where there are none, one row without targets.

        Raises:
            DataError: a file cannot be read any more.
        """
        shape = (max(len(samples), 1), self.sequence_length)
        inputs, targets = np.empty(shape, np.int64), np.empty(shape, np.int64)
        documents = np.empty(shape, np.int64) if self._has_documents else None
        if not samples:
            inputs[:], targets[:] = 0, IGNORED
            if documents is not None:
                documents[:] = PADDING_DOCUMENT
        before = self._retries()
        for row, sample in enumerate(samples):
            source, window = self._order[sample]
            self._sources[source].read(
                window, inputs[row], targets[row], None if documents is None else documents[row]
            )
        return TokenBatch(inputs, targets, documents, self._retries() - before)

    def batches(
        self, micro_batches: Callable[[int], range], *, workers: int = 0
    ) -> Generator[TokenBatch, None, None]:
        """Endless batches: number k holds the samples ``micro_batches(k)``.

        They are read ahead by a thread, or by ``workers`` processes, which end when the iterator is closed or dropped.
        Processes that die are started anew where the batches go on.

        Raises:
            DataError: a file cannot be read any more, or workers died several times in a row.
        """
        k = failures = 0
        while True:
            iterator = self._read_ahead(micro_batches, k, workers)
            try:
                while True:
                    try:
                        batch = next(iterator)
                    except RuntimeError as error:  # grain's word for a worker that died
                        failures += 1
                        self._require_workers(workers, failures, error)
                        break
                    yield TokenBatch(**batch)
                    k, failures = k + 1, 0
            finally:
                iterator.close()

    def _read_ahead(self, micro_batches: Callable[[int], range], first: int, workers: int) -> Any:
        dataset = grain.MapDataset.source(_Batches(self, micro_batches, first)).to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
        )
        if workers:
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_PREFETCHED_BATCHES)
            )
        return iter(dataset)

    def _require_workers(self, workers: int, failures: int, error: RuntimeError) -> None:
        if not workers:
            raise error
        if failures > _MOST_RESTARTS:
            raise DataError(
                f"data.num_workers: the {workers} processes that read the data died {failures} times in a row "
                f"({error}); is there enough memory?"
            ) from error
        self.restarts += 1

    def _retries(self) -> int:
        return sum(source.stream.retries for source in self._sources)


class _Batches:
    """The batches from number ``first`` on, as grain reads them."""

    def __init__(self, samples: TrainingSamples, micro_batches: Callable[[int], range], first: int) -> None:
        self._samples = samples
        self._micro_batches = micro_batches
        self._first = first

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, k: int) -> dict[str, Any]:
        return self._samples.read(self._micro_batches(self._first + int(k)))._asdict()
