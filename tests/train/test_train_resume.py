"""A run that is interrupted and goes on ends bit for bit as one that never was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from tokenformer.errors import TokenFormerError
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.prepare import prepare
from tokenformer.train.checkpoint.contents import read_checkpoint
from tokenformer.train.checkpoint.folder import list_checkpoints
from tokenformer.train.config import RunConfig
from tokenformer.train.interrupts import RunInterrupted, StopRequest
from tokenformer.train.metrics import read_metrics
from tokenformer.train.run import RunResult, train
from tokenformer.train.step import StepResult, TrainStep

MakeConfig = Callable[..., RunConfig]


@contextmanager
def signal_after(steps: int, number: int = signal.SIGTERM) -> Iterator[None]:
    """Send this process a signal in the middle of the ``steps``-th step from now."""
    take_step, left = TrainStep.__call__, steps

    def step(self: TrainStep, batches: Iterator[Any], stage_step: int, *rest: int) -> StepResult:
        nonlocal left
        left -= 1
        if left == 0:
            signal.raise_signal(number)
        return take_step(self, batches, stage_step, *rest)

    with mock.patch.object(TrainStep, "__call__", step):
        yield


def interrupted(config: RunConfig, out: Path, steps: int, *, number: int = signal.SIGTERM) -> RunInterrupted:
    with signal_after(steps, number), pytest.raises(RunInterrupted) as caught:
        train(config, out, resume=True, quiet=True)
    return caught.value


def same_result(one: RunResult, other: RunResult) -> None:
    assert (one.model / "model.safetensors").read_bytes() == (other.model / "model.safetensors").read_bytes()
    a, b = read_checkpoint(one.checkpoint), read_checkpoint(other.checkpoint)
    assert a.state.model_dump(exclude={"seconds"}) == b.state.model_dump(exclude={"seconds"})
    assert a.moments.keys() == b.moments.keys()
    for name, entry in a.moments.items():
        assert all((entry[key] == b.moments[name][key]).all() for key in entry), name


@pytest.fixture(scope="module")
def whole_ladder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunResult]:
    return {}


@pytest.mark.parametrize(
    "interruptions",
    [
        pytest.param([2], id="inside the first stage"),
        pytest.param([4], id="at the end of a stage, before the growth"),
        pytest.param([5], id="at the first step after a growth"),
        pytest.param([6], id="inside a grown stage"),
        pytest.param([3, 2], id="twice, the second time after a growth"),
        pytest.param([10], id="at the very last step"),
        pytest.param([1, 3, 1, 3], id="four times"),
    ],
)
def test_interrupted_ladder_is_bit_identical(
    ladder: RunConfig,
    whole_ladder: dict[str, RunResult],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    interruptions: list[int],
) -> None:
    if not whole_ladder:
        whole_ladder["run"] = train(ladder, tmp_path_factory.mktemp("whole") / "run", quiet=True)
    for index, steps in enumerate(interruptions):
        interruption = interrupted(ladder, tmp_path / "run", steps)
        assert f"after step {sum(interruptions[: index + 1])}" in str(interruption)
    resumed = train(ladder, tmp_path / "run", resume=True, quiet=True)
    same_result(resumed, whole_ladder["run"])
    counters = [
        [(r["step"], r["stage"]) for r in read_metrics(r.out)] for r in (resumed, whole_ladder["run"])
    ]
    assert counters[0] == counters[1]


def test_loss_of_a_window_that_was_interrupted(make_config: MakeConfig, tmp_path: Path) -> None:
    """A metrics line is of all steps since the last one, on whichever side of an interruption they were."""
    config = make_config("steps=8", "logging.every_steps=4")
    whole = train(config, tmp_path / "whole", quiet=True)
    interrupted(config, tmp_path / "run", 3)
    resumed = train(config, tmp_path / "run", resume=True, quiet=True)
    one, other = ([line["loss"] for line in read_metrics(r.out) if "loss" in line] for r in (resumed, whole))
    assert one == other
    assert len(one) == 2


def test_killed_run_goes_on_from_its_last_checkpoint(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("checkpoint.every_steps=2", "logging.every_steps=1")
    whole = train(config, tmp_path / "whole", quiet=True)
    original = TrainStep.__call__

    def die_at_step_four(self: TrainStep, batches: Iterator[Any], stage_step: int, *rest: int) -> StepResult:
        if stage_step == 3:
            raise KeyError("killed")
        return original(self, batches, stage_step, *rest)

    with mock.patch.object(TrainStep, "__call__", die_at_step_four), pytest.raises(KeyError):
        train(config, tmp_path / "run", quiet=True)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]
    (tmp_path / "run" / "checkpoints" / ".step-00000004.incomplete-1").mkdir()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "sta')
    resumed = train(config, tmp_path / "run", resume=True, quiet=True)
    same_result(resumed, whole)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 6]
    assert not list((tmp_path / "run" / "checkpoints").glob(".step-*"))


def test_resume_starts_where_there_is_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    assert train(make_config("steps=2"), tmp_path / "run", resume=True, quiet=True).state.step == 2


def test_run_without_checkpoint_starts_again(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("steps=3", "logging.every_steps=1")
    original = TrainStep.__call__

    def die(self: TrainStep, batches: Iterator[Any], stage_step: int, *rest: int) -> StepResult:
        if stage_step == 2:
            raise KeyError("killed")
        return original(self, batches, stage_step, *rest)

    with mock.patch.object(TrainStep, "__call__", die), pytest.raises(KeyError):
        train(config, tmp_path / "run", quiet=True)
    train(config, tmp_path / "run", resume=True, quiet=True)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 3]


def test_finished_run_says_so(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(make_config(), tmp_path / "run", quiet=True)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = train(make_config(), tmp_path / "run", resume=True)
    assert "this run is finished (step 6)" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    assert (again.metrics, again.state) == (first.metrics, first.state)


def test_export_that_is_missing_is_made_up_for(make_config: MakeConfig, tmp_path: Path) -> None:
    interrupted(make_config(), tmp_path / "run", 6)
    shutil.rmtree(tmp_path / "run" / "model")
    result = train(make_config(), tmp_path / "run", resume=True, quiet=True)
    assert (result.model / "model.safetensors").is_file()


def test_second_signal_ends_at_once(make_config: MakeConfig, tmp_path: Path) -> None:
    original = TrainStep.__call__

    def step(self: TrainStep, batches: Iterator[Any], stage_step: int, *rest: int) -> StepResult:
        if stage_step == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return original(self, batches, stage_step, *rest)

    with mock.patch.object(TrainStep, "__call__", step), pytest.raises(KeyboardInterrupt) as caught:
        train(make_config(), tmp_path / "run", quiet=True)
    assert not isinstance(caught.value, RunInterrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_only_a_second_sigint_ends_at_once(make_config: MakeConfig, tmp_path: Path) -> None:
    """SLURM sends SIGUSR1, and SIGTERM after it: the checkpoint at hand is not thrown away."""
    original = TrainStep.__call__

    def step(self: TrainStep, batches: Iterator[Any], stage_step: int, *rest: Any) -> StepResult:
        if stage_step == 1:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.raise_signal(number)
        return original(self, batches, stage_step, *rest)

    with mock.patch.object(TrainStep, "__call__", step), pytest.raises(RunInterrupted) as caught:
        train(make_config(), tmp_path / "run", quiet=True)
    assert caught.value.signal_number == signal.SIGUSR1
    assert "stopped by SIGUSR1 after step 2" in str(caught.value)


def test_torchrun_hands_a_sigint_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal has sent it to the workers already: that is no second one."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    request = StopRequest()
    request.receive(signal.SIGINT)
    request.receive(signal.SIGINT)
    request.poll()
    assert request.signal_number == signal.SIGINT
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with pytest.raises(KeyboardInterrupt):
        request.receive(signal.SIGINT)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.lr=0.02", "optimizer.lr: 0.01 in the checkpoint, 0.02 now"),
        ("model.ffn_param_tokens=24", "model.ffn_param_tokens: 16 in the checkpoint, 24 now"),
        ("data.batch_tokens=128", "data.batch_tokens: 64 in the checkpoint, 128 now"),
        ("schedule.name=linear", "schedule.name: 'cosine' in the checkpoint, 'linear' now"),
        ("seed=1", "seed: 0 in the checkpoint, 1 now"),
        ("steps=7", "steps: 6 in the checkpoint, 7 now"),
        ("optimizer.frozen_groups=[0]", "optimizer.frozen_groups: [] in the checkpoint, [0] now"),
    ],
)
def test_changed_configuration_is_refused(
    make_config: MakeConfig, finished: Path, override: str, line: str
) -> None:
    before = sorted(path for path in finished.rglob("*"))
    with pytest.raises(TokenFormerError) as caught:
        train(make_config(override), finished, resume=True, quiet=True)
    assert line in str(caught.value)
    assert sorted(path for path in finished.rglob("*")) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture(autouse=True)
def _train_once(request: pytest.FixtureRequest) -> None:
    if "finished" in request.fixturenames:
        out = request.getfixturevalue("finished")
        if not out.exists():
            train(request.getfixturevalue("make_config")(), out, quiet=True)


def test_changed_data_are_refused_by_name(
    make_config: MakeConfig, data_directory: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(data_directory, data)
    config = make_config(data={"path": str(data), "sequence_length": 16, "batch_tokens": 64})
    interrupted(config, tmp_path / "run", 3)
    checkpoint = list_checkpoints(tmp_path / "run")[-1]
    (tmp_path / "other.txt").write_text("Another text.\n" * 900)
    shutil.rmtree(data)
    prepare([tmp_path / "other.txt"], data, tokenizer="byte")
    with pytest.raises(TokenFormerError) as caught:
        train(config, tmp_path / "run", resume=True, quiet=True)
    former, now = (DataDirectory.open(path).identity for path in (data_directory, data))
    for name in ("corpus_sha256", "splits.train.tokens"):
        line = f"{data}: {name}: {former[name]!r} in the checkpoint, {now[name]!r} now"
        assert line in str(caught.value)
    values = yaml.safe_load(config.to_yaml()) | {"model": None, "init_from": str(checkpoint), "steps": 1}
    after = train(RunConfig.model_validate(values), tmp_path / "new", quiet=True)
    assert after.state.next_sample == 4, "the position means nothing in other data"


def test_changed_stage_is_refused(ladder: RunConfig, make_config: MakeConfig, tmp_path: Path) -> None:
    interrupted(ladder, tmp_path / "run", 2)
    values = yaml.safe_load(ladder.to_yaml())
    values["stages"][1]["grow"]["factor"] = 1.5
    with pytest.raises(TokenFormerError, match=r"stages\.1\.grow\.factor: 2\.0 in the checkpoint, 1\.5 now"):
        train(RunConfig.model_validate(values), tmp_path / "run", resume=True, quiet=True)


def test_what_does_not_decide_the_result_may_change(make_config: MakeConfig, tmp_path: Path) -> None:
    interrupted(make_config(), tmp_path / "run", 3)
    changed = make_config(
        "data.micro_batch_size=2",
        "logging.every_steps=1",
        "checkpoint.keep_last=1",
        "evaluation.every_steps=1",
    )
    assert train(changed, tmp_path / "run", resume=True, quiet=True).state.step == 6


def test_checkpoint_of_another_model_is_refused(
    make_config: MakeConfig, tmp_path: Path, reseal: Callable[[Path], None]
) -> None:
    interrupted(make_config(), tmp_path / "run", 3)
    path = list_checkpoints(tmp_path / "run")[-1] / "config.json"
    config = json.loads(path.read_text())
    config["num_attention_heads"] = 4
    path.write_text(json.dumps(config))
    reseal(path.parent)
    with pytest.raises(
        TokenFormerError, match="another model: num_attention_heads: 4 in the checkpoint, 2 expected"
    ):
        train(make_config(), tmp_path / "run", resume=True, quiet=True)


def test_sigterm_to_the_command(make_config: MakeConfig, tmp_path: Path) -> None:
    """The process itself: it finishes its step, saves, says how to go on, and exits with 128 + 15."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_config("steps=100000", "logging.every_steps=1").to_yaml())
    out = tmp_path / "run"
    code = (
        "import typer; from tokenformer.cli.train import register; "
        "app = typer.Typer(); app.callback()(lambda: None); register(app); app()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", str(recipe), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    step = read_checkpoint(list_checkpoints(out)[-1]).state.step
    assert f"stopped by SIGTERM after step {step}" in errors
    assert "--resume" in errors
