"""Where and in which precision a run computes; settings of the process are put back when it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from tokenformer.errors import TokenFormerError
from tokenformer.ops.pattention_float8 import has_float8
from tokenformer.parallel.launch import Launch
from tokenformer.train.sections import ParallelConfig, PrecisionConfig


def find_device(name: str = "auto") -> torch.device:
    """The device called ``name``; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        TokenFormerError: the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TokenFormerError(f"device: found '{name}', expected auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise TokenFormerError(f"device: '{name}' was asked for, but this machine offers no CUDA device")
        if device.index is not None and device.index >= count:
            raise TokenFormerError(
                f"device: '{name}' was asked for, but there are cuda:0 to cuda:{count - 1}"
            )
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise TokenFormerError("device: 'mps' was asked for, but this machine offers no MPS device")
    if device.type not in ("cpu", "mps"):
        raise TokenFormerError(f"device: found '{name}', expected auto, cpu, cuda, cuda:N or mps")
    return device


def rank_device(name: str, launch: Launch) -> torch.device:
    """The device called ``name`` for one process of ``launch``: of several, each takes the CUDA device of its
    local rank, or all the CPU.

    Raises:
        TokenFormerError: the device is not there, or cannot be shared out.
    """
    if launch.world_size == 1:
        return find_device(name)
    if name not in ("auto", "cpu", "cuda"):
        raise TokenFormerError(
            f"parallel.device: found '{name}' with {launch.world_size} processes, expected auto, cpu or cuda"
        )
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return find_device(f"cuda:{launch.local_rank}")


def total_memory(device: torch.device) -> int:
    """Bytes of the device's own memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(
    needed: int, device: torch.device, what: str, advice: str = "choose smaller sizes"
) -> None:
    """Refuse what cannot fit, instead of being ended by the system in the middle of it.

    Args:
        needed: bytes, a lower bound.
        device: whose memory counts; MPS shares the machine's.
        what: opens the message.
        advice: ends it.

    Raises:
        TokenFormerError: ``needed`` is more than the whole memory there.
    """
    total = total_memory(device)
    if needed > total:
        raise TokenFormerError(
            f"{what} takes at least {needed / 2**30:.3g} GiB of memory, but {device} has {total / 2**30:.3g} GiB; "
            f"{advice}"
        )


def compute_dtype(precision: PrecisionConfig, device: torch.device) -> torch.dtype:
    """dtype of the forward pass on ``device``.

    Raises:
        TokenFormerError: bfloat16 on MPS.
    """
    if precision.dtype == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float32
    if precision.dtype == "bfloat16" and device.type == "mps":
        raise TokenFormerError("precision.dtype: bfloat16 is not offered on mps, expected auto or float32")
    dtype: torch.dtype = getattr(torch, precision.dtype)
    return dtype


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """Matrix products in ``dtype``; nothing for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def check_float8(precision: PrecisionConfig, device: torch.device, tensor_ranks: int) -> None:
    """Refuse ``float8`` where it would not be computed.

    Raises:
        TokenFormerError: the device has none, the rest is not bfloat16, or parameter tokens are split over ranks.
    """
    if not precision.float8:
        return
    if not has_float8(device):
        raise TokenFormerError(
            f"precision.float8: {device} has no float8, expected a CUDA device of compute capability 8.9 or more"
        )
    if (dtype := compute_dtype(precision, device)) != torch.bfloat16:
        raise TokenFormerError(
            f"precision.float8: found dtype {str(dtype).removeprefix('torch.')}, expected bfloat16 beside it"
        )
    if tensor_ranks > 1:
        raise TokenFormerError(f"precision.float8: found parallel.tensor {tensor_ranks}, expected 1")


def wants_compile(precision: PrecisionConfig, device: torch.device) -> bool:
    """Whether the blocks are compiled: as configured, on CUDA by itself."""
    return device.type == "cuda" if precision.compile == "auto" else precision.compile


def wants_cuda_graphs(precision: PrecisionConfig, device: torch.device) -> bool:
    """Whether passes are recorded as CUDA graphs: as configured, and by itself where blocks are compiled."""
    if device.type != "cuda":
        return False
    if precision.cuda_graphs == "auto":
        return wants_compile(precision, device)
    return precision.cuda_graphs


@contextmanager
def process_settings(parallel: ParallelConfig, *, deterministic: bool) -> Iterator[None]:
    """Threads and determinism of the process for the time of a run."""
    threads = torch.get_num_threads()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    if parallel.num_threads is not None:
        torch.set_num_threads(parallel.num_threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if deterministic:
            torch.use_deterministic_algorithms(was_deterministic)
