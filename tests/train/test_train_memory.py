"""The prediction against what autograd really keeps, and its behaviour where nothing can be measured here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from tokenformer.errors import TokenFormerError
from tokenformer.models.config import DecoderConfig
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.models.transformer.config import TransformerConfig
from tokenformer.ops import pattention_cpu
from tokenformer.parallel.local import local_parts
from tokenformer.parallel.sizes import MeshSizes
from tokenformer.parallel.tensor import split_layers
from tokenformer.train.activation_checkpointing import apply_activation_checkpointing
from tokenformer.train.config import RunConfig
from tokenformer.train.memory import TrainingSetup, _weight_copies, kept_for_backward, training_memory
from tokenformer.train.memory_check import check_training_memory
from tokenformer.train.sections import ActivationCheckpointingConfig
from tokenformer.train.yaml_source import apply_overrides
from tokenformer.validation import validate

KINDS = ["gelu", "l2_norm_gelu", "gelu_l2_norm", "softmax", "transformer"]
BATCH, LENGTH = 4, 96


def make_config(kind: str, **changes: Any) -> DecoderConfig:
    sizes = {
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "rotary_pct": 0.25,
    }
    if kind == "transformer":
        return TransformerConfig(**(sizes | changes))
    tokens = {"qkv_param_tokens": 72, "proj_param_tokens": 80, "ffn_param_tokens": 256}
    return TokenFormerConfig(norm_activation=kind, **(sizes | tokens | changes))  # type: ignore[arg-type]


def measured(config: DecoderConfig, setup: TrainingSetup) -> int:
    """Bytes of the storages that the backward of ``model.hidden`` holds, parameters aside."""
    torch.compiler.reset()
    model = build_model(config)
    if setup.tensor > 1:
        split_layers(model, init_device_mesh("cpu", (setup.tensor,)))
    apply_activation_checkpointing(model, setup.activation_checkpointing)
    if setup.compiled:
        for block in model.blocks:
            block.compile(dynamic=False, backend="aot_eager_decomp_partition")
    weights = {p.untyped_storage().data_ptr() for p in local_parts(list(model.parameters()))}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    dtype = getattr(torch, setup.dtype)
    cast = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), cast:
        model.hidden(torch.randint(256, (setup.micro_batch_size, setup.sequence_length)))
    torch.compiler.reset()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def predicted(config: DecoderConfig, setup: TrainingSetup) -> float:
    return kept_for_backward(config, setup) + _weight_copies(config, setup)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device_type", ["cpu", "mps"])
def test_kept_by_eager_layers(
    kind: str, dtype: Any, device_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device_type == "mps":  # the definition, which runs where the row-blocked path does not
        monkeypatch.setattr(pattention_cpu, "applies", lambda x: False)
    setup = TrainingSetup(BATCH, LENGTH, dtype, compiled=False, device_type=device_type)
    for rotary_pct in (0.25, 1.0):
        config = make_config(kind, rotary_pct=rotary_pct)
        assert predicted(config, setup) == pytest.approx(measured(config, setup), rel=0.02)


SCORES = ActivationCheckpointingConfig(mode="selective", blocks=3, recompute="scores")


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_without_scores(kind: str, dtype: Any) -> None:
    setup = TrainingSetup(
        BATCH, LENGTH, dtype, compiled=False, device_type="cpu", activation_checkpointing=SCORES
    )
    config = make_config(kind)
    assert predicted(config, setup) == pytest.approx(measured(config, setup), rel=0.02)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_kept_with_activation_checkpointing(mode: Any) -> None:
    checkpointing = ActivationCheckpointingConfig(mode=mode)
    setup = TrainingSetup(
        BATCH,
        LENGTH,
        "float32",
        compiled=False,
        device_type="cpu",
        activation_checkpointing=checkpointing,
    )
    config = make_config("gelu")
    assert predicted(config, setup) == pytest.approx(measured(config, setup), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "checkpointing", [ActivationCheckpointingConfig(), SCORES], ids=["", "without scores"]
)
def test_kept_by_compiled_layers(kind: str, dtype: Any, checkpointing: ActivationCheckpointingConfig) -> None:
    setup = TrainingSetup(
        BATCH, LENGTH, dtype, compiled=True, device_type="cpu", activation_checkpointing=checkpointing
    )
    config = make_config(kind)
    # where the compiler makes scores again, it makes a norm's result again too
    tolerance = 0.05 if checkpointing.mode == "none" else 0.09
    assert predicted(config, setup) == pytest.approx(measured(config, setup), rel=tolerance)


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """One of two ranks, whose collectives do nothing: shapes are all that counts here."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "checkpointing", [ActivationCheckpointingConfig(), SCORES], ids=["", "without scores"]
)
def test_kept_by_split_layers(
    two_ranks: None, kind: str, dtype: Any, checkpointing: ActivationCheckpointingConfig
) -> None:
    setup = TrainingSetup(
        BATCH,
        LENGTH,
        dtype,
        compiled=True,
        device_type="cpu",
        tensor=2,
        activation_checkpointing=checkpointing,
    )
    config = make_config(kind)
    assert predicted(config, setup) == pytest.approx(measured(config, setup), rel=0.05)


