"""Texts to tokens, in whatever process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tokenformer.language.tokenizers import Tokenizer, make_tokenizer


class Encoded(NamedTuple):
    """Tokens of several texts end to end [t], and how many each has, int32 [texts]."""

    tokens: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Encoder:
    """A tokenizer that travels to other processes: called with texts, and whether each ends its document.

    The end-of-document id follows the texts that do. ``dtype`` is that of the tokens.
    """

    definition: str
    eos_token: str
    dtype: str

    @classmethod
    def of(cls, tokenizer: Tokenizer, dtype: np.dtype) -> Encoder:
        """For ``tokenizer``, whose ids fit ``dtype``."""
        return cls(tokenizer.definition, tokenizer.eos_token, dtype.str)

    def __call__(self, payload: tuple[Sequence[str], Sequence[bool]]) -> Encoded:
        texts, ends = payload
        tokenizer = _tokenizer(self.definition, self.eos_token)
        end = np.array([tokenizer.eos_token_id], dtype=self.dtype)
        arrays: list[np.ndarray] = []
        lengths = np.empty(len(texts), dtype=np.int32)
        for number, (ids, ended) in enumerate(zip(tokenizer.encode_batch(texts), ends, strict=True)):
            arrays.append(ids.astype(self.dtype))
            if ended:
                arrays.append(end)
            lengths[number] = len(ids) + ended
        return Encoded(np.concatenate(arrays), lengths)


@lru_cache(maxsize=1)
def _tokenizer(definition: str, eos_token: str) -> Tokenizer:
    return make_tokenizer(definition, eos_token=eos_token)
