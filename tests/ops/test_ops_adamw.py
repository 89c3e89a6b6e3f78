"""The update of many tensors at once against torch's AdamW: in the interpreter, and on a GPU against its fused one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenformer.ops import adamw as ops_adamw
from tokenformer.ops.adamw import adamw_update, applies

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
SIZES = (1, 3, 1023, 4096, 100_000)
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


class Updated:
    """Parameters of some sizes with their moments, at odd offsets into their storage if ``shift`` is not 0."""

    def __init__(self, sizes: Sequence[int], shift: int = 0) -> None:
        self.shift = shift
        generator = torch.Generator().manual_seed(0)
        self.parameters = [self.place(torch.randn(size, generator=generator)) for size in sizes]
        self.exp_avgs, self.exp_avg_sqs = (
            [self.place(torch.zeros(size)) for size in sizes] for _ in range(2)
        )
        self.steps = [torch.zeros((), device=DEVICE) for _ in sizes]

    def place(self, values: Tensor) -> Tensor:
        whole = torch.full((len(values) + self.shift + 4,), float("nan"), device=DEVICE)
        part = whole[self.shift : self.shift + len(values)]
        part.copy_(values)
        return part

    def everything(self) -> list[Tensor]:
        return [*self.parameters, *self.exp_avgs, *self.exp_avg_sqs, *self.steps]

    def take(self, gradients: Sequence[Tensor], **options: Any) -> None:
        placed = [self.place(gradient) for gradient in gradients]
        before = [gradient.clone() for gradient in placed]
        adamw_update(self.parameters, placed, self.exp_avgs, self.exp_avg_sqs, self.steps, **options)
        assert all(torch.equal(a, b) for a, b in zip(placed, before, strict=True))

    def check(self, reference: torch.optim.AdamW, rtol: float = 1e-6) -> None:
        parameters = [p for group in reference.param_groups for p in group["params"]]
        close(self.parameters, parameters, rtol)
        for key, found in (("exp_avg", self.exp_avgs), ("exp_avg_sq", self.exp_avg_sqs)):
            close(found, [reference.state[p][key] for p in parameters], rtol)
        assert [s.item() for s in self.steps] == [reference.state[p]["step"].item() for p in parameters]
        for tensor in (*self.parameters, *self.exp_avgs, *self.exp_avg_sqs):
            around = tensor.new_empty(0).set_(tensor.untyped_storage())
            assert around.isnan().sum() == self.shift + 4  # nothing beside the tensor was written


def close(found: Sequence[Tensor], expected: Sequence[Tensor], rtol: float) -> None:
    """Relative to the element, or, where sums cancel, to the largest."""
    for a, b in zip(found, expected, strict=True):
        atol = rtol * b.abs().max().item()
        torch.testing.assert_close(a.cpu(), b.detach().float().cpu(), rtol=rtol, atol=atol)


def make_reference(updated: Updated, **options: Any) -> torch.optim.AdamW:
    parameters = [nn.Parameter(p.double().cpu()) for p in updated.parameters]
    return torch.optim.AdamW(parameters, **options)


def gradients_of(step: int, sizes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [10.0**-step * torch.randn(size, generator=generator) for size in sizes]


def step_reference(reference: torch.optim.AdamW, gradients: Sequence[Tensor]) -> None:
    parameters = [p for group in reference.param_groups for p in group["params"]]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.to(parameter)
    reference.step()


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_the_definition(weight_decay: float, shift: int) -> None:
    updated = Updated(SIZES, shift)
    reference = make_reference(updated, weight_decay=weight_decay, **OPTIONS)
    for step in range(4):
        gradients = gradients_of(step, SIZES)
        updated.take(gradients, weight_decay=weight_decay, **OPTIONS)
        step_reference(reference, gradients)
        updated.check(reference)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
def test_corrections_of_the_first_steps_are_exact(betas: tuple[float, float]) -> None:
    updated = Updated((64,))
    options = OPTIONS | {"betas": betas, "weight_decay": 0.0}
    reference = make_reference(updated, **options)
    for step in range(3):
        gradients = gradients_of(step, (64,))
        updated.take(gradients, **options)
        step_reference(reference, gradients)
        updated.check(reference)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_gradients_are_divided_and_steps_left_out() -> None:
    updated = Updated(SIZES)
    options = OPTIONS | {"weight_decay": 0.1}
    reference = make_reference(updated, **options)
    for step in range(5):
        gradients = gradients_of(step, SIZES)
        left_out = step in (0, 3)
        scale, found_inf = (torch.tensor(x, device=DEVICE) for x in (3.0 * 2.0**step, float(left_out)))
        before = [tensor.clone() for tensor in updated.everything()]
        scaled = [gradient * scale.cpu() for gradient in gradients]
        if left_out:
            scaled[-1][7] = float("inf")
        updated.take(scaled, grad_scale=scale, found_inf=found_inf, **options)
        if left_out:
            assert all(torch.equal(a, b) for a, b in zip(updated.everything(), before, strict=True))
        else:
            step_reference(reference, gradients)
            updated.check(reference)


def test_tensors_of_all_kinds_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aligned, not aligned, of odd size, empty, and more tensors than one program has steps for."""
    monkeypatch.setattr(ops_adamw, "BLOCK", 128)
    monkeypatch.setattr(ops_adamw, "CHUNK", 256)
    count = ops_adamw._STEPS_BLOCK // 2 + 3
    aligned, shifted = Updated([0, 8, 4099] + [4] * count), Updated([0, 8, 4099] + [4] * count, 3)
    merged = Updated(())
    for name in ("parameters", "exp_avgs", "exp_avg_sqs", "steps"):
        setattr(
            merged,
            name,
            [t for pair in zip(*(getattr(u, name) for u in (aligned, shifted)), strict=True) for t in pair],
        )
    reference = make_reference(merged, weight_decay=0.1, **OPTIONS)
    gradients = gradients_of(0, [len(p) for p in merged.parameters])
    placed = [(shifted if index % 2 else aligned).place(g) for index, g in enumerate(gradients)]
    versions = [p._version for p in merged.parameters]
    adamw_update(
        merged.parameters,
        placed,
        merged.exp_avgs,
        merged.exp_avg_sqs,
        merged.steps,
        weight_decay=0.1,
        **OPTIONS,
    )
    step_reference(reference, gradients)
    close(merged.parameters[2:], reference.param_groups[0]["params"][2:], 1e-6)
    assert all(step == 1 for step in merged.steps)
    assert all(p._version > version for p, version in zip(merged.parameters, versions, strict=True))


