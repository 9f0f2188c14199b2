"""Provider ``deep_gemm``: the contiguous grouped GEMM of DeepGEMM (PyPI ``sgl-deep-gemm``), on Hopper."""

from __future__ import annotations

import torch
import triton

from ...problem import DeviceKey, Inputs, MoEProblem
from ..pipeline import GroupedGemm, Launch, Routed, combine, row_capacity
from . import libraries
from .library_rows import Rows, gather, require_alignment, rows_bytes, swiglu

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

    def not_supported_reasons(self, problem: MoEProblem, device: DeviceKey) -> list[str]:
        """The GPU, the library, and the compiler that it calls."""
        return libraries.deep_gemm_reasons(device)

    def workspace_bytes(self, problem: MoEProblem, num_tokens: int) -> int:
        """The rows of both GEMMs in full width for the worst routing, and the experts' bounds."""
        return rows_bytes(problem, padded_capacity(problem, num_tokens, ALIGN)) + 4 * (
            2 * problem.num_local_experts + 1
        )

    def run(self, inputs: Inputs, routed: Routed, problem: MoEProblem, launch: Launch, output: torch.Tensor) -> None:
        """Launch all steps; ValueError if an input doesn't start at a multiple of 16 bytes, as the library wants."""
        require_alignment(inputs, routed)
        library = libraries.deep_gemm()
        grouped_mm = getattr(library, libraries.DEEP_GEMM_FUNCTION)
        # Others in this process may have set it, and the library's tiles follow it.
        align = int(library.get_mk_alignment_for_contiguous_layout())
        capacity = padded_capacity(problem, inputs.num_tokens, align)
        rows = Rows.allocate(problem, capacity, output.device, align=align, row_major_scales=False)
        tables = gather(inputs, routed, problem, launch, rows, problem_tables=False)
        # The library chooses its tiles by it.
        expected = triton.cdiv(inputs.num_tokens * problem.top_k, problem.num_experts)
        grouped_mm(
            (rows.gathered, rows.gathered_scale),
            (inputs.gemm1_weights, inputs.gemm1_weights_scale),
            rows.gemm1,
            tables.end,
            use_psum_layout=True,
            expected_m_for_psum_layout=expected,
        )
        swiglu(routed, problem, launch, rows)
        grouped_mm(
            (rows.activated, rows.activated_scale),
            (inputs.gemm2_weights, inputs.gemm2_weights_scale),
            rows.gemm2,
            tables.end,
            use_psum_layout=True,
            expected_m_for_psum_layout=expected,
        )
        combine(rows.gemm2, routed, problem, launch, output, 0, align=align)


def padded_capacity(problem: MoEProblem, num_tokens: int, align: int) -> int:
    """Most rows that any routing can give, each expert's rounded up to a multiple of ``align``."""
    rows = row_capacity(problem, num_tokens)
    active = min(problem.num_local_experts, rows)
    return (active + (rows - active) // align) * align
