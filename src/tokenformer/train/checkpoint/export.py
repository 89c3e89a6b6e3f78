"""Model directories, or adapters, made from checkpoints, beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tokenformer.adapters.config import EXPORT_DIRECTORY, is_adapter_directory
from tokenformer.files import read_json, write_json
from tokenformer.language.tokenizers import load_tokenizer
from tokenformer.models.directory import save_model
from tokenformer.models.paths import is_model_directory
from tokenformer.train.adapter import export_adapter, is_adapter_run
from tokenformer.train.checkpoint.contents import read_model
from tokenformer.train.checkpoint.folder import checkpoint_step
from tokenformer.train.checkpoint.worker import Worker

EXPORT_FILE = "export.json"
"""In a run directory: the step of the model in ``model/``, or of the adapter in ``adapter/``."""


class Export(NamedTuple):
    """A checkpoint to make the model directory from, and the text of its model card."""

    checkpoint: Path
    card: str


def export_model(export: Export, run: Path, worker: Worker | None = None) -> None:
    """Write the model of a checkpoint, of however many ranks, to the run's ``model/``, or the adapter that the run
    trains to its ``adapter/``, in place of what is there; in ``worker``, if one is given.

    Raises:
        TokenFormerError: the checkpoint is damaged, or the disk refuses.
    """
    if worker is not None:
        worker.call(_export_model, export, run)
    else:
        _export_model(export, run)


def _export_model(export: Export, run: Path) -> None:
    if is_adapter_run(run):
        export_adapter(export.checkpoint, run, export.card)
    else:
        has_tokenizer = (export.checkpoint / "tokenizer.json").is_file()
        save_model(
            read_model(export.checkpoint),
            run / "model",
            card=export.card,
            tokenizer=load_tokenizer(export.checkpoint) if has_tokenizer else None,
            replace=True,
        )
    write_json(run / EXPORT_FILE, {"step": checkpoint_step(export.checkpoint)})


def is_exported(checkpoint: Path, run: Path) -> bool:
    """Whether the run's ``model/`` or ``adapter/`` is that of ``checkpoint``."""
    has_export = is_model_directory(run / "model") or is_adapter_directory(run / EXPORT_DIRECTORY)
    if not (has_export and (run / EXPORT_FILE).is_file()):
        return False
    exported = read_json(run / EXPORT_FILE, "the step of the exported model")
    return exported.get("step") == checkpoint_step(checkpoint)


class Exporter:
    """Makes ``model/`` of ``run`` the model of its newest checkpoint.

    In the background a checkpoint that is overtaken before its turn is left out. An export that fails does not stop
    the training: it is told through ``say``, and raised by :meth:`finish` unless a later one succeeded. ``worker``:
    the process that makes them; this one by default.
    """

    def __init__(
        self, run: Path, *, background: bool, say: Callable[[str], None], worker: Worker | None = None
    ) -> None:
        self._run = run
        self._worker = worker
        self._background = background
        self._say = say
        self._lock = threading.Condition()
        self._next: Export | None = None
        self._current: Export | None = None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def submit(self, export: Export) -> None:
        """Export, at once or as soon as the one at hand is done."""
        with self._lock:
            self._next = export
            if self._thread is not None:
                return
            if self._background:
                self._thread = threading.Thread(target=self._work, name="export", daemon=True)
                self._thread.start()
                return
        self._work()

    def in_use(self) -> set[Path]:
        """The checkpoints that are still to be read."""
        with self._lock:
            return {export.checkpoint for export in (self._current, self._next) if export is not None}

    def finish(self) -> None:
        """Wait until nothing is left to do.

        Raises:
            TokenFormerError: the last export failed.
        """
        thread = self._thread
        if thread is not None:
            thread.join()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while (export := self._take()) is not None:
            try:
                export_model(export, self._run, self._worker)
                self._failure = None
            except Exception as error:  # in a thread of its own it would end unseen
                self._failure = error
                self._say(f"export of {export.checkpoint.name} failed: {error}; the checkpoint is whole")

    def _take(self) -> Export | None:
        with self._lock:
            self._current, self._next = self._next, None
            if self._current is None:
                self._thread = None
            return self._current
