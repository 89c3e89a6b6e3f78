"""Masks and positions of documents against loops over all pairs; attention against a loop over queries."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenformer.ops.attention import causal_attention, document_mask, document_positions

rows_of_documents = st.integers(1, 9).flatmap(
    lambda length: st.lists(
        st.lists(st.integers(-1, 2), min_size=length, max_size=length), min_size=1, max_size=3
    )
)


@given(rows_of_documents, st.data())
def test_mask_lets_a_token_see_its_own_document_before_it_and_itself(
    rows: list[list[int]], data: st.DataObject
) -> None:
    s = len(rows[0])
    t = data.draw(st.integers(1, s))
    documents = torch.tensor(rows)
    mask = document_mask(documents[:, s - t :], documents)
    assert mask.shape == (len(rows), 1, t, s)
    for row, ids in enumerate(rows):
        for i in range(t):
            query = s - t + i
            for key in range(s):
                same = ids[query] == ids[key] != -1
                assert mask[row, 0, i, key].item() == (key <= query and (same or key == query))


@given(rows_of_documents)
def test_positions_count_from_the_start_of_each_run_of_equal_ids(rows: list[list[int]]) -> None:
    found = document_positions(
        torch.tensor(rows), torch.full((len(rows),), -1), torch.zeros(len(rows), dtype=torch.long)
    )
    for row, ids in enumerate(rows):
        position = -1
        for index, document in enumerate(ids):
            position = position + 1 if index == 0 or document == ids[index - 1] else 0
            assert found[row, index] == position


@given(rows_of_documents, st.data())
def test_positions_in_parts_equal_positions_at_once(rows: list[list[int]], data: st.DataObject) -> None:
    documents = torch.tensor(rows)
    b, t = documents.shape
    cut = data.draw(st.integers(0, t))
    start = torch.full((b,), -1)
    whole = document_positions(documents, start, torch.zeros(b, dtype=torch.long))
    last = documents[:, cut - 1] if cut else start
    after = whole[:, cut - 1] + 1 if cut else torch.zeros(b, dtype=torch.long)
    assert torch.equal(document_positions(documents[:, cut:], last, after), whole[:, cut:])


def test_attention_is_a_softmax_over_what_a_query_may_see() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64)

    def by_hand(seen: torch.Tensor, t: int) -> torch.Tensor:
        out = torch.zeros(2, 3, t, 4, dtype=torch.float64)
        for b in range(2):
            for h in range(3):
                for i in range(t):
                    keys = seen[b, i].nonzero()[:, 0]
                    weights = torch.softmax(
                        key[b, h, keys] @ query[b, h, 7 - t + i] / 2, dim=0
                    )  # 2 = sqrt(e)
                    out[b, h, i] = weights @ value[b, h, keys]
        return out

    for t in (7, 3, 1):
        causal = torch.ones(2, t, 7).tril(7 - t)
        torch.testing.assert_close(
            causal_attention(query[:, :, 7 - t :], key, value, None), by_hand(causal, t)
        )
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [-1, -1, 0, 0, 0, 0, 1]])
    mask = document_mask(documents, documents)
    torch.testing.assert_close(causal_attention(query, key, value, mask), by_hand(mask[:, 0], 7))
