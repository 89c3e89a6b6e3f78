"""What ``train_step.py`` and ``float8_curve.py`` measure: models by size, and whole training steps of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formula import published_pattention
from tokenformer.language.loss import Batch, loss_sum
from tokenformer.layers.pattention import Pattention
from tokenformer.models.base import LanguageModel
from tokenformer.models.empty import empty_model
from tokenformer.models.tokenformer.config import ROLES, TokenFormerConfig
from tokenformer.models.transformer.config import TransformerConfig
from tokenformer.ops.pattention import WeightKind
from tokenformer.ops.pattention_float8 import pattention_float8
from tokenformer.train.activation_checkpointing import apply_activation_checkpointing
from tokenformer.train.config import RunConfig, StageConfig
from tokenformer.train.sections import ActivationCheckpointingConfig
from tokenformer.train.step import TrainStep
from tokenformer.validation import validate

GROUPS = 4
RECOMPUTED = (5, 12)
"""Of so many blocks so many make their scores again in the backward: enough to take the 150M step below 10 GB."""
SIDES = (
    "ours",
    "groups",
    "accumulated",
    "recomputed",
    "float8",
    "formula",
    "published",
    "eager",
    "transformer",
    "gpt_neox",
    "launched",
)
Step = Callable[[], Tensor]
"""Takes a step; the loss, in nats a target."""


class Size(NamedTuple):
    """A TokenFormer with n = d in attention and 4 d in the feed-forward layer, and the batch it is measured with."""

    layers: int
    hidden: int
    heads: int
    vocab: int
    sequences: int
    length: int


SIZES = {
    "tiny": Size(2, 32, 2, 64, 2, 16),
    "150M": Size(12, 768, 12, 50304, 16, 2048),
    "450M": Size(24, 1024, 16, 50304, 8, 2048),
    "1.5B": Size(40, 1536, 16, 50304, 4, 2048),
}


class Side(NamedTuple):
    """A step, and the model that takes it; ``flops`` of a token."""

    step: Step
    model: nn.Module
    flops: float


def make_side(
    name: str, size: Size, norm_activation: str, batches: Sequence[Batch], device: torch.device
) -> Side:
    """One of ``SIDES``, on ``device``, with random weights."""
    if name == "gpt_neox":
        model = gpt_neox(size, device)
        return Side(plain_step(model, gpt_neox_loss, batches, device), model, transformer_flops(size))
    if name == "transformer":
        transformer = fresh_model(transformer_config(size), device)
        return Side(fast_step(transformer, size, batches, device), transformer, transformer_flops(size))
    config = tokenformer_config(size, norm_activation, groups=GROUPS if name == "groups" else 1)
    ours = fresh_model(config, device)
    op = {
        "float8": pattention_float8,
        "formula": published_op,
        "published": published_op,
        "eager": published_op,
    }
    for module in ours.modules():
        if isinstance(module, Pattention) and name in op:
            module.op = op[name]
    if name == "recomputed":
        share, whole = RECOMPUTED
        scores = ActivationCheckpointingConfig(
            mode="selective", blocks=-(-size.layers * share // whole), recompute="scores"
        )
        apply_activation_checkpointing(ours, scores)
    flops = config.flops_per_token(size.length)
    if name in ("published", "eager"):
        return Side(published_step(ours, batches, device, compiled=name == "published"), ours, flops)
    passes = 2 if name == "accumulated" else 1
    step = fast_step(ours, size, batches, device, passes=passes, cuda_graphs=name != "launched")
    return Side(step, ours, flops)


def fast_step(
    model: LanguageModel,
    size: Size,
    batches: Sequence[Batch],
    device: torch.device,
    *,
    passes: int = 1,
    cuda_graphs: bool = True,
) -> Step:
    """The step of the training loop; of ``passes`` parts of each batch."""
    if device.type == "cuda":
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile(dynamic=False)
    step = TrainStep(model, RandomTask(), stage_config(size, cuda_graphs=cuda_graphs), device)  # type: ignore[arg-type]
    parts = [
        Batch(*part) for batch in batches for part in zip(*(x.chunk(passes) for x in batch[:2]), strict=True)
    ]
    endless = cycle(parts)
    return lambda: step(endless, 0, passes).nats / (size.sequences * size.length)


class RandomTask:
    """What a training step needs of a task."""

    def loss(self, model: LanguageModel, batch: Batch) -> Any:
        return loss_sum(model, batch)


def published_step(
    model: LanguageModel, batches: Sequence[Batch], device: torch.device, *, compiled: bool
) -> Step:
    """As training scripts commonly have it: torch's layer norms, the loss of all logits."""
    for block in model.blocks:  # type: ignore[union-attr]
        for name in ("attention_norm", "ffn_norm"):
            plain = getattr(block, name)
            setattr(block, name, nn.LayerNorm(plain.features, plain.eps, elementwise_affine=False))
    compiled = compiled and device.type == "cuda"
    loss = torch.compile(full_logits_loss, dynamic=False) if compiled else full_logits_loss
    if compiled:  # a block is compiled once for all, where a whole deep model takes minutes
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile(dynamic=False)
    return plain_step(
        model,
        lambda model, inputs, targets: loss(model.hidden(inputs), model.head.weight, targets),
        batches,
        device,
    )


