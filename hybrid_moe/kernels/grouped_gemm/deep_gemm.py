"""Provider ``deep_gemm``: the contiguous grouped GEMM of DeepGEMM (PyPI ``sgl-deep-gemm``), on Hopper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton

from ...device import DeviceKey
from ...problem import MoEProblem
from ..arena import Arena
from ..combine import combine
from ..launcher import DeviceLimits
from ..plan import LaunchKey
from ..shapes import max_local_rows
from ..steps import AnyStep, LibraryStep
from . import libraries
from .base import GroupedGemm
from .gather import gather
from .library_rows import Rows
from .swiglu import swiglu

# Rows of the library's tile on Hopper, unless a process sets another: no tile holds two experts.
ALIGN = 128


class DeepGemmGroupedGemm(GroupedGemm):
    """Five launches: gather, GEMM1, SwiGLU with quantisation, GEMM2, combine.

    The library is told where each expert's rows end (``use_psum_layout``), and so works on those alone. By its other
    way, an expert for each row and -1 for none, it would still load the tiles of all rows that are reserved, eight
    times those that one of eight ranks has.

    It computes all columns of the result at once: it wants weights whose experts follow one another without a gap,
    which a slice of columns doesn't have. So the rows of both GEMMs are reserved in full width for the worst
    routing, 17.7 KB a row: 2.1 GB for DeepSeek-V3 at T = 14107 (116,864 rows with each expert's padding).

    A kernel is compiled by nvcc at its first use, for each of the two weight shapes and the tile that the library
    chooses for the expected rows of an expert in multiples of 128: call it once for every T that you serve before you
    capture a graph.
    """

    name = "deep_gemm"
    wants_alignment = True
    usual_row_alignment = ALIGN

    def not_supported_reasons(self, problem: MoEProblem, device: DeviceKey) -> list[str]:
        """The GPU, the library, and the compiler that it calls."""
        return libraries.deep_gemm_reasons(device)

    def row_alignment(self) -> int:
        """As the library says at each call: others in this process may have set it, and its tiles follow it."""
        return int(libraries.deep_gemm().get_mk_alignment_for_contiguous_layout())

    def reserve(self, arena: Arena, problem: MoEProblem, num_tokens: int, row_alignment: int) -> None:
        """The rows of both GEMMs in full width for the worst routing, and the experts' bounds."""
        _rows(problem, num_tokens, row_alignment).reserve(arena)

    def steps(self, problem: MoEProblem, limits: DeviceLimits, key: LaunchKey) -> list[AnyStep]:
        """Gather, GEMM1, SwiGLU with quantisation, GEMM2, combine."""
        grouped_mm = getattr(libraries.deep_gemm(), libraries.DEEP_GEMM_FUNCTION)
        rows = _rows(problem, key.num_tokens, key.row_alignment)
        # The library chooses its tiles by it.
        expected = triton.cdiv(key.num_tokens * problem.top_k, problem.num_experts)

        def gemm(call: Mapping[str, Any], values: str, weights: str, output: str) -> None:
            grouped_mm(
                (call[values], call[f"{values}_scale"].t()),
                (call[weights], call[f"{weights}_scale"]),
                call[output],
                call["end"],
                use_psum_layout=True,
                expected_m_for_psum_layout=expected,
            )

        return [
            gather(rows, limits, key),
            LibraryStep(lambda call: gemm(call, "gathered", "gemm1_weights", "gemm1")),
            swiglu(rows, limits),
            LibraryStep(lambda call: gemm(call, "activated", "gemm2_weights", "rows")),
            combine(problem, limits, key, problem.hidden_size, 0),
        ]


def _rows(problem: MoEProblem, num_tokens: int, align: int) -> Rows:
    max_rows = padded_max_rows(problem, num_tokens, align)
    return Rows(problem, max_rows, align=align, row_major_scales=False, tables=False)


def padded_max_rows(problem: MoEProblem, num_tokens: int, align: int) -> int:
    """Most rows that any routing can give, each expert's rounded up to a multiple of ``align``."""
    rows = max_local_rows(problem, num_tokens)
    active = min(problem.num_local_experts, rows)
    return (active + (rows - active) // align) * align
