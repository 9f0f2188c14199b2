"""GEMM2 in plain Triton: the activation's rows lie side by side, and an expert starts once GEMM1 has finished it."""

import functools

import triton
import triton.language as tl

from ....problem import MoEProblem
from ...aggregate import aggregate
from ...launcher import Constants, DeviceLimits, Kernel
from ...pdl import let_next_kernel_start, wait_for_previous_kernel
from ...plan import LaunchKey
from ...shapes import max_local_rows, max_row_tiles, pow2
from ...steps import Step
from ..completion import Signals, all_finished, await_expert, await_signals
from ..tiles import Tile
from .common import bucket_constants, load_weights, locate_tile, options, scaled_product, weights_operand, zeros


@aggregate
class Gemm2:
    """Arguments of `gemm2_kernel` that its tiles use."""

    activated_ptr: tl.tensor
    activated_scale_ptr: tl.tensor
    weight: tl.core.base_value  # a descriptor or a pointer
    weight_scale_ptr: tl.tensor
    out_ptr: tl.tensor
    first_column: tl.tensor
    max_rows: tl.tensor
    HIDDEN: tl.constexpr
    INTERMEDIATE: tl.constexpr
    COLUMNS: tl.constexpr
    BLOCK_N: tl.constexpr
    FUSE_HALVES: tl.constexpr
    TMA: tl.constexpr


