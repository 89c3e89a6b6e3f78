"""Loading a model directory to the CPU, against reading its weight file into memory.

Writes the 1.5B shape with random weights into a temporary directory (6.3 GB in float32, removed at the end), then
measures both sides in fresh processes, in turn. Weights are mapped from the file, so a load would be over before
anything was read: after it, one number of every page is read, which brings in all of them; so is the other side's
buffer filled. With ``--cold`` the file is dropped from the page cache before each measurement (a machine that also
caches its disks elsewhere still serves it from there).

    python benchmarks/load.py --repeats 5 --json load.json
    python benchmarks/load.py --repeats 5 --cold
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tokenformer.models.directory import load_model, save_model
from tokenformer.models.empty import empty_model
from tokenformer.models.tokenformer.config import TokenFormerConfig

PAGE = 4096
LARGE = {
    "hidden_size": 1536,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "qkv_param_tokens": 1536,
    "proj_param_tokens": 1536,
    "ffn_param_tokens": 6144,
    "vocab_size": 50304,
    "rotary_pct": 0.25,
    "norm_activation": "l2_norm_gelu",
}
SMALL = LARGE | {"num_hidden_layers": 1, "hidden_size": 768, "vocab_size": 512}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_model(directory: Path, sizes: dict[str, object], dtype: torch.dtype) -> Path:
    """One file of random numbers; drawn in place, since only their number matters."""
    config = TokenFormerConfig.model_validate(sizes)
    model = empty_model(config)
    model.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.01, 0.01)
    return save_model(model, directory, max_shard_size="100GB") / "model.safetensors"


def read(file: Path) -> None:
    """The whole file into memory of this process."""
    buffer = bytearray(file.stat().st_size)
    with file.open("rb", buffering=0) as opened:
        view, done = memoryview(buffer), 0
        while done < len(buffer):
            done += opened.readinto(view[done:]) or 0


def load(file: Path) -> None:
    """The model, every page of it in memory."""
    for parameter in load_model(file.parent).parameters():
        parameter.detach().flatten()[:: PAGE // parameter.element_size()].sum()


def peak_bytes() -> int:
    """The most memory that this process has held, mapped pages of files included (Linux)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def measure_here(side: str, file: Path) -> dict[str, float]:
    """Seconds and bytes of one side in this process: the peak, and what the process held before."""
    torch.set_num_threads(1)
    before = peak_bytes()
    start = time.perf_counter()
    {"read": read, "load": load}[side](file)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": peak_bytes(), "before": before}


def measure(side: str, file: Path, cold: bool) -> dict[str, float]:
    """The same in a fresh process."""
    with file.open("rb") as opened:
        if cold:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--side", side, "--file", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    values: dict[str, float] = json.loads(done.stdout)
    return values


def compare(arguments: argparse.Namespace) -> dict[str, object]:
    """Both sides in turn, ``repeats`` times after one round that is not counted."""
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        sizes = SMALL if arguments.small else LARGE
        file = write_model(Path(scratch) / "model", sizes, DTYPES[arguments.dtype])
        os.sync()
        rounds: dict[str, list[dict[str, float]]] = {"read": [], "load": []}
        for number in range(arguments.repeats + 1):
            for side, values in rounds.items():
                found = measure(side, file, arguments.cold)
                if number:
                    values.append(found)
        size = file.stat().st_size
    seconds = {side: statistics.median(r["seconds"] for r in found) for side, found in rounds.items()}
    peak = statistics.median(r["peak"] for r in rounds["load"])
    added = statistics.median(r["peak"] - r["before"] for r in rounds["load"])
    return {
        "dtype": arguments.dtype,
        "cold": arguments.cold,
        "bytes": size,
        "seconds": seconds,
        "time_ratio": seconds["load"] / seconds["read"],
        "peak_ratio": peak / size,
        "added_ratio": added / size,
        "rounds": rounds,
    }


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--cold", action="store_true", help="drop the file from the page cache each time")
    parser.add_argument("--small", action="store_true", help="a small model, to try the script")
    parser.add_argument("--directory", type=Path, help="where the temporary directory is made")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=("read", "load"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure_here(arguments.side, arguments.file)))
        return
    values = compare(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(values, indent=2) + "\n")
    seconds = values["seconds"]
    assert isinstance(seconds, dict)
    cache = "cold" if arguments.cold else "warm"
    print(f"{values['bytes']:,} bytes, {arguments.dtype}, {cache} page cache, median of {arguments.repeats}")
    print(f"read the file {seconds['read']:.2f} s; load the model {seconds['load']:.2f} s")
    print(
        f"time {values['time_ratio']:.2f} of reading; peak memory {values['peak_ratio']:.2f} of the file "
        f"(with Python and torch), {values['added_ratio']:.2f} added by loading"
    )


if __name__ == "__main__":
    main()
