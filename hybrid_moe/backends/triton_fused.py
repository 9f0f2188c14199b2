"""One pipeline of this package's Triton kernels, with a pluggable grouped GEMM.

Launches: clearing of counters; routing and sorting; GEMM1 with gather, SwiGLU and quantisation; GEMM2; combine. A
library's grouped GEMM (`gemm` other than ``"triton"``) has a gather before and SwiGLU with quantisation between its
two. Weights stay in the definition's layout. Nothing is read back to the host: grids depend on the shapes alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from ..device import DeviceKey
from ..inputs import Inputs
from ..problem import MoEProblem
from .base import NO_FP8, Backend, ConfigValue, Runner, lacks_fp8

if TYPE_CHECKING:
    from ..kernels.pipeline import GroupedGemm

GEMMS = ("triton", "sgl_kernel", "deep_gemm")
LIBRARIES = {"sgl_kernel": "sglang-kernel", "deep_gemm": "sgl-deep-gemm"}
# What the kernels are compiled for: Ada, Hopper, Blackwell of data centres and of workstations.
CAPABILITIES = ((8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))


class TritonFused(Backend):
    """See the module. Option ``gemm``: the provider of the grouped GEMM."""

    name = "triton_fused"
    default_config = {"gemm": "triton"}

    def configs(self) -> Iterator[Mapping[str, ConfigValue]]:
        """One for each grouped GEMM."""
        for gemm in GEMMS:
            yield {"gemm": gemm}

    def packages(self, config: Mapping[str, ConfigValue]) -> tuple[str, ...]:
        """Triton runs the pipeline, a library its grouped GEMM."""
        library = LIBRARIES.get(str(config.get("gemm", self.default_config["gemm"])))
        return ("torch", "triton") if library is None else ("torch", "triton", library)

    def not_supported_reasons(
        self, problem: MoEProblem, device: DeviceKey, config: Mapping[str, ConfigValue]
    ) -> list[str]:
        """The GPU, then Triton, then the grouped GEMM's own reasons."""
        reasons = self.unknown_config_reasons(config, {"gemm": GEMMS})
        if importlib.util.find_spec("triton") is None:
            return [*reasons, "triton is not installed: pip install triton"]
        from ..kernels.interpreter import interpreting

        if device.capability not in CAPABILITIES and not (device.name == "cpu" and interpreting()):
            *others, last = map(_text, CAPABILITIES)
            reasons.append(
                f"device {device.name}: expected compute capability {', '.join(others)} or {last}, "
                f"got {_text(device.capability)}"
                + (" (or Triton's interpreter: TRITON_INTERPRET=1, for tests)" if device.name == "cpu" else "")
                + (f": {NO_FP8}" if lacks_fp8(device) else "")
            )
        if not reasons:
            gemm = str(config.get("gemm", self.default_config["gemm"]))
            reasons.extend(_gemm(gemm, device).not_supported_reasons(problem.all_routed, device))
        return reasons

    def kernels(
        self,
        problem: MoEProblem,
        capability: tuple[int, int] | None,
        config: Mapping[str, ConfigValue],
        num_tokens: int,
    ) -> str | None:
        """The modules of our own GEMMs; a library decides for itself."""
        if config.get("gemm") != "triton" or importlib.util.find_spec("triton") is None:
            return None
        from ..kernels.grouped_gemm.tiles import describe

        return describe(problem.all_routed, num_tokens, capability)

    def prepare(self, problem: MoEProblem, device: DeviceKey, config: Mapping[str, ConfigValue]) -> Runner:
        """Make the runner; kernels compile at its first call for a token count's tiles."""
        self.refuse_if_unsupported(problem, device, config)
        return _TritonRunner(problem, device, str(config["gemm"]))


def _text(capability: tuple[int, int] | None) -> str:
    return "none" if capability is None else f"{capability[0]}.{capability[1]}"


def _gemm(name: str, device: DeviceKey) -> GroupedGemm:
    # Imported where used: `import hybrid_moe` imports no kernel library.
    if name == "triton":
        from ..kernels.grouped_gemm.triton.provider import TritonGroupedGemm

        return TritonGroupedGemm(device.capability)
    if name == "sgl_kernel":
        from ..kernels.grouped_gemm.sgl import SglGroupedGemm

        return SglGroupedGemm()
    if name == "deep_gemm":
        from ..kernels.grouped_gemm.deep_gemm import DeepGemmGroupedGemm

        return DeepGemmGroupedGemm()
    raise ValueError(f"gemm: expected one of {', '.join(GEMMS)}, got {name!r}")


def provider_module(gemm: str) -> str:
    """Module of this package that a grouped GEMM is in; imports it, and with it Triton, but no library."""
    return type(_gemm(gemm, DeviceKey("cpu"))).__module__


class _TritonRunner(Runner):
    def __init__(self, problem: MoEProblem, device: DeviceKey, gemm: str) -> None:
        from ..kernels import interpreter, pipeline

        self._pipeline = pipeline.Pipeline(problem, _gemm(gemm, device))
        if interpreter.interpreting():
            interpreter.repair()

    def run(self, inputs: Inputs, output: torch.Tensor) -> None:
        self._pipeline.run(inputs, output)

    def run_in(self, inputs: Inputs, output: torch.Tensor, memory: torch.Tensor) -> None:
        self._pipeline.run(inputs, output, memory)

    def compile(self, inputs: Inputs) -> None:
        self._pipeline.compile(inputs)

    def workspace_bytes(self, num_tokens: int) -> int:
        return self._pipeline.arena(num_tokens).bytes

    def reserved_bytes(self, num_tokens: int) -> int:
        return self.workspace_bytes(num_tokens)

    def most_reserved_bytes(self, first: int, last: int) -> int:
        return self._pipeline.most_bytes(first, last)
