"""Every way to call a model gives what the plain call gives for each text alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenformer.models.base import LanguageModel

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def draw_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(seed))


def plain(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Logits [t, v] of one text [t]."""
    return model(tokens[None]).logits[0]


def left_padded(lengths: list[int]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Texts, and the same in one batch: tokens and documents [b, t]."""
    texts = [draw_tokens(length, seed=index) for index, length in enumerate(lengths)]
    tokens = draw_tokens(len(lengths), max(lengths), seed=99)
    documents = torch.full_like(tokens, -1)
    for row, text in enumerate(texts):
        tokens[row, len(tokens[row]) - len(text) :] = text
        documents[row, len(tokens[row]) - len(text) :] = row + 3
    return texts, tokens, documents


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7], [7, 1, 4], [1, 11]], ids=str)
def test_in_parts_with_a_state(any_model: LanguageModel, sizes: list[int]) -> None:
    tokens = draw_tokens(3, 12)
    state, parts = any_model.initial_state(3), []
    for part in tokens.split(sizes, dim=1):
        out = any_model(part, state=state)
        state = out.state
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), any_model(tokens).logits, **TOLERANCE)


def test_left_padding(any_model: LanguageModel) -> None:
    texts, tokens, documents = left_padded([3, 9, 1, 6])
    logits = any_model(tokens, documents=documents).logits
    assert torch.isfinite(logits).all()
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row, 9 - len(text) :], plain(any_model, text), **TOLERANCE)


def test_what_padding_holds_does_not_matter(any_model: LanguageModel) -> None:
    _, tokens, documents = left_padded([3, 9, 1])
    other = torch.where(documents == -1, 7, tokens)
    found, expected = (any_model(t, documents=documents).logits for t in (other, tokens))
    assert torch.equal(found[documents != -1], expected[documents != -1])


@pytest.mark.parametrize("documents_again", [True, False])
def test_left_padded_prompts_go_on_token_by_token(any_model: LanguageModel, documents_again: bool) -> None:
    texts, tokens, documents = left_padded([8, 12, 5])
    out = any_model(tokens[:, :8], documents=documents[:, :8], state=any_model.initial_state(3))
    logits = [out.logits]
    for index in range(8, 12):
        column = slice(index, index + 1)
        given_documents = documents[:, column] if documents_again else None
        out = any_model(tokens[:, column], documents=given_documents, state=out.state)
        logits.append(out.logits)
    for row, text in enumerate(texts):
        torch.testing.assert_close(
            torch.cat(logits, dim=1)[row, 12 - len(text) :], plain(any_model, text), **TOLERANCE
        )


def test_a_prompt_of_padding_alone_in_its_first_part(any_model: LanguageModel) -> None:
    text = draw_tokens(4)
    tokens = torch.cat((draw_tokens(3, seed=1), text))[None]
    documents = torch.tensor([[-1, -1, -1, 0, 0, 0, 0]])
    out = any_model(tokens[:, :3], documents=documents[:, :3], state=any_model.initial_state(1))
    assert torch.isfinite(out.logits).all()
    out = any_model(tokens[:, 3:], documents=documents[:, 3:], state=out.state)
    torch.testing.assert_close(out.logits[0], plain(any_model, text), **TOLERANCE)


def test_documents_packed_in_one_row(any_model: LanguageModel) -> None:
    texts = [draw_tokens(length, seed=length) for length in (4, 1, 7)]
    documents = torch.repeat_interleave(torch.tensor([5, 0, 9]), torch.tensor([4, 1, 7]))[None]
    packed = torch.cat(texts)[None]
    expected = torch.cat([plain(any_model, text) for text in texts])
    torch.testing.assert_close(any_model(packed, documents=documents).logits[0], expected, **TOLERANCE)
    for cut in (1, 4, 5, 8):
        first = any_model(packed[:, :cut], documents=documents[:, :cut], state=any_model.initial_state(1))
        second = any_model(packed[:, cut:], documents=documents[:, cut:], state=first.state)
        found = torch.cat((first.logits, second.logits), dim=1)[0]
        torch.testing.assert_close(found, expected, **TOLERANCE)


@given(data=st.data())
def test_rows_of_any_documents_in_any_parts(make_tokenformer, data: st.DataObject) -> None:
    """Each row: padding, then documents; the batch goes through in parts, cut anywhere."""
    model = make_tokenformer(norm_activation="l2_norm_gelu")
    rows = data.draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3))
    t = max(map(sum, rows))
    tokens, documents = draw_tokens(len(rows), t), torch.full((len(rows), t), -1)
    expected = torch.zeros(len(rows), t, 40)
    with torch.no_grad():
        for row, lengths in enumerate(rows):
            start = t - sum(lengths)
            for document, length in enumerate(lengths):
                part = slice(start, start + length)
                documents[row, part] = document
                expected[row, part] = plain(model, tokens[row, part])
                start += length
        state, parts, start = model.initial_state(len(rows)), [], 0
        while start < t:
            part = slice(start, start + data.draw(st.integers(1, t)))
            out = model(tokens[:, part], documents=documents[:, part], state=state)
            parts.append(out.logits)
            state, start = out.state, part.stop
    found = torch.cat(parts, dim=1)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[documents >= 0], expected[documents >= 0], **TOLERANCE)


def test_a_state_is_a_value(any_model: LanguageModel) -> None:
    tokens = draw_tokens(2, 12)
    state = any_model(tokens[:, :5], state=any_model.initial_state(2)).state
    first = any_model(tokens[:, 5:9], state=state)
    other = any_model(draw_tokens(2, 6, seed=5), state=state)
    again = any_model(tokens[:, 5:9], state=state)
    assert torch.equal(again.logits, first.logits)
    for continued in (first, again):
        torch.testing.assert_close(
            any_model(tokens[:, 9:], state=continued.state).logits,
            any_model(tokens).logits[:, 9:],
            **TOLERANCE,
        )
    mixed = torch.cat((tokens[:, :5], draw_tokens(2, 6, seed=5), tokens[:, 9:]), dim=1)
    torch.testing.assert_close(
        any_model(tokens[:, 9:], state=other.state).logits, any_model(mixed).logits[:, 11:], **TOLERANCE
    )


@torch.enable_grad()
def test_a_state_carries_gradients(any_model: LanguageModel) -> None:
    tokens = draw_tokens(2, 9)
    weights = torch.linspace(-1, 1, 2 * 9 * 40).reshape(2, 9, 40)

    def gradients(logits: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((logits * weights).sum(), list(any_model.parameters())))

    expected = gradients(any_model(tokens).logits)
    state, parts = any_model.initial_state(2), []
    for part in tokens.split([4, 1, 1, 3], dim=1):
        out = any_model(part, state=state)
        state = out.state
        parts.append(out.logits)
    for found, exact in zip(gradients(torch.cat(parts, dim=1)), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


def test_logits_to_keep_and_hidden_states(any_model: LanguageModel) -> None:
    tokens = draw_tokens(2, 6)
    logits = any_model(tokens).logits
    for keep in (1, 4, 6, 100):
        torch.testing.assert_close(
            any_model(tokens, logits_to_keep=keep).logits, logits[:, -keep:], **TOLERANCE
        )
    assert any_model(tokens, logits_to_keep=0).logits.shape == (2, 0, 40)
    hidden = any_model.hidden(tokens)
    assert hidden.shape == (2, 6, 16)
    assert torch.equal(any_model.head(hidden), logits)
    assert any_model(tokens).state is None
    by_hand = hidden @ any_model.head.weight.T * any_model.head.logit_scale
    torch.testing.assert_close(by_hand, logits, **TOLERANCE)


def test_a_later_token_moves_no_earlier_logit(any_model: LanguageModel) -> None:
    tokens = draw_tokens(1, 10)
    changed = tokens.clone()
    changed[0, 6] = (tokens[0, 6] + 1) % 40
    found, expected = any_model(changed).logits, any_model(tokens).logits
    assert torch.equal(found[:, :6], expected[:, :6])
    assert (found[:, 6:] - expected[:, 6:]).abs().amax(-1).min() > 0


def test_explicit_positions(any_model: LanguageModel) -> None:
    tokens = draw_tokens(2, 6)
    expected = any_model(tokens).logits
    steps = torch.arange(6).expand(2, 6)
    assert torch.equal(any_model(tokens, positions=steps).logits, expected)
    torch.testing.assert_close(any_model(tokens, positions=steps + 20).logits, expected, rtol=1e-3, atol=1e-4)
    stretched = any_model(tokens, positions=steps * 3).logits
    if any_model.config.position_embedding == "none":
        assert torch.equal(stretched, expected)
    else:
        assert (stretched - expected).abs().max() > 1e-3
    out = any_model(tokens[:, :3], positions=steps[:, :3] + 20, state=any_model.initial_state(2))
    after = any_model(tokens[:, 3:], state=out.state).logits  # goes on from position 23
    torch.testing.assert_close(after, expected[:, 3:], rtol=1e-3, atol=1e-4)


@torch.enable_grad()
def test_backward_of_a_padded_and_packed_batch(any_model: LanguageModel) -> None:
    """Gradients are finite, and none goes from one document, or from padding, to another."""
    tokens = draw_tokens(2, 8)
    documents = torch.tensor([[-1, -1, -1, 0, 0, 0, 1, 1], [4, 4, 4, 4, 2, 2, 2, 2]])
    embedded: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    handle = any_model.embedding.register_forward_hook(keep)
    logits = any_model(tokens, documents=documents).logits
    handle.remove()
    (logits[0, 6:].square().sum() + logits[1, :4].square().sum()).backward()
    gradients = [p.grad for p in any_model.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    reached = embedded[0].grad.abs().amax(-1) > 0
    assert reached.tolist() == [[False] * 6 + [True] * 2, [True] * 4 + [False] * 4]
    any_model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(make_tokenformer, make_transformer, dtype: torch.dtype) -> None:
    tokens = draw_tokens(2, 9)
    documents = torch.tensor([[-1] * 3 + [0] * 6, [0] * 9])
    for make in (make_tokenformer, make_transformer):
        model = make()
        expected = model(tokens, documents=documents).logits[documents >= 0]
        found = model.to(dtype)(tokens, documents=documents).logits
        assert found.dtype == dtype
        assert torch.isfinite(found).all()
        error = (found[documents >= 0].double() - expected.double()).abs().max()
        assert error < (0.05 if dtype != torch.float64 else 1e-5) * expected.abs().max()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(draw_tokens(5)), r"tokens: found shape \[5\]"),
        (
            lambda model: model(draw_tokens(1, 0)),
            r"found shape \[1, 0\], expected \[b, t\] with t at least 1",
        ),
        (
            lambda model: model(draw_tokens(2, 3), state=model.initial_state(3)),
            "2 rows, but the state was made for 3",
        ),
        (
            lambda model: model(draw_tokens(2, 3), documents=draw_tokens(2, 4)),
            r"documents: found shape \[2, 4\], expected that of tokens, \[2, 3\]",
        ),
        (lambda model: model(draw_tokens(2, 3), positions=draw_tokens(3)), r"positions: found shape \[3\]"),
    ],
)
def test_wrong_shapes_are_named(make_tokenformer, call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(make_tokenformer())
