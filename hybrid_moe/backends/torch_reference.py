"""The definition itself as a backend: always there, on any device, slow."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..problem import DeviceKey, MoEInputs, MoEProblem
from ..reference import moe_reference
from .base import Backend, ConfigValue, Runner


class TorchReference(Backend):
    """Runs `hybrid_moe.reference.moe_reference`. Reads routing back to the host: not for CUDA graphs."""

    name = "torch_reference"

    def not_supported_reasons(
        self, problem: MoEProblem, device: DeviceKey, config: Mapping[str, ConfigValue]
    ) -> list[str]:
        """Nothing but an unknown option stops it."""
        return self.unknown_config_reasons(config, {})

    def prepare(self, problem: MoEProblem, device: DeviceKey, config: Mapping[str, ConfigValue]) -> Runner:
        """Make the runner; nothing to prepare."""
        self.refuse_if_unsupported(problem, device, config)
        return _ReferenceRunner(problem)


class _ReferenceRunner(Runner):
    def __init__(self, problem: MoEProblem) -> None:
        self._problem = problem

    def run(self, inputs: MoEInputs, output: torch.Tensor) -> None:
        output.copy_(moe_reference(inputs, self._problem))
