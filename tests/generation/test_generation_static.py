"""Generation in static memory against plain calls; what CUDA graphs add is tested on a GPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tokenformer.errors import TokenFormerError
from tokenformer.generation import feed, prepared
from tokenformer.generation.config import SamplingConfig
from tokenformer.generation.engine import generate, generate_stream
from tokenformer.growth.grow import grow
from tokenformer.models.base import LanguageModel

GREEDY = SamplingConfig(temperature=0)
SAMPLED = SamplingConfig(temperature=0.8, top_k=20, top_p=0.95, min_p=0.01, seed=3)
PROMPTS = [[7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [30, 20, 10], [5, 5, 6, 6]]
MakeModel = Callable[..., LanguageModel]


@pytest.fixture(params=["grown", "no positions", "transformer", "parallel"])
def model(
    request: pytest.FixtureRequest, make_tokenformer: MakeModel, make_transformer: MakeModel
) -> LanguageModel:
    fields: dict[str, Any] = {"tie_word_embeddings": False, "seed": 1}
    if request.param in ("transformer", "parallel"):
        parallel = request.param == "parallel"
        made = make_transformer(**fields, use_bias=parallel, use_parallel_residual=parallel)
    else:
        positions = "none" if request.param == "no positions" else "rotary"
        made = make_tokenformer(**fields, norm_activation="l2_norm_gelu", position_embedding=positions)
        if request.param == "grown":
            made = grow(made, factor=2, init="random")
    return loud(made)


@torch.no_grad()
def loud(model: LanguageModel) -> LanguageModel:
    """Texts that wander instead of repeating one token."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            is_value = "value_tokens" in name
            quiet = model.role_of(name) in ("embedding", "head")
            parameter.mul_(0.04 / parameter.std() if quiet else 4.0 if is_value else 2.0)
    return model


def in_static_memory(monkeypatch: pytest.MonkeyPatch, on: bool = True) -> None:
    """What a GPU does, wherever the model is."""
    monkeypatch.setattr(feed, "_static_pays", lambda *_: on)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_static_memory_gives_what_plain_calls_give(
    model: LanguageModel, sampling: SamplingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    eos = generate(model, PROMPTS[1:2], max_new_tokens=9, sampling=sampling, vocab_size=35)[0][-1]
    cases: list[tuple[list[list[int]], dict[str, Any]]] = [
        (PROMPTS, {"max_new_tokens": 20}),
        (PROMPTS[:2], {"max_new_tokens": 20, "eos_token_id": eos, "vocab_size": 35}),
        ([[1, 2] * 25, [3, 4] * 24], {"max_new_tokens": 30}),  # to the end of the context
        ([[1], [2]], {"max_new_tokens": 1}),
    ]
    for prompts, options in cases:
        in_static_memory(monkeypatch, False)
        plain = list(generate_stream(model, prompts, sampling=sampling, **options))
        in_static_memory(monkeypatch)
        assert list(generate_stream(model, prompts, sampling=sampling, **options)) == plain


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16])
def test_logits_of_every_batch(model: LanguageModel, batch: int) -> None:
    prompts = torch.randint(0, 35, (batch, 12), generator=torch.Generator().manual_seed(2))
    padding = torch.arange(batch)[:, None] % 5
    documents = torch.where(torch.arange(12) < padding, -1, 0)
    state = model(prompts[:, :-2], documents=documents[:, :-2], state=model.initial_state(batch)).state
    static = model.static_state(state, 16)
    step = prepared.make_step(model, static)
    expected = model(prompts, documents=documents).logits
    for place in (10, 11):
        found = step(prompts[:, place : place + 1], static)
        torch.testing.assert_close(found, expected[:, place], rtol=1e-4, atol=1e-5)


def test_a_decoder_is_kept_while_the_weights_stay(
    make_tokenformer: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_static_memory(monkeypatch)
    made: list[Any] = []
    prepare = prepared._prepare
    monkeypatch.setattr(prepared, "_prepare", lambda *given: made.append(given) or prepare(*given))
    models = [loud(make_tokenformer(tie_word_embeddings=False))]

    def continued(seed: int = 0, **options: Any) -> list[list[int]]:
        sampling = SamplingConfig(seed=seed)
        return generate(models[0], [[1, 2], [3]], max_new_tokens=12, sampling=sampling, **options)

    first = continued()
    assert continued() == first
    assert continued(seed=1) != first  # a seed is no reason for another
    assert len(made) == 1
    continued(vocab_size=30)
    assert len(made) == 2
    with torch.no_grad():
        models[0].head.weight.mul_(-1)  # type: ignore[operator]
    changed = continued(vocab_size=30)
    assert len(made) == 3
    in_static_memory(monkeypatch, False)
    assert continued(vocab_size=30) == changed
    gone = weakref.ref(models.pop())
    made.clear()
    gc.collect()
    assert gone() is None  # what is kept for a model does not keep it


def test_two_streams_of_one_model_do_not_meet(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    in_static_memory(monkeypatch)
    alone = [generate(model, [prompt], max_new_tokens=10, sampling=GREEDY)[0] for prompt in PROMPTS[:2]]
    streams = [generate_stream(model, [p], max_new_tokens=10, sampling=GREEDY) for p in PROMPTS[:2]]
    pairs = [(one.tokens[0], two.tokens[0]) for one, two in zip(*streams, strict=True)]
    assert [list(row) for row in zip(*pairs, strict=True)] == alone


def test_damaged_weights_are_reported(make_transformer: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    in_static_memory(monkeypatch)
    model = make_transformer()
    with torch.no_grad():
        model.head.weight[3] = torch.inf  # type: ignore[operator, index]
    with pytest.raises(TokenFormerError, match="not finite"):
        generate(model, [[1]], max_new_tokens=3)


def test_a_model_without_a_static_state_takes_plain_calls(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = generate(model, PROMPTS, max_new_tokens=5, sampling=GREEDY)
    in_static_memory(monkeypatch)
    monkeypatch.setattr(type(model), "static_state", lambda *_: None)
    assert generate(model, PROMPTS, max_new_tokens=5, sampling=GREEDY) == plain


def test_what_a_static_state_refuses(make_tokenformer: MakeModel) -> None:
    model = make_tokenformer()
    with torch.inference_mode():
        static = model.static_state(model.initial_state(2), 8)
        with pytest.raises(ValueError, match=r"tokens: found shape \[2, 3\], expected \[2, 1\]"):
            model(torch.zeros(2, 3, dtype=torch.int64), state=static)
        with pytest.raises(ValueError, match="a static state has its own"):
            model(
                torch.zeros(2, 1, dtype=torch.int64),
                positions=torch.zeros(2, 1, dtype=torch.int64),
                state=static,
            )
