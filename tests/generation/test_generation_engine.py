"""The engine against plain calls of the model without a state."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tokenformer.errors import TokenFormerError
from tokenformer.generation.config import SamplingConfig
from tokenformer.generation.context import fit_prompts, new_token_limits
from tokenformer.generation.engine import GenerationStep, generate, generate_stream
from tokenformer.models.base import LanguageModel
from tokenformer.models.config import DecoderConfig
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.models.transformer.config import TransformerConfig

GREEDY = SamplingConfig(temperature=0)
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,  # a tied head on fresh weights repeats its input for ever
}
TOKENS = {"qkv_param_tokens": 24, "proj_param_tokens": 16, "ffn_param_tokens": 40}
CONFIGS: dict[str, DecoderConfig] = {
    "transformer": TransformerConfig(**SIZES),
    "transformer-parallel": TransformerConfig(**SIZES, use_parallel_residual=True, use_bias=True),
    **{
        f"tokenformer-{kind}": TokenFormerConfig(**SIZES, **TOKENS, norm_activation=kind, rotary_pct=0.5)
        for kind in ("gelu", "l2_norm_gelu", "gelu_l2_norm", "softmax")
    },
    "tokenformer-no-positions": TokenFormerConfig(**SIZES, **TOKENS, position_embedding="none"),
}


def make(name: str) -> LanguageModel:
    """Fresh weights, those inside the blocks louder than the embedding: greedy texts then wander instead of
    repeating one token."""
    model = build_model(CONFIGS[name], seed=1).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if model.role_of(parameter_name) in ("embedding", "head"):
                parameter.mul_(0.04 / parameter.std())
            elif parameter.ndim == 2:
                parameter.mul_(4.0 if "value_tokens" in parameter_name else 2.0)
    return model


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return make("tokenformer-gelu")


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 100, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def greedy_without_state(model: LanguageModel, prompt: list[int], new_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_with_state_equals_greedy_without_over_200_tokens(name: str) -> None:
    model, prompt = make(name), prompt_of(17)
    found = generate(model, [prompt], max_new_tokens=200, sampling=GREEDY)[0]
    assert len(set(found)) > 3  # a text that says something about the state
    assert found == greedy_without_state(model, prompt, 200)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=0.8, top_k=20, top_p=0.95, seed=3)])
def test_prompts_of_different_lengths_each_give_what_they_give_alone(
    name: str, sampling: SamplingConfig
) -> None:
    model = make(name)
    prompts = [prompt_of(length, seed=length) for length in (1, 9, 30, 4)]
    together = generate(model, prompts, max_new_tokens=24, sampling=sampling)
    for row, prompt in enumerate(prompts):
        alone = sampling.model_copy(update={"seed": sampling.seed + row})
        assert generate(model, [prompt], max_new_tokens=24, sampling=alone) == [together[row]]


def test_a_tensor_of_prompts_equals_lists(model: LanguageModel) -> None:
    prompts = [prompt_of(8, seed=1), prompt_of(8, seed=2)]
    from_lists = generate(model, prompts, max_new_tokens=12)
    assert generate(model, torch.tensor(prompts), max_new_tokens=12) == from_lists
    assert [len(ids) for ids in from_lists] == [12, 12]


def test_seeds_decide(model: LanguageModel) -> None:
    def sample(seed: int) -> list[list[int]]:
        return generate(model, [prompt_of(5)], max_new_tokens=30, sampling=SamplingConfig(seed=seed))

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def test_equal_lengths_need_no_documents(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    forward = type(model).forward

    def spy(self: LanguageModel, tokens: torch.Tensor, **options: Any) -> Any:
        given.append(options["documents"])
        return forward(self, tokens, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model), "forward", spy)
    generate(model, [prompt_of(4), prompt_of(4, seed=1)], max_new_tokens=3)
    assert given == [None, None, None]
    given.clear()
    generate(model, [prompt_of(2), prompt_of(4, seed=1)], max_new_tokens=1)
    assert given[0].tolist() == [[-1, -1, 0, 0], [0, 0, 0, 0]]


def test_eos_ends_a_row_and_is_not_part_of_it(model: LanguageModel) -> None:
    prompts = [prompt_of(6, seed=5), prompt_of(11, seed=6)]
    free = generate(model, prompts, max_new_tokens=60, sampling=GREEDY)
    eos = next(token for token in free[0] if token not in free[1])
    stop = free[0].index(eos)
    steps = list(generate_stream(model, prompts, max_new_tokens=60, sampling=GREEDY, eos_token_id=eos))
    assert [row_tokens(steps, 0), row_tokens(steps, 1)] == [free[0][:stop], free[1]]
    assert steps[-1].finish_reasons == ["eos", "length"]
    assert all(step.finish_reasons[0] is None for step in steps[:stop])
    assert steps[stop].finish_reasons == ["eos", None]


def row_tokens(steps: list[GenerationStep], row: int) -> list[int]:
    return [token for step in steps if (token := step.tokens[row]) is not None]


def test_generation_stops_when_every_row_has_ended(model: LanguageModel) -> None:
    first = generate(model, [prompt_of(6)], max_new_tokens=1, sampling=GREEDY)[0][0]
    steps = list(
        generate_stream(model, [prompt_of(6)], max_new_tokens=50, sampling=GREEDY, eos_token_id=first)
    )
    assert steps == [GenerationStep([None], ["eos"])]


def test_generation_ends_with_the_context(model: LanguageModel) -> None:
    context = model.config.max_position_embeddings
    prompts = [prompt_of(context - 5), prompt_of(context - 20, seed=1), prompt_of(context)]
    steps = list(generate_stream(model, prompts, max_new_tokens=12, sampling=GREEDY))
    assert [len(row_tokens(steps, row)) for row in range(3)] == [5, 12, 0]
    assert steps[-1].finish_reasons == ["context", "length", "context"]
    assert row_tokens(steps, 1) == greedy_without_state(model, prompts[1], 12)


def test_a_prompt_longer_than_the_context(model: LanguageModel) -> None:
    context = model.config.max_position_embeddings
    prompt = prompt_of(context + 40)
    with pytest.raises(
        TokenFormerError, match=rf"{context + 40} tokens.*context is {context}.*--truncate-prompt"
    ):
        generate(model, [prompt], max_new_tokens=10)
    truncated = generate(model, [prompt], max_new_tokens=10, sampling=GREEDY, truncate_prompt=True)
    assert truncated == generate(model, [prompt[-(context - 10) :]], max_new_tokens=10, sampling=GREEDY)
    with pytest.raises(TokenFormerError, match="leaves no room"):
        generate(model, [prompt], max_new_tokens=context, truncate_prompt=True)


def test_fitting_prompts() -> None:
    prompts = [[1, 2, 3, 4, 5], [6]]
    assert fit_prompts(prompts, context=6, max_new_tokens=3, truncate=True) == [[3, 4, 5], [6]]
    assert fit_prompts(prompts, context=6, max_new_tokens=3, truncate=False) == prompts
    assert new_token_limits(prompts, context=6, max_new_tokens=3) == [1, 3]


def test_padding_ids_are_never_generated() -> None:
    model = make("tokenformer-softmax")
    with torch.no_grad():  # ids from 100 on are the likeliest by far
        model.head.weight[100:] *= 10  # type: ignore[operator, index]
    prompts = [prompt_of(3, seed=seed) for seed in range(4)]
    for sampling in (GREEDY, SamplingConfig(temperature=3.0)):
        unmasked = generate(model, prompts, max_new_tokens=60, sampling=sampling)
        assert max(map(max, unmasked)) >= 100
        masked = generate(model, prompts, max_new_tokens=60, sampling=sampling, vocab_size=100)
        assert max(map(max, masked)) < 100


def test_an_empty_prompt_starts_from_eos(model: LanguageModel) -> None:
    found = generate(model, [[]], max_new_tokens=5, sampling=GREEDY, eos_token_id=7)
    assert found == generate(model, [[7]], max_new_tokens=5, sampling=GREEDY, eos_token_id=7)
    with pytest.raises(TokenFormerError, match="prompt 2 is empty"):
        generate(model, [[1], []], max_new_tokens=5)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1, 128]], {}, "token id 128, expected 0 to 127"),
        ([[-1]], {}, "token id -1"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens"),
        ([[1]], {"vocab_size": 129}, "vocab_size is 129"),
        ([[1]], {"eos_token_id": 100, "vocab_size": 100}, "eos_token_id is 100"),
    ],
)
def test_wrong_arguments_are_named_before_the_first_step(
    model: LanguageModel, prompts: list[list[int]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TokenFormerError, match=message):
        generate_stream(model, prompts, **options)


def test_nothing_to_do(model: LanguageModel) -> None:
    assert generate(model, [], max_new_tokens=5) == []
    assert generate(model, [[1, 2]], max_new_tokens=0) == [[]]


def test_training_mode_and_grad_mode_are_as_before(model: LanguageModel) -> None:
    model.train()
    try:
        steps: Iterator[GenerationStep] = generate_stream(model, [[1, 2]], max_new_tokens=5)
        next(steps)
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not model.training
        steps.close()  # type: ignore[attr-defined]
        assert model.training
    finally:
        model.eval()


def test_damaged_weights_are_reported() -> None:
    model = make("transformer")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(TokenFormerError, match="not finite"):
        generate(model, [[1]], max_new_tokens=2)
