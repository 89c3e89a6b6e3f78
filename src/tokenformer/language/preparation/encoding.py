"""Texts to tokens, in whatever process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tokenformer.language.preparation.tokens import Body
from tokenformer.language.tokenizers import Tokenizer, make_tokenizer


class Encoded(NamedTuple):
    """Tokens of several texts end to end [t], and how many each has, int32 [texts]."""

    tokens: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Encoder:
    """A tokenizer that travels to other processes: called with bodies, and whether each ends its document.

    Texts are encoded, ids stay as they are; the end-of-document id follows those that end a document. ``dtype`` is
    that of the tokens.
    """

    definition: str
    eos_token: str
    dtype: str

    @classmethod
    def of(cls, tokenizer: Tokenizer, dtype: np.dtype) -> Encoder:
        """For ``tokenizer``, whose ids fit ``dtype``."""
        return cls(tokenizer.definition, tokenizer.eos_token, dtype.str)

    def __call__(self, payload: tuple[Sequence[Body], Sequence[bool]]) -> Encoded:
        bodies, ends = payload
        tokenizer = _tokenizer(self.definition, self.eos_token)
        end = np.array([tokenizer.eos_token_id], dtype=self.dtype)
        arrays: list[np.ndarray] = []
        lengths = np.empty(len(bodies), dtype=np.int32)
        encoded = iter(tokenizer.encode_batch([body for body in bodies if isinstance(body, str)]))
        for number, (body, ended) in enumerate(zip(bodies, ends, strict=True)):
            ids = next(encoded) if isinstance(body, str) else body.ids
            arrays.append(ids.astype(self.dtype))
            if ended:
                arrays.append(end)
            lengths[number] = len(ids) + ended
        return Encoded(np.concatenate(arrays), lengths)


@lru_cache(maxsize=1)
def _tokenizer(definition: str, eos_token: str) -> Tokenizer:
    return make_tokenizer(definition, eos_token=eos_token)
