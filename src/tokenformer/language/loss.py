"""A batch of language modelling, and its loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tokenformer.language.windows import IGNORED
from tokenformer.models.base import LanguageModel
from tokenformer.ops.losses import linear_cross_entropy


class Batch(NamedTuple):
    """``inputs`` [b, t] int64, and ``targets`` [b, t] int64: the token after each, -100 where none counts.

    ``documents`` [b, t] int64, where several are packed in a row: attention stays inside each and positions count
    from its start; padding is document -1.
    """

    inputs: Tensor
    targets: Tensor
    documents: Tensor | None = None


class LossSum(NamedTuple):
    """``nats``: the summed cross-entropy, a differentiable float32 scalar; ``count``: over how many targets,
    an int64 scalar on the same device (so that asking for it need not wait for the device)."""

    nats: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


def loss_sum(model: LanguageModel, batch: Batch) -> LossSum:
    """Cross-entropy of a batch that lies on the model's device; its logits never exist all at once."""
    hidden = model.hidden(batch.inputs, documents=batch.documents)
    weight: Tensor = model.head.weight  # type: ignore[assignment]
    scale = float(model.head.logit_scale)  # type: ignore[arg-type]
    nats = linear_cross_entropy(hidden, weight, batch.targets, logit_scale=scale, ignore_index=IGNORED)
    return LossSum(nats, (batch.targets != IGNORED).sum())
