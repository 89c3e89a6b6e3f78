"""How far a growth step moved the function, measured on real tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenformer.models.base import LanguageModel


@torch.no_grad()
def logit_change(before: LanguageModel, after: LanguageModel, tokens: Tensor) -> float:
    """Largest change of a logit, in units of the spread (standard deviation) of the logits before.

    Args:
        before: the small model.
        after: the grown one.
        tokens: [b, t] int64, on the models' device.
    """
    old = before(tokens).logits.float()
    new = after(tokens).logits.float()
    return float((new - old).abs().max() / old.std())
