"""Larger copies of models, and optimiser moments that follow."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tokenformer.errors import TokenFormerError
from tokenformer.growth.moments import move_optimizer
from tokenformer.growth.spec import GrowthSpec, grown_config, target_tokens
from tokenformer.layers.growth_rules import GrowthInit, NewTokens
from tokenformer.layers.pattention import Pattention
from tokenformer.models.base import LanguageModel
from tokenformer.models.tokenformer.config import ROLES, TokenFormerConfig
from tokenformer.validation import validate


class CopiedFrom(NamedTuple):
    """A parameter after ``copies``: the old parameter that its moments come from, and what its gradient is
    multiplied by."""

    name: str
    gradient_factor: float


class Grown(NamedTuple):
    """A larger model. ``copied`` (init ``copies`` only) says where the moments of a parameter come from;
    ``fresh_optimizer`` (init ``random``) that all moments are dropped."""

    model: Any
    copied: dict[str, CopiedFrom]
    fresh_optimizer: bool

    def moments(self, named: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Moments of the larger model from those of the old one.

        Args:
            named: parameter name -> Adam's ``exp_avg``, ``exp_avg_sq`` (shaped like the parameter) and ``step``, or
                Muon's ``momentum_buffer``. Each group is a matrix of its own to Muon, before and after.

        Returns:
            The same for the new model; parameters that start afresh are absent.
        """
        if self.fresh_optimizer:
            return {}
        moved = {name: dict(state) for name, state in named.items()}
        for name, source in self.copied.items():
            if source.name in named:
                moved[name] = _copied_moments(named[source.name], source.gradient_factor, self._shape(name))
        return moved

    def _shape(self, name: str) -> torch.Size:
        shape: torch.Size = self.model.get_parameter(name).shape
        return shape


def grow(
    module: nn.Module,
    *,
    factor: float | None = None,
    qkv: int | None = None,
    proj: int | None = None,
    ffn: int | None = None,
    init: GrowthInit = "exact",
    new_tokens: NewTokens = "zero_keys",
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> Any:
    """A larger copy of a TokenFormer, or of any module that contains :class:`Pattention` layers.

    Args:
        module: stays as it is.
        factor: multiplies the parameter tokens of every layer.
        qkv: new total of each query, key and value layer (TokenFormer only), likewise ``proj`` and ``ffn``.
        proj: see ``qkv``.
        ffn: see ``qkv``.
        init: ``exact``, ``copies`` or ``random``.
        new_tokens: what is zero in the tokens of ``exact`` growth: ``zero_keys``, or for ``gelu`` also ``zero_values``.
        optimizer: Adam, AdamW or Muon over ``module``; from now on it optimises the copy. Old groups keep their
            moments, new ones join the parameter group of their layer (the first one if the layer was
            not optimised) and start at step 0.
        seed: draws the new tokens.

    Returns:
        The larger copy.

    Raises:
        TokenFormerError: what cannot grow, with the reason.
    """
    sizes = {"factor": factor, "qkv": qkv, "proj": proj, "ffn": ffn}
    asked = {name: size for name, size in sizes.items() if size is not None}
    spec = validate(GrowthSpec, {"init": init, "new_tokens": new_tokens, **asked}, source="grow")
    grown = grow_model(module, spec, seed=seed)
    if optimizer is not None:
        move_optimizer(optimizer, module, grown.model, grown.moments)
    return grown.model


def grow_model(module: nn.Module, spec: GrowthSpec, *, seed: int = 0, step: int | None = None) -> Grown:
    """As :func:`grow`, with what is needed to carry optimiser moments over.

    Args:
        module: stays as it is.
        spec: what to do.
        seed: draws the new tokens, for each layer by its name and size.
        step: training steps done so far, for the growth history.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, Pattention)}
    if not layers:
        raise TokenFormerError(
            f"grow: {type(module).__name__} contains no Pattention layer, so there is nothing to grow"
        )
    if spec.factor is None and not isinstance(module, LanguageModel):
        raise TokenFormerError(
            f"grow: qkv, proj and ffn name the layers of a TokenFormer; for {type(module).__name__} use factor"
        )
    configs = {
        name: grown_config(part.config, spec, step=step)
        for name, part in module.named_modules()
        if isinstance(part, LanguageModel) and (part is module or isinstance(part.config, TokenFormerConfig))
    }
    targets = {name: _target(module, name, layer, spec) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.check_growth(targets[name], spec.init, spec.new_tokens)
    if all(targets[name] == layer.num_param_tokens for name, layer in layers.items()):
        raise TokenFormerError(f"grow: factor {spec.factor} adds no parameter token to any layer")

    larger = copy.deepcopy(module)
    copied: dict[str, CopiedFrom] = {}
    for name, target in targets.items():
        layer = cast(Pattention, larger.get_submodule(name))
        before = layer.groups
        generator = _generator(seed, name, sum(before))
        layer.grow(target, spec.init, generator, new_tokens=spec.new_tokens)
        if spec.init == "copies" and target != sum(before):
            copied |= _copy_sources(name, len(before), target // sum(before))
    for name, config in configs.items():
        cast(LanguageModel, larger.get_submodule(name)).config = config
    return Grown(larger, copied, fresh_optimizer=spec.init == "random")


def _generator(seed: int, layer: str, tokens: int) -> torch.Generator:
    """One for each layer and size, so that growing twice with one seed draws different tokens."""
    return torch.Generator().manual_seed(seed ^ zlib.crc32(f"{layer}:{tokens}".encode()))


def _target(module: nn.Module, name: str, layer: Pattention, spec: GrowthSpec) -> int:
    role = "factor"
    if isinstance(module, LanguageModel):
        role = module.role_of(f"{name}.key_tokens.0")
        if role not in ROLES:
            raise TokenFormerError(f"grow: layer {name} plays no role that can grow")
    return target_tokens(layer.num_param_tokens, spec, role)


def _copy_sources(layer: str, groups: int, r: int) -> dict[str, CopiedFrom]:
    """With r copies of a token, values / r: the gradient of each key copy is 1/r of the old one, that of each
    value copy is the old one."""
    prefix = f"{layer}." if layer else ""
    sources = {}
    for kind, factor in (("key_tokens", 1.0 / r), ("value_tokens", 1.0)):
        for group in range(groups):
            source = CopiedFrom(f"{prefix}{kind}.{group}", factor)
            sources[source.name] = source
            sources[f"{prefix}{kind}.{groups + group}"] = source
    return sources


def _copied_moments(state: Mapping[str, Tensor], factor: float, shape: torch.Size) -> dict[str, Tensor]:
    powers = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
    moved = {}
    for name, value in state.items():
        if name in powers:
            moved[name] = (value * factor ** powers[name]).repeat(shape[0] // value.shape[0], 1)
        else:
            moved[name] = value.clone() if isinstance(value, Tensor) else value
    return moved
