"""Time of one generated token against the length of the prompt, on the CPU.

With a state, a token costs the same whatever came before it, except for attention itself, which reads every
earlier key and value. The last column times that alone: one query over as many keys, in every layer.

    python benchmarks/generate_cpu.py --threads 2 --out generate_cpu.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from tokenformer.generation.config import SamplingConfig
from tokenformer.generation.engine import generate_stream
from tokenformer.models.base import LanguageModel
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig

PROMPT_LENGTHS = (128, 512, 1024, 2048)
CONFIG = TokenFormerConfig(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=8,
    qkv_param_tokens=512,
    proj_param_tokens=512,
    ffn_param_tokens=2048,
    max_position_embeddings=4096,
)


class Row(NamedTuple):
    """Milliseconds; the per-token ones are medians."""

    prompt_tokens: int
    prefill_ms: float
    token_ms: float
    attention_ms: float


def measure(model: LanguageModel, prompt_tokens: int, new_tokens: int) -> Row:
    """Prefill a prompt of random ids, then time every further step."""
    prompt = torch.randint(
        0, CONFIG.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0)
    )
    steps = generate_stream(model, prompt, max_new_tokens=new_tokens, sampling=SamplingConfig(temperature=0))
    times = [_milliseconds(lambda: next(steps)) for _ in range(new_tokens)]
    heads, features = CONFIG.num_attention_heads, CONFIG.head_dim
    query = torch.randn(1, heads, 1, features)
    keys = [torch.randn(2, 1, heads, prompt_tokens, features) for _ in range(CONFIG.num_hidden_layers)]

    def attend() -> None:
        for key, value in keys:
            scaled_dot_product_attention(query, key, value)

    with torch.inference_mode():
        attention = statistics.median(_milliseconds(attend) for _ in range(new_tokens))
    return Row(prompt_tokens, times[0], statistics.median(times[1:]), attention)


def _milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument(
        "--prompt-tokens", type=int, nargs="+", default=PROMPT_LENGTHS, help="lengths of the prompts"
    )
    parser.add_argument("--new-tokens", type=int, default=65, help="tokens to generate, from 2")
    parser.add_argument(
        "--out", type=Path, default=Path("generate_cpu.json"), help="where the rows go as JSON"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build_model(CONFIG)
    measure(model, options.prompt_tokens[0], options.new_tokens)  # warm-up
    rows = [measure(model, length, options.new_tokens) for length in options.prompt_tokens]
    print(f"TokenFormer, {CONFIG.num_parameters():,} parameters, {options.threads} threads; milliseconds")
    print(f"{'prompt':>8} {'prefill':>9} {'token':>8} {'its attention':>14}")
    for row in rows:
        print(f"{row.prompt_tokens:>8} {row.prefill_ms:>9.1f} {row.token_ms:>8.2f} {row.attention_ms:>14.2f}")
    result = {
        "config": CONFIG.to_json(),
        "threads": options.threads,
        "torch": torch.__version__,
        "rows": [row._asdict() for row in rows],
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
