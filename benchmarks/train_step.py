"""A whole training step: batch to the device, loss, backward, clipping, optimiser.

    python benchmarks/train_step.py --models 150M 1.5B --json train_step.json

Sides, all in one run and each with the memory to itself: ``ours``; ``formula``, the published formula of Pattention in
plain tensor operations in its place, everything else the same; ``published``, that with the loss of all logits at
once, compiled as well, and without CUDA graphs; ``transformer``, our baseline with as many parameters in
the same step; ``gpt_neox``, that of Hugging Face with as many parameters, its own loss and a fused AdamW;
``accumulated``: ours in two passes of half the batch; ``launched``: ours without CUDA graphs; ``float8``: ours with
Pattention in float8. On a GPU every side is compiled and computes in bfloat16 over float32 weights. A time is the
median over steps, the first of which warm up.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from formula import published_pattention
from tokenformer.language.loss import Batch, LossSum, loss_sum
from tokenformer.language.pipeline import IGNORED
from tokenformer.layers.pattention import Pattention
from tokenformer.models.base import LanguageModel
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.models.transformer.config import TransformerConfig
from tokenformer.ops.pattention import WeightKind
from tokenformer.ops.pattention_float8 import pattention_float8
from tokenformer.train.config import RunConfig, StageConfig
from tokenformer.train.step import TrainStep
from tokenformer.validation import validate

SIDES = ("ours", "formula", "published", "transformer", "gpt_neox", "accumulated", "launched", "float8")
WARM_UP = 5


class Size(NamedTuple):
    """A TokenFormer with n = d in attention and 4 d in the feed-forward layer, and the batch it is measured with."""

    layers: int
    hidden: int
    heads: int
    vocab: int
    sequences: int
    length: int


SIZES = {
    "tiny": Size(2, 32, 2, 64, 2, 16),
    "150M": Size(12, 768, 12, 50304, 16, 2048),
    "450M": Size(24, 1024, 16, 50304, 8, 2048),
    "1.5B": Size(40, 1536, 16, 50304, 4, 2048),
}
Step = Callable[[], Tensor]


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    about = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "norm_activation": arguments.norm_activation,
        "peak_tflops": measure_peak(device),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    results = []
    for name in arguments.models:
        size = SIZES[name]
        print(f"\n{name}, {size.sequences} x {size.length} tokens a step", flush=True)
        print(
            f"{'side':12} {'parameters':>11} {'ms':>9} {'tokens/s':>10} {'TFLOP/s':>8} {'of peak':>8} {'peak GB':>8}"
        )
        for side in arguments.sides:
            result = {"model": name, "side": side, **measure(side, size, arguments, device)}
            result["of_peak"] = result["tflops"] / about["peak_tflops"]
            print(
                f"{side:12} {result['parameters']:11,} {result['seconds'] * 1e3:9.2f} "
                f"{result['tokens_per_second']:10,.0f} {result['tflops']:8.3g} {result['of_peak']:8.3f} "
                f"{result['peak_memory'] / 1e9:8.2f}",
                flush=True,
            )
            results.append(result)
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=SIZES, default=["150M"])
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES))
    parser.add_argument(
        "--norm-activation",
        default="l2_norm_gelu",
        choices=("gelu", "l2_norm_gelu", "gelu_l2_norm", "softmax"),
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10, help="steps that are timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    return parser.parse_args()


def measure_peak(device: torch.device) -> float:
    """TFLOP/s of one large square product of random numbers."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = statistics.median(take_times(lambda: a @ b, 10, device)[3:])
    return 2 * n**3 / seconds / 1e12


