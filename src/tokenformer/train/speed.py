"""How fast a run is: tokens a second, model FLOPs utilisation, peak memory, time left; and the console's line of it."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

import torch

from tokenformer.progress import short_number

_PEAK_FLOPS = (
    # dense bfloat16 with float32 sums, from the makers' data sheets; the first name found decides
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A40", 150e12),
    ("A10", 125e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("MI300X", 1307e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by the name its driver gives, None where it is not known."""
    words = device_name.replace("-", " ").split()
    for name, flops in _PEAK_FLOPS:
        wanted = name.split()
        if all(word in words for word in wanted):
            return flops
    return None


class Speed:
    """Measures of the steps between two readings, for one device of ``devices``.

    Args:
        device: this rank's.
        dtype: of the forward pass; utilisation is told for 16 bits alone, whose peak is known.
        devices: ranks of the run.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, devices: int) -> None:
        self._device, self._devices = device, devices
        half = dtype in (torch.bfloat16, torch.float16)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" and half else ""
        self._peak = peak_flops(name)

    def read(self, tokens: int, flops: float, seconds: float, recorded_memory: int = 0) -> dict[str, float]:
        """Metrics of ``tokens`` trained with ``flops`` in ``seconds`` by all devices together. ``recorded_memory``:
        bytes on this rank's device at the peak of what torch's statistics do not see."""
        seconds = max(seconds, 1e-9)
        values = {
            "tokens_per_second": round(tokens / seconds, 1),
            "tokens_per_second_per_device": round(tokens / seconds / self._devices, 1),
        }
        if self._peak is not None:
            values["mfu"] = round(flops / seconds / self._devices / self._peak, 4)
        if self._device.type == "cuda":
            seen = torch.cuda.max_memory_allocated(self._device)
            values["peak_memory_bytes"] = max(seen, recorded_memory)
            torch.cuda.reset_peak_memory_stats(self._device)
        return values


def console_line(place: str, values: Mapping[str, Any]) -> str:
    """One line for people of what a logging line holds; ``place`` opens it. What is not there is left out."""
    parts = [f"loss {values['loss']:.4f}", f"lr {values['lr']:.3g}", f"grad norm {values['grad_norm']:.3g}"]
    parts.append(f"{short_number(values['tokens_per_second_per_device'])} tokens/s per device")
    if "mfu" in values:
        parts.append(f"MFU {100 * values['mfu']:.1f} %")
    if "peak_memory_bytes" in values:
        parts.append(f"{values['peak_memory_bytes'] / 2**30:.1f} GiB")
    if "loss_scale" in values:
        parts.append(f"scale {values['loss_scale']:g}")
    if "skipped_steps" in values:
        parts.append(f"{values['skipped_steps']} skipped")
    parts.append(f"{datetime.timedelta(seconds=round(values['seconds_left']))} left")
    return f"{place}: {', '.join(parts)}"
