"""A token through the kernel of all layers against the model: by Triton's interpreter in float32, or on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from tokenformer.generation.streamed import StreamedStep, serves_streamed
from tokenformer.growth.grow import grow
from tokenformer.models.base import LanguageModel
from tokenformer.models.quantize import quantize_model

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
MakeModel = Callable[..., LanguageModel]
SIZES = {"hidden_size": 48, "num_attention_heads": 4, "norm_activation": "l2_norm_gelu"}
NAMES = ("gelu", "l2_norm_gelu", "gelu_l2_norm", "softmax", "grown", "padded")
TOKENS = {"qkv_param_tokens": 48, "proj_param_tokens": 48, "ffn_param_tokens": 192}


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "meet"), [*((name, ON_GPU) for name in NAMES), *([("l2_norm_gelu", False)] if ON_GPU else [])]
)
def test_logits_are_the_models(name: str, meet: bool, make_tokenformer: MakeModel) -> None:
    with torch.inference_mode(False):
        kind = name if name not in ("grown", "padded") else "l2_norm_gelu"
        options = {"rotary_pct": 0.5, "tie_word_embeddings": False} if name == "padded" else {}
        model = make_tokenformer(**{**SIZES, **TOKENS, "norm_activation": kind}, **options)
        if name == "grown":
            model = grow(model, factor=2, init="random")
        model = model.to(DEVICE)
    prompts = torch.randint(0, 40, (1, 7), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    documents = torch.zeros_like(prompts)
    if name == "padded":
        documents[:, :3] = -1
    state = model(prompts, documents=documents, state=model.initial_state(1)).state
    static, plain = model.static_state(state, 16), model.static_state(state, 16)
    assert static is not None
    assert plain is not None
    assert serves_streamed(model, 1)
    step = StreamedStep(model, static, meet=meet)
    exact = copy.deepcopy(model).double()
    for token in (3, 39):
        tokens = torch.tensor([[token]], device=DEVICE)
        values = {field: getattr(plain, field).clone() for field in plain.__dataclass_fields__}
        double = {field: v.double() if v.is_floating_point() else v for field, v in values.items()}
        expected = exact(tokens, state=type(plain)(**double)).logits[:, -1]
        error = (step(tokens, static) - expected).norm() / expected.norm()
        assert error < 3e-6, f"error {error:.3g}"
        model(tokens, state=plain)
        assert torch.equal(static.counters, plain.counters)
        torch.testing.assert_close(static.keys, plain.keys, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_scores_whose_squares_vanish_or_overflow(make_tokenformer: MakeModel) -> None:
    for factor in (1e-25, 1e25):
        with torch.inference_mode(False):
            model = make_tokenformer(**SIZES, **TOKENS).to(DEVICE)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "key_tokens" in name:
                        parameter.mul_(factor)
        tokens = torch.tensor([[5]], device=DEVICE)
        static, plain = (model.static_state(model.initial_state(1), 16) for _ in range(2))
        assert static is not None
        found = StreamedStep(model, static)(tokens, static)
        torch.testing.assert_close(found, model(tokens, state=plain).logits[:, -1], rtol=1e-4, atol=1e-5)


def test_what_is_not_served(make_tokenformer: MakeModel, make_transformer: MakeModel) -> None:
    model = make_tokenformer(**SIZES, **TOKENS)
    assert serves_streamed(model, 1)
    assert not serves_streamed(model, 2)
    assert not serves_streamed(grow(model, factor=1.5, init="random"), 1)
    assert not serves_streamed(make_transformer(), 1)
    quantize_model(model)
    assert not serves_streamed(model, 1)
