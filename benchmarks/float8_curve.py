"""The loss of training in float8 beside that in bfloat16: the same text in the same order, the same first weights.

    python benchmarks/float8_curve.py train.jsonl --seeds 0 1 2 --json float8_curve.json

By default 1000 steps of the 150M model, 8 x 1024 tokens each, on bytes (ids below 257 of the published vocabulary of
50,304; ``--tokenizer`` takes another), the learning rate of the published models warmed up and let down over them. The
losses are smoothed over windows of ``--window`` steps; the ratios of the sides' means are printed for each seed, the
one furthest from 1 after the first fifth of the steps, and their mean over the seeds with its standard error. On a CPU
both sides compute the same, as a check of the script.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
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
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(arguments.sources, Path(folder) / "data", tokenizer=arguments.tokenizer)
        size = size._replace(vocab=max(size.vocab, data.tokenizer.vocab_size))
        for seed in arguments.seeds:
            runs.append({"seed": seed, **compare(data, size, seed, arguments, device)})
            print_run(runs[-1], arguments.window)
    summary = summarized([run["ratios"] for run in runs])
    print_summary(summary, arguments.window)
    if arguments.json:
        about = {
            "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "torch": torch.__version__,
            "size": size._asdict(),
        }
        names = ("model", "norm_activation", "tokenizer", "steps", "lr", "window")
        settings = {name: getattr(arguments, name) for name in names}
        values = {**about, **settings, **summary, "runs": runs}
        arguments.json.write_text(json.dumps(values, indent=1) + "\n")


def compare(
    data: DataDirectory, size: Size, seed: int, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Both sides with one seed: means of windows of steps, in nats a token, their ratios, and seconds."""
    sides = {side: train(side == "float8", data, size, seed, arguments, device) for side in SIDES}
    means = {side: smoothed(found["losses"], arguments.window) for side, found in sides.items()}
    ratios = [a / b for a, b in zip(means["float8"], means["bfloat16"], strict=True)]
    settled = ratios[len(ratios) // 5 :]
    return {
        "furthest_from_1": max(settled, key=lambda ratio: abs(ratio - 1)),
        "seconds": {side: found["seconds"] for side, found in sides.items()},
        "ratios": ratios,
        "means": means,
    }


def summarized(ratios: list[list[float]]) -> dict[str, list[float]]:
    """Mean over the seeds of each window's ratio, and its standard error (0 with one seed)."""
    columns = list(zip(*ratios, strict=True))
    spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
    return {
        "mean_ratios": [statistics.mean(column) for column in columns],
        "standard_errors": [value / len(ratios) ** 0.5 for value in spread],
    }


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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one after another")
    parser.add_argument("--window", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write curves and ratios here as well")
    return parser.parse_args()


def train(
    float8: bool,
    data: DataDirectory,
    size: Size,
    seed: int,
    arguments: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Losses of every step, in nats a token."""
    stage = stage_config(
        size,
        steps=arguments.steps,
        optimizer={"lr": arguments.lr},
        precision={"float8": float8 and device.type == "cuda"},
    )
    model = build_model(tokenformer_config(size, arguments.norm_activation), seed=seed)
    task = LanguageModelingTask(data, size.length, seed)
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
    torch.compiler.reset()
    gc.collect()
    return {**found, "seconds": time.perf_counter() - begin}


def smoothed(losses: list[float], window: int) -> list[float]:
    """Means over ``window`` steps after each other; of fewer steps over all of them."""
    starts = range(0, len(losses) - window + 1, window) or range(1)
    return [statistics.mean(losses[start : start + window]) for start in starts]


def print_run(run: dict[str, Any], window: int) -> None:
    print(f"seed {run['seed']}\n{'steps':>11} {'bfloat16':>9} {'float8':>9} {'ratio':>8}")
    columns = zip(run["means"]["bfloat16"], run["means"]["float8"], run["ratios"], strict=True)
    for index, (bfloat16, float8, ratio) in enumerate(columns):
        print(f"{index * window:5} -{(index + 1) * window:5} {bfloat16:9.4f} {float8:9.4f} {ratio:8.5f}")
    print(f"furthest_from_1 {run['furthest_from_1']:.5f}, seconds {run['seconds']}", flush=True)


def print_summary(summary: dict[str, list[float]], window: int) -> None:
    print(f"all seeds\n{'steps':>11} {'ratio':>9} {'error':>9}")
    for index, both in enumerate(zip(summary["mean_ratios"], summary["standard_errors"], strict=True)):
        print(f"{index * window:5} -{(index + 1) * window:5} {both[0]:9.5f} {both[1]:9.5f}")


if __name__ == "__main__":
    main()
