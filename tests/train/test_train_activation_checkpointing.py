"""Blocks and scores that are computed again: the same gradients, less kept; compiled, sharded, grown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tokenformer.errors import TokenFormerError
from tokenformer.language.loss import Batch, loss_sum
from tokenformer.models.base import LanguageModel
from tokenformer.train.activation_checkpointing import apply_activation_checkpointing
from tokenformer.train.config import RunConfig
from tokenformer.train.run import train
from tokenformer.train.sections import ActivationCheckpointingConfig

MakeConfig = Callable[..., RunConfig]
KINDS = ["gelu", "l2_norm_gelu", "gelu_l2_norm", "softmax"]
CHOICES = [
    ("none", "block"),
    ("selective", "block"),
    ("full", "block"),
    ("selective", "scores"),
    ("full", "scores"),
]
"""Modes, and what is computed again."""


def gradients(model: LanguageModel) -> tuple[dict[str, torch.Tensor], int]:
    """By name, and the bytes that the blocks kept for the backward."""
    tokens = torch.randint(40, (3, 24), generator=torch.Generator().manual_seed(0))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_sum(model, Batch(tokens, tokens.roll(-1, 1)))
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.nats.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name, _ in model.named_parameters()}
    return found, size


def configured(mode: str, recompute: str = "block") -> ActivationCheckpointingConfig:
    return ActivationCheckpointingConfig(mode=mode, recompute=recompute)  # type: ignore[arg-type]


def test_which_blocks() -> None:
    assert list(configured("none").recomputed_blocks(5)) == []
    assert list(configured("selective").recomputed_blocks(5)) == [1, 3]
    assert list(ActivationCheckpointingConfig(mode="selective", every=3).recomputed_blocks(6)) == [2, 5]
    assert list(configured("full").recomputed_blocks(3)) == [0, 1, 2]
    for blocks, expected in (
        (1, [11]),
        (5, [1, 3, 6, 8, 11]),
        (6, [1, 3, 5, 7, 9, 11]),
        (99, list(range(12))),
    ):
        chosen = ActivationCheckpointingConfig(mode="selective", blocks=blocks)
        assert list(chosen.recomputed_blocks(12)) == expected
        assert len(ActivationCheckpointingConfig(mode="full", blocks=blocks).recomputed_blocks(12)) == 12


@pytest.mark.parametrize("kind", [*KINDS, "transformer"])
def test_gradients_are_the_same_bits_and_less_is_kept(
    kind: str, make_tokenformer: Callable[..., Any], make_transformer: Callable[..., Any]
) -> None:
    def make() -> LanguageModel:
        if kind == "transformer":
            return make_transformer(num_hidden_layers=4)
        return make_tokenformer(num_hidden_layers=4, norm_activation=kind)

    expected, most = gradients(make())
    kept = [most]
    for mode in ("selective", "full"):
        model = make()
        apply_activation_checkpointing(model, configured(mode))
        found, size = gradients(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        kept.append(size)
    assert kept[0] > 1.5 * kept[1] > 2 * kept[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [(30,), (20, 10)])
def test_scores_alone_are_made_again(
    kind: str, groups: tuple[int, ...], make_tokenformer: Callable[..., Any]
) -> None:
    def make() -> LanguageModel:
        return make_tokenformer(
            num_hidden_layers=4,
            norm_activation=kind,
            qkv_param_tokens=30,
            proj_param_tokens=30,
            ffn_param_tokens=30,
            param_token_groups=dict.fromkeys(("qkv", "proj", "ffn"), groups),
        )

    expected, most = gradients(make())
    scores = 4 * 5 * 30 * 3 * 24  # bytes of a block, 3 x 24 tokens
    for mode, blocks in (("selective", 2), ("full", 4)):
        model = make()
        apply_activation_checkpointing(model, configured(mode, "scores"))
        found, size = gradients(model)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert most - size == blocks * scores


def test_choice_is_undone(make_tokenformer: Callable[..., Any]) -> None:
    model = make_tokenformer()
    before = gradients(model)[1]
    apply_activation_checkpointing(model, configured("full"))
    apply_activation_checkpointing(model, configured("full", "scores"))
    apply_activation_checkpointing(model, configured("none", "scores"))
    assert gradients(model)[1] == before


@pytest.mark.parametrize(("mode", "recompute"), CHOICES[1:])
def test_compiled_blocks(mode: str, recompute: str, make_tokenformer: Callable[..., Any]) -> None:
    expected, _ = gradients(make_tokenformer())
    torch.compiler.reset()
    model = make_tokenformer()
    apply_activation_checkpointing(model, configured(mode, recompute))
    for block in model.blocks:
        block.compile(dynamic=False, backend="aot_eager")
    found, _ = gradients(model)
    torch.compiler.reset()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recompute", ["block", "scores"])
def test_sharded_blocks(one_rank: None, recompute: str, make_tokenformer: Callable[..., Any]) -> None:
    expected, _ = gradients(make_tokenformer())
    model = make_tokenformer()
    apply_activation_checkpointing(model, configured("full", recompute))
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    tokens = torch.randint(40, (3, 24), generator=torch.Generator().manual_seed(0))
    torch.nn.functional.cross_entropy(
        model(tokens).logits.flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="sum"
    ).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-5)


def test_run_is_the_same_bits(make_config: MakeConfig, tmp_path: Path) -> None:
    stages = [{"steps": 2}, {"steps": 2, "grow": {"factor": 2}}]
    results = [
        train(
            make_config(
                f"activation_checkpointing.mode={mode}",
                f"activation_checkpointing.recompute={recompute}",
                stages=stages,
            ),
            tmp_path / f"{mode}-{recompute}",
            quiet=True,
        )
        for mode, recompute in (("none", "block"), ("full", "block"), ("full", "scores"))
    ]
    one, *others = ((result.model / "model.safetensors").read_bytes() for result in results)
    assert all(other == one for other in others)


def test_scores_that_are_not_there_are_refused(make_config: MakeConfig) -> None:
    fields = ("activation_checkpointing.mode=full", "activation_checkpointing.recompute=scores")
    model = {"architecture": "transformer", "vocab_size": 384, "hidden_size": 16, "num_hidden_layers": 2}
    with pytest.raises(TokenFormerError, match=r"recompute: found 'scores' for a transformer, which has no"):
        make_config(*fields, model=model | {"num_attention_heads": 2, "intermediate_size": 32})
