"""How far a growth step moved the function, measured on real tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenformer.errors import TokenFormerError
from tokenformer.models.base import LanguageModel


@torch.no_grad()
def logit_change(before: LanguageModel, after: LanguageModel, tokens: Tensor) -> float:
    """Largest change of a logit, in units of the spread (standard deviation) of the logits before; those of one
    sequence exist at a time.

    Args:
        before: the small model.
        after: the grown one.
        tokens: [b, t] int64, on the models' device.

    Raises:
        TokenFormerError: the logits of ``before`` are not finite.
    """
    changes, variances, means = [], [], []
    for sequence in tokens.split(1):
        old, new = before(sequence).logits.float(), after(sequence).logits.float()
        changes.append((new - old).abs().max())
        variances.append(old.var(correction=0))
        means.append(old.mean())
    spread = (torch.stack(variances).mean() + torch.stack(means).var(correction=0)).sqrt()
    if not torch.isfinite(spread):
        raise TokenFormerError(
            "grow: the model's logits are not finite (NaN or infinity); its weights may be damaged"
        )
    return float(torch.stack(changes).max() / spread)
