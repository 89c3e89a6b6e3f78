"""How each side of the benchmark of decoding makes its tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from step_sides import Size, shared_fields
from tokenformer.generation.config import SamplingConfig
from tokenformer.generation.engine import generate_stream
from tokenformer.generation.feed import PlainFeed, Prefill
from tokenformer.models.base import LanguageModel

GREEDY = SamplingConfig(temperature=0)
Run = Callable[[Tensor, int], tuple[float, float]]
"""prompts [b, t] and new tokens to seconds until the first and until the last token."""


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


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

    class Clock(StoppingCriteria):
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


def synchronize(device: torch.device) -> None:
    """Wait for all that was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
