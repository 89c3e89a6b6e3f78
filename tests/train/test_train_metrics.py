"""Metrics on a disk that refuses: one clear error, and never one that hides another."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.io import gfile

from tokenformer.errors import TokenFormerError
from tokenformer.train.metrics import MetricsLog, read_metrics
from tokenformer.train.state import TrainingState


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's files take nothing more."""

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gfile.LocalFileSystem, "_write", refuse)


def test_scalars_are_in_both_files(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=True) as metrics:
        metrics.write(TrainingState(step=3), {"loss": 2.5})
    assert read_metrics(tmp_path)[0]["loss"] == 2.5
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5)]


def test_events_that_the_disk_refuses_are_one_message(
    tmp_path: Path, full_disk: None, capfd: pytest.CaptureFixture[str]
) -> None:
    hook = threading.excepthook
    with (
        pytest.raises(
            TokenFormerError, match=r"tensorboard: could not be written \(No space left on device\)"
        ),
        MetricsLog(tmp_path, tensorboard=True) as metrics,
    ):
        metrics.write(TrainingState(step=1), {"loss": 1.0})
    assert "Traceback" not in capfd.readouterr().err
    assert threading.excepthook is hook


def test_what_ended_a_run_is_not_hidden_by_the_last_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def fail() -> None:
        with MetricsLog(tmp_path, tensorboard=True) as metrics:
            metrics.write(TrainingState(step=1), {"loss": 1.0})
            monkeypatch.setattr(gfile.LocalFileSystem, "_write", refuse)
            raise TokenFormerError("the checkpoint could not be written")

    with pytest.raises(TokenFormerError, match="the checkpoint could not be written"):
        fail()
