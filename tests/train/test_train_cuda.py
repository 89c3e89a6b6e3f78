"""Training on a CUDA device: compiled as plain, exact resume, and no waiting for the device in between."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tokenformer.language.loss import Batch, loss_sum
from tokenformer.models.registry import build_model
from tokenformer.train import loss_scale
from tokenformer.train.checkpoint.contents import read_checkpoint
from tokenformer.train.checkpoint.folder import list_checkpoints
from tokenformer.train.config import RunConfig
from tokenformer.train.metrics import read_metrics
from tokenformer.train.run import train
from tokenformer.train.step import TrainStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MakeConfig = Callable[..., RunConfig]


def _gradients(config: RunConfig, *, dtype: torch.dtype, compiled: bool) -> dict[str, torch.Tensor]:
    assert config.model is not None
    torch.compiler.reset()
    model = build_model(config.model).cuda()
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)
    tokens = torch.randint(384, (8, 32), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        loss = loss_sum(model, Batch(tokens, tokens.roll(-1, 1)))
    loss.nats.backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def test_compiled_bfloat16_gradients_are_those_of_the_definition(make_config: MakeConfig) -> None:
    config = make_config(
        "model={architecture: tokenformer, vocab_size: 384, hidden_size: 64, "
        "num_hidden_layers: 3, num_attention_heads: 2, qkv_param_tokens: 64, "
        "proj_param_tokens: 64, ffn_param_tokens: 256, max_position_embeddings: 32}"
    )
    exact = _gradients(config, dtype=torch.float32, compiled=False)
    compiled = _gradients(config, dtype=torch.bfloat16, compiled=True)
    for name, gradient in exact.items():
        assert (compiled[name] - gradient).norm() <= 0.1 * gradient.norm(), name


def test_steps_do_not_wait_for_the_device(make_config: MakeConfig, tmp_path: Path) -> None:
    take_step = TrainStep.__call__

    def watched(self: TrainStep, *arguments: object) -> object:
        torch.cuda.set_sync_debug_mode("error" if self.optimizer.state else "default")
        try:
            return take_step(self, *arguments)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", watched)
        train(make_config("precision.compile=false"), tmp_path / "run", quiet=True)


def test_float16_finds_its_scale_and_resumes(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that overflow are left out until the scale fits; a resumed run has the scale and what came of it."""
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 2.0**40)
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 8)
    config = make_config(
        "precision={dtype: float16, compile: false, deterministic: true}",
        "checkpoint={every_steps: 20, keep_last: 9, asynchronous: false}",
        "steps=60",
    )
    whole = train(config, tmp_path / "whole", quiet=True)
    assert 3 < whole.state.skipped_steps < 40
    losses = [line["loss"] for line in read_metrics(whole.out) if line.get("loss") is not None]
    assert losses[-1] < losses[0] - 0.5
    shutil.copytree(whole.out, tmp_path / "run")
    for path in list_checkpoints(tmp_path / "run")[1:]:
        shutil.rmtree(path)
    resumed = train(config, tmp_path / "run", resume=True, quiet=True)
    one, other = read_checkpoint(whole.checkpoint), read_checkpoint(resumed.checkpoint)
    assert (tmp_path / "run") in resumed.checkpoint.parents
    names = ("loss_scale", "loss_scale_steps", "skipped_steps", "next_sample", "step")
    assert [getattr(one.state, name) for name in names] == [getattr(other.state, name) for name in names]
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name]), name
        assert torch.equal(one.moments[name]["exp_avg"], other.moments[name]["exp_avg"]), name
