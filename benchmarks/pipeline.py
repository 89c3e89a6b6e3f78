"""The training pipeline end to end: batches of tensors as the training loop gets them.

    python benchmarks/pipeline.py --json pipeline.json

Sides, all in one run and taken in turn within each repeat, from a warm page cache: windows of one data directory, a
weighted mixture of three, whole documents packed, and, to compare, the loop that most training scripts have (rows at
random places of a memory map, stacked: no epochs, no resume, no checks). Then, for a store of 10 billion tokens (a
sparse file) in 12.5 million documents: the time from the directory to the first batch, and the same at sample 10
million. Numbers are medians over the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenformer.files import write_json
from tokenformer.language.data_directory import DATASET_FILE, DataDirectory
from tokenformer.language.data_mixture import DataMixture
from tokenformer.language.prepare import prepare
from tokenformer.language.store import HEADER, MAGIC, VERSION
from tokenformer.language.task import LanguageModelingTask
from tokenformer.train.micro_batches import MicroBatches

TOKENS_A_DOCUMENT = 800
BATCH = 16
Batches = Callable[[int], Iterator[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--tokens", type=float, default=1e8, help="of each of the three data directories")
    parser.add_argument("--large-tokens", type=float, default=1e10, help="of the sparse store")
    parser.add_argument("--batches", type=int, default=200, help=f"of {BATCH} sequences, in each repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--workers", type=int, default=0, help="data.num_workers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "million_tokens_per_second": throughput(Path(folder), arguments),
            "seconds_to_first_batch": first_batch(Path(folder), arguments),
        }
    print_results(results, arguments)
    if arguments.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
        }
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        arguments.json.write_text(json.dumps({**machine, **settings, **results}, indent=2) + "\n")


def throughput(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Million tokens a second of each side."""
    t, tokens = arguments.sequence_length, int(arguments.tokens)
    parts = [make_directory(folder / f"part{seed}", tokens, seed) for seed in range(3)]
    mixture = DataMixture(list(zip(parts, (0.5, 0.3, 0.2), strict=True)))

    def batches_of(task: LanguageModelingTask) -> Batches:
        return lambda start: task.batches(MicroBatches(start, BATCH, BATCH), workers=arguments.workers)

    sides: dict[str, Batches] = {
        "windows": batches_of(LanguageModelingTask(parts[0], t, 0)),
        "mixture": batches_of(LanguageModelingTask(mixture, t, 0)),
        "documents": batches_of(LanguageModelingTask(parts[0], t, 0, packing="documents")),
        "usual loop": lambda start: usual_loop(parts[0].path / "train.bin", t, start),
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(arguments.repeats + 1):  # the first repeat warms up
        for name, batches in sides.items():
            with closing(batches(repeat * arguments.batches * BATCH)) as iterator:  # type: ignore[type-var]
                next(iterator)  # threads and processes have started
                begin = time.perf_counter()
                seen = sum(batch[0].numel() for batch in islice(iterator, arguments.batches))
                speeds[name].append(seen / (time.perf_counter() - begin) / 1e6)
    return {name: statistics.median(found[1:]) for name, found in speeds.items()}


def first_batch(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds from the path of a large data directory to its first batch."""
    path = make_directory(folder / "large", int(arguments.large_tokens), 3, sparse=True).path
    cases = {
        "windows": (0, "windows"),
        "windows, sample 10 million": (10_000_000, "windows"),
        "documents": (0, "documents"),
        "documents, sample 10 million": (10_000_000, "documents"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(max(arguments.repeats // 2, 1)):
        for name, (start, packing) in cases.items():
            begin = time.perf_counter()
            task = LanguageModelingTask(
                DataDirectory.open(path), arguments.sequence_length, 0, packing=packing
            )
            with closing(task.batches(MicroBatches(start, BATCH, BATCH))) as batches:
                next(batches)
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in seconds.items()}


def usual_loop(path: Path, sequence_length: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows at random places of a memory map, one tensor each, stacked."""
    tokens = np.memmap(path, np.uint16, mode="r")
    generator = np.random.default_rng(seed)
    while True:
        places = generator.integers(0, len(tokens) - sequence_length - 1, BATCH)
        yield (
            torch.stack([torch.from_numpy(tokens[i : i + sequence_length].astype(np.int64)) for i in places]),
            torch.stack(
                [torch.from_numpy(tokens[i + 1 : i + 1 + sequence_length].astype(np.int64)) for i in places]
            ),
        )


def make_directory(path: Path, tokens: int, seed: int, *, sparse: bool = False) -> DataDirectory:
    """A data directory whose training split has random ids, or zeros in a ``sparse`` file, in documents of log-normal
    lengths."""
    text = path.with_suffix(".txt")
    text.write_text("\n".join(f"line {i}" for i in range(1000)))
    prepare([text], path, tokenizer="byte")
    generator = np.random.default_rng(seed)
    sizes = generator.lognormal(np.log(TOKENS_A_DOCUMENT) - 0.5, 1.0, max(tokens // TOKENS_A_DOCUMENT, 1))
    sizes = np.maximum(sizes, 2).astype(np.int32)
    total = int(sizes.sum(dtype=np.int64))
    with (path / "train.bin").open("wb") as file:
        if sparse:
            file.truncate(2 * total)
        else:
            file.write(generator.integers(0, 257, total, dtype=np.uint16).tobytes())
    with (path / "train.idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 8, len(sizes), len(sizes) + 1))
        file.write(sizes.tobytes())
        file.write(((np.cumsum(sizes, dtype=np.int64) - sizes) * 2).tobytes())
        file.write(np.arange(len(sizes) + 1, dtype=np.int64).tobytes())
    info = json.loads((path / DATASET_FILE).read_text())
    info["splits"]["train"] |= {"documents": len(sizes), "tokens": total}
    write_json(path / DATASET_FILE, info)
    return DataDirectory.open(path)


def print_results(results: dict[str, dict[str, float]], arguments: argparse.Namespace) -> None:
    print(
        f"T = {arguments.sequence_length}, {BATCH} sequences a batch, {arguments.workers} workers, "
        f"{os.cpu_count()} cores (load {os.getloadavg()[0]:.1f}), torch {torch.__version__}"
    )
    for name, speed in results["million_tokens_per_second"].items():
        print(f"{name:30} {speed:8.1f} million tokens/s")
    for name, seconds in results["seconds_to_first_batch"].items():
        print(f"{name:30} {seconds:8.2f} s to the first batch of {arguments.large_tokens:.3g} tokens")


if __name__ == "__main__":
    main()
