"""What saving costs the training: mean step time without checkpoints and with one every so many steps.

    python benchmarks/checkpoint.py --model 450M --every 50 --json checkpoint.json

Sides, in turn within each round and over the same model and optimiser: ``none``; ``background``, as a run on a GPU
saves by itself (copied to page-locked memory; written, checksummed and exported meanwhile); ``at once``,
where the training waits. As in a run, the device is waited for before each save. A round's time is that of its steps
from start to end, saves included; in the background a round begins with one save under way, and ends without
waiting for its last. The first save, which takes the memory for the copies, is timed by itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from tokenformer.models.registry import build_model
from tokenformer.train.checkpoint.contents import TrainingCheckpoint
from tokenformer.train.checkpoint.folder import list_checkpoints
from tokenformer.train.checkpoint.writer import CheckpointWriter
from tokenformer.train.optimizer import named_state
from tokenformer.train.sections import CheckpointConfig
from tokenformer.train.state import TrainingState
from tokenformer.train.step import TrainStep
from train_step import SIZES, RandomTask, random_batches, stage_config, tokenformer_config

SIDES = ("none", "background", "at once")
POLICY = CheckpointConfig(keep_last=1)
WARM_UP = 5


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        trainer = Trainer(arguments.model, device, Path(folder), export=arguments.export)
        print(
            f"{machine}, torch {torch.__version__}, {arguments.model}: {trainer.parameters:,} parameters, bfloat16"
        )
        times: dict[str, list[float]] = {side: [] for side in SIDES[: 2 if arguments.no_at_once else 3]}
        for _ in range(arguments.rounds):
            for side in times:
                times[side].append(trainer.mean_step(side, arguments.steps, arguments.every))
                print(f"{side:12} {1e3 * times[side][-1]:9.2f} ms a step", flush=True)
        results = summary(times)
        for side, result in results.items():
            print(f"{side:12} {result['ms']:9.2f} ms a step, {result['of_none']:.4f} of none")
        about = {
            "first_save_seconds": trainer.first_save,
            "saved_bytes": trainer.saved_bytes(),
            **trainer.seconds(),
        }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    if arguments.json:
        written = {
            "machine": machine,
            "torch": torch.__version__,
            "arguments": vars(arguments) | {"json": None},
        }
        arguments.json.write_text(
            json.dumps({**written, **about, "results": results}, indent=2, default=str) + "\n"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SIZES, default="450M")
    parser.add_argument("--every", type=int, default=50, help="steps between two saves")
    parser.add_argument("--steps", type=int, default=150, help="of a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-at-once", action="store_true", help="leave that side out")
    parser.add_argument("--export", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--folder", type=Path, help="where to save; the system's temporary directory by default"
    )
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    return parser.parse_args()


class Trainer:
    """A model in training, with a writer for each way to save."""

    def __init__(self, name: str, device: torch.device, folder: Path, *, export: bool) -> None:
        size = SIZES[name]
        self.model = build_model(tokenformer_config(size, "l2_norm_gelu")).to(device)
        self.parameters = self.model.config.num_parameters()
        if device.type == "cuda":
            for block in self.model.blocks:
                block.compile(dynamic=False)
        self._step = TrainStep(self.model, RandomTask(), stage_config(size), device)  # type: ignore[arg-type]
        self._batches = cycle(list(random_batches(size)))
        self._device = device
        self._folder = folder
        self._card = "A benchmark." if export else None
        self._steps = 0
        self._writers = {
            side: CheckpointWriter(folder / side, device, background=side == "background")
            for side in SIDES
            if side != "none"
        }
        self._blocked: dict[str, list[float]] = {side: [] for side in self._writers}
        for _ in range(WARM_UP):
            self._step(self._batches, 0)
        begin = time.perf_counter()
        self._save("background")
        self._writers["background"].finish()
        self.first_save = time.perf_counter() - begin
        self._blocked["background"].clear()

    def mean_step(self, side: str, steps: int, every: int) -> float:
        """Seconds of a step, saves included, over ``steps`` of them."""
        if side == "background":
            self._save(side)
        self._wait()
        begin = time.perf_counter()
        for index in range(1, steps + 1):
            self._step(self._batches, 0)
            self._steps += 1
            if side != "none" and index % every == 0:
                self._save(side)
        self._wait()
        seconds = (time.perf_counter() - begin) / steps
        if side != "none":
            self._writers[side].finish()
        return seconds

    def seconds(self) -> dict[str, float]:
        """Median time for which a save held the training up, by side."""
        return {f"{side} held up": statistics.median(times) for side, times in self._blocked.items() if times}

    def saved_bytes(self) -> int:
        """Size of a checkpoint."""
        newest = list_checkpoints(self._folder / "background")[-1]
        return sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())

    def _save(self, side: str) -> None:
        self._wait()
        begin = time.perf_counter()
        moments = named_state(self.model, self._step.optimizer)
        self._steps += 1  # so that no two saves have the same name
        checkpoint = TrainingCheckpoint(self.model, moments, TrainingState(step=self._steps))
        self._writers[side].write(checkpoint, POLICY, self._card)
        self._blocked[side].append(time.perf_counter() - begin)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Median over rounds, and of the ratio to the round without saving."""
    return {
        side: {
            "ms": 1e3 * statistics.median(rounds),
            "of_none": statistics.median(t / none for t, none in zip(rounds, times["none"], strict=True)),
            "rounds_ms": [1e3 * seconds for seconds in rounds],
        }
        for side, rounds in times.items()
    }


if __name__ == "__main__":
    main()
