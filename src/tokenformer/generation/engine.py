"""One generation engine over any model's state: prefill the prompts, then one token at a time.

Nothing here knows what a state is (keys and values, a recurrent matrix): ``feed`` calls the model. Axis letters: b
prompts, t time, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from tokenformer.errors import TokenFormerError
from tokenformer.generation.config import SamplingConfig
from tokenformer.generation.context import fit_prompts, new_token_limits
from tokenformer.generation.feed import token_feed
from tokenformer.models.base import LanguageModel

FinishReason = Literal["eos", "length", "context"]


class GenerationStep(NamedTuple):
    """What one step of :func:`generate_stream` adds, a list entry for each prompt.

    ``tokens``: the new id, or None for a prompt that has ended. ``finish_reasons``: None while a prompt goes
    on, then ``eos`` (the end-of-text id was drawn; it is not among the tokens), ``length``
    (``max_new_tokens`` reached) or ``context`` (prompt and new tokens fill the model's context).
    """

    tokens: list[int | None]
    finish_reasons: list[FinishReason | None]


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]] | Tensor,
    *,
    max_new_tokens: int = 128,
    sampling: SamplingConfig | None = None,
    eos_token_id: int | None = None,
    vocab_size: int | None = None,
    truncate_prompt: bool = False,
) -> list[list[int]]:
    """Continue token ids.

    Args:
        model: runs on its own device, in evaluation mode; its training mode is put back.
        prompts: token ids, of different lengths if need be, or a tensor [b, t] int64. An empty prompt starts
            from ``eos_token_id``.
        max_new_tokens: the most new tokens of each prompt; fewer where the model's context
            (``max_position_embeddings``) ends first.
        sampling: temperature, filters and seed; by default plain sampling at temperature 1, seed 0.
        eos_token_id: the id that ends a text; None to go on regardless.
        vocab_size: ids from here on are padding and never generated; by default the rows of the embedding.
        truncate_prompt: keep the last tokens of prompts that do not fit, instead of an error.

    Returns:
        The new ids of each prompt, without the prompt and without ``eos_token_id``.

    Raises:
        TokenFormerError: a prompt longer than the context, empty without ``eos_token_id``, or with ids
            outside the vocabulary; logits that are not finite.
    """
    steps = generate_stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_token_id=eos_token_id,
        vocab_size=vocab_size,
        truncate_prompt=truncate_prompt,
    )
    new: list[list[int]] = [[] for _ in range(len(prompts))]
    for step in steps:
        for ids, token in zip(new, step.tokens, strict=True):
            if token is not None:
                ids.append(token)
    return new


def generate_stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]] | Tensor,
    *,
    max_new_tokens: int = 128,
    sampling: SamplingConfig | None = None,
    eos_token_id: int | None = None,
    vocab_size: int | None = None,
    truncate_prompt: bool = False,
) -> Iterator[GenerationStep]:
    """As :func:`generate`, but step by step: the new id of every prompt as soon as it is drawn.

    The arguments are checked when it is called, before the first step is asked for.
    """
    vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
    context = model.config.max_position_embeddings
    texts = prompts.tolist() if isinstance(prompts, Tensor) else [list(prompt) for prompt in prompts]
    _check_arguments(model, texts, max_new_tokens, eos_token_id, vocab_size)
    texts = [text if text else [eos_token_id] for text in texts]
    texts = fit_prompts(texts, context=context, max_new_tokens=max_new_tokens, truncate=truncate_prompt)
    limits = new_token_limits(texts, context=context, max_new_tokens=max_new_tokens)
    return _run(model, texts, limits, max_new_tokens, sampling or SamplingConfig(), vocab_size, eos_token_id)


def _run(
    model: LanguageModel,
    prompts: list[list[int]],
    limits: list[int],
    max_new_tokens: int,
    sampling: SamplingConfig,
    vocab_size: int,
    eos_token_id: int | None,
) -> Iterator[GenerationStep]:
    def reason_at(row: int, new_tokens: int) -> FinishReason | None:
        if new_tokens < limits[row]:
            return None
        return "length" if new_tokens == max_new_tokens else "context"

    rows = range(len(prompts))
    reasons = [reason_at(row, 0) for row in rows]
    training = model.training
    model.eval()
    try:
        if all(reasons):
            return
        with token_feed(model, prompts, max(limits), sampling, vocab_size) as feed:
            new_tokens = 0
            while active := [row for row in rows if reasons[row] is None]:
                tokens: list[int | None] = [None for _ in rows]
                new_tokens += 1
                for row, token in zip(active, feed.choose(active), strict=True):
                    if token == eos_token_id:
                        reasons[row] = "eos"
                    else:
                        tokens[row] = token
                        reasons[row] = reason_at(row, new_tokens)
                yield GenerationStep(tokens, list(reasons))
                feed.append(tokens)
    finally:
        model.train(training)


def _check_arguments(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_token_id: int | None,
    vocab_size: int,
) -> None:
    rows = model.config.vocab_size
    if not 0 < vocab_size <= rows:
        raise TokenFormerError(
            f"vocab_size is {vocab_size}, expected 1 to {rows}, the rows of the model's embedding"
        )
    if max_new_tokens < 0:
        raise TokenFormerError(f"max_new_tokens is {max_new_tokens}, expected 0 or more")
    if eos_token_id is not None and not 0 <= eos_token_id < vocab_size:
        raise TokenFormerError(
            f"eos_token_id is {eos_token_id}, expected an id below vocab_size {vocab_size}"
        )
    for index, prompt in enumerate(prompts):
        if not prompt and eos_token_id is None:
            raise TokenFormerError(
                f"prompt {index + 1} is empty, and there is no end-of-text id to start from"
            )
        wrong = [token for token in prompt if not 0 <= token < rows]
        if wrong:
            raise TokenFormerError(f"prompt {index + 1} has token id {wrong[0]}, expected 0 to {rows - 1}")
