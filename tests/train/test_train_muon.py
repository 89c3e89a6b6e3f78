"""Muon: the whole matrix's update however it is sharded, AdamW beside it, and moments that travel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from tokenformer.errors import TokenFormerError
from tokenformer.growth.grow import grow
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.parallel.shard import whole_tensors
from tokenformer.parallel.tensor import split_layers
from tokenformer.train.checkpoint.contents import read_checkpoint
from tokenformer.train.config import RunConfig
from tokenformer.train.muon import Muon, lr_ratio, orthogonalize
from tokenformer.train.optimizer import build_optimizer, load_named_state, named_state, set_learning_rate
from tokenformer.train.run import train
from tokenformer.train.sections import OptimizerConfig

MakeConfig = Callable[..., RunConfig]
SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "momentum": 0.95, "nesterov": True, "ns_steps": 5}
SHAPES = [(8, 6), (5, 7), (3, 16), (16, 4), (4, 4)]


def matrices(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def make_muon(parameters: list[nn.Parameter], adjust_lr: str = "match_rms_adamw") -> Muon:
    group = {"params": parameters, "algorithm": "muon", "weight_decay": 0.1}
    return Muon([group], lr=0.02, adjust_lr=adjust_lr, **SETTINGS)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (9, 9)])
def test_singular_values_follow_the_polynomial(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalize(matrix, 5), u @ torch.diag(s) @ vt)
    assert ((s > 0.6) & (s < 1.3)).all()
    assert not orthogonalize(torch.zeros(shape), 5).any()


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_steps_are_those_of_torch(adjust_lr: str) -> None:
    """torch orthogonalises in bfloat16, so the updates agree to its precision."""
    ours = [nn.Parameter(m) for m in matrices(0)]
    theirs = [nn.Parameter(m) for m in matrices(0)]
    start = matrices(0)
    optimizer = make_muon(ours, adjust_lr)
    reference = torch.optim.Muon(theirs, lr=0.02, adjust_lr_fn=adjust_lr)
    for step in range(4):
        for one, other, gradient in zip(ours, theirs, matrices(step + 1), strict=True):
            one.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        assert (one - other).norm() < 0.05 * (one - before).norm()
        torch.testing.assert_close(
            optimizer.state[one]["momentum_buffer"], reference.state[other]["momentum_buffer"]
        )


def test_ratio_matches_the_size_of_an_adamw_update() -> None:
    update = orthogonalize(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), 5)
    assert update.square().mean().sqrt() * lr_ratio((64, 256), "match_rms_adamw") == pytest.approx(
        0.2, rel=0.2
    )


def make_model() -> nn.Module:
    sizes = {"qkv_param_tokens": 6, "proj_param_tokens": 10, "ffn_param_tokens": 14}
    config = TokenFormerConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, **sizes
    )
    return build_model(config)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    tokens = torch.arange(24).reshape(2, 12)
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens).logits.square().mean().backward()
        optimizer.step()


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    model, twin = make_model(), make_model()
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", lr=0.02, adamw_lr=1e-3))
    set_learning_rate(optimizer, 0.02)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon = {
        names[id(p)]
        for group in optimizer.param_groups
        if group["algorithm"] == "muon"
        for p in group["params"]
    }
    assert by_muon == {name for name in names.values() if "_tokens" in name}
    reference = torch.optim.AdamW(
        [
            {"params": [p for n, p in twin.named_parameters() if n.startswith("norm")], "weight_decay": 0.0},
            {"params": [twin.embedding.weight], "weight_decay": 0.1},
        ],
        lr=1e-3,
        betas=(0.9, 0.95),
        fused=True,
    )
    take_steps(model, optimizer, 1)
    take_steps(twin, reference, 1)
    for name in ("embedding.weight", "norm.weight", "norm.bias"):
        torch.testing.assert_close(model.get_parameter(name), twin.get_parameter(name))


def test_step_that_is_not_finite_changes_nothing() -> None:
    model = make_model()
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    take_steps(model, optimizer, 2)
    weights = [p.detach().clone() for p in model.parameters()]
    moments = {
        name: {k: v.clone() for k, v in entry.items()}
        for name, entry in named_state(model, optimizer).items()
    }
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    for name, entry in named_state(model, optimizer).items():
        assert all(torch.equal(entry[key], moments[name][key]) for key in entry), name
    assert {"momentum_buffer"} in [entry.keys() for entry in moments.values()]


def test_moments_of_the_other_algorithm_start_afresh() -> None:
    model = make_model()
    adamw = build_optimizer(model, OptimizerConfig())
    take_steps(model, adamw, 2)
    before = named_state(model, adamw)
    muon = build_optimizer(model, OptimizerConfig(name="muon"))
    load_named_state(model, muon, before)
    kept = named_state(model, muon)
    assert set(kept) == {"embedding.weight", "norm.weight", "norm.bias"}
    assert all(torch.equal(kept[name]["exp_avg"], before[name]["exp_avg"]) for name in kept)
    take_steps(model, muon, 1)
    with pytest.raises(TokenFormerError, match=r"momentum_buffer: found \(6, 8\), expected \(14, 8\)"):
        load_named_state(
            model,
            muon,
            {"blocks.0.ffn.key_tokens.0": named_state(model, muon)["blocks.0.attention.query.key_tokens.0"]},
        )


def test_copied_momentum_follows_growth() -> None:
    model = make_model()
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    take_steps(model, optimizer, 2)
    before = named_state(model, optimizer)["blocks.0.ffn.key_tokens.0"]["momentum_buffer"].clone()
    larger = grow(model, factor=3.0, init="copies", optimizer=optimizer)
    after = named_state(larger, optimizer)
    torch.testing.assert_close(after["blocks.0.ffn.key_tokens.0"]["momentum_buffer"], before / 3)
    companion = after["blocks.0.ffn.key_tokens.1"]["momentum_buffer"]
    torch.testing.assert_close(companion, (before / 3).repeat(2, 1))
    take_steps(larger, optimizer, 1)


def test_ladder_from_adamw_to_muon_resumes_bit_for_bit(make_config: MakeConfig, tmp_path: Path) -> None:
    stages = [
        {"steps": 3},
        {"steps": 4, "grow": {"factor": 2}, "optimizer": {"name": "muon", "lr": 2e-3}},
    ]
    config = make_config("checkpoint.every_steps=2", stages=stages)
    whole = train(config, tmp_path / "whole", quiet=True)
    partial = train(config, tmp_path / "run", quiet=True)
    for name in ("step-00000007",):
        (partial.out / "checkpoints" / name).rename(tmp_path / name)
    resumed = train(config, tmp_path / "run", resume=True, quiet=True)
    one, other = read_checkpoint(whole.checkpoint), read_checkpoint(resumed.checkpoint)
    assert one.moments["blocks.0.ffn.key_tokens.1"].keys() == {"momentum_buffer"}
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name]), name
        assert all(torch.equal(one.moments[name][k], other.moments[name][k]) for k in one.moments[name])


def test_muon_settings_belong_to_muon() -> None:
    with pytest.raises(ValueError, match="momentum belongs to muon, but the optimizer's name is 'adamw'"):
        OptimizerConfig(momentum=0.9)


def _train_sharded(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("shard", "tensor"))
    results = {"fsdp": _fsdp_steps(mesh)}
    if ranks == 2:
        for name, placement in (("rows", Shard(0)), ("columns", Shard(1)), ("replicated", Replicate())):
            results[name] = _distributed_steps(mesh["shard"], placement)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


def _fsdp_steps(mesh: DeviceMesh) -> list[Tensor]:
    """Parameters after three steps; with two ranks along ``tensor`` the layers are split over them first."""
    model = make_model()
    split_layers(model, mesh["tensor"])
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    take_steps(model, build_optimizer(model, OptimizerConfig(name="muon", lr=0.01)), 3)  # type: ignore[arg-type]
    return list(whole_tensors(dict(model.named_parameters())).values())


def _distributed_steps(mesh: DeviceMesh, placement: Placement) -> list[Tensor]:
    parameters = [nn.Parameter(distribute_tensor(m, mesh, [placement])) for m in matrices(0)]
    optimizer = make_muon(parameters)
    for step in range(3):
        for parameter, gradient in zip(parameters, matrices(step + 1), strict=True):
            parameter.grad = distribute_tensor(gradient, mesh, [placement])
        optimizer.step()
    assert all(isinstance(optimizer.state[p]["momentum_buffer"], DTensor) for p in parameters)
    return [p.full_tensor().detach() for p in parameters]  # type: ignore[attr-defined]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_update_of_sharded_matrices_is_that_of_the_whole(ranks: int, tmp_path: Path) -> None:
    """FSDP2 over 2 ranks, alone or (4 ranks) with tensor parallelism 2; and other layouts over 2."""
    mp.spawn(_train_sharded, args=(ranks, str(tmp_path)), nprocs=ranks)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    model = make_model()
    take_steps(model, build_optimizer(model, OptimizerConfig(name="muon", lr=0.01)), 3)  # type: ignore[arg-type]
    start = list(make_model().parameters())
    for found, expected, before in zip(results.pop("fsdp"), model.parameters(), start, strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)
        assert not torch.equal(before, expected)
    whole = [nn.Parameter(m) for m in matrices(0)]
    optimizer = make_muon(whole)
    for step in range(3):
        for parameter, gradient in zip(whole, matrices(step + 1), strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert len(results) == (3 if ranks == 2 else 0)
    for other in results.values():
        for found, expected in zip(other, whole, strict=True):
            torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
