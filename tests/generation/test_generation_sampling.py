"""Sampling against closed forms computed in float64 with numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tokenformer.errors import TokenFormerError
from tokenformer.generation.config import SamplingConfig
from tokenformer.generation.sampling import (
    Sampler,
    draw,
    filter_logits,
    mask_min_p,
    mask_padding,
    mask_top_k,
    mask_top_p,
)

# Halves, so that ties occur; a base of 2 makes probabilities that float64 adds up without rounding trouble.
logit_rows = st.lists(st.integers(-12, 12).map(lambda k: k / 2), min_size=1, max_size=20)


def softmax(row: list[float]) -> np.ndarray:
    weights = np.exp(np.array(row, dtype=np.float64) - max(row))
    return weights / weights.sum()


def kept(masked: torch.Tensor) -> list[bool]:
    assert masked.shape[0] == 1
    return (masked[0] > float("-inf")).tolist()


@given(row=logit_rows, k=st.integers(1, 25))
def test_top_k_keeps_tokens_that_fewer_than_k_exceed(row: list[float], k: int) -> None:
    expected = [sum(other > value for other in row) < k for value in row]
    assert kept(mask_top_k(torch.tensor([row]), k)) == expected


@given(row=logit_rows, p=st.floats(0.001, 1.0))
def test_top_p_keeps_the_smallest_set_that_reaches_p(row: list[float], p: float) -> None:
    probabilities = softmax(row)
    order = sorted(range(len(row)), key=lambda index: (-row[index], index))
    found = kept(mask_top_p(torch.tensor([row]), p))
    before = 0.0
    for index in order:
        if abs(before - p) > 1e-6:  # at the very border float32 may fall on either side
            assert found[index] == (before < p)
        before += probabilities[index]
    assert found[order[0]]


@given(row=logit_rows, min_p=st.floats(0.001, 1.0))
def test_min_p_keeps_tokens_relative_to_the_likeliest(row: list[float], min_p: float) -> None:
    probabilities = softmax(row)
    found = kept(mask_min_p(torch.tensor([row]), min_p))
    for index, probability in enumerate(probabilities):
        relative = probability / probabilities.max()
        if abs(relative - min_p) > 1e-6:
            assert found[index] == (relative >= min_p)
    assert found[int(probabilities.argmax())]


def test_masks_of_a_known_row() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    logits = probabilities.log()
    assert kept(mask_top_k(logits, 2)) == [False, True, False, True]
    assert kept(mask_top_p(logits, 0.65)) == [False, True, False, True]
    assert kept(mask_top_p(logits, 0.75)) == [False, True, True, True]
    assert kept(mask_min_p(logits, 0.6)) == [False, True, False, True]
    assert kept(mask_padding(logits, 2)) == [True, True, False, False]


def test_filters_apply_in_the_stated_order() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.10]]).log()
    # Of the top 2 alone, the first has 2/3: top-p 0.6 then keeps one; before top-k it would have kept two.
    sampling = SamplingConfig(top_k=2, top_p=0.6)
    assert kept(filter_logits(logits, sampling, vocab_size=4)) == [True, False, False, False]
    # Temperature 1/2 squares the shares: 0.5 / 0.25 becomes 4 to 1, so min-p 0.3 drops the second.
    sampling = SamplingConfig(temperature=0.5, min_p=0.3)
    assert kept(filter_logits(logits, sampling, vocab_size=4)) == [True, False, False, False]


@settings(max_examples=50)
@given(
    row=st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=12),
    temperature=st.floats(0.3, 3.0),
    top_k=st.none() | st.integers(1, 12),
)
def test_draws_follow_the_filtered_softmax(row: list[float], temperature: float, top_k: int | None) -> None:
    sampling = SamplingConfig(temperature=temperature, top_k=top_k)
    logits = filter_logits(torch.tensor([row]), sampling, vocab_size=len(row))
    keep = np.array(kept(logits))
    expected = np.where(keep, np.exp(np.array(row, dtype=np.float64) / temperature), 0)
    expected /= expected.sum()
    # Evenly spaced uniforms turn the inverse cumulative distribution into its exact frequencies.
    count = 20_000
    uniforms = (torch.arange(count) + 0.5) / count
    drawn = draw(logits.expand(count, -1), uniforms)
    frequencies = np.bincount(drawn.numpy(), minlength=len(row)) / count
    np.testing.assert_allclose(frequencies, expected, atol=2e-4)


@given(row=logit_rows, uniform=st.sampled_from([0.0, 0.5, 1 - 2**-24]))
def test_no_token_of_probability_zero_is_drawn(row: list[float], uniform: float) -> None:
    logits = torch.tensor([[float("-inf"), *row, float("-inf"), -300.0]])
    token = int(draw(logits, torch.tensor([uniform])))
    assert 1 <= token <= len(row)


def test_greedy_takes_the_likeliest_real_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 9.0], [5.0, 1.0, 2.0, 9.0]])
    sampler = Sampler(SamplingConfig(temperature=0), batch_size=2, vocab_size=3)
    assert sampler(logits, [0, 1]) == [1, 0]


def test_tiny_temperatures_are_greedy_and_finite() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0]])
    for temperature in (1e-6, 1e-38, 1e-60):
        sampler = Sampler(SamplingConfig(temperature=temperature), batch_size=1, vocab_size=3)
        assert sampler(logits, [0]) == [1]


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))

    def draws(seed: int, rows: list[int], batch_size: int, count: int = 20) -> list[list[int]]:
        sampler = Sampler(SamplingConfig(seed=seed), batch_size=batch_size, vocab_size=50)
        steps = [sampler(logits[rows], range(batch_size)) for _ in range(count)]
        return [[step[row] for step in steps] for row in range(batch_size)]

    together = draws(7, [0, 1, 2, 3, 4], 5)
    for row in range(5):
        assert draws(7 + row, [row], 1) == [together[row]]
    assert draws(8, [0, 1, 2, 3, 4], 5) != together


def test_rows_that_have_ended_do_not_shift_the_draws_of_others() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    both = Sampler(SamplingConfig(seed=1), batch_size=2, vocab_size=50)
    second_only = Sampler(SamplingConfig(seed=1), batch_size=2, vocab_size=50)
    expected = [both(logits, [0, 1])[1] for _ in range(10)]
    assert [second_only(logits[1:], [1])[0] for _ in range(10)] == expected


def test_logits_that_are_not_finite_are_reported() -> None:
    sampler = Sampler(SamplingConfig(), batch_size=1, vocab_size=2)
    with pytest.raises(TokenFormerError, match="not finite"):
        sampler(torch.tensor([[0.0, float("nan")]]), [0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 0.0),
        ("min_p", 1.5),
        ("seed", -1),
        ("seed", 2**63),
        ("top_n", 1),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        SamplingConfig(**{field: value})
