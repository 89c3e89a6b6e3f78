"""Keys and values kept between calls: what is shared, and what must not be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tokenformer.layers.attention import AttentionContext, SelfAttention


@pytest.fixture
def attention() -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention(*(nn.Linear(6, 6) for _ in range(4)), num_heads=3)


def context(past: int) -> AttentionContext:
    return AttentionContext(cos=None, sin=None, mask=None, past=past, keep=True)


def test_one_call_equals_heads_by_hand(attention: SelfAttention) -> None:
    x = torch.randn(2, 4, 6)
    found, buffer = attention(x, AttentionContext(None, None, None, past=0, keep=False), None)
    assert buffer is None
    parts = []
    for head in range(3):
        part = slice(2 * head, 2 * head + 2)
        query, key, value = (p(x)[..., part] for p in (attention.query, attention.key, attention.value))
        scores = (query @ key.mT / 2**0.5).masked_fill(torch.ones(4, 4).triu(1) > 0, -torch.inf)
        parts.append(scores.softmax(-1) @ value)
    torch.testing.assert_close(found, attention.proj(torch.cat(parts, dim=-1)))


def test_without_gradients_the_buffer_is_filled_in_place_and_copied_where_another_went_on(
    attention: SelfAttention,
) -> None:
    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        _, first = attention(x[:, :2], context(0), None)
        used = first.key[:, :, :2].clone()
        _, second = attention(x[:, 2:3], context(2), first)
        assert second.key.data_ptr() == first.key.data_ptr()
        _, other = attention(x[:, 3:4], context(2), first)
        assert other.key.data_ptr() != second.key.data_ptr()
    assert torch.equal(second.key[:, :, :2], used)
    assert not torch.equal(second.key[:, :, 2], other.key[:, :, 2])


def test_a_buffer_grows_beyond_its_first_room(attention: SelfAttention) -> None:
    x = torch.randn(1, 600, 6)
    with torch.no_grad():
        whole, _ = attention(x, context(0), None)
        parts, buffer = [], None
        for start in range(0, 600, 150):
            part, buffer = attention(x[:, start : start + 150], context(start), buffer)
            parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("trained", ["query", "key", "value", "proj"])
def test_a_backward_goes_through_several_calls_whatever_is_trained(
    attention: SelfAttention, trained: str
) -> None:
    x = torch.randn(2, 4, 6)
    attention.requires_grad_(False)
    weight = getattr(attention, trained).weight.requires_grad_()
    whole, _ = attention(x, context(0), None)
    (expected,) = torch.autograd.grad(whole.square().sum(), weight)
    parts, buffer = [], None
    for index in range(4):
        part, buffer = attention(x[:, index : index + 1], context(index), buffer)
        parts.append(part)
    (found,) = torch.autograd.grad(torch.cat(parts, dim=1).square().sum(), weight)
    torch.testing.assert_close(found, expected)
