"""Named tensors in torch.distributed.checkpoint's format: written by one process or by all ranks of a run together,
read by any number of processes in any layout.

A DTensor is stored as the whole logical tensor, each rank writing the part it holds; a plain tensor that several ranks
hold is written by one of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from tokenformer.errors import TokenFormerError

Shapes = dict[str, tuple[int, ...]]


class _StagedPlanner(dcp.DefaultSavePlanner):
    """Plans from the tensors (shapes and layouts alone) and writes copies of their local parts."""

    def __init__(self, local: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._local = local

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._local[index.fqn]


def save_tensors(
    tensors: Mapping[str, Tensor],
    directory: Path,
    *,
    local: Mapping[str, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write ``tensors`` to ``directory``; with ``group`` all of its ranks together.

    Args:
        tensors: plain tensors and DTensors by name.
        directory: a free directory that all ranks reach.
        local: copies on the CPU of what each tensor holds on this rank, written in its place.
        group: the ranks that write (CPU backend); None: this process alone.

    Raises:
        OSError: the disk refuses.
        TokenFormerError: any other failure, of this rank or another.
    """
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    # copy_ahead 0: the tensors are on the CPU or copied one by one; no stream of the device is waited for
    writer = dcp.FileSystemWriter(directory, per_thread_copy_ahead=0)
    planner = None if local is None else _StagedPlanner(local)
    try:
        with _single_process():
            dcp.save(
                detached, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None
            )
    except CheckpointException as error:  # a BaseException, so nothing further out would catch it
        cause = _cause(error)
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror or str(cause), cause.filename) from error
        raise TokenFormerError(f"{directory}: could not be written ({cause})") from error


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
