"""Provider ``sgl_kernel``: the CUTLASS block-scale grouped GEMM of sgl-kernel (PyPI ``sglang-kernel``)."""

from __future__ import annotations

import torch

from ...problem import DeviceKey, Inputs, MoEProblem
from ..pipeline import GroupedGemm, Launch, Routed, combine, row_capacity
from . import libraries
from .library_rows import Rows, gather, require_alignment, rows_bytes, swiglu

# What SGLang reserves for CUTLASS.
WORKSPACE_BYTES = 90_000
# Integers in which the library keeps the layout of one expert's scales.
LAYOUT_INTS = 5
# It finds the experts' addresses in one block with a thread for each.
MAX_EXPERTS = 1024
# The library takes its tiles for few rows, 128 weight rows by 32 tokens, if `a` has up to so many rows.
FEW_ROWS = 2048
# We choose those up to so many rows of an expert, if routing is even: `a` may show fewer rows than there are, since the
# library reads addresses and sizes from the device.
FEW_ROWS_PER_EXPERT = 16.0


class SglGroupedGemm(GroupedGemm):
    """Gather, GEMM1, SwiGLU with quantisation, GEMM2, combine: three launches of ours, and two for each GEMM.

    The first of a GEMM's two writes the experts' addresses. Weights and scales go in as views, without a copy.

    The library computes all columns of the result at once: it takes expert ``e``'s weights at ``e * N * K``, which a
    slice of columns doesn't have. So the rows of both GEMMs are reserved in full width for the worst routing,
    17.7 KB a row: 2.0 GB for DeepSeek-V3 at T = 14107 (112,856 rows), of which few are touched.
    """

    name = "sgl_kernel"

    def not_supported_reasons(self, problem: MoEProblem, device: DeviceKey) -> list[str]:
        """The GPU, the library, and the experts that it can count."""
        reasons = libraries.sgl_reasons(device)
        if problem.num_local_experts > MAX_EXPERTS:
            reasons.append(f"num_local_experts is {problem.num_local_experts}; at most {MAX_EXPERTS} is wanted")
        return reasons

    def workspace_bytes(self, problem: MoEProblem, num_tokens: int) -> int:
        """The rows of both GEMMs in full width for the worst routing, and the experts' tables."""
        tables = problem.num_local_experts * (8 * 8 + 4 * (2 + 6 + 2 * LAYOUT_INTS))
        return rows_bytes(problem, row_capacity(problem, num_tokens)) + tables + WORKSPACE_BYTES

    def run(self, inputs: Inputs, routed: Routed, problem: MoEProblem, launch: Launch, output: torch.Tensor) -> None:
        """Launch all steps; ValueError if an input doesn't start at a multiple of 16 bytes, as the library wants."""
        require_alignment(inputs, routed)
        grouped_mm = libraries.sgl_grouped_mm()
        e, device = problem.num_local_experts, output.device
        rows = Rows.allocate(problem, row_capacity(problem, inputs.num_tokens), device, align=1, row_major_scales=True)
        tables = gather(inputs, routed, problem, launch, rows, problem_tables=True)
        assert tables.problem_sizes is not None and tables.strides is not None
        h, i, two_i = tables.strides.unbind()
        sizes1, sizes2 = tables.problem_sizes.unbind()
        start = tables.start[:-1]
        pointers = torch.empty((5, e), dtype=torch.int64, device=device).unbind()
        layouts = torch.empty((2, e, LAYOUT_INTS), dtype=torch.int32, device=device).unbind()
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        shown = _shown_rows(problem, inputs.num_tokens, rows.gathered.shape[0])
        grouped_mm(
            rows.gemm1,
            *pointers,
            rows.gathered[:shown],
            inputs.gemm1_weights.transpose(1, 2),
            rows.gathered_scale,
            inputs.gemm1_weights_scale.transpose(1, 2),
            h,
            h,
            two_i,
            *layouts,
            sizes1,
            start,
            workspace,
        )
        swiglu(routed, problem, launch, rows)
        grouped_mm(
            rows.gemm2,
            *pointers,
            rows.activated[:shown],
            inputs.gemm2_weights.transpose(1, 2),
            rows.activated_scale,
            inputs.gemm2_weights_scale.transpose(1, 2),
            i,
            i,
            h,
            *layouts,
            sizes2,
            start,
            workspace,
        )
        combine(rows.gemm2, routed, problem, launch, output, 0)


def _shown_rows(problem: MoEProblem, num_tokens: int, capacity: int) -> int:
    """How many rows `a` shows to the library, which chooses its tiles by it."""
    few = num_tokens * problem.top_k / problem.num_experts <= FEW_ROWS_PER_EXPERT
    return min(capacity, FEW_ROWS) if few else capacity
