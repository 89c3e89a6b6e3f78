"""States of torch's random generators."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """States of torch's generators: the CPU's and the device's."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put generator states back; one of a device that is not in use is left out."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
