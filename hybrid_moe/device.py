"""Where it is computed: which kind of device a measurement or a policy speaks of."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DeviceKey:
    """Which kind of device a measurement or a policy speaks of.

    Parameters
    ----------
    name
        Slug of the device's product name, as ``nvidia_h100_80gb_hbm3``; ``cpu`` for the CPU.
    capability
        CUDA compute capability; ``None`` where there is none or it isn't known.
    """

    name: str
    capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, device: torch.device | str) -> DeviceKey:
        """Key of a torch device that is present."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return _device_key(device)


@functools.cache
def _device_key(device: torch.device) -> DeviceKey:
    if device.type != "cuda":
        return DeviceKey(device.type)
    return DeviceKey(device_slug(torch.cuda.get_device_name(device)), torch.cuda.get_device_capability(device))


def device_slug(product_name: str) -> str:
    """``"NVIDIA H100 80GB HBM3"`` -> ``"nvidia_h100_80gb_hbm3"``."""
    return re.sub(r"[^a-z0-9]+", "_", product_name.lower()).strip("_")
