"""Which tiles the Triton grouped GEMMs use, by the expected rows of an expert."""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass, replace

from ...problem import MoEProblem
from .sm90 import many_rows, narrow, one_token
from .sm90.share import ALL, Share


@dataclass(frozen=True, slots=True)
class MBucket:
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
    m_buckets
        By rows. An expert's rows are cut by the last; what is left of them for a tile takes the first bucket that holds
        it. They are known on the device alone. All buckets share one kernel, whose registers and shared memory are the
        most that any of them needs.
    programs_per_sm
        Grid bound: programs share the tiles, so more of them than are resident only add start-up work.
    fused
        One product computes both halves of a tile's columns (GEMM1: gate and up), instead of two that wait for one
        another and need fewer registers at a time.
    max_registers
        Of a thread, so that more programs fit; None for what the compiler finds best.
    """

    block_n: int
    num_warps: int
    m_buckets: tuple[MBucket, ...]
    programs_per_sm: int = 7
    fused: bool = False
    max_registers: int | None = None

    def __post_init__(self) -> None:
        rows = [bucket.block_m for bucket in self.m_buckets]
        if not rows or rows != sorted(set(rows)):
            raise ValueError(f"m_buckets: expected one or more, each with more rows than the one before, got {rows}")

    @property
    def block_m(self) -> int:
        """Rows of a full tile."""
        return self.m_buckets[-1].block_m


class Specialized(enum.Enum):
    """Kernels of one architecture alone, by the rows that they are for."""

    FEW = enum.auto()  # `sm90.few_rows`
    MANY = enum.auto()  # `sm90.many_rows`
    NARROW = enum.auto()  # `sm90.narrow`: GEMM2 alone, of narrow experts with few rows


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Tiles of both GEMMs.

    Parameters
    ----------
    gemm1, gemm2
        Of the plain Triton kernels.
    specialized
        What GEMM1 and GEMM2 are instead, if anything. The tiles are then for what those kernels can't read, as inputs
        that don't start at multiples of 16 bytes.
    many_above
        Experts that more than this share of the tokens have chosen take `Specialized.MANY` all the same if they have
        rows enough together, in a pair of launches before the others', which has nothing to do if routing is even.
        None: there is no such pair.
    """

    gemm1: Tile
    gemm2: Tile
    specialized: tuple[Specialized | None, Specialized | None] = (None, None)
    many_above: float | None = None

    def pairs(self, num_tokens: int) -> tuple[tuple[Share, Specialized | None, Specialized | None], ...]:
        """Which experts take which kernels for GEMM1 and GEMM2, in the order of their launches."""
        if self.many_above is None:
            return ((ALL, *self.specialized),)
        rows = int(num_tokens * self.many_above)
        many = Share(rows, busy=True, suffix="_many"), Specialized.MANY, Specialized.MANY
        return many, (Share(rows), *self.specialized)


_16_X4_PAIRS, _16_X3_PAIRS = MBucket(16, num_stages=4, k_unroll=2), MBucket(16, num_stages=3, k_unroll=2)
_16_X3, _16_X4 = MBucket(16, num_stages=3), MBucket(16, num_stages=4)
_64_X3, _64_X4 = MBucket(64, num_stages=3), MBucket(64, num_stages=4)
_128_X3, _128_X4 = MBucket(128, num_stages=3), MBucket(128, num_stages=4)

_FUSED_GEMM1 = Tile(block_n=64, num_warps=4, m_buckets=(_16_X4_PAIRS, _64_X4), fused=True)
_FUSED_GEMM2 = Tile(block_n=128, num_warps=4, m_buckets=(_16_X3_PAIRS, _64_X4), fused=True)
# (up to so many tokens for each expert of the model if routing is even, plan). Measured on H100, see
# benchmarks/NOTES.md.
TILES_SM90: tuple[tuple[float, TilePlan], ...] = (
    # Few experts are active: narrow tiles, one for each SM.
    (
        0.5,
        TilePlan(
            gemm1=Tile(block_n=32, num_warps=4, m_buckets=(_16_X4_PAIRS,), fused=True),
            gemm2=Tile(block_n=64, num_warps=4, m_buckets=(_16_X3_PAIRS,), fused=True),
            specialized=(Specialized.FEW, Specialized.FEW),
        ),
    ),
    (
        2.5,
        TilePlan(
            gemm1=Tile(block_n=32, num_warps=4, m_buckets=(_16_X4_PAIRS, _64_X4), fused=True),
            gemm2=_FUSED_GEMM2,
            specialized=(Specialized.FEW, Specialized.FEW),
        ),
    ),
    # Most tokens may still choose the same few experts.
    (
        6.5,
        TilePlan(
            gemm1=_FUSED_GEMM1,
            gemm2=_FUSED_GEMM2,
            specialized=(Specialized.FEW, Specialized.FEW),
            many_above=0.75,
        ),
    ),
    (
        float("inf"),
        TilePlan(
            gemm1=Tile(block_n=128, num_warps=4, m_buckets=(_64_X3,), programs_per_sm=4),
            gemm2=Tile(block_n=256, num_warps=8, m_buckets=(_128_X3,), programs_per_sm=4),
            specialized=(Specialized.MANY, Specialized.MANY),
        ),
    ),
)
# The same for the intermediate sizes that `sm90.narrow` takes.
TILES_SM90_NARROW: tuple[tuple[float, TilePlan], ...] = (
    (0.5, replace(TILES_SM90[0][1], specialized=(Specialized.FEW, Specialized.NARROW))),
    (16.0, replace(TILES_SM90[1][1], specialized=(Specialized.FEW, Specialized.NARROW))),
    TILES_SM90[-1],
)
# Never measured: tiles that compile for sm_100a without spills, by tcgen05 where there are rows enough.
TILES_SM100: tuple[tuple[float, TilePlan], ...] = (
    (
        0.5,
        TilePlan(
            gemm1=Tile(block_n=64, num_warps=4, m_buckets=(_16_X4,)),
            gemm2=Tile(block_n=128, num_warps=4, m_buckets=(_16_X3_PAIRS,), fused=True),
        ),
    ),
    (
        80.0,
        TilePlan(
            gemm1=Tile(block_n=64, num_warps=4, m_buckets=(_16_X3_PAIRS, _64_X4), fused=True),
            gemm2=_FUSED_GEMM2,
        ),
    ),
    (
        float("inf"),
        TilePlan(
            gemm1=Tile(block_n=64, num_warps=8, m_buckets=(_128_X4,), programs_per_sm=2),
            gemm2=Tile(block_n=128, num_warps=8, m_buckets=(_128_X4,), programs_per_sm=2, fused=True),
        ),
    ),
)

