"""Texts of the harness's requests as token ids, all of them together."""

from __future__ import annotations

from collections.abc import Sequence

from tokenformer.evaluation.likelihood import Continuation
from tokenformer.language.tokenizers import Tokenizer


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], *, prefix_token: int
) -> list[Continuation]:
    """Ids of each (context, continuation), as the harness's ``TemplateLM.loglikelihood`` makes them one by one.

    Both are encoded as one text; the context's part of it is as long as the context is by itself, without white space
    at its end, which goes with the continuation. Special tokens spelled in a text are read as such.

    Args:
        tokenizer: the model's.
        pairs: an empty context stands for ``prefix_token``.
        prefix_token: what comes before a text without context, unless the text begins with it.
    """
    contexts = [context.rstrip() for context, _ in pairs]
    wholes = [context + continuation for context, continuation in pairs]
    texts = list(dict.fromkeys([*wholes, *contexts]))
    encoded = {
        text: ids.tolist()
        for text, ids in zip(texts, tokenizer.encode_batch(texts, allow_special=True), strict=True)
    }
    found = []
    for context, whole in zip(contexts, wholes, strict=True):
        before, ids = encoded[context], encoded[whole]
        if not before and ids[:1] != [prefix_token]:
            found.append(Continuation([prefix_token], ids))
        else:
            start = len(before) or 1
            found.append(Continuation(before or ids[:1], ids[start:]))
    return found
