"""The Transformer's own growth: what is kept, and which moments follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenformer import TokenFormerError, Transformer, TransformerConfig
from tokenformer.growth.measure import logit_change
from tokenformer.growth.transformer import deepen_transformer, widen_transformer

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def draw_tokens(seed: int = 0) -> Tensor:
    return torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(seed))


def trained(optimizer_steps: int = 3, **fields: Any) -> tuple[Transformer, torch.optim.AdamW]:
    model = Transformer(TransformerConfig(**SIZES | fields), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(optimizer_steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def loss_of(model: nn.Module) -> Tensor:
    tokens = draw_tokens()
    return nn.functional.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize(
    "fields",
    [{}, {"use_bias": True, "use_parallel_residual": True}, {"intermediate_size": 24, "rotary_pct": 0.25}],
    ids=["plain", "neox", "narrow"],
)
def test_widening_keeps_the_function(factor: int, fields: dict[str, Any]) -> None:
    model, _ = trained(**fields)
    wide = widen_transformer(model, factor, seed=3).model
    assert logit_change(model, wide, draw_tokens(1)) < 1e-5
    assert logit_change(model.double(), wide.double(), draw_tokens(1)) < 1e-6
    assert wide.config.hidden_size == factor * 16
    assert wide.config.num_attention_heads == factor * 2
    assert wide.config.num_parameters() == sum(p.numel() for p in wide.parameters())
    assert loss_of(wide).item() == pytest.approx(loss_of(model).item(), rel=1e-6)


def test_copies_of_a_feature_part_after_widening() -> None:
    model, _ = trained()
    wide = widen_transformer(model, 2).model
    optimizer = torch.optim.AdamW(wide.parameters(), lr=1e-2)
    for _ in range(2):
        loss_of(wide).backward()
        optimizer.step()
        optimizer.zero_grad()
    halves = wide.embedding.weight.detach().chunk(2, dim=1)
    assert (halves[0] - halves[1]).abs().max() > 1e-3


def test_moments_follow_the_gradients_of_the_wider_model() -> None:
    """Without noise the gradients of the wider model are those of the old one, repeated and divided by r."""
    model, optimizer = trained()
    grown = widen_transformer(model, 2, noise=0.0)
    loss_of(model).backward()
    loss_of(grown.model).backward()
    old = {name: p.grad for name, p in model.named_parameters()}
    as_moments = grown.moments({name: {"exp_avg": grad} for name, grad in old.items() if grad is not None})
    for name, parameter in grown.model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(as_moments[name]["exp_avg"], parameter.grad, rtol=1e-4, atol=1e-7)
    named = {name: optimizer.state[p] for name, p in model.named_parameters()}
    moved = grown.moments(named)
    weight = "blocks.0.ffn.up.weight"
    assert moved[weight]["exp_avg_sq"].shape == (128, 32)
    assert torch.equal(moved[weight]["exp_avg_sq"][:64, :16], named[weight]["exp_avg_sq"] / 4)
    assert moved[weight]["step"] == 3


@pytest.mark.parametrize(("order", "expected"), [("stack", [0, 1, 0, 1]), ("interleave", [0, 0, 1, 1])])
def test_deepening_repeats_blocks_with_their_moments(order: Any, expected: list[int]) -> None:
    model, optimizer = trained()
    grown = deepen_transformer(model, 2, order=order)
    deep = grown.model
    assert deep.config.num_hidden_layers == 4
    for index, source in enumerate(expected):
        for new, old in zip(deep.blocks[index].parameters(), model.blocks[source].parameters(), strict=True):
            assert torch.equal(new, old)
    moved = grown.moments({name: optimizer.state[p] for name, p in model.named_parameters()})
    assert moved.keys() == dict(deep.named_parameters()).keys()
    source = model.blocks[expected[2]].attention.proj.weight
    assert torch.equal(moved["blocks.2.attention.proj.weight"]["exp_avg"], optimizer.state[source]["exp_avg"])


@pytest.mark.parametrize("order", ["stack", "interleave"])
def test_identity_deepening_keeps_the_function_and_learns(order: Any) -> None:
    model, _ = trained(use_bias=True)
    deep = deepen_transformer(model, 2, order=order, identity=True).model
    assert logit_change(model, deep, draw_tokens(1)) < 1e-6
    loss_of(deep).backward()
    assert all(p.grad is not None for p in deep.parameters())
    new = 2 if order == "stack" else 1
    assert deep.blocks[new].ffn.down.weight.grad.abs().max() > 0


def test_refusals() -> None:
    model, _ = trained(0)
    with pytest.raises(TokenFormerError, match="found 1, expected at least 2"):
        widen_transformer(model, 1)
    with pytest.raises(TokenFormerError, match="found 1, expected at least 2"):
        deepen_transformer(model, 1)
    untied, _ = trained(0, tie_word_embeddings=False)
    with pytest.raises(TokenFormerError, match="expected a tied head"):
        widen_transformer(untied, 2)
