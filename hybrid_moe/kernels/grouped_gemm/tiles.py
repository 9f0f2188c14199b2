"""Which tiles the Triton grouped GEMMs use, by the expected rows of an expert."""

from __future__ import annotations

from dataclasses import dataclass

from ...problem import MoEProblem


@dataclass(frozen=True, slots=True)
class Tile:
    """One kernel's tile and resources.

    Parameters
    ----------
    block_m, block_n
        Rows and columns of the result that one step computes. GEMM1 computes ``block_n`` gate and as many up columns.
    num_warps, num_stages
        Warps of a program and depth of its load pipeline.
    programs_per_multiprocessor
        Grid bound: programs share the tiles, so more of them than are resident only add start-up work.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Tiles of both GEMMs. The activation is quantised by GEMM1 where ``gemm1.block_n`` is 128."""

    gemm1: Tile
    gemm2: Tile

    @property
    def quantized(self) -> bool:
        """Whether GEMM1 writes e4m3 (otherwise float32, which GEMM2 quantises as it loads)."""
        return self.gemm1.block_n == 128


# (up to so many tokens for each expert of the model if routing is even, plan)
TILE_TABLE: tuple[tuple[float, TilePlan], ...] = (
    (0.5, TilePlan(Tile(16, 32, 2, 5, 8), Tile(16, 64, 2, 4, 8))),
    (16.0, TilePlan(Tile(64, 64, 4, 4, 4), Tile(64, 64, 4, 5, 4))),
    (float("inf"), TilePlan(Tile(64, 128, 8, 3, 2), Tile(64, 128, 4, 3, 4))),
)


def tile_plan(problem: MoEProblem, num_tokens: int) -> TilePlan:
    """The plan for ``num_tokens``: a function of the shapes alone, so that a captured graph keeps it."""
    tokens_per_expert = num_tokens * problem.top_k / problem.num_experts
    return next(plan for bound, plan in TILE_TABLE if tokens_per_expert <= bound)


def max_row_tiles(problem: MoEProblem, num_tokens: int, block_m: int) -> int:
    """Most row tiles that any routing of ``num_tokens`` can need over the local experts."""
    rows = num_tokens * problem.max_local_rows_per_token
    active = min(problem.num_local_experts, rows)
    # Each active expert rounds up once: at most active partly filled tiles beside the full ones.
    return active + (rows - active) // block_m
