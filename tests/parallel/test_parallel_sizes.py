"""The mesh that a run asks for, against the processes that were launched and the model."""

from __future__ import annotations

import pytest

from tokenformer.errors import TokenFormerError
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.models.transformer.config import TransformerConfig
from tokenformer.parallel.launch import Launch
from tokenformer.parallel.sizes import MeshSizes, check_tensor_split, mesh_sizes
from tokenformer.train.device import rank_device
from tokenformer.train.sections import ParallelConfig
from tokenformer.validation import validate

SIZES = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}


@pytest.mark.parametrize(
    ("asked", "world", "sizes"),
    [
        ((1, -1, 1), 1, (1, 1, 1)),
        ((1, -1, 1), 8, (1, 8, 1)),
        ((2, -1, 2), 16, (2, 4, 2)),
        ((-1, 1, 1), 4, (4, 1, 1)),
        ((1, 1, -1), 2, (1, 1, 2)),
        ((2, 2, 2), 8, (2, 2, 2)),
    ],
)
def test_filled_up(asked: tuple[int, int, int], world: int, sizes: tuple[int, int, int]) -> None:
    found = mesh_sizes(*asked, world)
    assert found == MeshSizes(*sizes)
    assert (found.world, found.data) == (world, sizes[0] * sizes[1])


@pytest.mark.parametrize(
    ("asked", "world", "message"),
    [
        ((1, -1, 3), 8, "parallel: replicate 1 x tensor 3 does not divide 8 processes"),
        ((2, 2, 1), 8, "parallel: replicate 2 x shard 2 x tensor 1 = 4 ranks, but there are 8 processes"),
        ((1, 2, 1), 1, "= 2 ranks, but there is 1 process"),
    ],
)
def test_refused(asked: tuple[int, int, int], world: int, message: str) -> None:
    with pytest.raises(TokenFormerError, match=message):
        mesh_sizes(*asked, world)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicate": -1}, "expected -1 once at most"),
        ({"tensor": 0}, "found 0, expected a number of ranks"),
        ({"shard": -2}, "parallel.shard|shard"),
    ],
)
def test_section_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(TokenFormerError, match=message):
        validate(ParallelConfig, values, source="test")


def test_what_does_not_divide_is_named() -> None:
    tokens = {"qkv_param_tokens": 8, "proj_param_tokens": 8, "ffn_param_tokens": 15}
    groups = {"qkv": (8,), "proj": (8,), "ffn": (8, 7)}
    check_tensor_split(TokenFormerConfig(**SIZES, **tokens), 1)
    with pytest.raises(
        TokenFormerError, match=r"parallel\.tensor: 2 .* model\.param_token_groups\.ffn\.1 7 evenly"
    ):
        check_tensor_split(TokenFormerConfig(**SIZES, **tokens, param_token_groups=groups), 2)
    check_tensor_split(TransformerConfig(**SIZES), 3)
    with pytest.raises(TokenFormerError, match=r"2 ranks do not divide model\.num_attention_heads 3"):
        check_tensor_split(TransformerConfig(**SIZES), 2)
    with pytest.raises(TokenFormerError, match=r"model\.intermediate_size 64"):
        check_tensor_split(TransformerConfig(**SIZES, intermediate_size=64), 3)


def test_one_device_cannot_be_named_for_several_processes() -> None:
    assert rank_device("cpu", Launch(1, 2, 1)).type == "cpu"
    with pytest.raises(TokenFormerError, match=r"parallel\.device: found 'cuda:0' with 2 processes"):
        rank_device("cuda:0", Launch(1, 2, 1))
