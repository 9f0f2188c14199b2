"""What both plain Triton GEMMs share: tiles by number, loads of weights, and products with their scales.

Each 128 block of the sum is multiplied in FP8 and promoted to float32 with its two scales.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....problem import MoEProblem
from ...launcher import DeviceLimits
from ...plan import LaunchKey
from ...steps import Operand, Tiles
from ..tiles import Tile


@triton.jit
def locate_tile(tile, count, expert, TILES_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert, row tile and column tile of a tile's number.

    The tiles of one expert follow one another, its row tiles fastest: those share their weights, which come from L2.
    ``count`` and ``expert`` are the vectors of rows per expert and 0, 1, 2...

    Returns expert, rows of that expert, rows of all experts before it, row tiles of all experts before it, row tile,
    column tile.
    """
    row_tiles = tl.cdiv(count, BLOCK_M)
    ends = tl.cumsum(row_tiles, axis=0) * TILES_N
    at = tl.sum((ends <= tile).to(tl.int32), axis=0)
    rows = tl.sum(tl.where(expert == at, count, 0), axis=0)
    rows_before = tl.sum(tl.where(expert < at, count, 0), axis=0)
    tiles_before = tl.sum(tl.where(expert < at, row_tiles, 0), axis=0)
    inside = tile - tiles_before * TILES_N
    my_tiles = tl.cdiv(rows, BLOCK_M)
    return at, rows, rows_before, tiles_before, inside % my_tiles, inside // my_tiles


@triton.jit
def load_weights(
    weight,
    matrix,
    row,
    block,
    MATRICES: tl.constexpr,
    ROWS: tl.constexpr,
    HEIGHT: tl.constexpr,
    INNER: tl.constexpr,
    TMA: tl.constexpr,
):
    """One 128 block of ROWS rows of each of MATRICES neighbours, one below the other; a matrix is ``[HEIGHT, INNER]``.

    By TMA no thread computes addresses: a quarter of the registers, and 4.19 instead of 3.9 TB/s on an H200. By pointer
    where the weights don't start at a multiple of 16 bytes.
    """
    if TMA:
        # The reshape moves nothing: in shared memory the matrices are contiguous.
        return tl.reshape(weight.load([matrix, row, block * 128]), (MATRICES * ROWS, 128))
    else:
        index = tl.arange(0, MATRICES * ROWS)
        height = (matrix + index // ROWS).to(tl.int64) * HEIGHT + row + index % ROWS
        return tl.load(weight + height[:, None] * INNER + block * 128 + tl.arange(0, 128)[None, :])


@triton.jit
def zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP_AB: tl.constexpr):
    """The sum of `scaled_product` before its first term."""
    return tl.zeros((BLOCK_N, BLOCK_M) if SWAP_AB else (BLOCK_M, BLOCK_N), tl.float32)


@triton.jit
def scaled_product(x, w, row_scale, SWAP_AB: tl.constexpr):
    """``x @ w.T`` with a factor for each row of ``x``; transposed if SWAP_AB.

    The matrix instructions for e4m3 take 64 rows of their first operand and as few as 8 of the other. Fewer than 64
    rows of ``x`` go second: as first operand Hopper would use mma.sync, bound by converting e4m3 to float16.
    """
    if SWAP_AB:
        return tl.dot(w, tl.trans(x)) * row_scale[None, :]
    else:
        return tl.dot(x, tl.trans(w)) * row_scale[:, None]


def weights_operand(
    name: str, problem: MoEProblem, key: LaunchKey, shape: tuple[int, int], parts: int, box_parts: int, box_rows: int
) -> Operand:
    """Each expert's weights as ``parts`` matrices of ``shape``, in tiles; the tensor itself where TMA can't read.

    A tile is ``box_rows`` rows by 128 columns of each of ``box_parts`` neighbouring parts.
    """
    return Tiles(name, problem.num_local_experts * parts, *shape, box_parts, box_rows) if key.aligned else name


def bucket_constants(tile: Tile) -> tuple[tuple[int, int, int, int], ...]:
    """Each M bucket as the kernels want it: the rows above which and up to which it is taken, stages, unrolling."""
    above = (0, *(bucket.block_m for bucket in tile.m_buckets))
    return tuple((low, b.block_m, b.num_stages, b.k_unroll) for low, b in zip(above, tile.m_buckets, strict=False))


def options(limits: DeviceLimits, tile: Tile) -> dict[str, int | bool]:
    """Launch options."""
    registers = {} if tile.max_registers is None else {"maxnreg": tile.max_registers}
    return {**limits.options, "num_warps": tile.num_warps, **registers}
