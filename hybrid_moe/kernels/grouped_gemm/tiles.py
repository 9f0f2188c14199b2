"""Which tiles the Triton grouped GEMMs use, by the expected rows of an expert."""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass, replace

from ...problem import MoEProblem
from .sm90 import few_rows, many_rows


@dataclass(frozen=True, slots=True)
class Tier:
    """Rows of a tile, with the load pipeline that suits them.

    Parameters
    ----------
    block_m
        Rows of the result that one step computes.
    num_stages
        Depth of the load pipeline.
    k_unroll
        128 blocks of the sum in one stage: neighbouring loads of one weight row, which memory serves better together.
    """

    block_m: int
    num_stages: int
    k_unroll: int = 1


@dataclass(frozen=True, slots=True)
class Tile:
    """One kernel's tile and resources.

    Parameters
    ----------
    block_n
        Columns of the result that one step computes. GEMM1 computes ``block_n`` gate and as many up columns.
    num_warps
        Warps of a program.
    tiers
        By rows. An expert's rows are cut by the last; what is left of them for a tile takes the first tier that holds
        it. They are known on the device alone. All tiers share one kernel, whose registers and shared memory are the
        most that any of them needs.
    programs_per_multiprocessor
        Grid bound: programs share the tiles, so more of them than are resident only add start-up work.
    joined
        One product computes both halves of a tile's columns (GEMM1: gate and up), instead of two that wait for one
        another and need fewer registers at a time.
    max_registers
        Of a thread, so that more programs fit; None for what the compiler finds best.
    """

    block_n: int
    num_warps: int
    tiers: tuple[Tier, ...]
    programs_per_multiprocessor: int = 7
    joined: bool = False
    max_registers: int | None = None

    def __post_init__(self) -> None:
        rows = [tier.block_m for tier in self.tiers]
        if not rows or rows != sorted(set(rows)):
            raise ValueError(f"tiers have {rows} rows; one or more are wanted, each with more than the one before")

    @property
    def block_m(self) -> int:
        """Rows of a full tile."""
        return self.tiers[-1].block_m


class Specialized(enum.Enum):
    """Kernels of one architecture alone, by the rows that they are for."""

    FEW = enum.auto()  # `hopper_few_kernels`
    MANY = enum.auto()  # `hopper_kernels`


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Tiles of both GEMMs.

    Parameters
    ----------
    gemm1, gemm2
        Of the kernels in `triton_kernels`.
    specialized
        What GEMM1 and GEMM2 are instead, if anything. The tiles are then for what those kernels can't read, as inputs
        that don't start at multiples of 16 bytes.
    """

    gemm1: Tile
    gemm2: Tile
    specialized: tuple[Specialized | None, Specialized | None] = (None, None)


_FEW = TilePlan(Tile(64, 4, (Tier(16, 4),)), Tile(128, 4, (Tier(16, 3, 2),), joined=True))
_MANY = (Tile(128, 4, (Tier(64, 3),), 4), Tile(256, 8, (Tier(128, 3),), 4))
_GEMM2 = Tile(128, 4, (Tier(16, 3, 2), Tier(64, 4)), joined=True)
# (up to so many tokens for each expert of the model if routing is even, plan). Measured on H100, see
# benchmarks/NOTES.md.
TILES_SM90: tuple[tuple[float, TilePlan], ...] = (
    # Few experts are active: narrow tiles, so that there is one for each multiprocessor.
    (
        0.5,
        TilePlan(
            Tile(32, 4, (Tier(16, 4, 2),), joined=True),
            Tile(64, 4, (Tier(16, 3, 2),), joined=True),
            (Specialized.FEW, Specialized.FEW),
        ),
    ),
    (
        2.5,
        TilePlan(Tile(32, 4, (Tier(16, 4, 2), Tier(64, 4)), joined=True), _GEMM2, (Specialized.FEW, Specialized.FEW)),
    ),
    (8.0, TilePlan(Tile(64, 4, (Tier(16, 4, 2), Tier(64, 4)), joined=True), _GEMM2)),
    (float("inf"), TilePlan(*_MANY, specialized=(Specialized.MANY, Specialized.MANY))),
)
# Never measured: tiles that compile for sm_100a without spills, by tcgen05 where there are rows enough.
TILES_SM100: tuple[tuple[float, TilePlan], ...] = (
    (0.5, _FEW),
    (
        80.0,
        TilePlan(
            Tile(64, 4, (Tier(16, 3, 2), Tier(64, 4)), joined=True),
            Tile(128, 4, (Tier(16, 3, 2), Tier(64, 4)), joined=True),
        ),
    ),
    (float("inf"), TilePlan(Tile(64, 8, (Tier(128, 4),), 2), Tile(128, 8, (Tier(128, 4),), 2, joined=True))),
)


@functools.lru_cache(maxsize=4096)
def tile_plan(problem: MoEProblem, num_tokens: int, capability: tuple[int, int] | None = None) -> TilePlan:
    """The plan for ``num_tokens``: a function of the shapes alone, so that a captured graph keeps it."""
    tokens_per_expert = num_tokens * problem.top_k / problem.num_experts
    table = TILES_SM100 if capability is not None and capability[0] >= 10 else TILES_SM90
    plan = next(plan for bound, plan in table if tokens_per_expert <= bound)
    fits = {Specialized.FEW: few_rows.fits, Specialized.MANY: many_rows.fits}
    first, second = (
        kernels if kernels is not None and capability == (9, 0) and fits[kernels](problem)[number] else None
        for number, kernels in enumerate(plan.specialized)
    )
    return TilePlan(
        _fitting(plan.gemm1, problem.hidden_size, problem.intermediate_size, problem.block),
        _fitting(plan.gemm2, problem.intermediate_size, problem.hidden_size, problem.block),
        (first, second),
    )


def _fitting(tile: Tile, inner: int, columns: int, block: int) -> Tile:
    """The tile with its unrolling and width cut down to what divides this problem's sizes."""

    def unroll(wanted: int) -> int:
        return next(u for u in range(wanted, 0, -1) if inner // block % u == 0)

    tiers = tuple(replace(tier, k_unroll=unroll(tier.k_unroll)) for tier in tile.tiers)
    return replace(tile, block_n=tile.block_n if columns % tile.block_n == 0 else block, tiers=tiers)
