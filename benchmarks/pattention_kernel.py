"""Pattention's kernel for Hopper GPUs against a cuBLAS product and the Triton pass behind it, for every kind, each way.

    python benchmarks/pattention_kernel.py --json pattention_kernel.json

Forward, of the kinds whose forward the kernel can do: scores and weights. Backward: the weights again and the gradient
of the scores. Sides, each a CUDA graph, taken in turn within each repeat: the product alone, product and pass, the
kernel. The latter two are compared before anything is timed, and the kernel is asked where it does not serve, too. A
ratio is the median over repeats of the kernel's time over that of product and pass in the same repeat; from the ratios
follows what ``PAYS`` in ``ops/pattention_sm90.py`` ought to be, printed at the end. Needs a Hopper GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pattention import GPU_SHAPES, Shape, Step, parse_shape, take_times, warm_up
from tokenformer.ops import pattention_sm90
from tokenformer.ops.pattention import NORM_ACTIVATIONS, WeightKind

BOUNDS = {"scores": 1e-4, "weights": 2e-3, "statistics": 5e-4, "score_grads": 4e-3}
"""Of relative errors, by norm; the kernel rounds the gradients of weights once more on the way."""
COLUMNS = ("product", "product and pass", "kernel")


class Way(NamedTuple):
    """One direction: what its sides give, the bare product, and the two sides that give it."""

    name: str
    gives: tuple[str, ...]
    product: Step
    product_and_pass: Callable[[], tuple[Tensor, ...]]
    kernel: Callable[[], tuple[Tensor | None, ...]]


def main() -> None:
    arguments = parse_arguments()
    if not has_kernel():
        print("pattention_kernel.py needs a Hopper GPU, Triton and cuda-bindings", file=sys.stderr)
        raise SystemExit(2)
    print(
        f"{torch.cuda.get_device_name()}, bfloat16, torch {torch.__version__}, {arguments.repeats} repeats, ms"
    )
    results = []
    for shape in arguments.shapes:
        print(f"\n{shape!s:30}" + "".join(f"{name:>18}" for name in COLUMNS) + f"{'ratio':>8}{'error':>9}")
        for result in measure(shape, arguments.kinds, arguments.repeats):
            print_result(result)
            results.append(result)
    pays = pays_from(results, arguments.margin)
    print_pays(pays)
    if arguments.json:
        about = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__}
        settings = {name: getattr(arguments, name) for name in ("repeats", "margin")}
        found = [{"kind": kind, "way": way, "from": n} for (kind, way), n in pays.items()]
        values = {**about, **settings, "results": results, "pays": found}
        arguments.json.write_text(json.dumps(values, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes",
        type=parse_shape,
        nargs="*",
        default=GPU_SHAPES,
        metavar="ROWSxFEATURESxTOKENS",
        help="e.g. 65536x768x3072",
    )
    parser.add_argument("--kinds", nargs="*", choices=NORM_ACTIVATIONS, default=list(NORM_ACTIVATIONS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--margin", type=float, default=0.99, help="the kernel pays where its ratio is below this"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    return parser.parse_args()


def has_kernel() -> bool:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.empty(1024, 64, dtype=torch.bfloat16, device=device)
    return pattention_sm90.takes(x, x, x.shape[0])


def measure(shape: Shape, kinds: list[str], repeats: int) -> Iterator[dict[str, Any]]:
    """Seconds of all sides, kind by kind, each way."""
    rows, d, n = shape
    torch.manual_seed(0)
    sizes = ((rows, d, 1.0), (n, d, d**-0.5), (n, d, n**-0.5), (rows, d, 1.0))
    inputs = [torch.randn(a, b, device="cuda").mul_(std).bfloat16() for a, b, std in sizes]
    assert all(pattention_sm90.takes(*pair, n) for pair in (inputs[:2], inputs[3:1:-1])), shape
    for kind in kinds:
        for way in ways(*inputs, WeightKind(kind, float(n))):  # type: ignore[arg-type]
            error = check(way, f"{shape}, {kind}, {way.name}")
            sides: dict[str, Step] = {
                "product": way.product,
                "product and pass": way.product_and_pass,
                "kernel": way.kernel,
            }
            recorded = warm_up(sides, torch.device("cuda"))
            times = take_times(recorded, repeats, torch.device("cuda"))
            pairs = zip(times["kernel"], times["product and pass"], strict=True)
            yield {
                **shape._asdict(),
                "kind": kind,
                "way": way.name,
                "seconds": {name: statistics.median(seconds) for name, seconds in times.items()},
                "ratio": statistics.median(kernel / before for kernel, before in pairs),
                "error": error,
            }


def ways(x: Tensor, key: Tensor, value: Tensor, grad: Tensor, kind: WeightKind) -> Iterator[Way]:
    from tokenformer.ops.pattention_rows import weights_backward, weights_forward

    def forward() -> tuple[Tensor, ...]:
        scores = torch.mm(x, key.t())
        return scores, *weights_forward(scores, kind, keep=True)

    if kind.norm_activation in pattention_sm90.FORWARD_KINDS:
        yield Way(
            "forward",
            ("scores", "weights") if kind.norm_activation == "gelu" else ("scores", "weights", "statistics"),
            lambda: torch.mm(x, key.t()),
            forward,
            lambda: pattention_sm90.scores_and_weights(x, key, 1, kind),
        )
    scores, _, row_statistics = forward()
    yield Way(
        "backward",
        ("weights", "score_grads"),
        lambda: torch.mm(grad, value.t()),
        lambda: weights_backward(scores, torch.mm(grad, value.t()), row_statistics, kind),
        lambda: pattention_sm90.weights_and_score_grads([grad], value, scores, row_statistics, kind),
    )


def check(way: Way, what: str) -> float:
    """The largest relative error of what the kernel gives.

    Raises:
        SystemExit: one is too large.
    """
    sides = (way.kernel(), way.product_and_pass())
    errors = {
        name: float((found.double() - expected.double()).norm() / expected.double().norm())
        for name, found, expected in zip(way.gives, *sides, strict=False)
    }
    for name, error in errors.items():
        if not error < BOUNDS[name]:
            raise SystemExit(f"{what}: {name} of the kernel differ by {error:.1e}; not timed")
    return max(errors.values())


def pays_from(results: list[dict[str, Any]], margin: float) -> dict[tuple[str, str], int | None]:
    """For each kind and way the least number of parameter tokens measured from which on the kernel is faster at every
    shape; None where it is not at the largest."""
    ratios: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for result in results:
        by_tokens = ratios[result["kind"], result["way"]]
        by_tokens[result["tokens"]] = max(result["ratio"], by_tokens.get(result["tokens"], 0.0))
    found: dict[tuple[str, str], int | None] = {}
    for case, by_tokens in ratios.items():
        found[case] = None
        for n in sorted(by_tokens, reverse=True):
            if by_tokens[n] >= margin:
                break
            found[case] = n
    return found


def print_result(result: dict[str, Any]) -> None:
    times = "".join(f"{result['seconds'][name] * 1e3:18.3f}" for name in COLUMNS)
    name = f"{result['kind']} {result['way']}"
    print(f"{name:30}{times}{result['ratio']:8.3f}{result['error']:9.1e}", flush=True)


def print_pays(pays: dict[tuple[str, str], int | None]) -> None:
    print("\nThe kernel pays, of what was measured (and serves, by PAYS):")
    for (kind, way), n in pays.items():
        serves = pattention_sm90.PAYS.get((kind, way == "backward"))
        measured, now = (
            "never" if least is None else f"from n = {least} on" if least else "always"
            for least in (n, serves)
        )
        print(f"{kind + ' ' + way:30}{measured} ({now})")


if __name__ == "__main__":
    main()
