"""Causal attention inside documents, and the positions and masks that go with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING_DOCUMENT = -1


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention, scale 1/sqrt(e).

    Args:
        query: [b, h, t, e].
        key: [b, h, s, e] with s >= t; the queries are the last t of the s positions.
        value: like ``key``.
        mask: [b, 1, t, s] bool, True where a query may look, from :func:`document_mask`; None for plain
            causal attention.

    Returns:
        [b, h, t, e].
    """
    t, s = query.shape[2], key.shape[2]
    if mask is not None or t == 1:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if t == s:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    causal = torch.ones(t, s, dtype=torch.bool, device=query.device).tril(s - t)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=causal)


def document_mask(query_documents: Tensor, key_documents: Tensor) -> Tensor:
    """Who may look at whom: earlier or equal positions of the same document, and every position at itself.

    Looking at itself keeps the rows of padding finite.

    Args:
        query_documents: [b, t] integers.
        key_documents: [b, s] integers; the queries are the last t of the s positions.

    Returns:
        [b, 1, t, s] bool.
    """
    t, s = query_documents.shape[1], key_documents.shape[1]
    same = query_documents[:, :, None] == key_documents[:, None, :]
    same &= (query_documents != PADDING_DOCUMENT)[:, :, None]
    everywhere = torch.ones(t, s, dtype=torch.bool, device=same.device)
    causal = everywhere.tril(s - t)
    itself = causal & everywhere.triu(s - t)
    return ((same & causal) | itself)[:, None]


def document_positions(documents: Tensor, previous_document: Tensor, next_position: Tensor) -> Tensor:
    """Positions counted from the start of each document (a run of equal ids in a row).

    Args:
        documents: [b, t] integers.
        previous_document: [b], the document of the token before this call; -1 for none.
        next_position: [b], the position that the next token of that document has.

    Returns:
        [b, t] int64.
    """
    t = documents.shape[1]
    index = torch.arange(t, device=documents.device).expand_as(documents)
    before = torch.cat((previous_document[:, None], documents[:, :-1]), dim=1)
    starts = torch.where(documents != before, index, -1).cummax(dim=1).values
    continued = index + next_position[:, None]
    return torch.where(starts >= 0, index - starts, continued)
