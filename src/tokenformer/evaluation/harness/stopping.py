"""Generation that ends at stop sequences of text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from tokenformer.generation.config import SamplingConfig
from tokenformer.generation.engine import generate_stream
from tokenformer.language.tokenizers import Tokenizer
from tokenformer.models.base import LanguageModel


def generate_until_stopped(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    stops: Sequence[str],
    max_new_tokens: int,
    sampling: SamplingConfig,
) -> list[str]:
    """The text that follows each prompt, up to the first of ``stops`` in it; that one is left out.

    Args:
        model: in any mode, on its own device.
        tokenizer: turns new ids into text; its end-of-document id ends a text too.
        prompts: token ids of each prompt.
        stops: sequences of text, none of them empty.
        max_new_tokens: the most new ids.
        sampling: how ids are drawn.

    Raises:
        TokenFormerError: as :func:`~tokenformer.generation.engine.generate_stream`.
    """
    texts = [""] * len(prompts)
    streams = [tokenizer.stream(skip_special=False) for _ in prompts]
    ended = [False] * len(prompts)
    steps = generate_stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_token_id=tokenizer.eos_token_id,
        vocab_size=tokenizer.vocab_size,
    )
    with closing(steps):  # type: ignore[type-var]
        for step in steps:
            for row, token in enumerate(step.tokens):
                if token is not None and not ended[row]:
                    texts[row] += streams[row].add(token)
                ended[row] = ended[row] or token is None or any(stop in texts[row] for stop in stops)
            if all(ended):
                break
    whole = (text + stream.finish() for text, stream in zip(texts, streams, strict=True))
    return [_before_first(text, stops) for text in whole]


def _before_first(text: str, stops: Sequence[str]) -> str:
    found = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(found)] if found else text
