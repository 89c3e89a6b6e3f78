"""A run's checkpoints: written at once or in the background, then pruned and exported."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch

from tokenformer.errors import TokenFormerError
from tokenformer.train.checkpoint.contents import CheckpointContents, TrainingCheckpoint, write_contents
from tokenformer.train.checkpoint.export import Export, Exporter
from tokenformer.train.checkpoint.folder import checkpoint_path, list_checkpoints, prune_checkpoints
from tokenformer.train.checkpoint.ranks import Ranks
from tokenformer.train.checkpoint.staging import Staging
from tokenformer.train.sections import CheckpointConfig

_PATIENCE = 60.0
"""Seconds."""


def writes_in_background(config: CheckpointConfig, device: torch.device) -> bool:
    """Whether checkpoints are written while the training goes on: as configured, on CUDA by itself."""
    return device.type == "cuda" if config.asynchronous == "auto" else config.asynchronous


class CheckpointWriter:
    """Writes the checkpoints of ``run``; every rank has one and calls the same methods in the same order.

    In the background at most one is being written: the tensors are copied to the CPU first, and the next one waits for
    the former. A failure there is raised by the next :meth:`write`, :meth:`raise_failure` or :meth:`finish`.

    Args:
        run: the run directory.
        device: of the tensors.
        background: write while the training goes on.
        ranks: the processes of the run; their group serves nothing else.
        say: prints a line for the user.
    """

    def __init__(
        self,
        run: Path,
        device: torch.device,
        *,
        background: bool,
        ranks: Ranks | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self._run = run
        self._device = device
        self._ranks = ranks or Ranks()
        self._staging = Staging() if background else None
        self._exporter = Exporter(run, background=background, say=say)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether a write in the background went wrong on this rank."""
        return self._failure is not None

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
        if self._staging is None:
            self._write(contents, policy, card)
            self.raise_failure()
            return
        self._staging.copy(contents.tensors)
        self._thread = threading.Thread(
            target=self._write, args=(contents, policy, card), name="checkpoint", daemon=True
        )
        self._thread.start()

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

    def _write(self, contents: CheckpointContents, policy: CheckpointConfig, card: str | None) -> None:
        try:
            local = None
            if self._staging is not None:
                if self._device.index is not None:
                    torch.cuda.set_device(self._device)  # a thread begins on the first device
                self._staging.wait()
                local = self._staging.copies
            path = checkpoint_path(self._run, contents.state.step)
            write_contents(path, contents, ranks=self._ranks, local=local)
            if self._ranks.rank == 0:
                if card is not None:
                    self._exporter.submit(Export(path, card))
                prune_checkpoints(
                    self._run, policy.keep_last, policy.keep_every_steps, in_use=self._exporter.in_use()
                )
        except Exception as error:  # raised where the run looks for it
            self._failure = self._explained(error)

    def _explained(self, error: Exception) -> Exception:
        """``error`` with what is left to go on from; faults of ours stay as they are."""
        if not isinstance(error, TokenFormerError | OSError | RuntimeError):
            return error
        former = list_checkpoints(self._run)
        advice = (
            f"{former[-1]} is whole: go on from it with --resume" if former else "there is none before it"
        )
        explained = TokenFormerError(f"{error}; {advice}")
        explained.__cause__ = error
        return explained
