"""Logits never exist whole on one device, however the model is spread: seen in the shapes of all that is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenformer.language.loss import Batch, loss_sum
from tokenformer.models.base import LanguageModel
from tokenformer.ops import losses
from tokenformer.parallel.shard import shard_blocks
from tokenformer.parallel.sizes import MeshSizes
from tokenformer.parallel.tensor import split_layers

V, WIDTH, ROWS, SEQUENCES, LENGTH = 40, 16, 3, 4, 15
MakeModel = Callable[..., LanguageModel]


class LargestLogits(TorchDispatchMode):
    """``rows``: the most rows of a result [..., v] of any operation, the head's [d, v] aside."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (V,) and len(tensor) != WIDTH:
                self.rows = max(self.rows, tensor.numel() // V)
        return result


@pytest.fixture(params=[None, MeshSizes(shard=2), MeshSizes(tensor=2), MeshSizes(shard=2, tensor=2)])
def spread(request: pytest.FixtureRequest) -> Iterator[Callable[[LanguageModel], None]]:
    """Lays a model out as on one rank of a mesh; collectives do nothing, since shapes are all that counts."""
    if request.param is None:
        yield lambda model: None
        return
    sizes: MeshSizes = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=sizes.world)
    mesh = dist.init_device_mesh("cpu", tuple(sizes), mesh_dim_names=("replicate", "shard", "tensor"))

    def lay_out(model: LanguageModel) -> None:
        split_layers(model, mesh["tensor"])
        shard_blocks(model, mesh, compute_dtype=torch.float32)

    yield lay_out
    dist.destroy_process_group()


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_a_chunk_at_a_time(
    spread: Callable[[LanguageModel], None],
    make_tokenformer: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
    with_gradient: bool,
    tied: bool,
) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", ROWS * V)
    model = make_tokenformer(
        vocab_size=V, hidden_size=WIDTH, qkv_param_tokens=6, proj_param_tokens=4, tie_word_embeddings=tied
    ).train()
    spread(model)
    tokens = torch.randint(V, (SEQUENCES, LENGTH))
    with torch.set_grad_enabled(with_gradient), LargestLogits() as seen:
        loss = loss_sum(model, Batch(tokens, tokens))
        if with_gradient:
            loss.nats.backward()
    assert seen.rows == ROWS  # of SEQUENCES * LENGTH
