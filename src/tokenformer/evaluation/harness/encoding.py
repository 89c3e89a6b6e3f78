"""Texts of the harness's requests as token ids, all of them together."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tokenformer.evaluation.likelihood import Continuation
from tokenformer.language.tokenizers import Tokenizer

_AT_SPACE = re.compile(r" \S")


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], *, prefix_token: int
) -> list[Continuation]:
    """Ids of each (context, continuation), as the harness's ``TemplateLM.loglikelihood`` makes them one by one.

    Both are encoded as one text, or apart where that gives the same ids; the context's part of it is as long as the
    context is by itself, without white space at its end, which goes with the continuation. Special tokens spelled in a
    text are read as such.

    Args:
        tokenizer: the model's.
        pairs: an empty context stands for ``prefix_token``.
        prefix_token: what comes before a text without context, unless the text begins with it.
    """
    contexts = [context.rstrip() for context, _ in pairs]
    rests = [context[len(before) :] + rest for before, (context, rest) in zip(contexts, pairs, strict=True)]
    apart = [
        tokenizer.works_in_words and bool(before) and _AT_SPACE.match(rest) is not None
        for before, rest in zip(contexts, rests, strict=True)
    ]
    wholes = [
        rest if cut else before + rest for before, rest, cut in zip(contexts, rests, apart, strict=True)
    ]
    texts = list(dict.fromkeys([*contexts, *wholes]))
    encoded = dict(zip(texts, tokenizer.encode_batch(texts, allow_special=True), strict=True))
    found = []
    for context, whole, cut in zip(contexts, wholes, apart, strict=True):
        before, ids = encoded[context], encoded[whole]
        if cut:
            found.append(Continuation(before, ids))
        elif not context and ids[:1].tolist() != [prefix_token]:
            found.append(Continuation(np.array([prefix_token]), ids))
        else:
            start = len(before) or 1
            found.append(Continuation(ids[:1] if not context else before, ids[start:]))
    return found
