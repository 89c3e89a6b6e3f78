"""Differentiable sums over the ranks of a group, in float32; they may stand inside compiled code.

The conjugate pair of tensor parallelism (Megatron-LM, arXiv 1909.08053, section 3): what all ranks have in common goes
into a split layer through :func:`to_ranks` and comes out of it through :func:`sum_of_shares`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as functional


def to_ranks(x: Tensor, group: str) -> Tensor:
    """``x`` itself; its gradient is the sum of those of all ranks of the process group named ``group``."""
    out: Tensor = _ToRanks.apply(x, group)
    return out


def sum_of_shares(share: Tensor, group: str) -> Tensor:
    """The sum over the ranks, for use that all ranks have in common: the gradient of a share is that of the sum."""
    out: Tensor = _SumOfShares.apply(share, group)
    return out


def total_of_ranks(figure: Tensor, group: str) -> Tensor:
    """The sum over the ranks, for use that each rank makes by itself: the gradients of all ranks are summed too."""
    out: Tensor = _TotalOfRanks.apply(figure, group)
    return out


def largest_of_ranks(figure: Tensor, group: str) -> Tensor:
    """The largest over the ranks; not differentiable."""
    return _all_reduce(figure.detach(), "max", group)


class _ToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _SumOfShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, group: str) -> Tensor:
        return _sum(share, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _TotalOfRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, figure: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _sum(figure, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


def _sum(x: Tensor, group: str) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return _all_reduce(wide, "sum", group).to(x.dtype)


def _all_reduce(x: Tensor, operation: str, group: str) -> Tensor:
    # a group's name, unlike the group, is a constant to the compiler
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), operation, group))  # type: ignore[arg-type]
