"""How rows lie in memory around another library's two grouped GEMMs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...inputs import FP8
from ...problem import MoEProblem
from ..arena import Arena


@dataclass(frozen=True, slots=True)
class Rows:
    """How one call's rows lie in expert order, and the tables that say where; all on the device.

    The tensors, by name:

    ``gathered``, ``gathered_scale``
        ``[max_rows, H]`` e4m3 and its scales, float32: the first GEMM's input.
    ``gemm1``
        ``[max_rows, 2I]`` bfloat16, for the first GEMM's result.
    ``activated``, ``activated_scale``
        ``[max_rows, I]`` e4m3 and its scales: the second GEMM's input.
    ``rows``
        ``[max_rows, H]`` bfloat16, for the second GEMM's result; the memory of ``gathered`` and ``gemm1``, whose last
        reader comes before.
    ``start``, ``end``
        ``[E + 1]`` and ``[E]`` int32: each expert's first row (the last element: where one more would start), and the
        row after its last.
    ``problem_sizes``, ``strides``
        If wanted: ``[2, E, 3]`` int32, rows, columns and sum length of each expert's GEMM1, then of its GEMM2; and
        ``[3, E]`` int64, H, I and 2I, each E times.

    Parameters
    ----------
    problem
        Of the layer.
    max_rows
        Rows that there is room for.
    align
        Each expert's rows start at a multiple of it: 1, or the row tile of a library that wants none to hold two
        experts.
    row_major_scales
        Whether scales are ``[max_rows, blocks]``, or else ``[blocks, max_rows]``.
    tables
        Whether ``problem_sizes`` and ``strides`` are made.
    """

    problem: MoEProblem
    max_rows: int
    align: int
    row_major_scales: bool
    tables: bool

    def reserve(self, arena: Arena) -> None:
        """Add the tensors: 17.7 KB a row for DeepSeek-V3."""
        p, max_rows = self.problem, self.max_rows
        e, h, i = p.num_local_experts, p.hidden_size, p.intermediate_size
        shared = arena.bytes
        arena.reserve("shared", (max_rows * max(h + 4 * i, 2 * h),), torch.uint8)
        arena.overlay("gathered", shared, (max_rows, h), FP8)
        arena.overlay("gemm1", shared + max_rows * h, (max_rows, 2 * i), torch.bfloat16)
        arena.overlay("rows", shared, (max_rows, h), torch.bfloat16)
        arena.reserve("gathered_scale", self._scales(h), torch.float32)
        arena.reserve("activated", (max_rows, i), FP8)
        arena.reserve("activated_scale", self._scales(i), torch.float32)
        arena.reserve("start", (e + 1,), torch.int32)
        arena.reserve("end", (e,), torch.int32)
        if self.tables:
            arena.reserve("problem_sizes", (2, e, 3), torch.int32)
            arena.reserve("strides", (3, e), torch.int64)

    def _scales(self, width: int) -> tuple[int, int]:
        blocks = width // self.problem.block
        return (self.max_rows, blocks) if self.row_major_scales else (blocks, self.max_rows)

    def scale_strides(self, width: int) -> tuple[int, int]:
        """From row to row, and from block to block."""
        return (width // self.problem.block, 1) if self.row_major_scales else (1, self.max_rows)
