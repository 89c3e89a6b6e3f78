"""Throughput and memory of ``prepare`` against the tokenizers library on the same documents already in memory.

Each repeat measures, one after the other, the library (``encode_batch`` of all documents on all its threads) and
``prepare`` (from the files on the disk to the finished data directory, worker processes and their start included),
each in a process of its own. Peak memory is that of all processes together, sampled (proportional set size).

    python benchmarks/prepare.py corpus.jsonl.xz --tokenizer tokenizer.json --repeats 3 --copies 4 --json prepare.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tokenformer.language.documents import read_documents
from tokenformer.language.preparation.engines import LocalEngine, usable_cores
from tokenformer.language.prepare import prepare


class Measured(NamedTuple):
    """Seconds of the work, those of all cores in the whole process, UTF-8 bytes of text, peak memory in bytes."""

    seconds: float
    cpu_seconds: float
    utf8_bytes: int
    peak_bytes: int

    @property
    def megabytes_per_second(self) -> float:
        return self.utf8_bytes / 1e6 / self.seconds


def encode_in_memory(sources: list[str], tokenizer: str, text_field: str) -> tuple[float, int]:
    """The library alone; reading comes before the clock starts."""
    from tokenizers import Tokenizer

    texts = [
        document.text for source in sources for document in read_documents(source, text_field=text_field)
    ]
    backend = Tokenizer.from_file(tokenizer)
    begun = time.perf_counter()
    backend.encode_batch(texts, add_special_tokens=False)
    return time.perf_counter() - begun, sum(len(text.encode("utf-8")) for text in texts)


def prepare_directory(sources: list[str], tokenizer: str, text_field: str, workers: int) -> tuple[float, int]:
    """The whole command."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        data = prepare(
            sources,
            Path(folder) / "data",
            tokenizer=tokenizer,
            text_field=text_field,
            engine=LocalEngine(workers),
        )
        seconds = time.perf_counter() - begun
        return seconds, sum(split.utf8_bytes for split in data.info.splits.values())


def measure(function: Callable[..., tuple[float, int]], *arguments: Any) -> Measured:
    """Run ``function`` in a process of its own and watch the memory of it and of all its children."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    assert process.pid is not None
    peak, ended = [0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, ended))
    watcher.start()
    try:
        seconds, size, cpu_seconds = receiver.recv()
    finally:
        ended.set()
        watcher.join()
        process.join()
    return Measured(seconds, cpu_seconds, size, peak[0])


def _send(sender: Any, function: Callable[..., tuple[float, int]], arguments: tuple[Any, ...]) -> None:
    seconds, size = function(*arguments)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    sender.send((seconds, size, sum(usage.ru_utime + usage.ru_stime for usage in used)))


def _watch(process: int, peak: list[int], ended: threading.Event) -> None:
    while not ended.wait(0.05):
        peak[0] = max(peak[0], sum(map(_memory, _family(process))))


def _family(process: int) -> list[int]:
    found = [process]
    for parent in found:
        try:
            tasks = list(Path(f"/proc/{parent}/task").iterdir())
            found += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            continue  # it has ended
    return found


def _memory(process: int) -> int:
    """Proportional set size: pages that processes share are counted once."""
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)


def copies_of(source: str, count: int, folder: Path) -> list[str]:
    """``count`` files with the content of ``source``."""
    suffixes = "".join(Path(source).suffixes)
    found = []
    for number in range(count):
        copy = folder / f"copy-{number}{suffixes}"
        shutil.copy(source, copy)
        found.append(str(copy))
    return found


def _row(name: str, runs: list[Measured]) -> dict[str, Any]:
    return {
        "what": name,
        "seconds": statistics.median(run.seconds for run in runs),
        "cpu_seconds": statistics.median(run.cpu_seconds for run in runs),
        "megabytes_per_second": statistics.median(run.megabytes_per_second for run in runs),
        "peak_megabytes": max(run.peak_bytes for run in runs) / 1e6,
        "runs": [run.seconds for run in runs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--copies", type=int, default=0, help="measure also so many copies of the source, once"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shared = (options.tokenizer, options.text_field)

    library, ours = [], []
    for _ in range(options.repeats):
        library.append(measure(encode_in_memory, [options.source], *shared))
        ours.append(measure(prepare_directory, [options.source], *shared, options.workers))
    rows = [_row("encode_batch", library), _row("prepare", ours)]
    if options.copies:
        with tempfile.TemporaryDirectory() as folder:
            sources = copies_of(options.source, options.copies, Path(folder))
            longer = measure(prepare_directory, sources, *shared, options.workers)
        rows.append(_row(f"prepare, {options.copies} copies", [longer]))
    ratio = statistics.median(
        ours_run.megabytes_per_second / library_run.megabytes_per_second
        for ours_run, library_run in zip(ours, library, strict=True)
    )

    print(f"{options.source}, {options.workers} workers, {os.cpu_count()} cores")
    print("| what | seconds | CPU seconds | MB/s | peak MB |\n| --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row['what']} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {row['megabytes_per_second']:.2f} "
            f"| {row['peak_megabytes']:.0f} |"
        )
    print(f"prepare has {ratio:.2f} of the throughput of encode_batch")
    if options.json:
        values = {"source": options.source, "workers": options.workers, "rows": rows, "ratio": ratio}
        options.json.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