def measure(side: str, size: Size, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.compiler.reset()
    gc.collect()  # the side before
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    batches = list(random_batches(size))
    if side == "gpt_neox":
        step, parameters = gpt_neox_step(size, batches, device)
    else:
        step, parameters = our_step(side, size, arguments, batches, device)
    losses: list[Tensor] = []
    times = take_times(lambda: losses.append(step()), WARM_UP + arguments.repeats, device)
    seconds = statistics.median(times[WARM_UP:])
    tokens = size.sequences * size.length
    return {
        "parameters": parameters,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tflops": tokens * flops_per_token(size) / seconds / 1e12,
        "peak_memory": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        "loss": float(losses[0]),
    }


def flops_per_token(size: Size) -> float:
    return tokenformer_config(size, "gelu").flops_per_token(size.length)


def random_batches(size: Size) -> Iterator[Batch]:
    for _ in range(4):
        tokens = torch.randint(size.vocab, (size.sequences, size.length + 1))
        yield Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def our_step(
    side: str, size: Size, arguments: argparse.Namespace, batches: Sequence[Batch], device: torch.device
) -> tuple[Step, int]:
    if side == "transformer":
        model = build_model(transformer_config(size))
    else:
        model = build_model(tokenformer_config(size, arguments.norm_activation))
    if side == "float8":
        for module in model.modules():
            if isinstance(module, Pattention):
                module.op = pattention_float8
    if side in ("formula", "published"):
        for module in model.modules():
            if isinstance(module, Pattention):
                module.op = published_op
    model.to(device)
    if device.type == "cuda":
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile(dynamic=False)
    task = FullLogitsTask() if side == "published" else RandomTask()
    stage = stage_config(size, cuda_graphs=side not in ("published", "launched"))
    step = TrainStep(model, task, stage, device)  # type: ignore[arg-type]
    passes = 2 if side == "accumulated" else 1
    if passes > 1:
        batches = [
            Batch(*halves)
            for batch in batches
            for halves in zip(*(x.chunk(passes) for x in batch[:2]), strict=True)
        ]
    endless = cycle(batches)
    return lambda: step(endless, 0, passes).nats / (size.sequences * size.length), count(model)


def published_op(x: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], kind: WeightKind) -> Tensor:
    return published_pattention(x, keys[0], values[0], kind.norm_activation)


class RandomTask:
    """What a training step needs of a task."""

    def loss(self, model: LanguageModel, batch: Batch) -> Any:
        return loss_sum(model, batch)


class FullLogitsTask:
    """The loss as training scripts commonly have it."""

    def __init__(self) -> None:
        compiled = torch.compile(full_logits_loss, dynamic=False)
        self._loss = compiled if torch.cuda.is_available() else full_logits_loss

    def loss(self, model: LanguageModel, batch: Batch) -> LossSum:
        nats = self._loss(model.hidden(batch.inputs), model.head.weight, batch.targets)
        return LossSum(nats, (batch.targets != IGNORED).sum())


def full_logits_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten(), reduction="sum")


def tokenformer_config(size: Size, norm_activation: str) -> TokenFormerConfig:
    return TokenFormerConfig(
        **shared_fields(size),
        qkv_param_tokens=size.hidden,
        proj_param_tokens=size.hidden,
        ffn_param_tokens=4 * size.hidden,
        norm_activation=norm_activation,
    )


def transformer_config(size: Size) -> TransformerConfig:
    """Keys and values of n = d tokens are twice a d x d projection: 8 d^2 + 8 d^2 = 4 d^2 + 2 d (6 d)."""
    return TransformerConfig(**shared_fields(size), intermediate_size=6 * size.hidden)


def shared_fields(size: Size) -> dict[str, Any]:
    return {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": size.length,
    }


def stage_config(size: Size, *, cuda_graphs: bool = True) -> StageConfig:
    values = {
        "model": tokenformer_config(size, "gelu").model_dump(mode="json"),
        "steps": 1000,
        "precision": {"cuda_graphs": "auto" if cuda_graphs else False},
        "data": {
            "path": ".",
            "sequence_length": size.length,
            "batch_tokens": size.sequences * size.length,
        },
    }
    return validate(RunConfig, values, source="benchmark").resolve()[0]


def gpt_neox_step(size: Size, batches: Sequence[Batch], device: torch.device) -> tuple[Step, int]:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        **shared_fields(size),
        intermediate_size=6 * size.hidden,
        tie_word_embeddings=True,
        use_parallel_residual=False,
        attention_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        classifier_dropout=0.0,
        use_cache=False,
    )
    model = GPTNeoXForCausalLM(config).to(device)
    if device.type == "cuda":
        model.compile(dynamic=False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    endless = cycle(batches)
    bfloat16 = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")

    def step() -> Tensor:
        batch = next(endless)
        tokens = torch.cat((batch.inputs, batch.targets[:, -1:]), dim=1)
        if device.type == "cuda":
            tokens = tokens.pin_memory().to(device, non_blocking=True)
        with bfloat16:
            loss = model(
                input_ids=tokens[:, :-1], labels=tokens[:, :-1], shift_labels=tokens[:, 1:].contiguous()
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, count(model)


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


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
