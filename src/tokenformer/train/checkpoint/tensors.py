"""Named tensors in torch.distributed.checkpoint's format: written by one process or by all ranks of a run together,
read by any number of processes in any layout.

A DTensor is stored as the whole logical tensor, each rank writing the part it holds; a plain tensor that several ranks
hold is written by one of them.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.serialization import get_crc32_options, set_crc32_options

from tokenformer.errors import TokenFormerError
from tokenformer.train.checkpoint.manifest import FileRecord
from tokenformer.train.checkpoint.ranks import Ranks

Shapes = dict[str, tuple[int, ...]]

_BYTES_OF_A_FILE, _FILES = 256 << 20, 8
METADATA_FILE = ".metadata"


class WritePlan(NamedTuple):
    """Who writes what: ``mine`` is this rank's part, ``metadata`` that of the whole (both pickled: they go to other
    processes as they are)."""

    mine: bytes
    metadata: bytes


class WrittenShare(NamedTuple):
    """What a rank has written: the ``records`` of its files by name, and where each tensor lies (pickled)."""

    records: dict[str, FileRecord]
    places: bytes


def plan_writes(tensors: Mapping[str, Tensor], ranks: Ranks) -> WritePlan:
    """Share the writing of ``tensors`` among ``ranks``, which all call this: a DTensor's parts are written by those
    that hold them, a plain tensor by one rank. Only names, shapes and layouts count, so a plan serves again while
    these stay."""
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner({name: tensor.detach() for name, tensor in tensors.items()})
    plans, metadata = planner.create_global_plan(ranks.each(planner.create_local_plan))
    plans = dcp.FileSystemWriter("").prepare_global_plan(plans)
    return WritePlan(pickle.dumps(plans[ranks.rank]), pickle.dumps(metadata))


def write_share(directory: Path, plan: bytes, local: Mapping[str, Tensor]) -> WrittenShare:
    """Write this rank's part of a :class:`WritePlan` to ``directory``, which is there; some files side by side.

    Args:
        directory: where all ranks write.
        plan: of this rank.
        local: what each tensor holds on this rank.

    Raises:
        OSError: the disk refuses.
    """
    share: SavePlan = pickle.loads(plan)  # noqa: S301 our own
    size = sum(item.tensor_storage_size() or 0 for item in share.items)
    files = max(1, min(_FILES, size // _BYTES_OF_A_FILE))
    # copy_ahead 0: the tensors are on the CPU or copied one by one; no stream of the device is waited for
    writer = dcp.FileSystemWriter(directory, thread_count=files, per_thread_copy_ahead=0)
    writer.fs = disk = _HashingFileSystem()
    with _without_crc32():
        results = writer.write_data(share, _LocalParts(local)).value()
    if disk.failures:  # of whichever thread
        raise disk.failures[0]
    results.sort(key=lambda result: (result.storage_data.relative_path, result.storage_data.offset))
    return WrittenShare(disk.records, pickle.dumps(results))


def write_metadata(directory: Path, metadata: bytes, places: list[bytes]) -> FileRecord:
    """Write where everything lies, when all shares are written: ``metadata`` of the plan, ``places`` of each rank.

    Raises:
        OSError: the disk refuses.
    """
    writer = _MetadataWriter(directory)
    writer.fs = disk = _HashingFileSystem()
    writer.finish(pickle.loads(metadata), [pickle.loads(share) for share in places])  # noqa: S301 our own
    if disk.failures:
        raise disk.failures[0]
    (record,) = disk.records.values()
    return record


class _LocalParts(dcp.DefaultSavePlanner):
    """Finds the tensors of a plan among the local parts."""

    def __init__(self, local: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._local = local

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._local[index.fqn]


class _MetadataWriter(dcp.FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # the same for the same tensors: neither a random id nor the path of the moment


class _HashingFileSystem(FileSystem):
    """Hashes what is written, while it is, and keeps the errors, which dcp loses outside of its first thread."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}
        self.failures: list[Exception] = []

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        try:
            file = open(path, mode)  # noqa: PTH123, SIM115
        except OSError as error:
            self.failures.append(error)
            raise
        try:
            with file:
                hashing = _HashingFile(cast(io.BufferedWriter, file))
                yield cast(io.IOBase, hashing)
            self.records[Path(path).name] = FileRecord(bytes=hashing.size, sha256=hashing.sha256.hexdigest())
        except Exception as error:  # in a thread of dcp's it would only be printed
            self.failures.append(error)


class _HashingFile:
    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        count = self._file.write(data)
        self.size += count
        return count

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        self._file.flush()
        return self._file.fileno()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@contextmanager
def _without_crc32() -> Iterator[None]:
    """The manifest has better sums than zip's, which take longer than all the rest."""
    former = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(former)


def stored_shapes(directory: Path) -> Shapes:
    """Names and whole shapes of the tensors in ``directory``; reads the metadata alone.

    Raises:
        TokenFormerError: missing or damaged.
    """
    return {name: tuple(entry.size) for name, entry in _entries(directory).items()}


def load_tensors(directory: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, whole, on the CPU, whatever layout they were written in.

    Raises:
        TokenFormerError: missing or damaged.
    """
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in _entries(directory).items()
        if name.startswith(prefix)
    }
    _read_into(tensors, directory)
    return tensors


def load_into(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill ``tensors`` in place: plain tensors with the whole, DTensors with this rank's part, in any layout.

    Every rank reads by itself and only what it needs.

    Raises:
        TokenFormerError: a name that is not stored or has another shape (the first such is named), missing or
            damaged files.
    """
    stored = stored_shapes(directory)
    for name, tensor in tensors.items():
        found = stored.get(name, "no such tensor")
        if found != tuple(tensor.shape):
            raise TokenFormerError(f"{directory}: {name}: found {found}, expected {tuple(tensor.shape)}")
    _read_into({name: tensor.detach() for name, tensor in tensors.items()}, directory)


def _entries(directory: Path) -> dict[str, TensorStorageMetadata]:
    with _damage_explained(directory):
        stored = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
        return {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def _read_into(tensors: dict[str, Tensor], directory: Path) -> None:
    with _damage_explained(directory), _single_process():
        dcp.load(tensors, checkpoint_id=directory, no_dist=True)


@contextmanager
def _damage_explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:
        cause = _cause(error)  # an EOFError, of a file cut short, has no words of its own
        raise TokenFormerError(
            f"{directory}: missing or damaged ({type(cause).__name__}: {cause})"
        ) from error
    except Exception as error:  # the pickled metadata of a damaged file can fail in any way
        raise TokenFormerError(
            f"{directory}: missing or damaged ({type(error).__name__}: {error})"
        ) from error


@contextmanager
def _single_process() -> Iterator[None]:
    """dcp remarks on every call that torch.distributed is not in use, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _cause(error: CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0] if error.failures else error
