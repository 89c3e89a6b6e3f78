"""Metrics of a run: one JSON line each in ``metrics.jsonl``, and TensorBoard events beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from tokenformer.errors import TokenFormerError
from tokenformer.files import read_text, write_text
from tokenformer.train.sections import WandbConfig
from tokenformer.train.state import TrainingState

if TYPE_CHECKING:
    from tokenformer.train.tensorboard import TensorBoardEvents
    from tokenformer.train.wandb_run import WandbRun

METRICS_FILE = "metrics.jsonl"


def read_metrics(run: Path | str) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, in order; a last line cut off by a crash is left out.

    Raises:
        TokenFormerError: the file is missing, or a line is no JSON object.
    """
    path = Path(run) / METRICS_FILE
    lines = read_text(path, "the metrics of a run").splitlines(keepends=True)
    return [
        _parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.endswith("\n")
    ]


def latest_values(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The newest value of every metric, the counters left out."""
    latest: dict[str, Any] = {}
    for record in records:
        latest.update(record)
    return {name: value for name, value in latest.items() if name not in TrainingState().counters()}


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise TokenFormerError(f"{place}: invalid JSON ({error.msg})") from error
    if not isinstance(record, dict):
        raise TokenFormerError(f"{place}: found {line.strip()[:40]}, expected a JSON object")
    return record


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN or infinity: they become null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


class MetricsLog:
    """Appends metrics; on going on from a checkpoint, lines written after it are dropped first.

    TensorBoard and, where ``wandb`` is given, Weights & Biases (which also shows ``config``) get the same values.
    ``latest`` holds the newest value of every metric. With ``silent`` (all ranks but the first) nothing is written.
    """

    def __init__(
        self,
        run: Path,
        *,
        tensorboard: bool,
        wandb: WandbConfig | None = None,
        config: Mapping[str, Any] | None = None,
        after: TrainingState | None = None,
        silent: bool = False,
    ) -> None:
        self.path = run / METRICS_FILE
        self.latest: dict[str, Any] = {}
        self._file: TextIO | None = None
        self._events: TensorBoardEvents | None = None
        self._wandb: WandbRun | None = None
        if silent:
            return
        if after is not None and self.path.exists():
            self._drop_later_than(run, after)
        self._file = self.path.open("a", encoding="utf-8")
        if tensorboard:
            from tokenformer.train.tensorboard import TensorBoardEvents

            purge_step = None if after is None else after.step + 1
            self._events = TensorBoardEvents(run / "tensorboard", purge_step)
        if wandb is not None:
            from tokenformer.train.wandb_run import WandbRun

            self._wandb = WandbRun(run, wandb, config or {})

    def write(self, state: TrainingState, values: Mapping[str, Any]) -> None:
        """Append one line: the counters of ``state``, then ``values`` (numbers go to TensorBoard too).

        Raises:
            TokenFormerError: the disk refuses.
        """
        self.latest.update(values)
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({**state.counters(), **_finite(values)}) + "\n")
            self._file.flush()
        except OSError as error:
            raise TokenFormerError(
                f"{self.path}: could not be written ({error.strerror or error})"
            ) from error
        if self._events is not None:
            self._events.write(state.step, values)
        if self._wandb is not None:
            self._wandb.write(state.counters(), values)

    def _drop_later_than(self, run: Path, after: TrainingState) -> None:
        kept = [r for r in read_metrics(run) if r["step"] <= after.step and r["stage"] <= after.stage]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.latest = latest_values(kept)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # what ended the block says more than a full disk that cannot take the last events either
        with nullcontext() if error is None else suppress(OSError, TokenFormerError):
            if self._file is not None:
                self._file.close()
            if self._events is not None:
                self._events.close()
            if self._wandb is not None:
                self._wandb.close(failed=error is not None)
