"""Memory of training the published sizes on a GPU: measured against the prediction of ``tokenformer inspect``.

    python benchmarks/memory.py --json memory.json
    python benchmarks/memory.py --models pile-450m --micro-batch-size 8 --modes full --eager

Each case runs in a process of its own: fresh weights, three optimiser steps of two forward passes each on random tokens
(the second step on allocates nothing new that stays), then ``torch.cuda.max_memory_allocated`` of the last two.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tokenformer.language.loss import Batch, loss_sum
from tokenformer.models.registry import ModelConfig, build_model
from tokenformer.train.activation_checkpointing import apply_activation_checkpointing
from tokenformer.train.config import StageConfig, load_run_config
from tokenformer.train.memory import stage_setup, training_memory
from tokenformer.train.step import TrainStep

RECIPES = Path(__file__).parents[1] / "recipes" / "published"
MODELS = {"pile-150m": 16, "pile-450m": 16, "pile-900m": 8, "pile-1.5b": 4}
"""Sequences in one forward pass of each."""


class RandomTokens:
    """A task of random tokens, [b, t]."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def batches(self, sequences: int, length: int) -> Iterator[Batch]:
        while True:
            tokens = torch.randint(self.vocab_size, (sequences, length + 1))
            yield Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def loss(self, model: Any, batch: Batch) -> Any:
        return loss_sum(model, batch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--modes", nargs="+", default=["none", "selective", "full"])
    parser.add_argument(
        "--recompute", default="block", choices=["block", "scores"], help="what blocks compute again"
    )
    parser.add_argument("--optimizers", nargs="+", default=["adamw"], choices=["adamw", "muon"])
    parser.add_argument("--micro-batch-size", type=int, help="instead of 16, 16, 8 and 4")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(**json.loads(arguments.case))))
        return
    results = [run_case(arguments, *case) for case in cases(arguments)]
    if arguments.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        header = {"device": device, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({**header, "results": results}, indent=2) + "\n")


def cases(arguments: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Model, checkpointing mode and optimiser of each case."""
    return [(m, mode, o) for m in arguments.models for mode in arguments.modes for o in arguments.optimizers]


def run_case(arguments: argparse.Namespace, model: str, mode: str, optimizer: str) -> dict[str, Any]:
    """Measure in a fresh process, and print a line."""
    case = {
        "model": model,
        "mode": mode,
        "recompute": arguments.recompute,
        "optimizer": optimizer,
        "micro_batch_size": arguments.micro_batch_size or MODELS[model],
        "dtype": arguments.dtype,
        "compiled": not arguments.eager,
    }
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        result = case | {"error": done.stderr.strip().splitlines()[-1][:300]}
        print(f"{model:10} {mode:9} {optimizer:5} failed: {result['error']}", flush=True)
        return result
    result = case | json.loads(done.stdout.splitlines()[-1])
    measured, predicted = result["measured"], result["predicted"]["peak"]
    print(
        f"{model:10} {mode:9} {optimizer:5} {result['micro_batch_size']:3} x {result['sequence_length']}  measured "
        f"{measured / 2**30:7.2f} GiB  predicted {predicted / 2**30:7.2f} GiB  {predicted / measured - 1:+.1%}",
        flush=True,
    )
    return result


def measure(
    model: str, mode: str, recompute: str, optimizer: str, micro_batch_size: int, dtype: str, compiled: bool
) -> dict[str, Any]:
    """Bytes measured and predicted for one case."""
    stage, config = make_stage(model, mode, recompute, optimizer, micro_batch_size, dtype)
    setup = stage_setup(stage, dtype=dtype, compiled=compiled, device_type="cuda")
    device = torch.device("cuda")
    network = build_model(config).to(device).train()
    apply_activation_checkpointing(network, stage.activation_checkpointing)
    if compiled:
        for block in network.blocks:
            block.compile(dynamic=False)
    task = RandomTokens(config.vocab_size)
    step = TrainStep(network, task, stage, device)  # type: ignore[arg-type]
    batches = task.batches(micro_batch_size, stage.data.sequence_length)
    step(batches, 0, 2)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for number in (1, 2):
        step(batches, number, 2)
    torch.cuda.synchronize()
    return {
        "sequence_length": stage.data.sequence_length,
        "parameters": config.num_parameters(),
        "measured": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "predicted": training_memory(config, setup)._asdict(),
    }


def make_stage(
    model: str, mode: str, recompute: str, optimizer: str, micro_batch_size: int, dtype: str
) -> tuple[StageConfig, ModelConfig]:
    """The stage of a published recipe, with two forward passes a step."""
    path = RECIPES / f"{model}.yaml"
    length = load_run_config(path).data.sequence_length
    config = load_run_config(
        path,
        [
            f"data.micro_batch_size={micro_batch_size}",
            f"data.batch_tokens={2 * micro_batch_size * length}",
            f"optimizer.name={optimizer}",
            f"activation_checkpointing.mode={mode}",
            f"activation_checkpointing.recompute={recompute}",
            f"precision.dtype={dtype}",
        ],
    )
    assert config.model is not None
    return config.resolve()[0], config.model


if __name__ == "__main__":
    main()
