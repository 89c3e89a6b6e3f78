"""Training on several devices against one: tokens a second, memory, and whether the loss is the same.

The steps are the trainer's own (autocast, compiled blocks, clipping, AdamW) on random tokens that are made on the fly.
With N ranks and `--micro-batch` m:

    one          one device, m sequences a step (the others wait)
    accumulated  one device, N m sequences a step in N passes: the losses that the layouts below must have
    replicate, shard   all ranks, m sequences each
    tensor       all ranks on the same N m sequences, in N passes, each with its share of every layer

    torchrun --nproc-per-node 2 benchmarks/train_parallel.py --out parallel.json
    torchrun --nproc-per-node 2 benchmarks/train_parallel.py --cases one,shard --steps 40 --out parallel.json

`--out` keeps the cases that are in it already, so that they can be measured one after another.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tokenformer.language.loss import Batch, LossSum, loss_sum
from tokenformer.models.base import LanguageModel
from tokenformer.models.registry import build_model
from tokenformer.parallel.launch import find_launch
from tokenformer.parallel.share import Share
from tokenformer.parallel.sizes import MeshSizes
from tokenformer.parallel.world import PROCESS, World, joined, meet
from tokenformer.train.config import RunConfig, StageConfig, load_run_config
from tokenformer.train.device import rank_device
from tokenformer.train.micro_batches import MicroBatches
from tokenformer.train.placement import Placement
from tokenformer.train.step import TrainStep

CASES = ("one", "accumulated", "replicate", "shard", "tensor")
_PATIENCE = 1200.0
_WARMUP = 5  # steps that compile and fill caches; not timed


@dataclass(frozen=True)
class Case:
    """What was measured in one layout; ``losses`` in nats a token for every step, from the first."""

    case: str
    ranks: int
    sequences_per_step: int
    tokens_per_second: float
    seconds_per_step: float
    peak_gib: float
    losses: list[float]


class RandomTokens:
    """A task whose sample i is drawn from seed i: small ids more often than large ones, so that there is something to
    learn."""

    def __init__(self, vocab_size: int, length: int) -> None:
        self._vocab_size, self._length = vocab_size, length

    def batches(self, micro_batches: Callable[[int], range], *, workers: int = 0) -> Iterator[Batch]:
        k = 0
        while True:
            tokens = torch.stack([self._sample(i) for i in micro_batches(k)])
            yield Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
            k += 1

    def loss(self, model: LanguageModel, batch: Batch) -> LossSum:
        return loss_sum(model, batch)

    def evaluate(
        self,
        model: LanguageModel,
        device: torch.device,
        max_tokens: int | None,
        batch_size: int | None,
        share: Share,
    ) -> dict[str, float]:
        raise NotImplementedError("nothing is evaluated here")

    def _sample(self, index: int) -> Tensor:
        uniform = torch.rand(self._length + 1, generator=torch.Generator().manual_seed(index))
        return (uniform.pow(4) * self._vocab_size).long()


def measure(
    case: str,
    config: RunConfig,
    stage: StageConfig,
    world: World,
    device: torch.device,
    sequences: int,
    passes: int,
) -> Case:
    """Train ``stage.steps`` steps of ``sequences`` sequences, each rank in ``passes`` passes, and time all but the
    first few."""
    assert config.model is not None
    placement = Placement(device, world, reshard_after_forward=config.parallel.reshard_after_forward)
    model = placement.place(build_model(config.model, seed=config.seed), stage)
    share = world.share
    per_pass = sequences // share.ranks // passes
    task = RandomTokens(config.model.vocab_size, stage.data.sequence_length)
    micro_batches = MicroBatches(0, sequences, per_pass, share.rank, share.ranks)
    step = TrainStep(model, task, stage, device, world=world)
    batches = prepared(task.batches(micro_batches), stage.steps * passes)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    losses = []
    since = time.perf_counter()
    for index in range(stage.steps):
        if index == min(_WARMUP, stage.steps - 1):
            synchronize(device)
            since = time.perf_counter()
        result = step(batches, index, passes)
        losses.append(result.nats / result.targets)
    synchronize(device)
    seconds = (time.perf_counter() - since) / (stage.steps - min(_WARMUP, stage.steps - 1))
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    tokens = sequences * stage.data.sequence_length
    return Case(
        case,
        world.sizes.world,
        sequences,
        round(tokens / seconds, 1),
        round(seconds, 4),
        round(peak, 2),
        [round(loss.item(), 6) for loss in losses],
    )


def prepared(batches: Iterator[Batch], number: int) -> Iterator[Batch]:
    """The first ``number`` batches, made before the clock runs."""
    return iter([next(batches) for _ in range(number)])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(case: str, options: argparse.Namespace, store: Any) -> Case | None:
    """Measure ``case``; None on ranks that take no part in it."""
    launch = find_launch()
    ranks, m = launch.world_size, options.micro_batch
    sizes = MeshSizes(**{case: ranks}) if case in MeshSizes._fields else MeshSizes()
    alone = case in ("one", "accumulated")
    sequences = m if case == "one" else ranks * m
    config = configure(options, sequences)
    stage, device = config.resolve()[0], rank_device(config.parallel.device, launch)
    if alone:
        found = None
        if launch.rank == 0:
            found = measure(case, config, stage, PROCESS, device, sequences, sequences // m)
        if store is not None:  # the others wait for the first
            store.set(case, "done") if launch.rank == 0 else store.wait([case])
        return found
    with joined(launch, store and store_for(store, case), sizes, device, _PATIENCE) as world:
        found = measure(case, config, stage, world, device, sequences, sequences // world.sizes.data // m)
    return found if launch.rank == 0 else None


def store_for(store: Any, case: str) -> Any:
    return torch.distributed.PrefixStore(case, store)


def configure(options: argparse.Namespace, sequences: int) -> RunConfig:
    """The recipe with ``sequences`` in a step and a short warm-up; what the command line says goes before."""
    length = load_run_config(options.recipe, options.overrides).data.sequence_length
    return load_run_config(
        options.recipe,
        [
            f"data.batch_tokens={sequences * length}",
            f"data.micro_batch_size={options.micro_batch}",
            "schedule.warmup_steps=10",
            f"steps={options.steps}",
            *options.overrides,
        ],
    )


def report(cases: dict[str, Case]) -> Table:
    """Tokens a second against one device, and the largest difference of a loss from that of one device."""
    table = Table(
        "case", "ranks", "tokens/s", "of one device", "s/step", "peak GiB", "last loss", "largest difference"
    )
    one, reference = cases.get("one"), cases.get("accumulated")
    for found in cases.values():
        ratio = f"{found.tokens_per_second / one.tokens_per_second:.2f}" if one else ""
        difference = ""
        if reference is not None and found.case != "one":
            pairs = zip(found.losses, reference.losses, strict=False)
            difference = f"{max(abs(a - b) for a, b in pairs):.2g}"
        table.add_row(
            found.case,
            str(found.ranks),
            f"{found.tokens_per_second:,.0f}",
            ratio,
            f"{found.seconds_per_step:.3f}",
            f"{found.peak_gib:.1f}",
            f"{found.losses[-1]:.4f}",
            difference,
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="fields of the recipe to change")
    root = Path(__file__).parents[1]
    parser.add_argument("--recipe", type=Path, default=root / "recipes" / "published" / "pile-450m.yaml")
    parser.add_argument("--cases", default=",".join(CASES), help="which of them, with commas")
    parser.add_argument("--micro-batch", type=int, default=16, help="sequences in one pass of one rank")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file; cases in it are kept")
    options = parser.parse_intermixed_args()
    chosen = options.cases.split(",")
    if unknown := set(chosen) - set(CASES):
        sys.exit(f"--cases: found {', '.join(sorted(unknown))}, expected some of {', '.join(CASES)}")
    measured: dict[str, Case] = {}
    if options.out.exists():
        measured = {v["case"]: Case(**v) for v in json.loads(options.out.read_text())["cases"]}
    launch = find_launch()
    with meet(launch, _PATIENCE) as store:
        for case in chosen:
            found = run(case, options, store)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if found is not None:
                measured[case] = found
                facts = {"torch": torch.__version__, "device": device_name(), "recipe": options.recipe.name}
                facts |= {"overrides": options.overrides, "micro_batch": options.micro_batch}
                facts |= {"cases": [asdict(value) for value in measured.values()]}
                options.out.write_text(json.dumps(facts, indent=1) + "\n")
    if launch.rank == 0:
        Console(width=120).print(report(measured))


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