def test_what_ranks_share_is_divided() -> None:
    config = make_config("gelu", vocab_size=128, hidden_size=256, qkv_param_tokens=512)
    alone = training_memory(config, TrainingSetup(1, 8))
    sharded = training_memory(config, TrainingSetup(1, 8, shard=4))
    for name in ("weights", "gradients", "moments"):
        assert getattr(sharded, name) == pytest.approx(getattr(alone, name) / 4, rel=0.01)
    split = training_memory(config, TrainingSetup(64, 96, tensor=2))
    whole = training_memory(config, TrainingSetup(64, 96))
    assert 0.5 * whole.activations < split.activations < whole.activations
    assert split.weights < whole.weights
    assert split.peak < whole.peak


def test_float8_keeps_weights_and_inputs_beside_the_scores() -> None:
    config = make_config("l2_norm_gelu")
    with_float8, without = (training_memory(config, TrainingSetup(8, 96, float8=f)) for f in (True, False))
    kept = (
        3 * 72 + 80 + 256 + 3 * 64
    )  # bytes a token and layer: scores of all projections, inputs of three layers
    assert with_float8.activations - without.activations == 8 * 96 * 4 * kept


@pytest.mark.parametrize("float8", [False, True])
def test_scores_that_are_made_again_are_not_kept(float8: bool) -> None:
    config = make_config("l2_norm_gelu")
    setup = TrainingSetup(8, 96, float8=float8)
    kept, made_again = (
        training_memory(config, replace(setup, activation_checkpointing=a))
        for a in (ActivationCheckpointingConfig(), SCORES)
    )
    assert kept.activations - made_again.activations == 8 * 96 * 3 * 2 * (3 * 72 + 80 + 256)


def test_muon_keeps_one_moment_for_matrices() -> None:
    config = make_config("gelu")
    counts = config.parameter_counts()
    muon = training_memory(config, TrainingSetup(1, 8, optimizer="muon")).moments
    assert muon == 4 * (counts["attention"] + counts["ffn"]) + 8 * (counts["embedding"] + counts["norm"])


def test_published_450m_fits_where_it_should() -> None:
    """Orders of magnitude that follow from the published sizes: 450M parameters, 16 bytes each, and activations."""
    recipe = yaml.safe_load(
        (Path(__file__).parents[2] / "recipes/published/pile-450m.yaml").read_text(encoding="utf-8")
    )
    config = TokenFormerConfig.model_validate(recipe["model"])
    memory = training_memory(config, TrainingSetup(16, 2048))
    assert memory.weights == 4 * config.num_parameters()
    assert memory.weights + memory.gradients + memory.moments == 16 * config.num_parameters()
    full = ActivationCheckpointingConfig(mode="full")
    assert (
        training_memory(config, TrainingSetup(16, 2048, activation_checkpointing=full)).peak < memory.peak / 2
    )


def check(config: DecoderConfig, *overrides: str, is_adapter: bool = False) -> None:
    values = {
        "model": config.model_dump(mode="json"),
        "data": {"path": "x", "sequence_length": 1024, "batch_tokens": 1024 * 4096},
        "steps": 1,
    }
    run = validate(RunConfig, apply_overrides(values, overrides), source="test")
    check_training_memory(config, run.resolve()[0], torch.device("cpu"), MeshSizes(), is_adapter=is_adapter)


def test_what_cannot_fit_or_end_is_refused_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}  # 4 GiB
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    config = make_config("gelu", max_position_embeddings=1024)
    with pytest.raises(TokenFormerError) as caught:
        check(config)
    assert "data.micro_batch_size: training 299k parameters, 4096 sequences of 1024 at once, takes" in str(
        caught.value
    )
    assert str(caught.value).endswith("; lower data.micro_batch_size")  # nothing else is enough
    for sequences, enough in ((700, ""), (400, r" activation_checkpointing\.recompute=scores")):
        with pytest.raises(TokenFormerError, match=rf"or set activation_checkpointing\.mode=full{enough}$"):
            check(config, f"data.micro_batch_size={sequences}")
    check(config, "data.micro_batch_size=16")
    with pytest.raises(
        TokenFormerError, match=r"1000000 forward passes of 1 sequences of 1024 in every step"
    ):
        check(config, "data.micro_batch_size=1", "data.batch_tokens=1024000000")
    huge = make_config("gelu", hidden_size=8192, ffn_param_tokens=100_000, num_hidden_layers=4)
    with pytest.raises(
        TokenFormerError, match=r"training 6.58G parameters takes at least .* choose smaller sizes"
    ):
        check(huge, "data.micro_batch_size=1", "data.sequence_length=32", "data.batch_tokens=32")


def test_an_adapter_needs_no_room_for_what_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("gelu", max_position_embeddings=1024)
    sizes = ("data.batch_tokens=1024", "parallel.device=cpu")
    pages = {
        "SC_PAGE_SIZE": 1,
        "SC_PHYS_PAGES": 12 * config.num_parameters(),
    }  # 16 with gradients and moments
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    with pytest.raises(TokenFormerError, match="model: training 299k parameters"):
        check(config, *sizes)
    with pytest.raises(
        TokenFormerError, match=r"data\.micro_batch_size"
    ):  # past the first: now the activations
        check(config, *sizes, is_adapter=True)
