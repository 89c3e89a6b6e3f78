"""Log-likelihoods in batches against one request at a time in float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenformer.evaluation.likelihood import Continuation, log_likelihoods
from tokenformer.models.base import LanguageModel

LONGEST = 12
IDS = st.integers(0, 39)
REQUESTS = st.lists(
    st.builds(
        Continuation, st.lists(IDS, min_size=1, max_size=20), st.lists(IDS, min_size=1, max_size=LONGEST)
    ),
    max_size=12,
)


@pytest.fixture(scope="module", params=["tokenformer", "transformer"])
def model(request: pytest.FixtureRequest, make_tokenformer, make_transformer) -> LanguageModel:
    return {"tokenformer": make_tokenformer, "transformer": make_transformer}[request.param](seed=5)


def brute_force(model: LanguageModel, request: Continuation) -> tuple[float, bool]:
    """One token after another, each after all that fits before it."""
    wide = copy.deepcopy(model).double()
    tokens = [*request.context, *request.tokens]
    first = max(0, len(tokens) - 1 - LONGEST)
    nats, greedy = 0.0, True
    for place in range(len(request.context), len(tokens)):
        with torch.no_grad():
            logits = wide(torch.tensor([tokens[first:place]])).logits[0, -1]
        nats += logits.log_softmax(-1)[tokens[place]].item()
        greedy &= logits.argmax().item() == tokens[place]
    return nats, greedy


@settings(max_examples=25, deadline=None)
@given(requests=REQUESTS, batch_size=st.sampled_from([None, 1, 3]))
def test_against_one_at_a_time(
    model: LanguageModel, requests: list[Continuation], batch_size: int | None
) -> None:
    answered: list[int] = []
    found = log_likelihoods(
        model, requests, max_length=LONGEST, batch_tokens=40, batch_size=batch_size, on_done=answered.append
    )
    assert sum(answered) == len(found) == len(requests)
    for request, answer in zip(requests, found, strict=True):
        nats, greedy = brute_force(model, request)
        assert answer.nats == pytest.approx(nats, abs=2e-5)
        assert answer.greedy == greedy


def test_equal_inputs_share_a_row(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens: (seen.append(tokens.shape), hidden(tokens))[1])
    answers = [Continuation([4, 7, 9], [token]) for token in range(10)]
    found = log_likelihoods(model, answers, max_length=LONGEST, batch_tokens=100)
    assert seen == [torch.Size([1, 3])]
    assert len({answer.nats for answer in found}) == 10


@pytest.mark.parametrize(
    "request_", [Continuation([], [1]), Continuation([1], []), Continuation([1], [2] * 13)]
)
def test_requests_that_cannot_be_scored(model: LanguageModel, request_: Continuation) -> None:
    with pytest.raises(ValueError, match="expected at least 1 and 1 to 12"):
        log_likelihoods(model, [request_], max_length=LONGEST, batch_tokens=10)
