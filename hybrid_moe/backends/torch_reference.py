"""The definition itself as a backend: always there, on any device, slow."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..device import DeviceKey
from ..inputs import Inputs
from ..problem import MoEProblem
from ..reference import moe_reference
from .base import NO_FP8, Backend, ConfigValue, Runner, lacks_fp8

# Elements of the weights from which a call takes seconds on a CPU.
LARGE = 10**8


class TorchReference(Backend):
    """Runs `hybrid_moe.reference.moe_reference`. Reads routing back to the host: not for CUDA graphs."""

    name = "torch_reference"

    def not_supported_reasons(
        self, problem: MoEProblem, device: DeviceKey, config: Mapping[str, ConfigValue]
    ) -> list[str]:
        """Nothing but an unknown option stops it."""
        return self.unknown_config_reasons(config, {})

    def remarks(self, problem: MoEProblem, device: DeviceKey, config: Mapping[str, ConfigValue]) -> list[str]:
        """That it is slow, where that is felt."""
        weights = 3 * problem.num_local_experts * problem.hidden_size * problem.intermediate_size
        if device.name == "cpu" and weights < LARGE:
            return []
        slow = "the layer in plain torch, one expert at a time: it is slow, and can't be captured in a CUDA graph"
        return [f"{slow}. Nothing else can run here: {NO_FP8}" if lacks_fp8(device) else slow]

    def prepare(self, problem: MoEProblem, device: DeviceKey, config: Mapping[str, ConfigValue]) -> Runner:
        """Make the runner; nothing to prepare."""
        self.refuse_if_unsupported(problem, device, config)
        return _ReferenceRunner(problem)


class _ReferenceRunner(Runner):
    def __init__(self, problem: MoEProblem) -> None:
        self._problem = problem

    def run(self, inputs: Inputs, output: torch.Tensor) -> None:
        output.copy_(moe_reference(inputs, self._problem))

    def workspace_bytes(self, num_tokens: int) -> int:
        """About: one expert's weights in float32 with their scales as wide, and all tokens' activations."""
        p = self._problem
        expert = 2 * 2 * p.intermediate_size * p.hidden_size
        token = 3 * p.hidden_size + 6 * p.intermediate_size + 4 * p.num_experts
        return 4 * (expert + num_tokens * token)
