"""A run's checkpoints: written at once or in the background, then pruned and exported."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tokenformer.errors import TokenFormerError
from tokenformer.train.checkpoint.contents import (
    CheckpointContents,
    TrainingCheckpoint,
    plan_contents,
    write_contents,
)
from tokenformer.train.checkpoint.export import Export, Exporter
from tokenformer.train.checkpoint.folder import checkpoint_path, list_checkpoints, prune_checkpoints
from tokenformer.train.checkpoint.ranks import Ranks, greatest_of_all_ranks
from tokenformer.train.checkpoint.shared_memory import SharedMemory
from tokenformer.train.checkpoint.staging import Staging, write_staged
from tokenformer.train.checkpoint.tensors import WritePlan, WrittenShare, write_share
from tokenformer.train.checkpoint.worker import Worker
from tokenformer.train.sections import CheckpointConfig

_PATIENCE = 60.0
"""Seconds."""


Mode = Literal["at once", "thread", "process"]
_MODES: tuple[Mode, ...] = ("at once", "thread", "process")


def writing_mode(configs: Iterable[CheckpointConfig], device: torch.device) -> Mode:
    """How the checkpoints of stages are written: as the one that wants most does it. By itself, on CUDA by a process
    beside the training; a computation on the CPU has no time to spare for it."""
    modes: list[Mode] = ["at once"]
    for asynchronous in (config.asynchronous for config in configs):
        if asynchronous == "thread" or asynchronous == "process":
            modes.append(asynchronous)
        elif device.type == "cuda" and asynchronous:
            modes.append("process")
        elif asynchronous is True:
            modes.append("thread")
    return max(modes, key=_MODES.index)


class CheckpointWriter:
    """Writes the checkpoints of ``run``; every rank has one and calls the same methods in the same order.

    In the background at most one is being written: the tensors are copied to the CPU first, and the next one waits for
    the former. With a process beside each rank, the copies lie in memory that it shares, and a thread here only waits
    for it and for the other ranks. A failure is raised by the next :meth:`write`, :meth:`raise_failure` or
    :meth:`finish`.

    Args:
        run: the run directory.
        mode: let the training wait, or write while it goes on, by a thread of it or a process beside it.
        ranks: the processes of the run; their group serves nothing else.
        say: prints a line for the user.
    """

    def __init__(
        self,
        run: Path,
        *,
        mode: Mode = "at once",
        ranks: Ranks | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.run = run
        self._ranks = ranks or Ranks()
        self._say = say
        self._background = None if mode == "at once" else Background(say, processes=mode == "process")
        exporting = self._background.exporting if self._background is not None else None
        self._exporter = Exporter(run, background=self._background is not None, say=say, worker=exporting)
        self._agree = greatest_of_all_ranks() if self._ranks.group is not None else None
        self._plan: tuple[object, WritePlan] | None = None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether a write in the background went wrong on this rank."""
        return self._failure is not None

    def start(self) -> None:
        """Begin the processes, if there are to be any, so that the first checkpoint need not wait for them."""
        if self._background is not None:
            self._background.start(exports=self._ranks.rank == 0)

    def write(
        self, checkpoint: TrainingCheckpoint, policy: CheckpointConfig, card: str | None = None
    ) -> None:
        """Save ``checkpoint`` under its step, remove what ``policy`` does not keep, and export the model with
        ``card`` where one is given.

        Raises:
            TokenFormerError: this or the former write failed; names the newest whole checkpoint.
        """
        self.wait()
        contents = checkpoint.contents()  # here: sharded parameters are not themselves during a forward pass
        plan = self._planned(contents)
        if self._background is None:
            self._write(contents, plan, policy, card)
            self.raise_failure()
            return
        self.start()
        self._background.staging.copy(contents.tensors)
        contents = replace(contents, tensors={})  # the device's memory is not the thread's to keep
        self._thread = threading.Thread(
            target=self._write, args=(contents, plan, policy, card), name="checkpoint", daemon=True
        )
        self._thread.start()

    def is_writing(self) -> bool:
        """Whether a checkpoint is still being written, on any rank; all ask together."""
        writing = self._thread is not None and self._thread.is_alive()
        return bool(self._agree(writing)) if self._agree is not None else writing

    def before_update(self) -> None:
        """To be called before the tensors of the last checkpoint change: on the device that waits for the copy."""
        if self._background is not None:
            self._background.staging.hold_updates()

    def raise_failure(self) -> None:
        """Raise what went wrong in the background, once it is known.

        Raises:
            TokenFormerError: a write failed; names the newest whole checkpoint.
        """
        if self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            TokenFormerError: it could not be written; names the newest whole checkpoint.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_failure()

    def abandon(self) -> None:
        """Let what is being written come to its end, when the run itself has failed; gives up after a minute, since
        other ranks may be gone."""
        if self._thread is not None:
            self._thread.join(_PATIENCE)

    def finish(self) -> None:
        """Wait until the last checkpoint is complete and its export is made.

        Raises:
            TokenFormerError: one of them failed.
        """
        self.wait()
        self._ranks.first(self._exporter.finish)

    def close(self) -> None:
        """End the processes, whatever they are doing; give the memory back."""
        if self._background is not None:
            self._background.close()

    def _planned(self, contents: CheckpointContents) -> WritePlan:
        layout = [(name, _layout(tensor)) for name, tensor in contents.tensors.items()]
        if self._plan is None or self._plan[0] != layout:
            self._plan = layout, plan_contents(contents, self._ranks)
        return self._plan[1]

    def _write(
        self, contents: CheckpointContents, plan: WritePlan, policy: CheckpointConfig, card: str | None
    ) -> None:
        try:
            path = checkpoint_path(self.run, contents.state.step)
            write = self._background.write_share if self._background is not None else None
            write_contents(path, contents, ranks=self._ranks, plan=plan, write=write)
            if self._ranks.rank == 0:
                if card is not None:
                    self._exporter.submit(Export(path, card))
                prune_checkpoints(
                    self.run, policy.keep_last, policy.keep_every_steps, in_use=self._exporter.in_use()
                )
        except Exception as error:  # raised where the run looks for it
            self._failure = self._explained(error)

    def _explained(self, error: Exception) -> Exception:
        """``error`` with what is left to go on from; faults of ours stay as they are."""
        if not isinstance(error, TokenFormerError | OSError | RuntimeError):
            return error
        former = list_checkpoints(self.run)
        advice = (
            f"{former[-1]} is whole: go on from it with --resume" if former else "there is none before it"
        )
        explained = TokenFormerError(f"{error}; {advice}")
        explained.__cause__ = error
        return explained


