"""A batch that grows over the first steps of a stage: exact counters, exact resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tokenformer.errors import TokenFormerError
from tokenformer.train.checkpoint.contents import read_checkpoint
from tokenformer.train.config import RunConfig
from tokenformer.train.metrics import read_metrics
from tokenformer.train.run import train

MakeConfig = Callable[..., RunConfig]
WARMUP = "data.batch_warmup={from_tokens: 16, steps: 3}"


def test_counters_are_exact(make_config: MakeConfig, tmp_path: Path) -> None:
    result = train(
        make_config(WARMUP, "logging.every_steps=1", "data.micro_batch_size=3"), tmp_path / "run", quiet=True
    )
    tokens = [line["tokens"] for line in read_metrics(result.out) if "loss" in line]
    assert tokens == [16, 48, 96, 160, 224, 288]  # 1, 2, 3, then 4 sequences of 16 tokens
    assert result.state.next_sample == 288 / 16


def test_resumed_run_is_bit_identical(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        WARMUP, "checkpoint.every_steps=2", "checkpoint.keep_last=9", "data.micro_batch_size=2"
    )
    whole = train(config, tmp_path / "run", quiet=True)
    expected = read_checkpoint(whole.checkpoint)
    for step in (6, 4):
        (whole.out / "checkpoints" / f"step-{step:08d}").rename(tmp_path / f"step-{step}")
    resumed = read_checkpoint(train(config, tmp_path / "run", resume=True, quiet=True).checkpoint)
    assert resumed.state.model_dump(exclude={"seconds"}) == expected.state.model_dump(exclude={"seconds"})
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_each_stage_has_its_own(make_config: MakeConfig, tmp_path: Path) -> None:
    stages = [{"tokens": 160}, {"steps": 3}, {"steps": 2, "data": {"batch_warmup": None}}]
    config = make_config(WARMUP, stages=stages)
    assert [stage.steps for stage in config.resolve()] == [4, 3, 2]
    result = train(config, tmp_path / "run", quiet=True)
    assert result.state.tokens == 160 + 96 + 128


@pytest.mark.parametrize("tokens", [24, 128])
def test_sizes_that_cannot_be_are_refused(make_config: MakeConfig, tokens: int) -> None:
    with pytest.raises(
        TokenFormerError, match=f"from_tokens {tokens} is not a multiple of sequence_length 16"
    ):
        make_config(f"data.batch_warmup={{from_tokens: {tokens}, steps: 3}}")
