"""Generating tokens: prompts in, one token at a time out, greedily.

    python benchmarks/decode.py --models 150M 1.5B --batches 1 4 16 --json decode.json

Sides, all in one run on random weights and prompts: ``ours``, what ``generate`` does by itself on the device;
``fused``, ``batched`` and ``graph``, its step by a kernel for each product, by one and one more for the vectors of
each, and by a CUDA graph of the model's own operations (the former two fall back to the last where they do not serve
the batch; the column ``step`` tells); ``int8``, ours with its
weights in 8 bits; ``plain``, the same model by plain calls; ``transformer``, our baseline with as many parameters by
the same engine; ``hf``, GPT-NeoX of Hugging Face with as many parameters by its ``generate``; ``hf_static``, that
with its static cache and torch.compile (CUDA graphs). Before timing, the logits of ours are compared with those of a
plain float32 forward. A token's time is that from the first new token to the last over the tokens between; medians
over calls, the first of which warm up. The column ``memory`` is the bytes of all weights in products over a token's
time, in units of the copy bandwidth measured in the same process (bytes read and written). A side that fails or takes
longer than its limit is reported, and the others go on; ``--isolate`` gives sides a process of their own, which even
an error of the device does not leave.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decode_sides import GREEDY, Run, dtype_on, gpt_neox, hf_run, our_run, plain_run, synchronize
from step_sides import SIZES, Size, tokenformer_config, transformer_config
from tokenformer.generation import prepared
from tokenformer.models.base import LanguageModel
from tokenformer.models.quantize import quantize_model
from tokenformer.models.registry import model_class
from tokenformer.models.tokenformer.config import TokenFormerConfig

SIDES = ("ours", "fused", "batched", "graph", "int8", "plain", "transformer", "hf", "hf_static")
PATHS: dict[str, prepared.StepPath] = {"fused": "fused", "batched": "batched", "graph": "model"}
WITH_ERRORS = {"ours", "int8", "transformer", *PATHS}
LONGEST_CHECKED_PROMPT = 256
WARM_UP = 2


class Case(NamedTuple):
    """What is measured."""

    model: str
    param_tokens: int
    side: str
    batch: int
    prompt: int
    new_tokens: int


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    about = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "norm_activation": arguments.norm_activation,
        "dtype": str(dtype_on(device)).removeprefix("torch."),
        "copy_bandwidth": copy_bandwidth(device),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    print(
        f"{'model':6} {'x':>2} {'side':12} {'batch':>5} {'prompt':>6} {'first ms':>9} {'ms/token':>9} {'tokens/s':>9} "
        f"{'memory':>7} step"
    )
    results: list[dict[str, Any]] = []
    for name in arguments.models:
        for side in arguments.sides:
            if side in arguments.isolate:
                results += in_own_process(name, side, arguments)
                continue
            try:
                with time_limit(arguments.limit):
                    for result in measure_side(name, side, arguments, device, about["copy_bandwidth"]):
                        results.append(result)
                        print_result(result)
            except Exception as error:  # the other sides' numbers are worth having
                print(f"{name} {side}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                results.append({"model": name, "side": side, "error": f"{type(error).__name__}: {error}"})
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")
    if any("error" in result for result in results):
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=SIZES, default=["150M"])
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES))
    parser.add_argument("--batches", nargs="*", type=int, default=[1])
    parser.add_argument("--prompts", nargs="*", type=int, default=[128], help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5, help="calls that are timed")
    parser.add_argument(
        "--norm-activation",
        default="l2_norm_gelu",
        choices=("gelu", "l2_norm_gelu", "gelu_l2_norm", "softmax"),
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="show where a token's time goes")
    parser.add_argument("--param-tokens", nargs="*", type=int, default=[1], help="times as many (ours only)")
    parser.add_argument("--seconds", type=float, default=20.0, help="no further calls of a case after these")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that a side may take in all")
    parser.add_argument(
        "--isolate", nargs="*", choices=SIDES, default=[], help="sides in processes of their own"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    return parser.parse_args()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.randn(2**30 if device.type == "cuda" else 2**22, device=device, dtype=dtype_on(device))
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            target.copy_(source)
        synchronize(device)
        times.append((time.perf_counter() - start) / 4)
    return 2 * source.nbytes / statistics.median(times[3:])


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError inside, after so long."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_own_process(name: str, side: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one side by this script again."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "side.json"
        command = [sys.executable, __file__, "--models", name, "--sides", side, "--json", str(written)]
        for option in ("batches", "prompts", "param_tokens"):
            command += ["--" + option.replace("_", "-"), *map(str, getattr(arguments, option))]
        for option in ("new_tokens", "repeats", "norm_activation", "device", "seconds", "limit"):
            command += ["--" + option.replace("_", "-"), str(getattr(arguments, option))]
        command += ["--profile"] if arguments.profile else []
        error = ""
        try:
            subprocess.run(command, timeout=arguments.limit + 60)
        except subprocess.TimeoutExpired as stopped:
            error = str(stopped)
        if written.exists():
            found: list[dict[str, Any]] = json.loads(written.read_text())["results"]
            return found
        return [{"model": name, "side": side, "error": error or "the process failed"}]


def measure_side(
    name: str, side: str, arguments: argparse.Namespace, device: torch.device, bandwidth: float
) -> Iterator[dict[str, Any]]:
    """Every case of a side, as it comes."""
    size = SIZES[name]
    length = max(arguments.prompts) + arguments.new_tokens
    for factor in arguments.param_tokens if side in WITH_ERRORS - {"transformer"} else [1]:
        torch.manual_seed(0)
        if device.type == "cuda":
            torch.compiler.reset()
            gc.collect()  # the side before
            torch.cuda.empty_cache()
        run, model, weights = make_side(side, size, length, factor, arguments, device)
        for batch in arguments.batches:
            for prompt in arguments.prompts:
                case = Case(name, factor, side, batch, prompt, arguments.new_tokens)
                with step_path(side):
                    yield measure(case, run, model, weights, arguments, bandwidth)
        del run, model


@contextmanager
def step_path(side: str) -> Iterator[None]:
    """The step of the engine is that of the side."""
    default = prepared.make_step
    if side in PATHS:
        prepared.make_step = functools.partial(default, path=PATHS[side])
    try:
        yield
    finally:
        prepared.make_step = default


def measure(
    case: Case, run: Run, model: Any, weights: int, arguments: argparse.Namespace, bandwidth: float
) -> dict[str, Any]:
    device = next(model.parameters()).device
    prompts = torch.randint(model.config.vocab_size, (case.batch, case.prompt), device=device)
    checked = {}
    if case.side in WITH_ERRORS and case.prompt <= LONGEST_CHECKED_PROMPT:
        checked = logit_errors(model, prompts)
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(times) < WARM_UP + arguments.repeats:
        times.append(run(prompts, case.new_tokens))
        if len(times) > WARM_UP and time.perf_counter() - start > arguments.seconds:
            break
    if arguments.profile and device.type == "cuda":
        profile(run, prompts)
    tokens = [(last - first) / (case.new_tokens - 1) for first, last in times[WARM_UP:]]
    token = statistics.median(tokens)
    return {
        **case._asdict(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weight_bytes": weights,
        "first_seconds": statistics.median(first for first, _ in times[WARM_UP:]),
        "token_seconds": token,
        "all_token_seconds": tokens,
        "tokens_per_second": case.batch / token,
        "of_bandwidth": weights / token / bandwidth,
        **checked,
    }


def print_result(result: dict[str, Any]) -> None:
    case = f"{result['model']:6} {result['param_tokens']:2} {result['side']:12}"
    sizes = f"{result['batch']:5} {result['prompt']:6}"
    times = f"{result['first_seconds'] * 1e3:9.2f} {result['token_seconds'] * 1e3:9.3f}"
    rates = f"{result['tokens_per_second']:9,.0f} {result['of_bandwidth']:7.3f}"
    errors = [f"{name} {result[name]:.2e}" for name in ("logit_error", "plain_error") if name in result]
    print(case, sizes, times, rates, result.get("step", ""), *errors, flush=True)


def make_side(
    side: str, size: Size, length: int, factor: int, arguments: argparse.Namespace, device: torch.device
) -> tuple[Run, Any, int]:
    """How to run it, the model, and the bytes of the weights in its products."""
    if side.startswith("hf"):
        hf = gpt_neox(size, length, device)
        products = [p for name, p in hf.named_parameters() if p.ndim == 2 and "embed_out" not in name]
        return hf_run(hf, is_static=side == "hf_static"), hf, sum(p.nbytes for p in products)
    config = (
        transformer_config(size)
        if side == "transformer"
        else tokenformer_config(size, arguments.norm_activation)
    )
    if factor > 1:
        tokens = {"qkv_param_tokens": factor, "proj_param_tokens": factor, "ffn_param_tokens": 4 * factor}
        counts = {name: n * size.hidden for name, n in tokens.items()}
        config = TokenFormerConfig(**{**config.model_dump(exclude={"param_token_groups", "tau"}), **counts})
    config = config.model_copy(update={"max_position_embeddings": length})
    with torch.device(device):
        model = model_class(config.architecture)(config)
    model = model.to(device, dtype_on(device)).eval()
    weights = config.product_parameters() * dtype_on(device).itemsize
    if side == "int8":
        quantize_model(model)
        weights = config.product_parameters()
    return (plain_run(model) if side == "plain" else our_run(model)), model, weights


@torch.inference_mode()
def logit_errors(model: LanguageModel, prompts: Tensor) -> dict[str, Any]:
    """Relative errors of the logits after one decoded token, by the engine and a plain forward; the engine's step."""
    exact = copy.deepcopy(model).float()(prompts, logits_to_keep=1).logits[:, -1].double()
    plain = model(prompts, logits_to_keep=1).logits[:, -1]
    state = model(prompts[:, :-1], state=model.initial_state(len(prompts)), logits_to_keep=1).state
    with prepared.prepared_decoder(
        model, state, prompts.shape[1] + 1, GREEDY, model.config.vocab_size
    ) as decoder:
        assert decoder is not None
        decoder.state.load(state)
        found = decoder.logits_after(prompts[:, -1:])
        step = type(decoder.step).__name__

    def error(logits: Tensor) -> float:
        return float((logits.double() - exact).norm() / exact.norm())

    return {"logit_error": error(found), "plain_error": error(plain), "step": step}


def profile(run: Run, prompts: Tensor) -> None:
    """The kernels of 32 tokens, by their share of the device's time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    tokens = 32
    run(prompts, tokens)
    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        run(prompts, tokens)
    kernels = [event for event in recorded.key_averages() if event.device_type.name == "CUDA"]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)
    launches = sum(event.count for event in kernels)
    print(f"    {tokens} tokens and the prompt: kernels take {total / 1e3:.2f} ms, {launches} launches")
    for event in kernels[:12]:
        time_each = event.self_device_time_total / event.count
        print(
            f"    {event.self_device_time_total / total:6.1%} {event.count:6} x {time_each:8.2f} us  {event.key[:90]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
