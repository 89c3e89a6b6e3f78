"""How prompts and new tokens fit into a model's context. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from tokenformer.errors import TokenFormerError


def fit_prompts(
    prompts: Sequence[Sequence[int]], *, context: int, max_new_tokens: int, truncate: bool
) -> list[list[int]]:
    """Check that prompts fit into ``context`` tokens, or cut them.

    With ``truncate`` the last tokens of a prompt are kept, so many that ``max_new_tokens`` fit behind them.

    Raises:
        TokenFormerError: a prompt is longer than the context, or ``truncate`` leaves no room for one.
    """
    if not truncate:
        for index, prompt in enumerate(prompts):
            if len(prompt) > context:
                which = f"prompt {index + 1}" if len(prompts) > 1 else "the prompt"
                raise TokenFormerError(
                    f"{which} has {len(prompt)} tokens, but the model's context is {context}; shorten it, "
                    "or keep its last tokens alone with --truncate-prompt (in Python: truncate_prompt=True)"
                )
        return [list(prompt) for prompt in prompts]
    room = context - max_new_tokens
    if room < 1:
        raise TokenFormerError(
            f"max_new_tokens {max_new_tokens} leaves no room for a prompt in the model's context of "
            f"{context} tokens; with --truncate-prompt at least one must be left"
        )
    return [list(prompt[-room:]) for prompt in prompts]


def new_token_limits(prompts: Sequence[Sequence[int]], *, context: int, max_new_tokens: int) -> list[int]:
    """The most new tokens of each prompt: ``max_new_tokens``, or what is left of the context."""
    return [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
