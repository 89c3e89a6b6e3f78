"""The processes of a run: how they meet, who of them speaks, and the mesh they form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from tokenformer.errors import TokenFormerError, ToldElsewhere
from tokenformer.parallel.attempt import fresh_store
from tokenformer.parallel.launch import Launch
from tokenformer.parallel.share import WHOLE, Share
from tokenformer.parallel.sizes import ALONE, AXES, MeshSizes

_ASKING = timedelta(seconds=20)


@dataclass(frozen=True)
class World:
    """All ranks of a run and the place of this one; ``mesh`` (axes ``replicate``, ``shard``, ``tensor``) is None for a
    process by itself."""

    sizes: MeshSizes = ALONE
    rank: int = 0
    mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes files and speaks to the user."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which of the ``sizes.data`` shares of a batch this rank takes; ranks along ``tensor`` have the same."""
        return self.rank // self.sizes.tensor

    @property
    def share(self) -> Share:
        """This rank's part of work over samples."""
        if self.mesh is None:
            return WHOLE
        device = self.mesh.device_type

        def add_up(number: float) -> float:
            return float(self.sum_over_data(torch.tensor(number, dtype=torch.float64, device=device)))

        return Share(self.data_rank, self.sizes.data, add_up)

    def sum_over_data(self, values: Tensor) -> Tensor:
        """``values`` added up in place over the ranks that take different samples."""
        for axis in ("shard", "replicate"):
            if self.mesh is not None and self.mesh[axis].size() > 1:
                dist.all_reduce(values, group=self.mesh[axis].get_group())
        return values


PROCESS = World()
"""A process by itself."""


@contextmanager
def meet(launch: Launch, timeout: float) -> Iterator[Any]:
    """Yield the store where all processes of ``launch`` meet; None for a process by itself.

    An error that ends the block is told by the first rank where it comes up; the others raise
    :class:`~tokenformer.errors.ToldElsewhere`, which the command line ends without a word. An error of one rank breaks
    the others' connections, so that they come here too.

    Args:
        launch: of :func:`~tokenformer.parallel.launch.find_launch`.
        timeout: seconds to wait for the others.

    Raises:
        TokenFormerError: the others did not come.
    """
    if launch.world_size == 1:
        yield None
        return
    store = _store(launch, timedelta(seconds=timeout))
    try:
        yield store
    except ToldElsewhere:
        raise
    except TokenFormerError as error:
        if not _is_first_to_fail(store):
            told = ToldElsewhere(str(error))
            told.exit_code = error.exit_code
            raise told from error
        raise
    except Exception as error:
        # where another rank failed before, this one merely lost its connection
        if not _is_first_to_fail(store):
            raise ToldElsewhere(f"rank {launch.rank}: {error}") from error
        raise


@contextmanager
def joined(
    launch: Launch, store: Any, sizes: MeshSizes, device: torch.device, timeout: float
) -> Iterator[World]:
    """Yield the :class:`World` of a process group over ``store``: NCCL for tensors on CUDA, gloo on the CPU.

    Args:
        launch: which rank this is.
        store: of :func:`meet`; None gives a world of one.
        sizes: of :func:`~tokenformer.parallel.sizes.mesh_sizes`.
        device: where this rank computes.
        timeout: seconds after which a collective operation that not all ranks join is an error.
    """
    if store is None:
        yield PROCESS
        return
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
        store=dist.PrefixStore("group", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        mesh = init_device_mesh(device.type, tuple(sizes), mesh_dim_names=AXES)
        yield World(sizes, launch.rank, mesh)
    except Exception:
        if not is_cuda:  # NCCL would wait for ranks that no longer answer; the end of the process frees it
            dist.destroy_process_group()
        raise
    except BaseException:
        dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()


def _store(launch: Launch, timeout: timedelta) -> Any:
    where = f"{launch.address}:{launch.port}"
    try:
        if launch.launcher == "torchrun":  # which keeps a store itself, the same over its restarts
            kept, _, _ = next(rendezvous("env://", timeout=timeout))
            store = fresh_store(kept, launch.rank, launch.world_size, timeout)
        else:
            store = dist.TCPStore(
                launch.address, launch.port, launch.world_size, is_master=launch.rank == 0, timeout=timeout
            )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise TokenFormerError(
            f"rank {launch.rank} of {launch.world_size} did not meet the others at {where}: {error}"
        ) from error
    # a process may meet the others several times, one run after another: each meeting has names of its own
    meeting = (store.add("tokenformer/arrivals", 1) - 1) // launch.world_size
    return dist.PrefixStore(f"tokenformer/{meeting}", store)


def _is_first_to_fail(store: Any) -> bool:
    try:
        store.set_timeout(_ASKING)
        return bool(store.add("failures", 1) == 1)
    except Exception:  # the rank that kept the store is gone, so it was first
        return False
