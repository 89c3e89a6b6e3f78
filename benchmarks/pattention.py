"""Pattention forward and backward against its bare matrix products, for every kind.

    python benchmarks/pattention.py --json pattention.json

Sides, all in one run and taken in turn within each repeat: the six products alone (the floor), ours, the definition
in plain tensor operations, the formula as published (no guards), and on a GPU that formula under ``torch.compile`` and
ours with its tokens in four growth groups. Before timing, ours is checked against float64. A ratio is the median over
repeats of a side's time over the floor's in the same repeat. Without sizes, a GPU runs the shapes of the published
models' feed-forward layers and of the smallest one's attention; every side is a CUDA graph there, as in training.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from formula import published_pattention
from tokenformer.ops.pattention import NORM_ACTIVATIONS, WeightKind, pattention, pattention_reference

Step = Callable[[], object]
GROUPS = 4
_WARM_UP = 0.5  # seconds


class Shape(NamedTuple):
    rows: int
    features: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.features}, n = {self.tokens}"


GPU_SHAPES = (
    Shape(65536, 768, 768),
    Shape(65536, 768, 3072),
    Shape(65536, 1024, 4096),
    Shape(32768, 1536, 6144),
)
CPU_SHAPES = (Shape(4096, 512, 2048),)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{arguments.threads} threads"
    print(
        f"{machine}, {arguments.dtype}, torch {torch.__version__}, forward + backward, {arguments.repeats} repeats"
    )
    results = []
    for shape in arguments.shapes or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES):
        print(f"\n{shape}", flush=True)
        for index, kind in enumerate(arguments.kinds):
            result = measure(shape, kind, arguments.repeats, device, dtype)
            print_result(result, with_header=index == 0)
            results.append(result)
    if arguments.json:
        about = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        settings = {name: getattr(arguments, name) for name in ("device", "dtype", "repeats", "threads")}
        values = {"machine": machine, **about, **settings, "results": results}
        arguments.json.write_text(json.dumps(values, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", type=parse_shape, nargs="*", metavar="ROWSxFEATURESxTOKENS", help="e.g. 65536x768x3072"
    )
    parser.add_argument("--kinds", nargs="*", choices=NORM_ACTIVATIONS, default=list(NORM_ACTIVATIONS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="bfloat16 on a GPU, else float32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device.startswith("cuda") else "float32")
    return arguments


def parse_shape(text: str) -> Shape:
    rows, features, tokens = (int(size) for size in text.split("x"))
    return Shape(rows, features, tokens)


def measure(
    shape: Shape, norm_activation: str, repeats: int, device: torch.device, dtype: torch.dtype
) -> dict[str, object]:
    """Times of all sides for one kind, in seconds."""
    rows, d, n = shape
    kind = WeightKind(norm_activation, float(n))  # type: ignore[arg-type]
    torch.manual_seed(0)
    sizes = ((rows, d, 1.0), (n, d, d**-0.5), (n, d, n**-0.5), (rows, d, 1.0))
    x, key, value, grad = (torch.randn(a, b, device=device).mul_(std).to(dtype) for a, b, std in sizes)
    error, reference_error = errors(kind, x, key, value, grad)
    if error > max(1e-5 if dtype == torch.float32 else 0, 1.2 * reference_error):
        raise SystemExit(f"{norm_activation}: differs from float64 by {error:.1e}; nothing was timed")

    def published_formula(x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return published_pattention(x, key, value, norm_activation)

    def definition(x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return pattention_reference(x, [key], [value], kind)

    sides: dict[str, Step] = {
        "products": lambda: products(x, key, value, grad),
        "ours": gradients(lambda x, k, v: pattention(x, [k], [v], kind), x, [key], [value], grad),
        "definition": gradients(definition, x, [key], [value], grad),
        "published": gradients(published_formula, x, [key], [value], grad),
    }
    if device.type == "cuda":
        torch.compiler.reset()
        compiled = torch.compile(published_formula, dynamic=False)
        sides["compiled"] = gradients(compiled, x, [key], [value], grad)
        sides["groups"] = gradients(
            lambda x, *tokens: pattention(x, tokens[:GROUPS], tokens[GROUPS:], kind),
            x,
            key.chunk(GROUPS),
            value.chunk(GROUPS),
            grad,
        )
    times = take_times(warm_up(sides, device), repeats, device)
    ratios = {
        name: statistics.median(a / b for a, b in zip(taken, times["products"], strict=True))
        for name, taken in times.items()
    }
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        **shape._asdict(),
        "kind": norm_activation,
        "error": error,
        "reference_error": reference_error,
        "seconds": medians,
        "ratio": ratios,
        "floor_tflops": 12 * rows * d * n / medians["products"] / 1e12,
    }


def warm_up(sides: dict[str, Step], device: torch.device) -> dict[str, Step]:
    """The sides with everything compiled, and a GPU at its full clock, which takes it longer than the first repeats
    last. A GPU gets them as CUDA graphs, as a training step has them: no time is one of launches from the CPU."""
    take_times(sides, 2, device)
    if device.type != "cuda":
        return sides
    pool = torch.cuda.graph_pool_handle()  # one is replayed after the other, so they may share their memory
    recorded = {name: record(step, pool) for name, step in sides.items()}
    begin = time.perf_counter()
    while time.perf_counter() - begin < _WARM_UP:
        take_times(recorded, 2, device)
    return recorded


def record(step: Step, pool: object) -> Step:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay


def take_times(sides: dict[str, Step], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every side in every repeat; on a GPU by its own clock, without waiting in between."""
    if device.type != "cuda":
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(repeats):
            for name, step in sides.items():
                begin = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - begin)
        return times
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, step in sides.items():
            begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin_event.record()
            step()
            end_event.record()
            events[name].append((begin_event, end_event))
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in events.items()}