@triton.jit
def prefetch_rows(weight_ptr, first_row, ROWS: tl.constexpr, INNER: tl.constexpr, BYTES: tl.constexpr):
    """Bring the first BYTES of so many rows of ``[rows, INNER]`` e4m3 weights into L2."""
    row = first_row + tl.arange(0, ROWS)
    at = (weight_ptr + row.to(tl.int64) * INNER).to(tl.int64)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // dummy $0",
        "=r,l,r",
        [at, tl.full((ROWS,), BYTES, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_scales(row_at, left_at, right, block, max_rows, real, K_BLOCKS: tl.constexpr):
    """Scales of the rows and of the left and right 128 columns for a 128 block; those of the last one after it."""
    block = tl.minimum(block, K_BLOCKS - 1)
    row = tl.load(row_at + tl.cast(block, tl.int64) * max_rows, mask=real, other=0.0)
    return row, tl.load(left_at + block), tl.load(left_at + right + block)


@triton.jit
def gemm2_tile(
    p, expert, rows, rows_before, first_slot, tile_n, BLOCK_M: tl.constexpr, NUM_STAGES: tl.constexpr,
    K_UNROLL: tl.constexpr,
):  # fmt: skip
    """One tile of an expert with so many ``rows``."""
    BLOCK_K: tl.constexpr = 128
    K_BLOCKS: tl.constexpr = p.INTERMEDIATE // BLOCK_K
    WIDTH: tl.constexpr = p.BLOCK_N if p.FUSE_HALVES else p.BLOCK_N // 2
    tl.static_assert(128 % WIDTH == 0)
    tl.static_assert(K_BLOCKS % K_UNROLL == 0)
    k = tl.arange(0, BLOCK_K)
    slot = first_slot + tl.arange(0, BLOCK_M)
    real = slot < rows
    row = (rows_before + slot).to(tl.int64)
    activated_at = p.activated_ptr + row[:, None] * p.INTERMEDIATE + k[None, :]
    activated_scale_at = p.activated_scale_ptr + row
    weight_row = p.first_column + tile_n * p.BLOCK_N
    scale_at = p.weight_scale_ptr + (expert * (p.HIDDEN // 128) + weight_row // 128) * K_BLOCKS

    SWAP_AB: tl.constexpr = BLOCK_M < 64 and WIDTH >= 64
    total = zeros(BLOCK_M, WIDTH, SWAP_AB)
    # From the left half's scales to the right's: 0 where both are of one 128 block.
    scales = 0 if WIDTH < 128 or p.FUSE_HALVES else K_BLOCKS
    if not p.FUSE_HALVES:
        right = zeros(BLOCK_M, WIDTH, SWAP_AB)
    next_row, next_left, next_right = load_scales(activated_scale_at, scale_at, scales, 0, p.max_rows, real, K_BLOCKS)
    for step in tl.range(0, K_BLOCKS // K_UNROLL, num_stages=NUM_STAGES):
        for unrolled in tl.static_range(K_UNROLL):
            block = step * K_UNROLL + unrolled
            row_scale, scale, right_scale = next_row, next_left, next_right
            next_row, next_left, next_right = load_scales(
                activated_scale_at, scale_at, scales, block + 1, p.max_rows, real, K_BLOCKS
            )
            x = tl.load(activated_at + block * BLOCK_K, mask=real[:, None], other=0.0)
            w = load_weights(p.weight, expert, weight_row, block, 1, WIDTH, p.HIDDEN, p.INTERMEDIATE, p.TMA)
            total += scaled_product(x, w, row_scale * scale, SWAP_AB)
            if not p.FUSE_HALVES:
                w_right = load_weights(
                    p.weight, expert, weight_row + WIDTH, block, 1, WIDTH, p.HIDDEN, p.INTERMEDIATE, p.TMA
                )
                right += scaled_product(x, w_right, row_scale * right_scale, SWAP_AB)
    if SWAP_AB:
        total = tl.trans(total)
        if not p.FUSE_HALVES:
            right = tl.trans(right)

    out_at = p.out_ptr + row[:, None] * p.COLUMNS + (tile_n * p.BLOCK_N + tl.arange(0, WIDTH))[None, :]
    tl.store(out_at, total.to(tl.bfloat16), mask=real[:, None])
    if not p.FUSE_HALVES:
        tl.store(out_at + WIDTH, right.to(tl.bfloat16), mask=real[:, None])


@triton.jit(do_not_specialize=["first_column", "max_rows"])
def gemm2_kernel(
    activated_ptr,  # [max_rows, INTERMEDIATE] e4m3
    activated_scale_ptr,  # [INTERMEDIATE/128, max_rows] float32
    weight,  # [E, HIDDEN, INTERMEDIATE] e4m3: a descriptor of its rows if TMA, else a pointer
    weight_ptr,  # the same by pointer
    weight_scale_ptr,  # [E, HIDDEN/128, INTERMEDIATE/128] float32
    tokens_per_expert_ptr,  # [E] int32
    finished_ptr,  # [E + 1] int32: GEMM1's signals, see `completion`
    out_ptr,  # [max_rows, COLUMNS] bfloat16, out: columns first_column... of the result
    first_column,
    max_rows,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    COLUMNS: tl.constexpr,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FUSE_HALVES: tl.constexpr,
    M_BUCKETS: tl.constexpr,
    FIRST_M: tl.constexpr,
    SIGNALS: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: any number of programs; they share the tiles of BLOCK_M rows by BLOCK_N columns.

    FUSE_HALVES computes the tile by one product, otherwise its left and right half by one each: of 256 columns each
    half has its own weight scale, and they share the rows, which saves a quarter of the traffic from L2. M_BUCKETS are
    as in `gemm1_swiglu_kernel`. GEMM1, with row tiles of FIRST_M and SIGNALS for each of them, may still run.
    """
    TILES_N: tl.constexpr = COLUMNS // BLOCK_N
    tl.static_assert(COLUMNS % BLOCK_N == 0)
    let_next_kernel_start(PDL)
    p = Gemm2(
        activated_ptr=activated_ptr, activated_scale_ptr=activated_scale_ptr, weight=weight,
        weight_scale_ptr=weight_scale_ptr, out_ptr=out_ptr, first_column=first_column, max_rows=max_rows,
        HIDDEN=HIDDEN, INTERMEDIATE=INTERMEDIATE, COLUMNS=COLUMNS, BLOCK_N=BLOCK_N, FUSE_HALVES=FUSE_HALVES,
        TMA=TMA,
    )  # fmt: skip
    expert = tl.arange(0, E_POW2)
    # GEMM1 has waited for the routing, but L1 may hold older counts.
    count = tl.load(tokens_per_expert_ptr + expert, mask=expert < E, other=0, cache_modifier=".cg")
    through = all_finished(finished_ptr, count, FIRST_M, SIGNALS, E)
    if through:
        wait_for_previous_kernel(PDL)
    num_tiles = tl.sum(tl.cdiv(count, BLOCK_M), axis=0) * TILES_N
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        at, rows, rows_before, tiles_before, tile_m, tile_n = locate_tile(tile, count, expert, TILES_N, BLOCK_M)
        first_slot = tile_m * BLOCK_M
        left = tl.minimum(rows - first_slot, BLOCK_M)
        if not through:
            if TMA:
                # Once half of a row tile is finished, GEMM1 leaves memory bandwidth to spare.
                await_signals(finished_ptr, at, SIGNALS // 2)
                PREFETCHED: tl.constexpr = min(M_BUCKETS[0][2] * M_BUCKETS[0][3] * 128, INTERMEDIATE)
                prefetch_rows(
                    weight_ptr, at * HIDDEN + first_column + tile_n * BLOCK_N, BLOCK_N, INTERMEDIATE, PREFETCHED
                )
            await_expert(finished_ptr, at, rows, FIRST_M, SIGNALS)
        for b in tl.static_range(len(M_BUCKETS)):
            if left > M_BUCKETS[b][0] and left <= M_BUCKETS[b][1]:
                gemm2_tile(
                    p, at, rows, rows_before, first_slot, tile_n, M_BUCKETS[b][1], M_BUCKETS[b][2], M_BUCKETS[b][3]
                )
    # GEMM1 has to end before this kernel does: the next one may clear the counters of both.
    wait_for_previous_kernel(PDL)


GEMM2 = Kernel(gemm2_kernel)


def gemm2(
    problem: MoEProblem,
    limits: DeviceLimits,
    key: LaunchKey,
    tile: Tile,
    columns: int,
    first_column: int,
    signals: Signals,
) -> Step:
    """Columns ``[first_column, first_column + columns)`` of the second GEMM into ``rows`` bfloat16.

    ``signals`` are those of the step that computed the activation.
    """
    block_n = tile.block_n if columns % tile.block_n == 0 else problem.block
    tiles = max_row_tiles(problem, key.num_tokens, tile.block_m) * (columns // block_n)
    box_rows = block_n if tile.fused else block_n // 2
    shape = (problem.hidden_size, problem.intermediate_size)
    operands = (
        "activated",
        "activated_scale",
        weights_operand("gemm2_weights", problem, key, shape, 1, 1, box_rows),
        "gemm2_weights",
        "gemm2_weights_scale",
        "tokens_per_expert",
        "finished",
        "rows",
        first_column,
        max_local_rows(problem, key.num_tokens),
    )
    grid = (min(tiles, limits.num_sms * tile.programs_per_sm),)
    return Step(GEMM2, grid, operands, _constants(problem, limits, tile, columns, block_n, key.aligned, signals))


@functools.lru_cache(maxsize=256)
def _constants(
    problem: MoEProblem, limits: DeviceLimits, tile: Tile, columns: int, block_n: int, tma: bool, signals: Signals
) -> Constants:
    arguments = {
        "HIDDEN": problem.hidden_size,
        "INTERMEDIATE": problem.intermediate_size,
        "COLUMNS": columns,
        "E": problem.num_local_experts,
        "E_POW2": pow2(problem.num_local_experts),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": block_n,
        "FUSE_HALVES": tile.fused,
        "M_BUCKETS": bucket_constants(tile),
        "FIRST_M": signals.block_m,
        "SIGNALS": signals.per_row_tile,
        "TMA": tma,
        "PDL": limits.pdl,
    }
    return Constants(arguments, options(limits, tile))
