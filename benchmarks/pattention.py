"""Pattention forward and backward against its bare matrix products, for every kind.

    python benchmarks/pattention.py --json pattention.json

Sides, all in one run and taken in turn within each repeat: the six products alone (the floor), ours, the definition
in plain tensor operations, and the formula as published (no guards). Before timing, ours is checked against float64.
A ratio is the median over repeats of a side's time over the floor's in the same repeat.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenformer.ops.pattention import NORM_ACTIVATIONS, WeightKind, pattention, pattention_reference

Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = [measure(kind, arguments) for kind in NORM_ACTIVATIONS]
    print_table(results, arguments)
    if arguments.json:
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        arguments.json.write_text(json.dumps({**machine, **settings, "results": results}, indent=2) + "\n")


def measure(norm_activation: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Times of all sides for one kind, in seconds."""
    n, d = arguments.tokens, arguments.features
    kind = WeightKind(norm_activation, float(n))  # type: ignore[arg-type]
    torch.manual_seed(0)
    x, grad = torch.randn(arguments.rows, d), torch.randn(arguments.rows, d)
    key, value = torch.randn(n, d) / math.sqrt(d), torch.randn(n, d) / math.sqrt(n)
    error = relative_error(kind, x, key, value, grad)
    sides: dict[str, Step] = {
        "products": lambda: products(x, key, value, grad),
        "ours": gradients(lambda *t: pattention(t[0], [t[1]], [t[2]], kind), x, key, value, grad),
        "definition": gradients(
            lambda *t: pattention_reference(t[0], [t[1]], [t[2]], kind), x, key, value, grad
        ),
        "published": gradients(lambda *t: published(*t, norm_activation), x, key, value, grad),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.repeats + 1):  # the first repeat warms up
        for name, step in sides.items():
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    ratios = {
        name: statistics.median(a / b for a, b in zip(taken[1:], times["products"][1:], strict=True))
        for name, taken in times.items()
    }
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    return {"kind": norm_activation, "error": error, "seconds": medians, "ratio": ratios}


def products(x: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The two products of the forward and the four of the backward, with nothing in between."""
    scores = x @ key.t()
    out = scores @ value
    weight_grad = grad @ value.t()
    return out, scores.t() @ grad, weight_grad.t() @ x, weight_grad @ key


def gradients(function: Callable[..., Tensor], *tensors: Tensor) -> Step:
    """Forward and backward of ``function(x, key, value)``; the last tensor is the gradient of its result."""
    *inputs, grad = tensors
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def published(x: Tensor, key: Tensor, value: Tensor, norm_activation: str) -> Tensor:
    """The formula of the paper's code, without guards (and ``gelu``, of its JAX edition)."""
    scores = x @ key.t()
    n = scores.shape[-1]
    if norm_activation == "gelu":
        weights = F.gelu(scores)
    elif norm_activation == "softmax":
        exponentials = scores.exp()
        weights = exponentials / exponentials.norm(p=1, dim=-1, keepdim=True) * n
    elif norm_activation == "gelu_l2_norm":
        activated = F.gelu(scores)
        weights = activated / activated.norm(dim=-1, keepdim=True) * math.sqrt(n)
    else:
        weights = F.gelu(scores / scores.norm(dim=-1, keepdim=True) * math.sqrt(n))
    return weights @ value


def relative_error(kind: WeightKind, x: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> float:
    """Largest difference from float64 over the result and all gradients, relative to each tensor's largest entry."""
    rows = slice(0, min(256, x.shape[0]))
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x[rows], key, value)]
        function = pattention if dtype == torch.float32 else pattention_reference
        out = function(leaves[0], [leaves[1]], [leaves[2]], kind)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad[rows].to(dtype))])
    error = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
    if error > 1e-5:
        raise SystemExit(f"{kind.norm_activation}: differs from float64 by {error:.1e}; nothing was timed")
    return error


def print_table(results: list[dict], arguments: argparse.Namespace) -> None:
    print(
        f"{arguments.rows} x {arguments.features}, n = {arguments.tokens}, float32, {arguments.threads} threads, "
        f"torch {torch.__version__}, forward + backward, {arguments.repeats} repeats"
    )
    print(
        f"{'kind':14} {'products':>10} {'ours':>10} {'ratio':>7} {'definition':>11} {'published':>10} {'error':>8}"
    )
    for result in results:
        seconds, ratio = result["seconds"], result["ratio"]
        print(
            f"{result['kind']:14} {seconds['products'] * 1e3:8.1f}ms {seconds['ours'] * 1e3:8.1f}ms "
            f"{ratio['ours']:7.3f} {ratio['definition']:11.3f} {ratio['published']:10.3f} {result['error']:8.1e}"
        )


if __name__ == "__main__":
    main()
