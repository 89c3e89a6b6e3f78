"""A whole training step: batch to the device, loss, backward, clipping, optimiser.

    python benchmarks/train_step.py --models 150M 1.5B --json train_step.json

Sides, all in one run and each with the memory to itself:

- ``ours``; ``groups``: the tokens of every Pattention in four growth groups; ``accumulated``: in two passes of half the
  batch; ``recomputed``: five of twelve blocks keep no scores of Pattention, but make them again in the backward;
  ``float8``: Pattention in float8; ``launched``: without CUDA graphs;
- ``formula``: the published formula of Pattention in plain tensor operations in its place, the rest of the step ours;
- ``published``: that formula as training scripts commonly have it: torch's layer norms, the loss of all logits, torch's
  fused AdamW, no CUDA graphs; ``eager``: that without a compiler;
- ``transformer``: our baseline with as many parameters in our step; ``gpt_neox``: that of Hugging Face with as many
  parameters, its own loss and torch's fused AdamW.

But for ``eager``, a GPU has every side compiled; it computes in bfloat16 over float32 weights. A time is the median
over steps, the first of which warm up. FLOPs are those of the side's architecture. A side that fails is reported, and
the others go on.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from step_sides import SIDES, SIZES, Size, make_side
from tokenformer.language.loss import Batch

WARM_UP = 5
FEWEST = 3
RATIOS = (
    ("ours", "published"),
    ("ours", "formula"),
    ("published", "eager"),
    ("ours", "transformer"),
    ("ours", "gpt_neox"),
    ("groups", "ours"),
    ("accumulated", "ours"),
    ("recomputed", "ours"),
    ("float8", "ours"),
    ("ours", "launched"),
)


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    about: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "norm_activation": arguments.norm_activation,
        "peak_tflops": measure_peak(device),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    results: list[dict[str, Any]] = []
    for name in arguments.models:
        size = SIZES[name]
        print(f"\n{name}, {size.sequences} x {size.length} tokens a step", flush=True)
        print(
            f"{'side':12} {'parameters':>13} {'ms':>9} {'tokens/s':>10} {'TFLOP/s':>8} {'of peak':>8} {'peak GB':>8} "
            f"{'took s':>7}"
        )
        found = [
            measure_or_report(side, size, arguments, device, about["peak_tflops"]) for side in arguments.sides
        ]
        results += [{"model": name, **result} for result in found]
        print_ratios(found)
        if arguments.json:  # after each model: a later one may not come to its end
            arguments.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=SIZES, default=["150M"])
    parser.add_argument(
        "--sides", nargs="*", choices=SIDES, default=[side for side in SIDES if side != "launched"]
    )
    parser.add_argument(
        "--norm-activation",
        default="l2_norm_gelu",
        choices=("gelu", "l2_norm_gelu", "gelu_l2_norm", "softmax"),
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20, help="steps that are timed, at most")
    parser.add_argument("--seconds", type=float, default=3.0, help="for the timed steps of a side, about")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    return parser.parse_args()


def measure_peak(device: torch.device) -> float:
    """TFLOP/s of one large square product of random numbers."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = statistics.median(take_times(lambda: a @ b, 20, device)[5:])
    return 2 * n**3 / seconds / 1e12


def measure_or_report(
    side: str, size: Size, arguments: argparse.Namespace, device: torch.device, peak: float
) -> dict[str, Any]:
    begin = time.perf_counter()
    try:
        result = {"side": side, **measure(side, size, arguments, device)}
    except Exception as error:  # whatever it is, the other sides are still wanted
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{side:12} failed: {message}", flush=True)
        return {"side": side, "error": message}
    finally:
        forget(device)
    result["took"] = time.perf_counter() - begin
    result["of_peak"] = result["tflops"] / peak
    print(
        f"{side:12} {result['parameters']:13,} {result['seconds'] * 1e3:9.2f} "
        f"{result['tokens_per_second']:10,.0f} {result['tflops']:8.3g} {result['of_peak']:8.3f} "
        f"{result['peak_memory'] / 1e9:8.2f} {result['took']:7.1f}",
        flush=True,
    )
    return result


def forget(device: torch.device) -> None:
    """Let go of what a side held."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(side: str, size: Size, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    batches = list(random_batches(size))
    step, model, flops = make_side(side, size, arguments.norm_activation, batches, device)
    losses = []
    take_times(lambda: losses.append(step()), WARM_UP, device)
    (once,) = take_times(step, 1, device)
    repeats = max(FEWEST, min(arguments.repeats, int(arguments.seconds / once)))
    seconds = statistics.median(take_times(lambda: losses.append(step()), repeats, device))
    tokens = size.sequences * size.length
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tflops": tokens * flops / seconds / 1e12,
        "peak_memory": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        "loss": float(losses[0]),
        "last_loss": float(losses[-1]),
    }


def random_batches(size: Size) -> Iterator[Batch]:
    for _ in range(4):
        tokens = torch.randint(size.vocab, (size.sequences, size.length + 1))
        yield Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def print_ratios(results: list[dict[str, Any]]) -> None:
    """Tokens a second of one side by those of another; also FLOPs, where they differ by architecture."""
    by_side = {result["side"]: result for result in results if "error" not in result}
    for a, b in RATIOS:
        if a in by_side and b in by_side:
            speed, flops = (by_side[a][name] / by_side[b][name] for name in ("tokens_per_second", "tflops"))
            print(f"{a} / {b}: tokens/s {speed:.3f}, FLOP/s {flops:.3f}", flush=True)


def take_times(step: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each repeat, from the end of the one before it; nothing waits in between on a GPU."""
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


if __name__ == "__main__":
    main()
