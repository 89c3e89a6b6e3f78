"""All layers of one token in one kernel: the order of its chunks here, its results in ``tests/generation``."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("chunks", "programs"), [(576, 132), (288, 132), (96, 132), (576, 114), (6, 3), (30, 6)]
)
def test_the_order_of_the_values(chunks: int, programs: int) -> None:
    from tokenformer.ops.decode_layers import values_order

    order = values_order(chunks, programs)
    assert order.sort().values.tolist() == list(range(chunks))
    projections = order // (chunks // 3)
    vectors = [projections[program::programs].unique().numel() for program in range(programs)]
    assert max(vectors) <= 2  # a program makes one vector, or one more at the end
    whole = chunks // programs * programs
    assert all(projections[:whole][program::programs].unique().numel() <= 1 for program in range(programs))


def test_which_shapes_are_served() -> None:
    from tokenformer.ops.decode_layers import Shape

    assert Shape(1536, 16, 1536, 1536, 6144).is_served()
    assert Shape(768, 12, 3072, 3072, 6144).is_served()
    assert not Shape(1024, 16, 1792, 1792, 7168).is_served()
    assert not Shape(1000, 10, 1000, 1000, 4000).is_served()
    assert Shape(1536, 16, 1536, 1536, 6144).phases() == [576, 576, 192, 192, 768, 768]