# Never run there: tiles within the 99 KB of shared memory of Ada (8.9) and of Blackwell's workstations (12.0, 12.1).
TILES_99_KB: tuple[tuple[float, TilePlan], ...] = (
    (
        0.5,
        TilePlan(
            gemm1=Tile(block_n=64, num_warps=4, m_buckets=(_16_X4,)),
            gemm2=Tile(block_n=128, num_warps=4, m_buckets=(_16_X3_PAIRS,), fused=True),
        ),
    ),
    (
        float("inf"),
        TilePlan(
            gemm1=Tile(block_n=64, num_warps=8, m_buckets=(_16_X3, _64_X3), programs_per_sm=2, fused=True),
            gemm2=Tile(block_n=128, num_warps=8, m_buckets=(_16_X4, _64_X4), fused=True),
        ),
    ),
)


@functools.lru_cache(maxsize=4096)
def tile_plan(problem: MoEProblem, num_tokens: int, capability: tuple[int, int] | None = None) -> TilePlan:
    """The plan for ``num_tokens``: a function of the shapes alone, so that a captured graph keeps it."""
    tokens_per_expert = num_tokens * problem.top_k / problem.num_experts
    if capability is not None and capability[0] in (8, 12):
        table = TILES_99_KB
    elif capability is not None and capability[0] >= 10:
        table = TILES_SM100
    else:
        table = TILES_SM90_NARROW if capability == (9, 0) and narrow.fits(problem) else TILES_SM90
    plan = next(plan for bound, plan in table if tokens_per_expert <= bound)
    first, second = plan.specialized if capability == (9, 0) else (None, None)
    # One token has fewer of the units of `narrow` than there are programs.
    if second is Specialized.NARROW and num_tokens == 1:
        second = None
    if second is Specialized.MANY and not many_rows.fits(problem):
        second = None
    return TilePlan(
        _fitting(plan.gemm1, problem.hidden_size, problem.intermediate_size, problem.block),
        _fitting(plan.gemm2, problem.intermediate_size, problem.hidden_size, problem.block),
        (first, second),
        plan.many_above if None not in (first, second) and many_rows.fits(problem) else None,
    )


def describe(problem: MoEProblem, num_tokens: int, capability: tuple[int, int] | None) -> str:
    """For people: the modules of both GEMMs' kernels, and what decides it."""
    if one_token.fits(problem, num_tokens, capability):
        return "both GEMMs sm90/one_token.py, for one token"
    plan = tile_plan(problem, num_tokens, capability)
    names = {
        Specialized.FEW: "sm90/few_rows.py",
        Specialized.MANY: "sm90/many_rows.py",
        Specialized.NARROW: "sm90/narrow.py",
    }
    gemms = []
    for number, (kernels, tile) in enumerate(zip(plan.specialized, (plan.gemm1, plan.gemm2), strict=True), start=1):
        rows = " or ".join(str(bucket.block_m) for bucket in tile.m_buckets)
        of = names[kernels] if kernels is not None else f"triton/gemm{number}.py, tiles of {rows} rows"
        gemms.append(f"GEMM{number} {of}")
    tokens_per_expert = num_tokens * problem.top_k / problem.num_experts
    if plan.many_above is not None:
        gemms.append(f"sm90/many_rows.py for experts that more than {plan.many_above:.0%} of the tokens choose")
    return f"{', '.join(gemms)}, for {tokens_per_expert:.3g} rows of an expert if routing is even"


def _fitting(tile: Tile, inner: int, columns: int, block: int) -> Tile:
    """The tile with its unrolling and width cut down to what divides this problem's sizes."""

    def unroll(wanted: int) -> int:
        return next(u for u in range(wanted, 0, -1) if inner // block % u == 0)

    m_buckets = tuple(replace(bucket, k_unroll=unroll(bucket.k_unroll)) for bucket in tile.m_buckets)
    return replace(tile, block_n=tile.block_n if columns % tile.block_n == 0 else block, m_buckets=m_buckets)
