"""AdamW with its protocol of scaled gradients and skipped steps against torch's plain one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tokenformer.train.adamw import AdamW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if torch.cuda.is_available():
    pytestmark = pytest.mark.gpu
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6}


def make_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((5,), (70, 33), (1, 4097))
    return [nn.Parameter(torch.randn(size, generator=generator).to(DEVICE)) for size in sizes]


def groups_of(parameters: list[nn.Parameter]) -> list[dict[str, object]]:
    return [
        {"params": parameters[:1], "weight_decay": 0.0},
        {"params": parameters[1:], "weight_decay": 0.1},
    ]


def test_steps_are_torchs() -> None:
    """With gradients to divide, a step left out, a rate that moves, and a parameter that joins later."""
    ours, theirs = make_parameters(), make_parameters()
    optimizer = AdamW(groups_of(ours), **OPTIONS)
    reference = torch.optim.AdamW(groups_of(theirs), **OPTIONS)
    generator = torch.Generator().manual_seed(1)
    for index in range(8):
        skipped, scale = index == 3, 2.0**index
        gradients = [10.0**-index * torch.randn(p.shape, generator=generator).to(DEVICE) for p in ours]
        if index < 2:
            gradients[2] = None  # type: ignore[call-overload]
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 1e-2 / (1 + index)
        for a, b, gradient in zip(ours, theirs, gradients, strict=True):
            a.grad = None if gradient is None else gradient * scale
            b.grad = gradient
        optimizer.grad_scale = torch.tensor(scale, device=DEVICE)
        optimizer.found_inf = torch.tensor(float(skipped), device=DEVICE)
        before = [p.detach().clone() for p in ours]
        optimizer.step()
        if skipped:
            assert all(torch.equal(p, old) for p, old in zip(ours, before, strict=True))
            continue
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
            if a.grad is not None:
                for key, value in reference.state[b].items():
                    value, atol = value.cpu(), 1e-6 * value.abs().max().item()
                    torch.testing.assert_close(optimizer.state[a][key].cpu(), value, rtol=1e-5, atol=atol)
    assert [optimizer.state[p]["step"].item() for p in ours] == [7, 7, 5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recorded", [False, True])
def test_on_a_gpu_steps_are_those_of_torchs_fused_kernel(recorded: bool) -> None:
    """With gradients that a CUDA graph writes to one place, or new ones in each step; the host waits for nothing."""
    ours, theirs = make_parameters(), make_parameters()
    optimizer = AdamW(groups_of(ours), **OPTIONS)
    reference = torch.optim.AdamW(groups_of(theirs), fused=True, **OPTIONS)
    scale = torch.tensor(4.0, device=DEVICE)
    optimizer.grad_scale = scale
    graph = torch.cuda.CUDAGraph()
    if recorded:
        for parameter in ours:
            parameter.grad = torch.zeros_like(parameter)
        with torch.no_grad(), torch.cuda.graph(graph):
            for parameter in ours:
                parameter.grad.copy_(torch.sin(3 * parameter) * scale)
    for step in range(6):
        skipped = step == 3
        optimizer.found_inf = torch.tensor(float(skipped), device=DEVICE)
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        if recorded:
            graph.replay()
        else:
            for parameter in ours:
                parameter.grad = torch.sin(3 * parameter.detach()) * scale
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        for parameter in theirs:
            parameter.grad = torch.sin(3 * parameter.detach())
        if not skipped:
            reference.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(a.grad, b.grad * scale, rtol=1e-4, atol=1e-5)  # as it was
            assert torch.equal(optimizer.state[a]["step"], reference.state[b]["step"])