def full_logits_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten())


def plain_step(
    model: nn.Module, loss_of: Callable[..., Tensor], batches: Sequence[Batch], device: torch.device
) -> Step:
    """Autocast, torch's fused AdamW and clipping; no CUDA graphs."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    endless = cycle(batches)
    bfloat16 = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")

    def step() -> Tensor:
        pair = next(endless)[:2]
        if device.type == "cuda":
            pair = [x.pin_memory().to(device, non_blocking=True) for x in pair]
        with bfloat16:
            loss = loss_of(model, *pair)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def gpt_neox(size: Size, device: torch.device) -> nn.Module:
    """That of Hugging Face with as many parameters, compiled."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        **shared_fields(size),
        intermediate_size=6 * size.hidden,
        tie_word_embeddings=True,
        use_parallel_residual=False,
        attention_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        classifier_dropout=0.0,
        use_cache=False,
    )
    with device:
        model: nn.Module = GPTNeoXForCausalLM(config)
    if device.type == "cuda":
        model.compile(dynamic=False)
    return model


def gpt_neox_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=inputs, labels=inputs, shift_labels=targets).loss
    return loss


def published_op(
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    kind: WeightKind,
    *,
    recompute_scores: bool = False,
) -> Tensor:
    return published_pattention(x, keys[0], values[0], kind.norm_activation)


@torch.no_grad()
def fresh_model(config: TokenFormerConfig | TransformerConfig, device: torch.device) -> LanguageModel:
    """A model with weights of standard deviation 0.02, drawn where it lies: on a CPU that takes long."""
    model = empty_model(config).to_empty(device=device)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, 0.02)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return model


def tokenformer_config(size: Size, norm_activation: str, groups: int = 1) -> TokenFormerConfig:
    totals = dict(zip(ROLES, (size.hidden, size.hidden, 4 * size.hidden), strict=True))
    return TokenFormerConfig(
        **shared_fields(size),
        **{f"{role}_param_tokens": n for role, n in totals.items()},
        param_token_groups={role: (n // groups,) * groups for role, n in totals.items()},
        norm_activation=norm_activation,
    )


def transformer_config(size: Size) -> TransformerConfig:
    """Keys and values of n = d tokens are twice a d x d projection: 8 d^2 + 8 d^2 = 4 d^2 + 2 d (6 d)."""
    return TransformerConfig(**shared_fields(size), intermediate_size=6 * size.hidden)


def transformer_flops(size: Size) -> float:
    return transformer_config(size).flops_per_token(size.length)


def shared_fields(size: Size) -> dict[str, Any]:
    return {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": size.length,
    }


def stage_config(size: Size, *, cuda_graphs: bool = True, **sections: Any) -> StageConfig:
    """A stage of this size; ``sections`` replace those here."""
    values = {
        "model": tokenformer_config(size, "gelu").model_dump(mode="json"),
        "steps": 1000,
        "precision": {"cuda_graphs": "auto" if cuda_graphs else False},
        "data": {
            "path": ".",
            "sequence_length": size.length,
            "batch_tokens": size.sequences * size.length,
        },
    }
    return validate(RunConfig, values | sections, source="benchmark").resolve()[0]