def products(x: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The two products of the forward and the four of the backward, with nothing in between."""
    scores = x @ key.t()
    out = scores @ value
    weight_grad = grad @ value.t()
    return out, scores.t() @ grad, weight_grad.t() @ x, weight_grad @ key


def gradients(
    function: Callable[..., Tensor],
    x: Tensor,
    keys: list[Tensor] | tuple[Tensor, ...],
    values: list[Tensor] | tuple[Tensor, ...],
    grad: Tensor,
) -> Step:
    """Forward and backward of ``function(x, *keys, *values)``."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, *keys, *values)]
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def errors(kind: WeightKind, x: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> tuple[float, float]:
    """Largest relative error (by norm) over the result and all gradients, of ours and of the definition in the same
    dtype, both against the definition in float64."""
    rows = slice(0, min(2048, x.shape[0]))  # enough for every kernel that whole inputs take
    exact, *others = (
        results(path, kind, x[rows], key, value, grad[rows], dtype)
        for path, dtype in (
            (pattention_reference, torch.float64),
            (pattention, x.dtype),
            (pattention_reference, x.dtype),
        )
    )
    ours, reference = (
        max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
        for found in others
    )
    return ours, reference


def results(
    path: Callable[..., Tensor],
    kind: WeightKind,
    x: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    dtype: torch.dtype,
) -> list[Tensor]:
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, key, value)]
    out = path(leaves[0], [leaves[1]], [leaves[2]], kind)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def print_result(result: dict, *, with_header: bool) -> None:
    seconds, ratio = result["seconds"], result["ratio"]
    others = [name for name in seconds if name != "products"]
    if with_header:
        columns = "".join(f"{name:>12}" for name in others)
        print(f"{'kind':14} {'products':>10} {'TFLOP/s':>8} {'ours':>10} {columns} {'error':>8}  (ratios)")
    columns = "".join(f"{ratio[name]:12.3f}" for name in others)
    print(
        f"{result['kind']:14} {seconds['products'] * 1e3:8.3f}ms {result['floor_tflops']:8.3g} "
        f"{seconds['ours'] * 1e3:8.3f}ms {columns} {result['error']:8.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
