"""Passes of a step as CUDA graphs: when they are recorded, when not, and that the steps are those without."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tokenformer.language.loss import Batch, loss_sum
from tokenformer.models.registry import build_model
from tokenformer.train.config import RunConfig
from tokenformer.train.cuda_graphs import WARM_UP, CudaGraphs
from tokenformer.train.step import StepResult, TrainStep

MakeConfig = Callable[..., RunConfig]


class Numbers(NamedTuple):
    inputs: Tensor
    documents: Tensor | None = None


class Repeated:
    """Stands for a graph where there is no device: work again, its results at the place of the first time."""

    def __init__(self, work: Callable[[], None], parameters: Sequence[nn.Parameter]) -> None:
        self._work, self._parameters = work, parameters
        work()
        self._places = [p.grad for p in parameters]
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for parameter in self._parameters:
            parameter.grad = None
        self._work()
        for parameter, place in zip(self._parameters, self._places, strict=True):
            if place is not None and parameter.grad is not place:
                place.copy_(parameter.grad)

    def pool(self) -> int:
        return 1


class Passes:
    """A model of two parameters, one of them without gradient, its graphs, and what was recorded with which pool."""

    def __init__(self) -> None:
        self.used, self.unused = (nn.Parameter(torch.ones(3)) for _ in range(2))
        self.parameters = [self.used, self.unused]
        self.recorded: list[tuple[Repeated, Any]] = []
        self.runs = 0
        self.graphs = CudaGraphs(self.parameters, torch.device("cpu"), self.record)

    def record(self, work: Callable[[], None], pool: Any) -> Repeated:
        self.recorded.append((Repeated(work, self.parameters), pool))
        return self.recorded[-1][0]

    def run_pass(self, batch: Numbers, nats: Tensor, targets: Tensor) -> None:
        loss = (batch.inputs @ self.used).sum()
        loss.backward()
        nats += loss.detach()
        targets += len(batch.inputs)

    def step(self, *batches: Numbers) -> tuple[Tensor, Tensor] | None:
        for parameter in self.parameters:
            parameter.grad = None
        return self.graphs.run(batches, self.run_pass)

    def check(self, *batches: Numbers) -> None:
        sums = self.step(*batches)
        assert sums is not None
        inputs = torch.cat([batch.inputs for batch in batches])
        torch.testing.assert_close(self.used.grad, inputs.sum(0))
        torch.testing.assert_close(sums[0], inputs.sum())
        assert sums[1] == len(inputs)
        assert self.unused.grad is None


def numbers(rows: int = 2) -> Numbers:
    return Numbers(torch.randn(rows, 3))


def test_steps_of_one_form_are_recorded_after_the_first() -> None:
    passes = Passes()
    for _ in range(WARM_UP):
        assert passes.step(numbers()) is None
    assert not passes.recorded
    for _ in range(3):
        passes.check(numbers())
    assert [(graph.replays, pool) for graph, pool in passes.recorded] == [(3, None)]


def test_further_passes_add_up_and_share_the_pool() -> None:
    passes = Passes()
    for _ in range(WARM_UP):
        assert passes.step(numbers(), numbers()) is None
    passes.check(numbers(), numbers(), numbers())
    passes.check(numbers())
    passes.check(numbers(), numbers())
    assert [(graph.replays, pool) for graph, pool in passes.recorded] == [(3, None), (3, 1)]


def test_other_forms_run_one_by_one() -> None:
    passes = Passes()
    for _ in range(WARM_UP):
        passes.step(numbers())
    passes.check(numbers())
    assert passes.step(numbers(), numbers(1)) is None  # a shorter last pass: the graph is kept
    passes.check(numbers())
    assert passes.step(numbers(1)) is None  # all of another form: a new beginning
    with_documents = Numbers(torch.randn(1, 3), torch.zeros(1))
    assert passes.step(with_documents) is None
    for _ in range(WARM_UP):
        assert passes.step(numbers()) is None
    passes.check(numbers())
    assert len(passes.recorded) == 2


def test_what_cannot_be_recorded_runs_without() -> None:
    passes = Passes()

    def refuse(work: Callable[[], None], pool: Any) -> Repeated:
        work()
        raise RuntimeError("operation not permitted when stream is capturing")

    passes.graphs._record_graph = refuse
    for _ in range(WARM_UP):
        passes.step(numbers())
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph.*not permitted"):
        assert passes.step(numbers()) is None
    assert passes.used.grad is None
    assert passes.step(numbers()) is None


class RandomTask:
    def loss(self, model: Any, batch: Batch) -> Any:
        return loss_sum(model, batch)


def random_batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(384, (count, 4, 17), generator=generator)
    return [Batch(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_twenty_steps_are_those_without_graphs(make_config: MakeConfig, accumulation: int, name: str) -> None:
    def run(cuda_graphs: bool) -> tuple[list[StepResult], TrainStep]:
        torch.compiler.reset()
        config = make_config(f"precision.cuda_graphs={cuda_graphs}", f"optimizer.name={name}")
        assert config.model is not None
        model = build_model(config.model).cuda()
        for block in model.blocks:
            block.compile(dynamic=False)
        step = TrainStep(model, RandomTask(), config.resolve()[0], torch.device("cuda", 0))  # type: ignore[arg-type]
        batches = iter(random_batches(20 * accumulation))
        return [step(batches, index, accumulation) for index in range(20)], step

    plain, without = run(False)
    graphed, step = run(True)
    assert step.recorded_memory > 0
    assert without.recorded_memory == 0
    for found, expected in zip(graphed, plain, strict=True):
        assert found.targets == expected.targets == 4 * 16 * accumulation
        assert math.isclose(found.nats, expected.nats, rel_tol=2e-3)
        assert math.isclose(found.grad_norm, expected.grad_norm, rel_tol=3e-2)
    assert plain[-1].nats < plain[0].nats
    for a, b in zip(step.parameters, without.parameters, strict=True):
        assert (a - b).norm() <= 0.02 * b.norm()
