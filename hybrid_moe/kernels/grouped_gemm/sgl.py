"""Provider ``sgl_kernel``: the CUTLASS block-scale grouped GEMM of sgl-kernel (PyPI ``sglang-kernel``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

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

# What SGLang reserves for CUTLASS.
WORKSPACE_BYTES = 90_000
# Integers in which the library keeps the layout of one expert's scales.
LAYOUT_INTS = 5
# It finds the experts' addresses in one block with a thread for each.
MAX_EXPERTS = 1024
# The library takes its tiles for few rows, 128 weight rows by 32 tokens, if `a` has up to so many rows.
FEW_ROWS = 2048
# We choose those up to so many rows of an expert: `a` may show fewer rows than there are, since the library reads sizes
# and addresses from the device.
FEW_ROWS_PER_EXPERT = 16.0


class SglGroupedGemm(GroupedGemm):
    """Gather, GEMM1, SwiGLU with quantisation, GEMM2, combine: three launches of ours, and two for each GEMM.

    The first of a GEMM's two writes the experts' addresses. Weights and scales go in as views, without a copy.

    The library computes all columns of the result at once: it takes expert ``e``'s weights at ``e * N * K``, which a
    slice of columns doesn't have. So the rows of both GEMMs are reserved in full width for the worst routing,
    17.7 KB a row: 2.0 GB for DeepSeek-V3 at T = 14107 (112,856 rows), of which few are touched.
    """

    name = "sgl_kernel"
    wants_alignment = True

    def not_supported_reasons(self, problem: MoEProblem, device: DeviceKey) -> list[str]:
        """The GPU, the library, and the experts that it can count."""
        reasons = libraries.sgl_reasons(device)
        if problem.num_local_experts > MAX_EXPERTS:
            reasons.append(f"num_local_experts: expected at most {MAX_EXPERTS}, got {problem.num_local_experts}")
        return reasons

    def reserve(self, arena: Arena, problem: MoEProblem, num_tokens: int, row_alignment: int) -> None:
        """The rows of both GEMMs in full width for the worst routing, and the experts' tables."""
        _rows(problem, num_tokens).reserve(arena)
        arena.reserve("pointers", (5, problem.num_local_experts), torch.int64)
        arena.reserve("layouts", (2, problem.num_local_experts, LAYOUT_INTS), torch.int32)
        arena.reserve("workspace", (WORKSPACE_BYTES,), torch.uint8)

    def steps(self, problem: MoEProblem, limits: DeviceLimits, key: LaunchKey) -> list[AnyStep]:
        """Gather, GEMM1, SwiGLU with quantisation, GEMM2, combine."""
        grouped_mm = libraries.sgl_grouped_mm()
        rows = _rows(problem, key.num_tokens)
        shown = _shown_rows(problem, key.num_tokens, rows.max_rows)

        def gemm1(call: Mapping[str, Any]) -> None:
            h, _, two_i = call["strides"].unbind()
            _run(grouped_mm, call, "gemm1", ("gathered", "gathered_scale"), shown, (h, h, two_i), 0)

        def gemm2(call: Mapping[str, Any]) -> None:
            h, i, _ = call["strides"].unbind()
            _run(grouped_mm, call, "rows", ("activated", "activated_scale"), shown, (i, i, h), 1)

        return [
            gather(rows, limits, key),
            LibraryStep(gemm1),
            swiglu(rows, limits),
            LibraryStep(gemm2),
            combine(problem, limits, key, problem.hidden_size, 0),
        ]


def _rows(problem: MoEProblem, num_tokens: int) -> Rows:
    return Rows(problem, max_local_rows(problem, num_tokens), align=1, row_major_scales=True, tables=True)


def _run(
    grouped_mm: Callable[..., Any],
    call: Mapping[str, Any],
    output: str,
    activation: tuple[str, str],
    shown: int,
    strides: tuple[torch.Tensor, ...],
    which: int,
) -> None:
    values, scale = activation
    weights = f"gemm{which + 1}_weights"
    grouped_mm(
        call[output],
        *call["pointers"].unbind(),
        call[values][:shown],
        call[weights].transpose(1, 2),
        call[scale],
        call[f"{weights}_scale"].transpose(1, 2),
        *strides,
        *call["layouts"].unbind(),
        call["problem_sizes"][which],
        call["start"][:-1],
        call["workspace"],
    )


def _shown_rows(problem: MoEProblem, num_tokens: int, max_rows: int) -> int:
    """How many rows `a` shows to the library, which chooses its tiles by it."""
    few = num_tokens * problem.top_k / problem.num_experts <= FEW_ROWS_PER_EXPERT
    return min(max_rows, FEW_ROWS) if few else max_rows
