"""An optimiser's state by parameter name, and its move from a model to its larger copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tokenformer.errors import TokenFormerError

Moments = Mapping[str, Mapping[str, Tensor]]
_KNOWN_STATE = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "momentum_buffer"}


def move_optimizer(
    optimizer: torch.optim.Optimizer,
    old: nn.Module,
    new: nn.Module,
    carry: Callable[[Moments], dict[str, dict[str, Tensor]]],
) -> None:
    """Make ``optimizer`` optimise ``new`` in place of ``old``.

    Args:
        optimizer: over parameters of ``old``, with the state of Adam or Muon.
        old: the model before.
        new: its larger copy, with the names of ``old`` and more.
        carry: moments of ``old`` by name -> moments of ``new`` by name.

    Raises:
        TokenFormerError: a parameter or a kind of state that is not ``old``'s, or neither Adam's nor Muon's.
    """
    names = {id(parameter): name for name, parameter in old.named_parameters()}
    targets = dict(new.named_parameters())
    for group in optimizer.param_groups:
        if any(id(parameter) not in names for parameter in group["params"]):
            raise TokenFormerError("grow: the optimizer holds parameters that are not the model's")
    for state in optimizer.state.values():
        if unknown := state.keys() - _KNOWN_STATE:
            raise TokenFormerError(
                f"grow: optimizer state {sorted(unknown)} is neither Adam's nor Muon's and cannot be carried over"
            )
    named = {names[id(parameter)]: state for parameter, state in optimizer.state.items()}
    carried = carry(named)
    group_of = {
        _layer(names[id(p)]): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]
    }
    for group in optimizer.param_groups:
        group["params"] = [targets[names[id(parameter)]] for parameter in group["params"]]
    known = set(names.values())
    for name, parameter in targets.items():
        if name not in known:
            optimizer.param_groups[group_of.get(_layer(name), 0)]["params"].append(parameter)
    optimizer.state.clear()
    for name, state in carried.items():
        optimizer.state[targets[name]] = dict(state)


def _layer(name: str) -> str:
    """A parameter's name without the number of its group."""
    return name.rpartition(".")[0]
