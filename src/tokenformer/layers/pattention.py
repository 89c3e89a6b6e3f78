"""The Pattention layer: a drop-in for ``nn.Linear`` that can grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tokenformer.errors import TokenFormerError
from tokenformer.layers.growth_rules import GrowthInit, NewTokens, check_growth
from tokenformer.ops.pattention import (
    NORM_ACTIVATIONS,
    NormActivation,
    WeightKind,
    pattention,
    pattention_projections,
)
from tokenformer.ops.pattention_float8 import pattention_float8, pattention_float8_projections

COPY_NOISE = 0.1
"""Noise on the values of copies, relative to their own root mean square; it sums to zero over the copies."""


class PattentionOp(Protocol):
    """x, keys, values, kind -> output, as :func:`~tokenformer.ops.pattention.pattention`."""

    def __call__(
        self,
        x: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        kind: WeightKind,
        /,
        *,
        recompute_scores: bool = False,
    ) -> Tensor: ...


_TOGETHER: dict[PattentionOp, Callable[..., list[Tensor]]] = {
    pattention: pattention_projections,
    pattention_float8: pattention_float8_projections,
}
"""The same over several projections of one input."""


class TokenInit(NamedTuple):
    """How fresh parameter tokens are drawn: normal, keys with ``key_std``, values with ``value_std``,
    divided by sqrt(n) where ``scale_values`` (n: the layer's parameter tokens, the fresh ones included)."""

    key_std: float
    value_std: float
    scale_values: bool

    def value_std_for(self, num_param_tokens: int) -> float:
        """Standard deviation of fresh values in a layer of n tokens."""
        return self.value_std / math.sqrt(num_param_tokens) if self.scale_values else self.value_std


class Pattention(nn.Module):
    """Attention of the input over learned parameter tokens (arXiv 2410.23168): [..., d_in] -> [..., d_out].

    Args:
        in_features: d_in.
        out_features: d_out.
        num_param_tokens: n, or the sizes of several groups.
        norm_activation: ``gelu``, ``l2_norm_gelu``, ``gelu_l2_norm`` or ``softmax``.
        tau: the scale in the weights; n by default. Exact growth keeps it.
        gelu_approximate: ``none`` (erf) or ``tanh``.
        norm_eps: added to the L2 norms.
        init: how fresh tokens are drawn; by default keys with std 1/sqrt(d_in), values with 1/sqrt(n).
        generator: draws the first weights.

    ``key_tokens`` and ``value_tokens`` hold one Parameter for each group: [n_g, d_in] and [n_g, d_out]. ``op`` is the
    function that computes the layer; parallelism puts its own in its place. ``recompute_scores``: whether scores
    are made again in the backward instead of kept.

    Raises:
        TokenFormerError: a size or tau that is not positive, an unknown kind.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_param_tokens: int | tuple[int, ...] | list[int],
        *,
        norm_activation: NormActivation = "gelu",
        tau: float | None = None,
        gelu_approximate: Literal["none", "tanh"] = "none",
        norm_eps: float = 0.0,
        init: TokenInit | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        groups = (num_param_tokens,) if isinstance(num_param_tokens, int) else tuple(num_param_tokens)
        if not groups or min(in_features, out_features, *groups) < 1:
            raise TokenFormerError(
                f"Pattention: sizes must be positive, found in_features {in_features}, "
                f"out_features {out_features}, num_param_tokens {num_param_tokens}"
            )
        if norm_activation not in NORM_ACTIVATIONS:
            raise TokenFormerError(
                f"norm_activation: found '{norm_activation}', expected one of {', '.join(NORM_ACTIVATIONS)}"
            )
        if tau is not None and not 0 < tau < math.inf:
            raise TokenFormerError(f"tau: found {tau}, expected a positive number")
        self.in_features, self.out_features = in_features, out_features
        self.kind = WeightKind(
            norm_activation, float(sum(groups) if tau is None else tau), gelu_approximate, norm_eps
        )
        self.op: PattentionOp = pattention
        self.recompute_scores = False
        self.init = init or TokenInit(key_std=1 / math.sqrt(in_features), value_std=1.0, scale_values=True)
        self.key_tokens = nn.ParameterList(torch.empty(n, in_features) for n in groups)
        self.value_tokens = nn.ParameterList(torch.empty(n, out_features) for n in groups)
        self.reset_parameters(generator)

    @property
    def groups(self) -> tuple[int, ...]:
        """Sizes of the groups, oldest first."""
        return tuple(group.shape[0] for group in self.key_tokens)

    @property
    def num_param_tokens(self) -> int:
        """n, over all groups."""
        return sum(self.groups)

    @property
    def tau(self) -> float:
        """The stored scale in the weights."""
        return self.kind.tau

    def extra_repr(self) -> str:
        groups = " + ".join(str(n) for n in self.groups)
        sizes = f"{self.in_features}, {self.out_features}, tokens={groups}"
        return f"{sizes}, {self.kind.norm_activation}, tau={self.tau:g}"

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out].

        Raises:
            ValueError: the last axis of ``x`` is not d_in.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: found last axis {x.shape[-1]} in {list(x.shape)}, expected {self.in_features}"
            )
        keys, values = list(self.key_tokens), list(self.value_tokens)
        return self.op(x, keys, values, self.kind, recompute_scores=self.recompute_scores)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all tokens afresh."""
        value_std = self.init.value_std_for(self.num_param_tokens)
        for keys, values in zip(self.key_tokens, self.value_tokens, strict=True):
            keys.normal_(0.0, self.init.key_std, generator=generator)
            values.normal_(0.0, value_std, generator=generator)

    def check_growth(
        self, num_param_tokens: int, init: GrowthInit, new_tokens: NewTokens = "zero_keys"
    ) -> None:
        """Raise what :meth:`grow` would raise, without growing."""
        kind = self.kind.norm_activation
        check_growth(self.num_param_tokens, num_param_tokens, init, kind, "num_param_tokens", new_tokens)
        frozen = not all(values.requires_grad for values in self.value_tokens)
        if init == "copies" and frozen and num_param_tokens != self.num_param_tokens:
            raise TokenFormerError(
                "init 'copies' divides all values, but a group is frozen; use 'exact' or unfreeze it"
            )

    @torch.no_grad()
    def grow(
        self,
        num_param_tokens: int,
        init: GrowthInit = "exact",
        generator: torch.Generator | None = None,
        *,
        new_tokens: NewTokens = "zero_keys",
    ) -> None:
        """Append a group of parameter tokens, in place.

        ``exact``: zero keys and values as at init, or keys as at init and zero values (``new_tokens``); tau stays, so
        the function does not move. ``copies``: every
        group gets a companion with r - 1 copies of its tokens, values are divided by r (plus noise that sums to
        zero over the copies of a token), tau becomes r tau. ``random``: keys and values as at init, tau becomes n.

        Args:
            num_param_tokens: the new n, over all groups; unchanged n is no growth.
            init: the rule.
            generator: draws the new tokens (on the CPU).
            new_tokens: of ``exact`` growth: ``zero_keys``, or for ``gelu`` also ``zero_values``.

        Raises:
            TokenFormerError: fewer tokens than before, ``exact`` for softmax, ``zero_values`` for another kind than
                ``gelu``, ``copies`` by a fraction or of a frozen group.
        """
        self.check_growth(num_param_tokens, init, new_tokens)
        if num_param_tokens == self.num_param_tokens:
            return
        if init == "copies":
            self._append_copies(num_param_tokens // self.num_param_tokens, generator)
            return
        fresh = num_param_tokens - self.num_param_tokens
        key_std, value_std = self.init.key_std, self.init.value_std_for(num_param_tokens)
        if init == "exact" and new_tokens == "zero_keys":
            key_std = 0.0
        elif init == "exact":
            value_std = 0.0
        self.append(
            torch.zeros(fresh, self.in_features).normal_(0.0, key_std, generator=generator),
            torch.empty(fresh, self.out_features).normal_(0.0, value_std, generator=generator),
        )
        if init == "random":
            self.kind = self.kind._replace(tau=float(num_param_tokens))

    def freeze(self, group: int) -> None:
        """Exclude a group from training: no gradient is computed for it."""
        self._set_requires_grad(group, False)

    def unfreeze(self, group: int) -> None:
        """Undo :meth:`freeze`."""
        self._set_requires_grad(group, True)

    def remove(self, group: int) -> None:
        """Take a group out, in place; tau stays. Later groups move up by one.

        Raises:
            TokenFormerError: no such group, or it is the only one.
        """
        self._check_group(group)
        if len(self.groups) == 1:
            raise TokenFormerError("group 0 is the only group of this layer and cannot be removed")
        kept = [index for index in range(len(self.groups)) if index != group]
        self.key_tokens = nn.ParameterList(self.key_tokens[index] for index in kept)
        self.value_tokens = nn.ParameterList(self.value_tokens[index] for index in kept)

    @torch.no_grad()
    def consolidate(self) -> None:
        """Merge all groups into one, in place; the function stays the same up to rounding.

        Raises:
            TokenFormerError: some groups are frozen and others not.
        """
        if len({parameter.requires_grad for parameter in self.key_tokens}) > 1:
            raise TokenFormerError(
                "consolidate: some groups are frozen and others not; freeze or unfreeze all first"
            )
        trained = self.key_tokens[0].requires_grad
        self.key_tokens = nn.ParameterList([nn.Parameter(torch.cat(list(self.key_tokens)), trained)])
        self.value_tokens = nn.ParameterList([nn.Parameter(torch.cat(list(self.value_tokens)), trained)])

    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append a group of copies of given tokens, keys [n, d_in] and values [n, d_out], in place; tau stays."""
        like = self.key_tokens[0]
        self.key_tokens.append(nn.Parameter(keys.to(like, copy=True)))
        self.value_tokens.append(nn.Parameter(values.to(like, copy=True)))

    def _append_copies(self, r: int, generator: torch.Generator | None) -> None:
        for keys, values in zip(list(self.key_tokens), list(self.value_tokens), strict=True):
            n, features = values.shape
            noise = torch.empty(r, n, features).normal_(0.0, COPY_NOISE, generator=generator)
            noise = (noise - noise.mean(0)).to(values) * values.square().mean().sqrt()
            copies = (values + noise) / r  # [r, n, d_out]; their sum over r is the old values
            values.copy_(copies[0])
            self.append(keys.repeat(r - 1, 1), copies[1:].flatten(0, 1))
        self.kind = self.kind._replace(tau=r * self.tau)

    def _set_requires_grad(self, group: int, value: bool) -> None:
        self._check_group(group)
        self.key_tokens[group].requires_grad_(value)
        self.value_tokens[group].requires_grad_(value)

    def _check_group(self, group: int) -> None:
        if not 0 <= group < len(self.groups):
            raise TokenFormerError(
                f"group: found {group}, but this layer has groups 0 to {len(self.groups) - 1}"
            )


def project_together(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """What the layers make of one input, [..., d_out] each; Pattention layers of one form share their products."""
    plain = [layer for layer in layers if type(layer) is Pattention and is_plain(layer)]
    forms = {
        (
            layer.op,
            layer.kind,
            layer.num_param_tokens,
            layer.in_features,
            layer.out_features,
            layer.recompute_scores,
        )
        for layer in plain
    }
    if len(plain) != len(layers) or len(forms) > 1:
        return [layer(x) for layer in layers]
    keys = [list(layer.key_tokens) for layer in plain]
    values = [list(layer.value_tokens) for layer in plain]
    first = plain[0]
    return _TOGETHER[first.op](x, keys, values, first.kind, recompute_scores=first.recompute_scores)


def is_plain(layer: Pattention) -> bool:
    """Whether calling the layer is computing its ``op`` and nothing else, which also takes several projections."""
    return layer.op in _TOGETHER and not layer._forward_hooks and not layer._forward_pre_hooks
