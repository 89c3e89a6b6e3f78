"""Writing in the background: the state of its step, one at a time, failures told, exports of the newest."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tokenformer.errors import TokenFormerError
from tokenformer.models.directory import load_model
from tokenformer.train.checkpoint.contents import TrainingCheckpoint, read_checkpoint, write_contents
from tokenformer.train.checkpoint.export import export_model
from tokenformer.train.checkpoint.folder import checkpoint_path, list_checkpoints
from tokenformer.train.checkpoint.writer import CheckpointWriter, writing_mode
from tokenformer.train.config import RunConfig
from tokenformer.train.run import train
from tokenformer.train.sections import CheckpointConfig
from tokenformer.train.state import TrainingState

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")
EXPORT = "tokenformer.train.checkpoint.export.export_model"


@pytest.fixture
def checkpoint(make_config: MakeConfig, tmp_path: Path) -> TrainingCheckpoint:
    config = make_config("steps=1", "checkpoint.export=false")
    return read_checkpoint(train(config, tmp_path / "source", quiet=True).checkpoint)


def at(checkpoint: TrainingCheckpoint, step: int) -> TrainingCheckpoint:
    return TrainingCheckpoint(checkpoint.model, checkpoint.moments, TrainingState(step=step))


def fill(checkpoint: TrainingCheckpoint, value: float) -> None:
    with torch.no_grad():
        for parameter in checkpoint.model.parameters():
            parameter.fill_(value)


def test_background_run_writes_what_any_run_writes(make_config: MakeConfig, tmp_path: Path) -> None:
    """Step for step: weights, moments, counters; and the same export at the end."""
    checkpoints = {}
    for asynchronous in (False, True):
        section = (
            f"checkpoint={{every_steps: 1, keep_last: 9, asynchronous: {asynchronous}, when_busy: wait}}"
        )
        out = train(make_config("steps=4", section), tmp_path / str(asynchronous), quiet=True).out
        checkpoints[asynchronous] = [read_checkpoint(path) for path in list_checkpoints(out)]
        assert (out / "model" / "model.safetensors").is_file()
    one, other = (
        (tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("False", "True")
    )
    assert one == other
    assert len(checkpoints[True]) == 4
    for one, other in zip(checkpoints[False], checkpoints[True], strict=True):
        assert one.state.model_dump(exclude={"seconds"}) == other.state.model_dump(exclude={"seconds"})
        for name, tensor in one.contents().tensors.items():
            assert torch.equal(tensor, other.contents().tensors[name]), name


def test_only_cuda_writes_in_the_background_by_itself() -> None:
    config = CheckpointConfig()
    assert [writing_mode([config], torch.device(name)) for name in ("cpu", "mps", "cuda")] == [
        "at once",
        "at once",
        "process",
    ]
    wanted = CheckpointConfig(asynchronous=True)
    assert writing_mode([config, wanted], torch.device("cpu")) == "thread"
    assert writing_mode([wanted, config], torch.device("cuda")) == "process"
    by_name = [CheckpointConfig(asynchronous="process"), CheckpointConfig(asynchronous=False)]
    assert writing_mode(by_name, torch.device("cpu")) == "process"


def test_copy_is_that_of_its_step(checkpoint: TrainingCheckpoint, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, mode="thread")
    for step in (1, 2):
        fill(checkpoint, float(step))
        writer.write(at(checkpoint, step), CheckpointConfig())
        fill(checkpoint, -1.0)
    writer.finish()
    for step in (1, 2):
        model = read_checkpoint(checkpoint_path(tmp_path, step)).model
        assert all((parameter == step).all() for parameter in model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_update_is_told_before_it_changes_anything(
    make_config: MakeConfig, tmp_path: Path, optimizer: str
) -> None:
    """That is when the device waits for the copy of the last checkpoint."""
    told = []

    def before_update(self: CheckpointWriter) -> None:
        told.append(self.is_writing())

    with mock.patch.object(CheckpointWriter, "before_update", before_update):
        config = make_config("steps=3", f"optimizer.name={optimizer}", "checkpoint.asynchronous=true")
        train(config, tmp_path / "run", quiet=True)
    assert told == [False] * 3


def test_without_shared_memory_a_thread_writes(checkpoint: TrainingCheckpoint, tmp_path: Path) -> None:
    said: list[str] = []
    refused = OSError(24, "Too many open files")
    with mock.patch("os.memfd_create", side_effect=refused, create=True):
        writer = CheckpointWriter(tmp_path, mode="process", say=said.append)
    writer.write(at(checkpoint, 1), CheckpointConfig(), card="A card.")
    fill(checkpoint, -1.0)
    writer.finish()
    writer.close()
    assert "written by a thread of the training" in said[0]
    assert "Too many open files" in said[0]
    assert not any((p == -1).all() for p in read_checkpoint(checkpoint_path(tmp_path, 1)).model.parameters())
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_due_while_the_former_is_being_written_is_left_out(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But never the one that is kept for good, nor the last; as long as step 1 is written, two more become due."""
    may_end, asked = threading.Event(), []
    is_writing = CheckpointWriter.is_writing

    def asking(self: CheckpointWriter) -> bool:
        asked.append(is_writing(self))
        if len(asked) == 3:
            may_end.set()
        return asked[-1]

    def slow_write(*arguments: Any, **options: Any) -> None:
        assert may_end.wait(60)
        write_contents(*arguments, **options)

    section = "checkpoint={every_steps: 1, keep_last: 9, keep_every_steps: 4, asynchronous: true}"
    with (
        mock.patch.object(CheckpointWriter, "is_writing", asking),
        mock.patch("tokenformer.train.checkpoint.writer.write_contents", slow_write),
    ):
        run = train(make_config("steps=6", section), tmp_path / "run").out
    assert asked[:3] == [False, True, True]
    saved = {int(path.name[-1]) for path in list_checkpoints(run)}
    assert {1, 4, 6} <= saved <= {1, 4, 5, 6}
    said = capsys.readouterr().out
    assert "step 2: no checkpoint, the former one is still being written" in said
    assert all((run / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file() for step in saved)


def test_export_that_is_overtaken_is_left_out(checkpoint: TrainingCheckpoint, tmp_path: Path) -> None:
    exported, may_go_on, began = [], threading.Event(), threading.Event()

    def slow_export(export: object, run: Path, worker: None) -> None:
        began.set()
        assert may_go_on.wait(60)
        export_model(export, run)  # type: ignore[arg-type]
        exported.append(export.checkpoint.name[-1])  # type: ignore[attr-defined]

    writer = CheckpointWriter(tmp_path, mode="thread")
    with mock.patch(EXPORT, slow_export):
        for step in (1, 2, 3):
            fill(checkpoint, float(step))
            writer.write(at(checkpoint, step), CheckpointConfig(keep_last=1), card="A card.")
            writer.wait()
            assert began.wait(60)
        # the one that is being read and the one whose turn it is stay, whatever the policy says
        assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["1", "3"]
        may_go_on.set()
        writer.finish()
    assert exported == ["1", "3"]
    assert all((parameter == 3).all() for parameter in load_model(tmp_path / "model").parameters())


def test_export_that_fails_is_told_and_raised_at_the_end_only(
    checkpoint: TrainingCheckpoint, tmp_path: Path
) -> None:
    said: list[str] = []
    writer = CheckpointWriter(tmp_path, say=said.append)
    full = TokenFormerError("model: could not be written (No space left on device)")
    with mock.patch(EXPORT, side_effect=full):
        writer.write(at(checkpoint, 1), CheckpointConfig(), card="A card.")
    assert "export of step-00000001 failed" in said[0]
    with pytest.raises(TokenFormerError, match="No space left"):
        writer.finish()
    writer.write(at(checkpoint, 2), CheckpointConfig(), card="A card.")
    writer.finish()
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_failure_in_the_background_stops_the_run_at_the_next_step(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        "steps=500", "checkpoint={every_steps: 2, asynchronous: true}", "logging.every_steps=1"
    )
    full = OSError(28, "No space left on device")
    with (
        mock.patch("torch.distributed.checkpoint.filesystem._write_item", side_effect=full),
        pytest.raises(TokenFormerError, match=r"No space left on device.*there is none before it"),
    ):
        train(config, tmp_path / "run", quiet=True)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
