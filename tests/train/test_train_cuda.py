"""Training on a CUDA device: compiled as plain, exact resume, and no waiting for the device in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tokenformer.language.loss import Batch, loss_sum
from tokenformer.models.registry import build_model
from tokenformer.train.config import RunConfig
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
