"""The optimiser over named parameters: which decay, at which learning rate, which are frozen; its state by name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokenformer.errors import TokenFormerError
from tokenformer.models.base import LanguageModel
from tokenformer.parallel.shard import spread_like
from tokenformer.train.adamw import AdamW
from tokenformer.train.muon import Muon
from tokenformer.train.sections import OptimizerConfig
from tokenformer.validation import nearest

Moments = dict[str, dict[str, Tensor]]
"""By parameter name: AdamW's ``exp_avg``, ``exp_avg_sq`` (shaped as the parameter) and ``step`` (float32, no
dimensions), or Muon's ``momentum_buffer`` (shaped as the parameter)."""

_GROUP_SUFFIX = re.compile(r"(?:key_tokens|value_tokens)\.(\d+)$")
_ADAMW_KEYS, _MUON_KEYS = ("exp_avg", "exp_avg_sq", "step"), ("momentum_buffer",)
STATE_KEYS = (*_ADAMW_KEYS, *_MUON_KEYS)
_NO_MATRICES = ("embedding", "head", "norm")
"""Roles that AdamW trains beside Muon, whatever their shape."""


def growth_group(parameter_name: str) -> int | None:
    """The group g of parameter tokens that a parameter holds, None for any other parameter."""
    match = _GROUP_SUFFIX.search(parameter_name)
    return int(match.group(1)) if match else None


def check_roles_and_groups(
    config: OptimizerConfig, model: LanguageModel, num_groups: int, place: str
) -> None:
    """Refuse multipliers and frozen names that match nothing in a model with ``num_groups`` growth groups.

    Raises:
        TokenFormerError: an unknown role or group, with what there is.
    """
    roles = {model.role_of(name) for name, _ in model.named_parameters()}
    for key in [*config.lr_multipliers, *config.frozen_roles]:
        field = "lr_multipliers" if key in config.lr_multipliers else "frozen_roles"
        if not key.startswith("group:") and key not in roles:
            raise TokenFormerError(f"{place}.{field}: '{key}' is no role of this model{nearest(key, roles)}")
    groups = [
        (f"lr_multipliers: '{key}'", int(key[6:]))
        for key in config.lr_multipliers
        if key.startswith("group:")
    ]
    groups += [(f"frozen_groups: {group}", group) for group in config.frozen_groups]
    for found, group in groups:
        if group >= num_groups:
            raise TokenFormerError(
                f"{place}.{found}: expected a group from 0 to {num_groups - 1} at this stage"
            )
    tokens = {model.role_of(name) for name, _ in model.named_parameters() if growth_group(name) is not None}
    trained_groups = set(range(num_groups)) - set(config.frozen_groups)
    if not roles - set(config.frozen_roles) - (set() if trained_groups else tokens):
        raise TokenFormerError(f"{place}: frozen_groups and frozen_roles leave nothing to train")


def build_optimizer(
    model: LanguageModel, config: OptimizerConfig, trained: Collection[str] | None = None
) -> AdamW | Muon:
    """The optimiser, whose groups carry ``lr_multiplier``; frozen parameters no longer require gradients and are left
    out. With ``trained``, names of parameters, all others are frozen.

    Weight decay acts on every parameter with two or more dimensions that is no norm's. Muon takes the matrices inside
    the blocks; of parameter tokens, each growth group is a matrix of its own.

    Raises:
        TokenFormerError: everything is frozen.
    """
    groups: defaultdict[tuple[str, float, float, object], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        role, group = model.role_of(name), growth_group(name)
        frozen = role in config.frozen_roles or group in config.frozen_groups
        frozen = frozen or (trained is not None and name not in trained)
        parameter.requires_grad_(not frozen)
        if frozen:
            parameter.grad = None
            continue
        multiplier = config.lr_multipliers.get(role, 1.0) * config.lr_multipliers.get(f"group:{group}", 1.0)
        decay = config.weight_decay if parameter.ndim >= 2 and role != "norm" else 0.0
        by_muon = config.name == "muon" and parameter.ndim == 2 and role not in _NO_MATRICES
        if config.name == "muon" and not by_muon:
            multiplier *= (config.adamw_lr or config.lr) / config.lr
        mesh = (
            parameter.device_mesh if isinstance(parameter, DTensor) else None
        )  # fused kernels take one at a time
        groups["muon" if by_muon else "adamw", decay, multiplier, mesh].append(parameter)
    if not groups:
        raise TokenFormerError("optimizer: frozen_groups and frozen_roles leave nothing to train")
    described = [
        {"params": parameters, "algorithm": algorithm, "weight_decay": decay, "lr_multiplier": multiplier}
        for (algorithm, decay, multiplier, _), parameters in groups.items()
    ]
    if config.name == "adamw":
        return AdamW(described, lr=config.lr, betas=config.betas, eps=config.eps)
    return Muon(
        described,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        momentum=config.momentum,
        nesterov=config.nesterov,
        ns_steps=config.ns_steps,
        adjust_lr=config.adjust_lr,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group ``lr`` times its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Every parameter the optimiser updates."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Moments:
    """The optimiser's moments by parameter name; parameters without moments yet are absent.

    The tensors are the optimiser's own, not copies.
    """
    return {
        name: {key: value for key, value in optimizer.state[parameter].items() if key in STATE_KEYS}
        for name, parameter in model.named_parameters()
        if optimizer.state.get(parameter)
    }


def load_named_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Copy ``moments`` into the optimiser. A parameter that is absent starts afresh, and so does one whose moments are
    of the other algorithm (AdamW's where Muon trains it, or the reverse); moments of a frozen parameter are kept for
    the stage that trains it again.

    Raises:
        TokenFormerError: a name that the model does not have, a missing entry or another shape.
    """
    parameters = dict(model.named_parameters())
    _refuse_unknown(moments, parameters)
    algorithms = {p: group["algorithm"] for group in optimizer.param_groups for p in group["params"]}
    for name, entry in moments.items():
        parameter = parameters[name]
        found = "muon" if entry.keys() & set(_MUON_KEYS) else "adamw"
        if algorithms.get(parameter, found) != found:
            continue
        keys = _MUON_KEYS if found == "muon" else _ADAMW_KEYS
        for key in keys:
            expected = torch.Size() if key == "step" else parameter.shape
            if key not in entry or entry[key].shape != expected:
                shape = tuple(entry[key].shape) if key in entry else "nothing"
                raise TokenFormerError(
                    f"optimiser state of {name}: {key}: found {shape}, expected {tuple(expected)}"
                )
        optimizer.state[parameter] = {
            key: entry[key].detach().to(device=parameter.device, dtype=torch.float32, copy=True)
            if key == "step"
            else spread_like(entry[key], parameter)
            for key in keys
        }


def _refuse_unknown(names: Iterable[str], parameters: Mapping[str, nn.Parameter]) -> None:
    unknown = sorted(set(names) - set(parameters))
    if unknown:
        raise TokenFormerError(f"optimiser state of {unknown[0]}: the model has no such parameter")
