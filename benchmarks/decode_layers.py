"""The kernel of all layers of one token by itself: how it is laid out, and what its programs' waiting costs.

    python benchmarks/decode_layers.py --model 1.5B --stages 6 8 9 --pieces 256 512

First the residual stream after one launch in which programs wait for each other is compared, for every layout, with
that after a launch for each phase. Then the former is timed in a CUDA graph of one token, and so is the same launch
without any waiting, whose results are wrong: the least that reading the weights can take in this form. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

from decode import copy_bandwidth
from step_sides import SIZES, tokenformer_config
from tokenformer.generation.streamed import StreamedStep, cache_of
from tokenformer.models.registry import model_class
from tokenformer.ops.decode_layers import Cache, Layers

LENGTH = 512
KINDS = ("gelu", "l2_norm_gelu", "gelu_l2_norm", "softmax")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SIZES, default="1.5B")
    parser.add_argument("--stages", nargs="*", type=int, default=[8])
    parser.add_argument("--pieces", nargs="*", type=int, default=[256])
    parser.add_argument("--warps", nargs="*", type=int, default=[8])
    parser.add_argument("--cached", type=int, default=256, help="tokens in the cache")
    parser.add_argument("--norm-activation", default="l2_norm_gelu", choices=KINDS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    bandwidth = copy_bandwidth(device)
    torch.manual_seed(0)
    config = tokenformer_config(SIZES[arguments.model], arguments.norm_activation)
    with torch.device(device):
        model = model_class(config.architecture)(config)
    model = model.bfloat16().eval()
    state = model.static_state(model.initial_state(1), LENGTH)
    assert state is not None
    state.keys.normal_()
    state.values.normal_()
    state.counters.fill_(arguments.cached)
    step, cache = StreamedStep(model, state), cache_of(state)
    print(f"{torch.cuda.get_device_name()}, copy bandwidth {bandwidth / 1e12:.2f} TB/s, {arguments.model}")
    print(
        f"{'warps':>5} {'piece':>5} {'stages':>6} {'ms':>8} {'of bandwidth':>12} {'no waiting':>10} {'error':>9}"
    )
    expected = output(step.layers, cache, meet=False)
    results = []
    for warps, piece, stages in product(arguments.warps, arguments.pieces, arguments.stages):
        layout = {"warps": warps, "piece": piece, "stages": stages}
        try:
            result = measure(step.layers._replace(**layout), cache, expected, bandwidth)
        except Exception as error:  # a layout that does not fit
            print(f"{warps:5} {piece:5} {stages:6} {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        results.append({**layout, **result})
        print(
            f"{warps:5} {piece:5} {stages:6} {result['seconds'] * 1e3:8.3f} {result['of_bandwidth']:12.3f} "
            f"{result['no_waiting'] * 1e3:10.3f} {result['error']:9.2e}",
            flush=True,
        )
    if arguments.json:
        about = {
            "machine": torch.cuda.get_device_name(),
            "copy_bandwidth": bandwidth,
            "model": arguments.model,
        }
        arguments.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


def output(layers: Layers, cache: Cache, *, meet: bool) -> torch.Tensor:
    """The residual stream after the layers, always from the same."""
    residual = layers.space.residual(layers.shape.hidden)
    residual.copy_(torch.linspace(-3, 3, residual.numel(), device=residual.device).view_as(residual))
    layers.space.counters.zero_()
    layers.run(cache, meet=meet)
    return residual.clone()


def measure(layers: Layers, cache: Cache, expected: torch.Tensor, bandwidth: float) -> dict[str, Any]:
    chunks = cache.keys.shape[0] * sum(layers.shape.phases())
    found = [output(layers, cache, meet=True) for _ in range(20)]
    assert layers.space.counters[0] == chunks, "a wait had no end"

    def together() -> None:
        layers.space.counters.zero_()
        layers.run(cache, meet=True)

    seconds = graph_seconds(together)
    return {
        "seconds": seconds,
        "of_bandwidth": layers.stream.nbytes / seconds / bandwidth,
        "no_waiting": graph_seconds(lambda: layers.launch(cache, 0, chunks, 0, meet=False)),
        "error": max(float((x - expected).norm() / expected.norm()) for x in found),
    }


def graph_seconds(call: Callable[[], None]) -> float:
    """Of one call, median of several replays of four."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            call()
    times = []
    for _ in range(12):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) / 4000)
    return statistics.median(times[4:])


if __name__ == "__main__":
    main()
