"""What provides `triton_fused` with the experts' two GEMMs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from typing import ClassVar

from ...device import DeviceKey
from ...problem import MoEProblem
from ..arena import Arena
from ..launcher import DeviceLimits
from ..plan import LaunchKey
from ..steps import AnyStep


class GroupedGemm(ABC):
    """A provider of the experts' two GEMMs: gathered rows in, one row for each (token, local expert) pair out."""

    name: ClassVar[str]
    # Whether all inputs have to start at multiples of 16 bytes.
    wants_alignment: ClassVar[bool] = False
    # `row_alignment`, unless this process has changed it.
    usual_row_alignment: ClassVar[int] = 1

    @abstractmethod
    def not_supported_reasons(self, problem: MoEProblem, device: DeviceKey) -> list[str]:
        """Every reason why it can't run; an empty list means that it can."""

    @abstractmethod
    def reserve(self, arena: Arena, problem: MoEProblem, num_tokens: int, row_alignment: int) -> None:
        """Add the intermediate tensors of `steps`."""

    @abstractmethod
    def steps(self, problem: MoEProblem, limits: DeviceLimits, key: LaunchKey) -> list[AnyStep]:
        """From routed tokens to the layer's output: GEMM1, SwiGLU, quantisation, GEMM2, `combine`."""

    def whole_steps(self, problem: MoEProblem, limits: DeviceLimits, key: LaunchKey) -> list[AnyStep] | None:
        """From the routing's inputs on, where it has kernels for all of that; None where `steps` follow the routing."""
        return None

    def counters(self, problem: MoEProblem, num_tokens: int) -> Mapping[str, int]:
        """Names of int32 tensors that it counts with, and their lengths; `routing.route` clears them."""
        return {}

    def sizing(self, problem: MoEProblem, num_tokens: int) -> Hashable:
        """What else than T the sizes of its tensors depend on; while it is the same, they never fall with T."""
        return None

    def row_alignment(self) -> int:
        """Each expert's rows have to start at a multiple of it in the next call."""
        return self.usual_row_alignment
