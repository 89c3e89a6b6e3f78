"""Run under torchrun: gradients of models over several meshes against those of the plain model; prints the largest
relative difference of each case as a JSON line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from tokenformer.language.loss import Batch, loss_sum
from tokenformer.models.base import LanguageModel
from tokenformer.models.config import DecoderConfig
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.models.transformer.config import TransformerConfig
from tokenformer.ops.pattention import NORM_ACTIVATIONS
from tokenformer.parallel.gradients import average_replicas, total_norm
from tokenformer.parallel.launch import find_launch
from tokenformer.parallel.shard import (
    drop_gathered,
    shard_blocks,
    spread_like,
    synchronize_gradients,
    whole_model,
    whole_tensors,
)
from tokenformer.parallel.sizes import mesh_sizes
from tokenformer.parallel.tensor import split_layers
from tokenformer.parallel.world import World, joined, meet

CPU = torch.device("cpu")


def configs() -> Iterator[tuple[str, DecoderConfig]]:
    shared = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    for kind in NORM_ACTIVATIONS:
        yield (
            kind,
            TokenFormerConfig(
                **shared,
                qkv_param_tokens=12,
                proj_param_tokens=4,
                ffn_param_tokens=20,
                param_token_groups={"qkv": (4, 8), "proj": (4,), "ffn": (4, 4, 12)},
                norm_activation=kind,
                tie_word_embeddings=kind != "softmax",
            ),
        )
    yield "transformer", TransformerConfig(**shared, use_bias=True, intermediate_size=24)


def batch(rows: slice) -> Batch:
    tokens = torch.randint(40, (6, 10), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[0] = -100  # a sequence without targets
    targets[3, 2:] = -100
    return Batch(tokens[rows, :-1], targets[rows])


def spread(config: DecoderConfig, world: World) -> LanguageModel:
    model = build_model(config)
    model.blocks[0].requires_grad_(False)  # frozen parameters have no gradient
    assert world.mesh is not None
    split_layers(model, world.mesh["tensor"])
    shard_blocks(model, world.mesh, compute_dtype=torch.float32)
    return model


def largest_difference(config: DecoderConfig, world: World) -> float:
    """Over all gradients and their norm; the samples are split unevenly, in three passes, one of them empty."""
    plain, model = build_model(config), spread(config, world)
    plain.blocks[0].requires_grad_(False)
    loss_sum(plain, batch(slice(0, 6))).nats.backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    share = world.share
    mine = list(range(6))[share.rank :: share.ranks]
    for index, rows in enumerate((mine[:1], mine[1:], [])):
        synchronize_gradients(model, world, last=index == 2)
        part = batch(slice(0, 1))._replace(targets=torch.full((1, 9), -100))
        if rows:
            whole = batch(slice(0, 6))
            part = Batch(whole.inputs[rows], whole.targets[rows])
        loss_sum(model, part).nats.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    average_replicas(list(gradients.values()), world)
    assert gradients.keys() == expected.keys()
    found = whole_tensors(gradients)
    norm = total_norm(list(gradients.values())), torch.nn.utils.get_total_norm(list(expected.values()))
    pairs = [norm, *((found[name], expected[name]) for name in expected)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def check_state(config: DecoderConfig, world: World) -> None:
    """Whole tensors come back bit for bit, and lie as the parameters do when they are spread again."""
    plain, model = build_model(config), spread(config, world)
    with torch.no_grad():
        logits, expected = (m(batch(slice(0, 2)).inputs).logits for m in (model, plain))
    torch.testing.assert_close(logits, expected)
    drop_gathered(model)
    gathered = whole_model(model)
    for (name, parameter), whole in zip(model.named_parameters(), gathered.parameters(), strict=True):
        assert torch.equal(whole, plain.get_parameter(name)), name
        for source in (whole, parameter):
            again = spread_like(source, parameter)
            pairs = [t.to_local() if isinstance(t, DTensor) else t for t in (again, parameter)]
            assert torch.equal(*pairs), name


def main(out: Path) -> None:
    launch, results = find_launch(), {}
    n = launch.world_size
    layouts = [(1, n, 1), (n, 1, 1), (1, 1, n), (1, n // 2, 2), (2, n // 2, 1), (n // 2, 1, 2)]
    for layout in dict.fromkeys(layouts):
        sizes = mesh_sizes(*layout, n)
        with meet(launch, 60) as store, joined(launch, store, sizes, CPU, 60) as world:
            for name, config in configs():
                results[f"{name} {tuple(sizes)}"] = largest_difference(config, world)
                check_state(config, world)
    if launch.rank == 0:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