def test_only_empty_tensors() -> None:
    updated = Updated((0, 0))
    updated.take(gradients_of(0, (0, 0)), weight_decay=0.1, **OPTIONS)
    assert all(step == 1 for step in updated.steps)


def test_results_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = Updated((10_000,)), Updated((10_000,))
    gradients = gradients_of(0, (10_000,))
    whole.take(gradients, weight_decay=0.1, **OPTIONS)
    monkeypatch.setattr(ops_adamw, "BLOCK", 128)
    monkeypatch.setattr(ops_adamw, "CHUNK", 384)
    cut.take(gradients, weight_decay=0.1, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(whole.everything(), cut.everything(), strict=True))


def test_what_it_serves() -> None:
    x, step = torch.zeros(4, 4, device=DEVICE), torch.zeros((), device=DEVICE)
    assert applies([x], [x], steps=[step]) == ON_GPU
    assert not applies([x.cpu()], [x.cpu()], steps=[step.cpu()])
    for other in (x.bfloat16(), x.double(), x.new_zeros(4, 8)[:, ::2], x.new_zeros(4, 3), x.half().cpu()):
        assert not applies([x, x], [x, other], steps=[step, step])
    assert not applies([x, x], [x, x], steps=[step, step.double()])


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_on_a_gpu_it_is_torchs_fused(weight_decay: float) -> None:
    sizes = (*SIZES, 1536 * 1536, 3 * 2**20 + 1)
    updated = Updated(sizes)
    parameters = [nn.Parameter(p.clone()) for p in updated.parameters]
    reference = torch.optim.AdamW(parameters, fused=True, weight_decay=weight_decay, **OPTIONS)
    scale = torch.tensor(7.0, device=DEVICE)
    reference.grad_scale, reference.found_inf = scale, torch.tensor(0.0, device=DEVICE)  # type: ignore[attr-defined]
    for step in range(4):
        scaled = [7 * gradient for gradient in gradients_of(step, sizes)]
        updated.take(
            scaled, weight_decay=weight_decay, grad_scale=scale, found_inf=reference.found_inf, **OPTIONS
        )
        step_reference(reference, scaled)
        updated.check(reference, rtol=1e-5)
