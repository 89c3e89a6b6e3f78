"""A token through the kernels of both forms against the model: by Triton's interpreter in float32, or on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tokenformer.generation import batched
from tokenformer.generation.batched import BatchedStep
from tokenformer.generation.fused import FusedStep, serves
from tokenformer.growth.grow import grow
from tokenformer.layers.pattention import Pattention
from tokenformer.models.base import LanguageModel
from tokenformer.models.quantize import quantize_model

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MakeModel = Callable[..., LanguageModel]
KINDS = ("gelu", "l2_norm_gelu", "gelu_l2_norm", "softmax")


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes programs one after another."""
    if DEVICE == "cpu":
        from tokenformer.ops import decode, decode_batch

        def batch_tile(rows: int, columns: int, most_splits: int = 16, **_: int) -> decode_batch.BatchTile:
            pieces = max(2, -(-columns // (16 * most_splits)))
            return decode_batch.BatchTile(rows=32, piece=16, pieces=pieces, held=1)

        monkeypatch.setattr(decode, "choose_tile", lambda *_: decode.Tile(rows=16, piece=16, warps=4))
        monkeypatch.setattr(decode_batch, "choose_batch_tile", batch_tile)


def make(name: str, make_tokenformer: MakeModel, make_transformer: MakeModel) -> LanguageModel:
    if name in KINDS:
        model = make_tokenformer(norm_activation=name, gelu_approximate="tanh" if name == "gelu" else "none")
        return grow(model, factor=2, init="copies" if name == "softmax" else "random")
    if name == "plain head":
        return make_tokenformer(tie_word_embeddings=False, logit_scale=0.3, rotary_pct=0.5)
    fields: dict[str, Any] = {"use_bias": name == "biased", "layer_norm_affine": name == "biased"}
    model = make_transformer(**fields, position_embedding="rotary" if name == "biased" else "none")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return model


@torch.inference_mode()
@pytest.mark.parametrize("form", [FusedStep, BatchedStep])
@pytest.mark.parametrize(
    ("name", "quantized"),
    [
        *((name, False) for name in (*KINDS, "plain head", "biased", "no positions")),
        ("gelu", True),
        ("biased", True),
    ],
)
def test_logits_are_the_models(
    name: str,
    quantized: bool,
    form: type[FusedStep] | type[BatchedStep],
    make_tokenformer: MakeModel,
    make_transformer: MakeModel,
) -> None:
    with torch.inference_mode(False):
        model = make(name, make_tokenformer, make_transformer).to(DEVICE)
    if quantized:
        quantize_model(model)
    prompts = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    documents = torch.zeros_like(prompts)
    documents[1, :3] = -1
    state = model(prompts, documents=documents, state=model.initial_state(2)).state
    length = 16 if quantized else 80  # of one part of attention, or two
    static, plain = model.static_state(state, length), model.static_state(state, length)
    assert static is not None
    assert serves(model, 2)
    step = form(model, static)
    for token in (3, 39) if name in ("l2_norm_gelu", "biased") else (39,):
        tokens = torch.tensor([[token], [token - 1]], device=DEVICE)
        expected = copy.deepcopy(model).double()(tokens, state=_double(plain)).logits[:, -1]
        found = step(tokens, static)
        error = (found - expected).norm() / expected.norm()
        # the kernels take a fit of GELU for weights of fewer bits than float32's
        assert error < (1e-4 if quantized else 3e-6), f"error {error:.3g}"
        model(tokens, state=plain)
        assert torch.equal(static.length, plain.length)
        assert torch.equal(static.positions, plain.positions)


def _double(state: Any) -> Any:
    values = {name: getattr(state, name).clone() for name in state.__dataclass_fields__}
    return type(state)(**{name: v.double() if v.is_floating_point() else v for name, v in values.items()})


def test_what_is_not_served(make_tokenformer: MakeModel, make_transformer: MakeModel) -> None:
    assert serves(make_tokenformer(), 4)
    assert not serves(make_tokenformer(), 1000)
    assert not serves(make_transformer(use_parallel_residual=True), 1)
    assert not serves(make_tokenformer().double(), 1)
    hooked = make_tokenformer()
    layer = next(module for module in hooked.modules() if isinstance(module, Pattention))
    layer.register_forward_hook(lambda *_: None)
    assert not serves(hooked, 1)


def test_what_is_served_together(make_tokenformer: MakeModel) -> None:
    model = make_tokenformer()
    assert not batched.serves(model, 2)  # float32
    model = model.bfloat16()
    assert batched.serves(model, 2)
    assert batched.serves(model, 16)
    assert not batched.serves(model, 1)
    assert not batched.serves(model, 1000)
