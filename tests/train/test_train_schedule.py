"""Learning-rate schedules against their closed forms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenformer.train.schedule import lr_factor, warmup_steps
from tokenformer.train.sections import ScheduleConfig

TOTAL = 100


def test_warmup_is_linear_and_ends_at_the_peak() -> None:
    schedule = ScheduleConfig(warmup_steps=10)
    assert [lr_factor(schedule, step, TOTAL) for step in range(10)] == pytest.approx(
        [s / 10 for s in range(1, 11)]
    )


def test_warmup_fraction() -> None:
    assert warmup_steps(ScheduleConfig(), 1000) == 10
    assert warmup_steps(ScheduleConfig(warmup_fraction=0.5), 7) == round(3.5)
    assert warmup_steps(ScheduleConfig(warmup_steps=10), 4) == 4


def test_cosine() -> None:
    schedule = ScheduleConfig(name="cosine", warmup_steps=20, final_lr_fraction=0.1)
    for step in range(20, TOTAL):
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 19) / 80))
        assert lr_factor(schedule, step, TOTAL) == pytest.approx(expected)
    assert lr_factor(schedule, 59, TOTAL) == pytest.approx(0.55)


def test_linear() -> None:
    schedule = ScheduleConfig(name="linear", warmup_steps=0, final_lr_fraction=0.0)
    assert lr_factor(schedule, 49, TOTAL) == pytest.approx(0.5)
    assert lr_factor(schedule, 99, TOTAL) == pytest.approx(0.0)


def test_wsd_stays_and_then_falls_linearly() -> None:
    schedule = ScheduleConfig(name="wsd", warmup_steps=10, final_lr_fraction=0.0, decay_fraction=0.2)
    assert {lr_factor(schedule, step, TOTAL) for step in range(10, 80)} == {1.0}
    assert lr_factor(schedule, 89, TOTAL) == pytest.approx(0.5)
    assert lr_factor(schedule, 99, TOTAL) == pytest.approx(0.0)


def test_constant() -> None:
    schedule = ScheduleConfig(name="constant", warmup_steps=0)
    assert {lr_factor(schedule, step, TOTAL) for step in range(TOTAL)} == {1.0}


@given(
    name=st.sampled_from(["cosine", "wsd", "linear"]),
    total=st.integers(1, 500),
    warmup=st.floats(0, 0.5),
    final=st.floats(0, 1),
    decay=st.floats(0.05, 1),
)
def test_bounds_and_end(name: str, total: int, warmup: float, final: float, decay: float) -> None:
    schedule = ScheduleConfig.model_validate(
        {"name": name, "warmup_fraction": warmup, "final_lr_fraction": final, "decay_fraction": decay}
    )
    factors = [lr_factor(schedule, step, total) for step in range(total)]
    assert all(0 <= factor <= 1 for factor in factors)
    start = warmup_steps(schedule, total)
    assert all(a >= b - 1e-12 for a, b in zip(factors[start:], factors[start + 1 :], strict=False))
    if start < total and not (name == "wsd" and round(decay * total) == 0):
        assert factors[-1] == pytest.approx(final, abs=1e-9)
