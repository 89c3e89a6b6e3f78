"""The order of samples: complete in every epoch, different in each, exact in its proportions, pure."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenformer.errors import TokenFormerError
from tokenformer.language.sample_order import SampleOrder, whole_proportions

seeds = st.integers(0, 2**32 - 1)
weights = st.lists(st.one_of(st.integers(1, 50), st.floats(0.01, 10)), min_size=1, max_size=5)


@given(length=st.integers(1, 300), seed=seeds, epoch=st.one_of(st.integers(0, 3), st.integers(0, 2**40)))
@settings(max_examples=10)
def test_every_epoch_holds_every_window_once(length: int, seed: int, epoch: int) -> None:
    order = SampleOrder([length], [1.0], seed)
    samples = [order[epoch * length + i] for i in range(length)]
    assert sorted(samples) == [(0, window) for window in range(length)]


@given(length=st.integers(1, 200), seed=seeds, i=st.integers(0, 2**50))
def test_one_source_is_in_the_order_of_grain_s_own_datasets(length: int, seed: int, i: int) -> None:
    reference = grain.MapDataset.source(range(length)).seed(seed).shuffle().repeat()
    assert SampleOrder([length], [3], seed)[i] == (0, reference[i])


def test_the_order_changes_with_epoch_seed_and_source() -> None:
    orders = []
    for seed in (0, 1, 2):
        order = SampleOrder([1000, 1000], [1, 1], seed)
        for source in (0, 1):
            windows = [window for found, window in (order[i] for i in range(6000)) if found == source]
            orders += [windows[start : start + 1000] for start in (0, 1000, 2000)]
    assert len(orders) == 18
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 20
        assert np.mean(np.abs(np.diff(one)) < 10) < 0.1, "neighbours should not stay together"


@given(weights=weights, seed=seeds, period=st.integers(0, 2**30))
def test_a_mixture_has_its_exact_proportions(weights: list[float], seed: int, period: int) -> None:
    proportions = whole_proportions(weights)
    for proportion, weight in zip(proportions, weights, strict=True):
        assert proportion * Fraction(str(weights[0])) == proportions[0] * Fraction(str(weight))
    order = SampleOrder([2**16] * len(weights), weights, seed)
    total = sum(proportions)
    if total <= 2000:  # a whole period, anywhere
        counts = Counter(order[period * total + i][0] for i in range(total))
        assert [counts[source] for source in range(len(weights))] == list(proportions)
    counts = Counter(order[i][0] for i in range(500))
    for source, proportion in enumerate(proportions):
        assert abs(counts[source] - 500 * proportion / total) < len(weights), "no source runs ahead"


@given(weights=weights, seed=seeds)
@settings(max_examples=5)
def test_each_source_of_a_mixture_has_its_own_epochs(weights: list[float], seed: int) -> None:
    lengths = [60 + 2 * source for source in range(len(weights))]
    order = SampleOrder(lengths, weights, seed)
    found: list[list[int]] = [[] for _ in weights]
    for i in range(400):
        source, window = order[i]
        found[source].append(window)
    for windows, length in zip(found, lengths, strict=True):
        for start in range(0, len(windows) - length + 1, length):
            assert sorted(windows[start : start + length]) == list(range(length))


def test_proportions_are_those_written() -> None:
    assert whole_proportions([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert whole_proportions([0.5, 0.25]) == (2, 1)
    assert whole_proportions([30, 20, 10]) == (3, 2, 1)
    assert whole_proportions([123456789, 2]) == (123456789, 2)


def test_wrong_arguments() -> None:
    for seed in (-1, 2**32):
        with pytest.raises(TokenFormerError, match=f"seed: found {seed}, expected"):
            SampleOrder([5], [1], seed)
    with pytest.raises(TokenFormerError, match=f"{2**32} windows in one data directory, expected at most"):
        SampleOrder([2**32], [1], 0)
    with pytest.raises(IndexError):
        SampleOrder([5], [1], 0)[-1]
