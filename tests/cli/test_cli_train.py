"""``tokenformer train`` as users run it."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tokenformer.language.prepare import prepare

RECIPE = """
model: {architecture: tokenformer, vocab_size: 384, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
  qkv_param_tokens: 8, proj_param_tokens: 8, ffn_param_tokens: 16, max_position_embeddings: 32}
data: {path: data, sequence_length: 16, batch_tokens: 64}
logging: {tensorboard: false}
stages:
- steps: 3
- {steps: 2, grow: {factor: 2}}
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a recipe and its data, paths as a user writes them."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n".join(f"{i} times {i} is {i * i}" for i in range(200)))
    prepare(["text.txt"], "data")
    Path("tiny.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.usefixtures("workplace")
class TestTrain:
    def test_run_at_its_default_place(self, run_command: Any) -> None:
        result = run_command("train", "tiny.yaml")
        assert result.code == 0, result.err
        assert "starts at step 0 with TokenFormer" in result.out
        assert "logits moved by" in result.out
        assert Path("runs/tiny/model/model.safetensors").is_file()
        assert Path("runs/tiny/config.yaml").is_file()

    def test_overrides_and_resume(self, run_command: Any) -> None:
        arguments = ("train", "tiny.yaml", "optimizer.lr=3e-4", "stages.1.steps=1", "--out", "out")
        assert run_command(*arguments).code == 0
        assert "lr: 0.0003" in Path("out/config.yaml").read_text()
        again = run_command(*arguments)
        assert again.code == 2
        assert "a run is already there; go on with --resume" in again.err
        resumed = run_command(*arguments, "--resume")
        assert resumed.code == 0
        assert "this run is finished (step 4)" in resumed.out
        changed = run_command(
            "train", "tiny.yaml", "optimizer.lr=1e-4", "stages.1.steps=1", "--out", "out", "--resume"
        )
        assert changed.code == 2
        assert "optimizer.lr: 0.0003 in the checkpoint, 0.0001 now" in changed.err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nothing.yaml"], "nothing.yaml: no such file; expected a recipe"),
            (["tiny.yaml", "optimizer.lrr=1"], "optimizer.lrr: unknown field; did you mean 'lr'?"),
            (
                ["tiny.yaml", "model.num_attention_heads=3"],
                "num_attention_heads 3 does not divide hidden_size 16",
            ),
            (["tiny.yaml", "model.qkv_param_tokens=0"], "model.qkv_param_tokens: found 0"),
            (["tiny.yaml", "model.rotary_pct=0.4"], "expected an even number"),
            (["tiny.yaml", "data.path=elsewhere"], "elsewhere: no such directory"),
            (["tiny.yaml", "model.vocab_size=512"], "the model has 512, expected 384"),
            (["tiny.yaml", "optimizer.frozen_roles=[mlp]"], "'mlp' is no role of this model"),
            (["tiny.yaml", "lr"], "lr: expected field=value"),
        ],
    )
    def test_bad_input(self, run_command: Any, arguments: list[str], message: str) -> None:
        result = run_command("train", *arguments)
        assert result.code == 2
        assert message in " ".join(result.err.split())
        assert "Traceback" not in result.err
        assert not Path("runs").exists()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
    def test_unreachable_device(self, run_command: Any) -> None:
        result = run_command("train", "tiny.yaml", "parallel.device=cuda")
        assert result.code == 2
        assert "offers no CUDA device" in result.err

    def test_truncated_data(self, run_command: Any) -> None:
        store = Path("data/train.bin")
        store.write_bytes(store.read_bytes()[:-10])
        result = run_command("train", "tiny.yaml")
        assert result.code == 2
        assert "train.bin" in result.err
        assert not Path("runs").exists()

    def test_interruption_exits_with_the_signal(self, run_command: Any) -> None:
        from tokenformer.train.step import StepResult, TrainStep

        take_step = TrainStep.__call__

        def step(self: TrainStep, batches: Iterator[Any], stage_step: int, *rest: int) -> StepResult:
            signal.raise_signal(signal.SIGINT)
            return take_step(self, batches, stage_step, *rest)

        with mock.patch.object(TrainStep, "__call__", step):
            result = run_command("train", "tiny.yaml")
        assert result.code == 128 + signal.SIGINT
        assert "stopped by SIGINT after step 1" in result.err
        assert run_command("train", "tiny.yaml", "--resume").code == 0


def test_help_has_examples(run_command: Any) -> None:
    result = run_command("train", "--help")
    assert result.code == 0
    assert "tokenformer train recipes/ladder.yaml --resume" in " ".join(result.out.split())
