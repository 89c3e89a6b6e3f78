"""Windows of the stream: for training, and for validation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenformer.errors import TokenFormerError
from tokenformer.language.windows import IGNORED, StreamWindows, ValidationWindows

lengths = st.integers(2, 300)
windows_of = st.integers(1, 40)


@given(length=lengths, t=windows_of)
def test_training_windows_lie_end_to_end(stream_of, length: int, t: int) -> None:  # type: ignore[no-untyped-def]
    if length < t + 1:
        return
    windows = StreamWindows(stream_of(length), t)
    assert len(windows) == (length - 1) // t
    rows = np.empty((2, t), np.int64)
    for index in range(len(windows)):
        windows.read(index, rows[0], rows[1], None)
        assert rows[0].tolist() == list(range(index * t, index * t + t))
        assert rows[1].tolist() == list(range(index * t + 1, index * t + t + 1))


def test_a_stream_shorter_than_a_window_is_refused(stream_of) -> None:  # type: ignore[no-untyped-def]
    assert len(StreamWindows(stream_of(11), 10)) == 1
    with pytest.raises(TokenFormerError, match=r"holds 10 tokens, expected at least 11 \(sequence_length 10"):
        StreamWindows(stream_of(10), 10)
    with pytest.raises(TokenFormerError, match="holds 1 tokens, expected at least 2"):
        ValidationWindows(stream_of(1), 10)


@given(length=lengths, t=windows_of, limit=st.one_of(st.none(), st.integers(1, 400)))
def test_validation_predicts_every_token_but_the_first_once(  # type: ignore[no-untyped-def]
    stream_of, length: int, t: int, limit: int | None
) -> None:
    windows = ValidationWindows(stream_of(length), t, limit)
    expected = np.arange(1, length)[:limit]
    assert windows.num_targets == len(expected)
    found = [windows[i] for i in range(len(windows))]
    assert all(inputs.shape == targets.shape == (t,) for inputs, targets in found)
    targets = np.concatenate([window.targets for window in found])
    inputs = np.concatenate([window.inputs for window in found])
    counted = targets != IGNORED
    assert targets[counted].tolist() == expected.tolist()
    assert inputs[counted].tolist() == (expected - 1).tolist()
    assert counted[: len(expected)].all()
    assert not inputs[~counted].any()
    with pytest.raises(IndexError):
        windows[len(windows)]


@given(length=lengths, t=windows_of, stride=st.integers(1, 40))
def test_windows_that_overlap_score_every_target_once(  # type: ignore[no-untyped-def]
    stream_of, length: int, t: int, stride: int
) -> None:
    stride = min(stride, t)
    windows = ValidationWindows(stream_of(length), t, stride=stride)
    scored = []
    for index in range(len(windows)):
        inputs, targets = windows[index]
        counted = np.flatnonzero(targets != IGNORED)
        scored += targets[counted].tolist()
        # the stream is 0, 1, 2, ...: what stands before a target says how much context it has
        assert (targets[counted] == inputs[counted] + 1).all()
        assert inputs[0] == index * stride
        assert (counted >= (t - stride if index else 0)).all()
    assert scored == list(range(1, length))


def test_a_stride_beyond_the_window_is_refused(stream_of) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TokenFormerError, match="stride: found 11, expected 1 to 10"):
        ValidationWindows(stream_of(30), 10, stride=11)
