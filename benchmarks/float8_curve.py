"""The loss of training in float8 beside that in bfloat16: the same text in the same order, the same first weights.

    python benchmarks/float8_curve.py train.jsonl --json float8_curve.json

By default 1000 steps of the 150M model, 8 x 1024 tokens each, on bytes (ids below 257 of the published vocabulary of
50,304; ``--tokenizer`` takes another), the learning rate of the published models warmed up and let down over them. The
losses are smoothed over windows of ``--window`` steps; the ratios of the sides' means are printed, and how far the
furthest after the first fifth of the steps is from 1. On a CPU both sides compute the same, as a check of the script.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from step_sides import SIZES, Size, stage_config, tokenformer_config
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.prepare import prepare
from tokenformer.language.task import LanguageModelingTask
from tokenformer.models.registry import build_model
from tokenformer.parallel.world import PROCESS
from tokenformer.train.placement import Placement
from tokenformer.train.step import TrainStep

SIDES = ("bfloat16", "float8")


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    size = SIZES[arguments.model]._replace(sequences=arguments.sequences, length=arguments.length)
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(arguments.sources, Path(folder) / "data", tokenizer=arguments.tokenizer)
        size = size._replace(vocab=max(size.vocab, data.tokenizer.vocab_size))
        sides = {side: train(side == "float8", data, size, arguments, device) for side in SIDES}
    curves = {side: found["losses"] for side, found in sides.items()}
    ratios = smoothed_ratios(curves["float8"], curves["bfloat16"], arguments.window)
    settled = ratios[len(ratios) // 5 :]
    summary = {
        "last_ratio": ratios[-1],
        "furthest_from_1": max(settled, key=lambda ratio: abs(ratio - 1)),
        "seconds": {side: found["seconds"] for side, found in sides.items()},
    }
    print_curves(curves, ratios, arguments.window)
    print(", ".join(f"{name} {value}" for name, value in summary.items()))
    if arguments.json:
        about = {
            "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "torch": torch.__version__,
            "size": size._asdict(),
        }
        settings = {
            name: getattr(arguments, name)
            for name in ("model", "norm_activation", "tokenizer", "steps", "lr", "seed", "window")
        }
        values = {**about, **settings, **summary, "ratios": ratios, "losses": curves}
        arguments.json.write_text(json.dumps(values, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sources", nargs="+", metavar="TEXT", help="text, JSON lines, as `prepare` takes them"
    )
    parser.add_argument("--tokenizer", default="byte")
    parser.add_argument("--model", choices=SIZES, default="150M")
    parser.add_argument(
        "--norm-activation",
        default="l2_norm_gelu",
        choices=("gelu", "l2_norm_gelu", "gelu_l2_norm", "softmax"),
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--sequences", type=int, default=8, help="of a step")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write curves and ratios here as well")
    return parser.parse_args()


def train(
    float8: bool, data: DataDirectory, size: Size, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Losses of every step, in nats a token."""
    stage = stage_config(
        size,
        steps=arguments.steps,
        optimizer={"lr": arguments.lr},
        precision={"float8": float8 and device.type == "cuda"},
    )
    model = build_model(tokenformer_config(size, arguments.norm_activation), seed=arguments.seed)
    task = LanguageModelingTask(data, size.length, arguments.seed)
    model = Placement(device, PROCESS, reshard_after_forward=False).place(model, stage)
    step = TrainStep(model, task, stage, device)
    batches = task.batches(lambda k: range(k * size.sequences, (k + 1) * size.sequences))
    losses: list[Tensor] = []
    begin = time.perf_counter()
    for index in range(arguments.steps):
        result = step(batches, index)
        losses.append(result.nats / result.targets)  # in memory of its own: graphs write to the same place
    found = {"losses": [round(loss, 5) for loss in torch.stack(losses).tolist()]}
    batches.close()
    del model, step
    gc.collect()
    return {**found, "seconds": time.perf_counter() - begin}


def smoothed_ratios(a: list[float], b: list[float], window: int) -> list[float]:
    """Of the sums over ``window`` steps after each other."""
    starts = range(0, len(a) - window + 1, window) or range(1)
    return [sum(a[start : start + window]) / sum(b[start : start + window]) for start in starts]


def print_curves(curves: dict[str, list[float]], ratios: list[float], window: int) -> None:
    print(f"{'steps':>11} {'bfloat16':>9} {'float8':>9} {'ratio':>8}")
    for index, ratio in enumerate(ratios):
        part = slice(index * window, (index + 1) * window)
        means = (sum(curve[part]) / len(curve[part]) for curve in (curves["bfloat16"], curves["float8"]))
        columns = " ".join(f"{mean:9.4f}" for mean in means)
        print(f"{part.start:5} -{part.stop:5} {columns} {ratio:8.5f}")


if __name__ == "__main__":
    main()
