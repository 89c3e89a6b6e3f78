"""Which samples a rank's forward passes read: all of them once, whatever the sizes."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenformer.train.batch_sizes import BatchSizes
from tokenformer.train.micro_batches import MicroBatches


@given(
    start=st.integers(0, 10**12),
    sequences=st.integers(1, 70),
    micro=st.integers(1, 80),
    ranks=st.integers(1, 17),
    step=st.integers(0, 10**6),
)
def test_every_sample_of_a_step_comes_exactly_once(
    start: int, sequences: int, micro: int, ranks: int, step: int
) -> None:
    per_rank = [MicroBatches(start, sequences, micro, rank, ranks) for rank in range(ranks)]
    assert len({batches.per_step for batches in per_rank}) == 1
    shares = []
    for batches in per_rank:
        passes = [batches(k) for k in range(step * batches.per_step, (step + 1) * batches.per_step)]
        assert all(len(samples) <= micro for samples in passes)
        shares.append([i for samples in passes for i in samples])
    first = start + step * sequences
    assert [i for share in shares for i in share] == list(range(first, first + sequences))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert per_rank[0].per_step == -(-max(sizes) // micro), "no pass more than the largest share needs"


def test_ranks_with_nothing_left_have_empty_passes() -> None:
    passes = [[MicroBatches(10, 5, 2, rank, 2)(k) for k in range(4)] for rank in range(2)]
    assert passes[0] == [range(10, 12), range(12, 12), range(15, 17), range(17, 17)]
    assert passes[1] == [range(12, 14), range(14, 15), range(17, 19), range(19, 20)]


def test_it_travels_between_processes() -> None:
    batches = MicroBatches(3, 8, 2, 1, 4)
    assert pickle.loads(pickle.dumps(batches))(5) == batches(5)  # noqa: S301


@pytest.mark.parametrize(
    "wrong", [(-1, 8, 2), (0, 0, 2), (0, 8, 0), (0, 8, 2, 4, 4), (0, 8, 2, -1, 4), (0, 8, 2, 0, 0)]
)
def test_sizes_that_cannot_be_are_refused(wrong: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"MicroBatches\(.*expected"):
        MicroBatches(*wrong)


@given(
    first=st.integers(1, 20),
    rise=st.integers(0, 30),
    warmup=st.integers(1, 12),
    micro=st.integers(1, 9),
    ranks=st.integers(1, 4),
    begin=st.integers(0, 15),
)
def test_batch_that_grows_leaves_no_sample_out(
    first: int, rise: int, warmup: int, micro: int, ranks: int, begin: int
) -> None:
    """The ranks' passes of every step hold its samples; starting at any step gives what the whole stage gives there."""
    sizes = BatchSizes(first + rise, first, warmup)
    steps = range(begin, begin + 16)
    seen: list[int] = []
    position = [0] * ranks
    for step in steps:
        for rank in range(ranks):
            batches = MicroBatches(sizes.before(begin), sizes.full, micro, rank, ranks, sizes, begin)
            for _ in range(batches.passes(step - begin)):
                assert len(batches(position[rank])) <= micro
                seen += batches(position[rank])
                position[rank] += 1
        assert len(seen) == sizes.before(step + 1) - sizes.before(begin)
    assert seen == list(range(sizes.before(begin), sizes.before(begin + 16)))
    assert [sizes.at(0), sizes.at(warmup)] == [first, first + rise]
    assert all(sizes.at(s) <= sizes.at(s + 1) for s in range(warmup + 1))


@given(
    sequences=st.integers(1, 300), first=st.integers(1, 9), rise=st.integers(0, 9), warmup=st.integers(0, 20)
)
def test_steps_for_so_many_sequences(sequences: int, first: int, rise: int, warmup: int) -> None:
    sizes = BatchSizes(first + rise, first, warmup)
    steps = sizes.steps_for(sequences)
    assert sizes.before(steps - 1) < sequences <= sizes.before(steps)
