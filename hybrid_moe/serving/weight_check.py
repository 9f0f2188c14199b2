"""Which experts' weights hold what is no number: asked once, when a layer is made with ``check_weights=True``."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def not_finite(weights: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    """The local experts in whose weights or scales a value is NaN or infinite, by the tensor's name.

    Parameters
    ----------
    weights
        Each with the local experts as its first dimension: e4m3, whose NaN are two bytes, or floating point.

    Returns
    -------
    dict
        Without the tensors that are whole. It waits for the device once for each tensor.
    """
    found = {}
    for name, tensor in weights.items():
        # Expert by expert, as a copy of all would be 1.4 GB.
        flags = [_has_fault(expert) for expert in tensor]
        if experts := torch.stack(flags).nonzero()[:, 0].tolist():
            found[name] = experts
    return found


def _has_fault(values: torch.Tensor) -> torch.Tensor:
    if values.dtype == torch.float8_e4m3fn:
        return (values.view(torch.uint8) & 0x7F == 0x7F).any()
    return ~values.isfinite().all()


def refuse_not_finite(weights: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError that names the tensors and their local experts if any value is NaN or infinite."""
    if found := not_finite(weights):
        places = "; ".join(f"{name} of local experts {', '.join(map(str, e))}" for name, e in found.items())
        raise ValueError(f"expected finite weights and scales, got NaN or infinity in {places}: load the weights again")
