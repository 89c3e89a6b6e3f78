"""AdamW (arXiv 1711.05101) over plain and sharded parameters, alone and beside Muon: our kernel, or torch's fused."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tokenformer.ops.adamw import adamw_update, applies
from tokenformer.parallel.local import local_parts


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW(fused=True)``, with its state and its protocol (``grad_scale``, ``found_inf``); the update is
    :func:`step_adamw`."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self, groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(list(groups), lr=lr, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; ``closure`` is not used."""
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            step_adamw(trained, self.state, **options, grad_scale=self.grad_scale, found_inf=self.found_inf)


def step_adamw(
    parameters: Sequence[Tensor],
    state: MutableMapping[Tensor, dict[str, Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of all ``parameters``, in place; what becomes of gradients is left open (torch's kernel divides them).

    Args:
        parameters: plain tensors or DTensors, with gradients, all on one device.
        state: of each, ``step`` [], ``exp_avg`` and ``exp_avg_sq`` like the parameter; made where there is none.
        lr: learning rate.
        betas: decay of both moments.
        eps: added to the root of the second.
        weight_decay: decoupled, times ``lr``.
        grad_scale: [] float32, what gradients are divided by.
        found_inf: [] float32, 1.0 leaves everything but gradients as it is.
    """
    if not parameters:
        return
    states = [_state_of(parameter, state) for parameter in parameters]
    steps = [entry["step"] for entry in states]
    gradients = local_parts(cast(Tensor, parameter.grad) for parameter in parameters)
    exp_avgs, exp_avg_sqs = (local_parts(entry[key] for entry in states) for key in ("exp_avg", "exp_avg_sq"))
    tensors = (local_parts(parameters), gradients, exp_avgs, exp_avg_sqs)
    if applies(*tensors, steps=steps):
        adamw_update(
            *tensors,
            steps,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        return
    adamw(
        *tensors,
        [],
        steps,
        fused=True,
        grad_scale=grad_scale,
        found_inf=found_inf,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def _state_of(parameter: Tensor, state: MutableMapping[Tensor, dict[str, Tensor]]) -> dict[str, Tensor]:
    entry = state[parameter]
    if not entry:
        zeros = [torch.zeros_like(parameter) for _ in range(2)]
        step = torch.zeros((), device=parameter.device)
        entry.update(zip(("exp_avg", "exp_avg_sq", "step"), (*zeros, step), strict=True))
    return entry