class Background:
    """What writing beside the training takes: memory for the copies, and the processes ``writing`` (from the copies)
    and ``exporting``; threads do without, also where the system has no such memory."""

    def __init__(self, say: Callable[[str], None], *, processes: bool) -> None:
        self._memory: SharedMemory | None = None
        self.writing: Worker | None = None
        self.exporting: Worker | None = None
        if processes:
            try:
                self._memory = SharedMemory()
            except OSError as error:
                say(f"checkpoints are written by a thread of the training, which slows it down ({error})")
            else:
                memory = self._memory.descriptor
                self.writing = Worker(
                    "writes checkpoints", write_staged.__module__, descriptors=[memory], say=say
                )
                self.exporting = Worker("exports models", Exporter.__module__, say=say)
        self.staging = Staging(self._memory)

    def start(self, *, exports: bool) -> None:
        """Begin the processes; that of ``exports`` where this rank makes them.

        Raises:
            TokenFormerError: the system refuses.
        """
        try:
            for worker in (self.writing, self.exporting if exports else None):
                if worker is not None:
                    worker.start()
        except OSError as error:
            raise TokenFormerError(
                f"checkpoint.asynchronous: the process for it could not be started ({error}); "
                "checkpoint.asynchronous=thread needs none"
            ) from error

    def write_share(self, directory: Path, plan: bytes) -> WrittenShare:
        """Write this rank's part of ``plan`` from the copies."""
        self.staging.wait()
        if self.writing is None or self._memory is None:
            return write_share(directory, plan, self.staging.copies)
        return self.writing.call(write_staged, directory, plan, self._memory.descriptor, self.staging.layout)

    def close(self) -> None:
        """End the processes and give the memory back."""
        for worker in (self.writing, self.exporting):
            if worker is not None:
                worker.close()
        self.staging.wait()
        self.staging.copies = {}
        if self._memory is not None:
            self._memory.close()


def _layout(tensor: Tensor) -> tuple[object, ...]:
    """All that a plan for ``tensor`` depends on."""
    spread = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
    return tuple(tensor.shape), tensor.dtype, spread
