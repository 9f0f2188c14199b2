"""Which tiles the Triton grouped GEMMs use, by the expected rows of an expert."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

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
    k_unroll
        128 blocks of the sum in one stage: neighbouring loads of one weight row, which memory serves better together.
    programs_per_multiprocessor
        Grid bound: programs share the tiles, so more of them than are resident only add start-up work.
    few
        ``(block_m, num_stages, k_unroll)`` of the tile for an expert with at most ``block_m`` rows, the rest being
        equal: rows per expert are known on the device alone. ``(0, 1, 1)`` for none.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    k_unroll: int = 1
    programs_per_multiprocessor: int = 32
    few: tuple[int, int, int] = (0, 1, 1)


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Tiles of both GEMMs."""

    gemm1: Tile
    gemm2: Tile


# (up to so many tokens for each expert of the model if routing is even, plan). Measured on H200, see
# benchmarks/NOTES.md.
TILES_SM90: tuple[tuple[float, TilePlan], ...] = (
    (0.5, TilePlan(Tile(16, 64, 4, 4), Tile(16, 128, 4, 3, 2))),
    (80.0, TilePlan(Tile(64, 64, 4, 4, few=(16, 3, 2)), Tile(64, 128, 4, 4, few=(16, 3, 2)))),
    (float("inf"), TilePlan(Tile(128, 128, 8, 3, 1, 4), Tile(128, 256, 8, 3, 1, 4))),
)
# Never measured: the tiles above that compile for sm_100a without spills, by tcgen05 where there are rows enough.
TILES_SM100: tuple[tuple[float, TilePlan], ...] = (
    *TILES_SM90[:2],
    (float("inf"), TilePlan(Tile(128, 64, 8, 4, 1, 2), Tile(128, 128, 8, 4, 1, 2))),
)


@functools.lru_cache(maxsize=4096)
def tile_plan(problem: MoEProblem, num_tokens: int, capability: tuple[int, int] | None = None) -> TilePlan:
    """The plan for ``num_tokens``: a function of the shapes alone, so that a captured graph keeps it."""
    tokens_per_expert = num_tokens * problem.top_k / problem.num_experts
    table = TILES_SM100 if capability is not None and capability[0] >= 10 else TILES_SM90
    plan = next(plan for bound, plan in table if tokens_per_expert <= bound)
    return TilePlan(
        _fitting(plan.gemm1, problem.hidden_size, problem.intermediate_size, problem.block),
        _fitting(plan.gemm2, problem.intermediate_size, problem.hidden_size, problem.block),
    )


def _fitting(tile: Tile, inner: int, columns: int, block: int) -> Tile:
    """The tile with its unrolling and width cut down to what divides this problem's sizes."""

    def unroll(wanted: int) -> int:
        return next(u for u in range(wanted, 0, -1) if inner // block % u == 0)

    few = (*tile.few[:2], unroll(tile.few[2]))
    block_n = tile.block_n if columns % tile.block_n == 0 else block
    return replace(tile, k_unroll=unroll(tile.k_unroll), block_n=block_n, few=few)


def max_row_tiles(problem: MoEProblem, num_tokens: int, block_m: int) -> int:
    """Most row tiles that any routing of ``num_tokens`` can need over the local experts."""
    rows = num_tokens * problem.max_local_rows_per_token
    active = min(problem.num_local_experts, rows)
    # Each active expert rounds up once: at most active partly filled tiles beside the full ones.
    return active + (rows - active) // block_m
