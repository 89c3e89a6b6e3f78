"""Generating tokens: prompts in, one token at a time out, greedily.

    python benchmarks/decode.py --models 150M 1.5B --batches 1 8 64 --json decode.json

Sides, all in one run on random weights and prompts: ``ours``, what ``generate`` does by itself on the device; ``int8``,
that with its weights in 8 bits; ``plain``, the same model by plain calls; ``transformer``, our baseline with as many
parameters by the same engine; ``hf``, GPT-NeoX of Hugging Face with as many parameters by its ``generate``;
``hf_static``, that with its static cache and torch.compile (CUDA graphs). Before timing, the logits of ours are
compared with those of a plain float32 forward. A token's time is that from the first new token to the last over the
tokens between; medians over calls, the first of which warm up. The column ``memory`` is the bytes of all weights in
products over a token's time, in units of the measured copy bandwidth (bytes read and written).
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenformer.generation.config import SamplingConfig
from tokenformer.generation.engine import generate_stream
from tokenformer.generation.feed import PlainFeed, Prefill
from tokenformer.generation.prepared import prepared_decoder
from tokenformer.models.base import LanguageModel
from tokenformer.models.quantize import quantize_model
from tokenformer.models.registry import model_class
from train_step import SIZES, Size, count, shared_fields, tokenformer_config, transformer_config

SIDES = ("ours", "int8", "plain", "transformer", "hf", "hf_static")
GREEDY = SamplingConfig(temperature=0)
WARM_UP = 2
Run = Callable[[Tensor, int], tuple[float, float]]
"""prompts [b, t] and new tokens to seconds until the first and until the last token."""


class Case(NamedTuple):
    """What is measured."""

    model: str
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
    results = []
    for name in arguments.models:
        print(f"\n{name}, {arguments.new_tokens} new tokens")
        print(
            f"{'side':12} {'batch':>5} {'prompt':>6} {'first ms':>9} {'ms/token':>9} {'tokens/s':>9} {'memory':>7}"
        )
        for side in arguments.sides:
            try:
                for result in measure_side(name, side, arguments, device, about["copy_bandwidth"]):
                    results.append(result)
                    print_result(result)
            except Exception as error:  # the other sides' numbers are worth having
                if not arguments.keep_going:
                    raise
                print(f"{side}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


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
    parser.add_argument("--keep-going", action="store_true", help="report a side that fails, and go on")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    return parser.parse_args()


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


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


def measure_side(
    name: str, side: str, arguments: argparse.Namespace, device: torch.device, bandwidth: float
) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()
    size = SIZES[name]
    length = max(arguments.prompts) + arguments.new_tokens
    run, model, weights = make_side(side, size, length, arguments, device)
    for batch in arguments.batches:
        for prompt in arguments.prompts:
            prompts = torch.randint(size.vocab, (batch, prompt), device=device)
            error = {}
            if side in ("ours", "int8", "transformer"):
                error = logit_errors(model, prompts)
            times = [run(prompts, arguments.new_tokens) for _ in range(WARM_UP + arguments.repeats)][WARM_UP:]
            first = statistics.median(first for first, _ in times)
            token = statistics.median((last - first) / (arguments.new_tokens - 1) for first, last in times)
            yield {
                **Case(name, batch, prompt, arguments.new_tokens)._asdict(),
                "side": side,
                "parameters": count(model),
                "weight_bytes": weights,
                "first_seconds": first,
                "token_seconds": token,
                "all_token_seconds": [(last - first) / (arguments.new_tokens - 1) for first, last in times],
                "tokens_per_second": batch / token,
                "of_bandwidth": weights / token / bandwidth,
                **error,
            }
            if arguments.profile and device.type == "cuda":
                profile(run, prompts)


def print_result(result: dict[str, Any]) -> None:
    print(
        f"{result['side']:12} {result['batch']:5} {result['prompt']:6} {result['first_seconds'] * 1e3:9.2f} "
        f"{result['token_seconds'] * 1e3:9.3f} {result['tokens_per_second']:9,.0f} {result['of_bandwidth']:7.3f}"
        + "".join(f"  {name} {result[name]:.2e}" for name in ("error", "plain_error") if name in result),
        flush=True,
    )


def make_side(
    side: str, size: Size, length: int, arguments: argparse.Namespace, device: torch.device
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
    config = config.model_copy(update={"max_position_embeddings": length})
    with torch.device(device):
        model = model_class(config.architecture)(config)
    model = model.to(device, dtype_on(device)).eval()
    weights = config.product_parameters() * dtype_on(device).itemsize
    if side == "int8":
        quantize_model(model)
        weights = config.product_parameters()
    return (plain_run(model) if side == "plain" else our_run(model)), model, weights


def our_run(model: LanguageModel) -> Run:
    def run(prompts: Tensor, new_tokens: int) -> tuple[float, float]:
        ids = prompts.tolist()
        synchronize(prompts.device)
        start = time.perf_counter()
        steps = generate_stream(model, ids, max_new_tokens=new_tokens, sampling=GREEDY)
        next(steps)
        first = time.perf_counter() - start
        taken = 1 + sum(1 for _ in steps)
        assert taken == new_tokens
        return first, time.perf_counter() - start

    return run


def plain_run(model: LanguageModel) -> Run:
    def run(prompts: Tensor, new_tokens: int) -> tuple[float, float]:
        ids = prompts.tolist()
        synchronize(prompts.device)
        start = time.perf_counter()
        feed = PlainFeed(model, Prefill(model, ids), GREEDY, model.config.vocab_size)
        rows = range(len(ids))
        for step in range(new_tokens):
            feed.append(list(feed.choose(rows)))
            if step == 0:
                first = time.perf_counter() - start
        return first, time.perf_counter() - start

    return run


def gpt_neox(size: Size, length: int, device: torch.device) -> Any:
    """Of as many parameters as our models; see ``transformer_config`` of the training benchmark."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        **{**shared_fields(size), "max_position_embeddings": length},
        intermediate_size=6 * size.hidden,
        tie_word_embeddings=True,
        use_parallel_residual=False,
        attention_bias=False,
    )
    with torch.device(device):
        model = GPTNeoXForCausalLM(config)
    model = model.to(dtype_on(device)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def hf_run(model: Any, *, is_static: bool) -> Run:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Clock(StoppingCriteria):  # type: ignore[misc]
        """Called after every token; never stops."""

        def __init__(self) -> None:
            self.first: float | None = None

        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            if self.first is None:
                synchronize(input_ids.device)
                self.first = time.perf_counter()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    options = {"cache_implementation": "static"} if is_static else {}

    def run(prompts: Tensor, new_tokens: int) -> tuple[float, float]:
        clock = Clock()
        synchronize(prompts.device)
        start = time.perf_counter()
        found = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=new_tokens,
            stopping_criteria=StoppingCriteriaList([clock]),
            **options,
        )
        synchronize(prompts.device)
        end = time.perf_counter()
        assert found.shape[1] == prompts.shape[1] + new_tokens
        assert clock.first is not None
        return clock.first - start, end - start

    return run


@torch.inference_mode()
def logit_errors(model: LanguageModel, prompts: Tensor) -> dict[str, float]:
    """Relative errors of the logits after one decoded token: by the engine, and by a plain forward."""
    exact = copy.deepcopy(model).float()(prompts, logits_to_keep=1).logits[:, -1].double()
    plain = model(prompts, logits_to_keep=1).logits[:, -1]
    state = model(prompts[:, :-1], state=model.initial_state(len(prompts)), logits_to_keep=1).state
    with prepared_decoder(model, state, prompts.shape[1] + 1, GREEDY, model.config.vocab_size) as decoder:
        assert decoder is not None
        decoder.state.load(state)
        found = decoder.logits_after(prompts[:, -1:])

    def error(logits: Tensor) -> float:
        return float((logits.double() - exact).norm() / exact.norm())

    return {"error": error(found), "plain_error": error(plain)}


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


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
