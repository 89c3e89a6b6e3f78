"""What a run says of itself while it runs: the console's line, utilisation, and the same names everywhere."""

from __future__ import annotations

import os
import pty
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tokenformer.errors import TokenFormerError
from tokenformer.report.runs import report_run
from tokenformer.train.config import RunConfig
from tokenformer.train.metrics import MetricsLog, read_metrics
from tokenformer.train.run import train
from tokenformer.train.sections import WandbConfig
from tokenformer.train.speed import Speed, console_line, peak_flops
from tokenformer.train.state import TrainingState
from tokenformer.train.step import TrainStep
from tokenformer.train.wandb_run import require_wandb

MakeConfig = Callable[..., RunConfig]


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Quadro P400", None),
        ("", None),
    ],
)
def test_peak_of_a_device(name: str, flops: float | None) -> None:
    assert peak_flops(name) == flops


def test_utilisation_is_the_share_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = Speed(torch.device("cpu"), torch.bfloat16, devices=4)
    assert speed.read(8000, 1e12, 2.0) == {
        "tokens_per_second": 4000.0,
        "tokens_per_second_per_device": 1000.0,
    }
    monkeypatch.setattr(speed, "_peak", 1e12)
    assert speed.read(8000, 1e12, 2.0)["mfu"] == 0.125


def test_line_leaves_out_what_is_not_there() -> None:
    values = {
        "loss": 2.5,
        "lr": 6e-4,
        "grad_norm": 1.25,
        "tokens_per_second_per_device": 12345.0,
        "seconds_left": 3723,
    }
    assert console_line("run, step 7", values) == (
        "run, step 7: loss 2.5000, lr 0.0006, grad norm 1.25, 12.3k tokens/s per device, 1:02:03 left"
    )
    on_gpu = values | {
        "mfu": 0.4321,
        "peak_memory_bytes": 3 * 2**30,
        "skipped_steps": 2,
        "loss_scale": 65536.0,
    }
    assert "MFU 43.2 %, 3.0 GiB, scale 65536, 2 skipped, 1:02:03 left" in console_line("x", on_gpu)


def test_same_names_everywhere_and_a_report_while_it_runs(
    make_config: MakeConfig,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, take_step = tmp_path / "run", TrainStep.__call__

    def step(self: TrainStep, *arguments: object) -> object:
        if arguments[1] == 4:  # after two logging lines
            assert report_run(out).is_file()
        return take_step(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainStep, "__call__", step)
    train(make_config("logging.tensorboard=true"), out)
    printed = capfd.readouterr().out.splitlines()
    lines = [line for line in printed if re.match(r"stage 0, step \d+: loss ", line)]
    assert len(lines) == 3
    assert lines[-1].endswith("0:00:00 left")
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    names = {name for line in read_metrics(out) for name in line} - set(TrainingState().counters())
    assert set(events.Tags()["scalars"]) == names
    assert {
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "tokens_per_second_per_device",
        "seconds_left",
    } <= names
    assert (out / "report.html").is_file()


def _read_all(terminal: int, into: list[bytes]) -> None:
    with suppress(OSError):  # Linux tells the end so
        while block := os.read(terminal, 1 << 16):
            into.append(block)


def test_lines_and_bar_live_together_in_a_terminal(make_config: MakeConfig, tmp_path: Path) -> None:
    """With standard error a terminal: the bar is there; the lines go where standard output goes."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(yaml.safe_load(make_config().to_yaml())))
    master, slave = pty.openpty()
    program = "from tokenformer.cli.main import main; main()"
    command = [sys.executable, "-c", program, "train", "recipe.yaml", "--out", "run"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160"}
    shown: list[bytes] = []
    reader = threading.Thread(target=_read_all, args=(master, shown))
    reader.start()
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(
            command, cwd=tmp_path, stdout=log, stderr=slave, env=environment, timeout=120, check=False
        )
    os.close(slave)
    reader.join()
    os.close(master)
    terminal = b"".join(shown).decode()
    assert done.returncode == 0, terminal
    assert len(re.findall(r"step \d+: loss", (tmp_path / "log").read_text())) == 3
    assert "tokens/s" in terminal


def test_weights_and_biases_goes_on_as_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    section = WandbConfig(project="tests", mode="offline")
    for step in (1, 2):
        after = None if step == 1 else TrainingState(step=1)
        with MetricsLog(
            tmp_path, tensorboard=False, wandb=section, config={"seed": 7}, after=after
        ) as metrics:
            metrics.write(TrainingState(step=step), {"val_bits_per_byte": 2.5})
    found = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({path.name for path in found}) == 1, "one id"
    deadline = time.monotonic() + 30  # files are written by a process of wandb's own
    while not all(b"val_bits_per_byte" in wandb_records(path) for path in found):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def wandb_records(path: Path) -> bytes:
    """The content of a wandb file, a leveldb log: 7 bytes, then blocks of 32 KiB whose chunks have headers."""
    content, position, records = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 2**15 - position % 2**15 < 7:
            position += 2**15 - position % 2**15
            continue
        _, length, _ = struct.unpack_from("<IHB", content, position)
        records += content[position + 7 : position + 7 + length]
        position += 7 + length
    return records


def test_missing_package_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TokenFormerError, match=r"pip install 'tokenformer\[wandb\]'"):
        require_wandb()
