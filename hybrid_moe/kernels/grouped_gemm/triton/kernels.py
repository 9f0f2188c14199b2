"""Grouped FP8 block-scale GEMMs in Triton, on the definition's own weight layout.

GEMM1 gathers its rows by token index, computes the gate and the up tile together, applies SwiGLU and quantises the
result to e4m3 with one scale for each row's 128 columns. Where a tile is narrower than that, which is what fills the
GPU when few experts are active, the last program to finish a 128 block quantises it.

Each 128 block of the sum is multiplied in FP8 and promoted to float32 with its two scales.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...launch import let_next_kernel_start, wait_for_previous_kernel
from ...quantize import quantize_block, swiglu_of
from ..completion import all_finished, await_expert, await_signals, draw_ticket, signal


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

    By their descriptor (TMA) no thread computes addresses: a quarter of the registers, and 4.19 instead of 3.9 TB/s on
    an H200. By pointer where the weights don't start at a multiple of 16 bytes.
    """
    if TMA:
        # In shared memory the matrices' rows lie one below the other already: the new shape moves nothing.
        return tl.reshape(weight.load([matrix, row, block * 128]), (MATRICES * ROWS, 128))
    else:
        index = tl.arange(0, MATRICES * ROWS)
        height = (matrix + index // ROWS).to(tl.int64) * HEIGHT + row + index % ROWS
        return tl.load(weight + height[:, None] * INNER + block * 128 + tl.arange(0, 128)[None, :])


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
def zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):
    """The sum of `scaled_product` before its first term."""
    return tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)


@triton.jit
def scaled_product(x, w, row_scale, SWAP: tl.constexpr):
    """``x @ w.T`` with a factor for each row of ``x``; transposed if SWAP.

    The matrix instructions for e4m3 take 64 rows of their first operand and as few as 8 of the other. Fewer than 64
    rows of ``x`` go second; as first operand, Hopper would compute them with its older instructions, which convert e4m3
    to float16 in registers and are bound by that.
    """
    if SWAP:
        return tl.dot(w, tl.trans(x)) * row_scale[None, :]
    else:
        return tl.dot(x, tl.trans(w)) * row_scale[:, None]


@triton.jit
def scaled_pair_product(x, w, row_scale, first_scale, second_scale, ROWS: tl.constexpr, SWAP: tl.constexpr):
    """`scaled_product` with one more factor for the first ROWS rows of ``w`` and another for the ROWS after them."""
    factor = tl.where(tl.arange(0, 2 * ROWS) < ROWS, first_scale, second_scale)
    if SWAP:
        return tl.dot(w, tl.trans(x)) * (factor[:, None] * row_scale[None, :])
    else:
        return tl.dot(x, tl.trans(w)) * (row_scale[:, None] * factor[None, :])


@triton.jit
def gemm1_scales(row_at, up_at, gate_at, block, stride_scale_k, real, K_BLOCKS: tl.constexpr):
    """Scales of the rows, of up and of gate for one 128 block; those of the last one after it."""
    block = tl.minimum(block, K_BLOCKS - 1)
    row = tl.load(row_at + tl.cast(block, tl.int64) * stride_scale_k, mask=real, other=0.0)
    return row, tl.load(up_at + block), tl.load(gate_at + block)


@triton.jit
def gemm2_scales(row_at, left_at, right, block, capacity, real, K_BLOCKS: tl.constexpr):
    """Scales of the rows and of the left and right 128 columns for one 128 block; those of the last one after it."""
    block = tl.minimum(block, K_BLOCKS - 1)
    row = tl.load(row_at + tl.cast(block, tl.int64) * capacity, mask=real, other=0.0)
    return row, tl.load(left_at + block), tl.load(left_at + right + block)


@triton.jit
def store_quantized(value, out_ptr, out_scale_ptr, row, real, block_n, capacity, INTERMEDIATE: tl.constexpr):
    """Quantise one 128 block of the activation and store it with its scales."""
    quantized, scale = quantize_block(value)
    column = block_n * 128 + tl.arange(0, 128)
    tl.store(out_ptr + row[:, None] * INTERMEDIATE + column[None, :], quantized, mask=real[:, None])
    tl.store(out_scale_ptr + block_n.to(tl.int64) * capacity + row, scale, mask=real)


@triton.jit
def gemm1_tile(
    hidden_ptr,
    hidden_scale_ptr,
    weight,
    weight_scale_ptr,
    slot_token_ptr,
    out_ptr,
    out_scale_ptr,
    unquantized_ptr,
    tickets_ptr,
    finished_ptr,
    stride_scale_k,
    stride_scale_t,
    num_tokens,
    capacity,
    at,
    rows,
    rows_before,
    row_tile,
    first_slot,
    tile_n,
    STRIDE_HIDDEN: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    JOINED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    K_UNROLL: tl.constexpr,
    TMA: tl.constexpr,
):
    """One tile of `gemm1_swiglu_kernel`, whose arguments these are; the rest says where the tile lies."""
    BLOCK_K: tl.constexpr = 128
    K_BLOCKS: tl.constexpr = HIDDEN // BLOCK_K
    tl.static_assert(K_BLOCKS % K_UNROLL == 0)
    k = tl.arange(0, BLOCK_K)
    slot = first_slot + tl.arange(0, BLOCK_M)
    real = slot < rows
    # One token's number is 0, and what is masked costs no time.
    unknown = tl.where(num_tokens > 1, rows, 0)
    token = tl.load(slot_token_ptr + at.to(tl.int64) * num_tokens + slot, mask=slot < unknown, other=0)
    hidden_at = hidden_ptr + token.to(tl.int64)[:, None] * STRIDE_HIDDEN + k[None, :]
    hidden_scale_at = hidden_scale_ptr + token.to(tl.int64) * stride_scale_t
    weight_row = tile_n * BLOCK_N
    block_n = weight_row // 128
    first_scale_at = weight_scale_ptr + (at * (2 * INTERMEDIATE // 128) + block_n) * K_BLOCKS
    second_scale_at = first_scale_at + INTERMEDIATE // 128 * K_BLOCKS

    # Of the two halves of the weights, which GATE_FIRST names.
    SWAP: tl.constexpr = BLOCK_M < 64 and BLOCK_N * (2 if JOINED else 1) >= 64
    if JOINED:
        both = zeros(BLOCK_M, 2 * BLOCK_N, SWAP)
    else:
        first = zeros(BLOCK_M, BLOCK_N, SWAP)
        second = zeros(BLOCK_M, BLOCK_N, SWAP)
    # Scales are loaded one block ahead: their latency would stall every promotion.
    next_row, next_first, next_second = gemm1_scales(
        hidden_scale_at, first_scale_at, second_scale_at, 0, stride_scale_k, real, K_BLOCKS
    )
    for step in tl.range(0, K_BLOCKS // K_UNROLL, num_stages=NUM_STAGES):
        for unrolled in tl.static_range(K_UNROLL):
            block = step * K_UNROLL + unrolled
            row_scale, first_scale, second_scale = next_row, next_first, next_second
            next_row, next_first, next_second = gemm1_scales(
                hidden_scale_at, first_scale_at, second_scale_at, block + 1, stride_scale_k, real, K_BLOCKS
            )
            # Weights first: their loads wait for nothing, those of the rows for the tokens' numbers.
            if JOINED:
                w = load_weights(weight, 2 * at, weight_row, block, 2, BLOCK_N, INTERMEDIATE, HIDDEN, TMA)
                x = tl.load(hidden_at + block * BLOCK_K, mask=real[:, None], other=0.0)
                both += scaled_pair_product(x, w, row_scale, first_scale, second_scale, BLOCK_N, SWAP)
            else:
                w_first = load_weights(weight, 2 * at, weight_row, block, 1, BLOCK_N, INTERMEDIATE, HIDDEN, TMA)
                w_second = load_weights(weight, 2 * at + 1, weight_row, block, 1, BLOCK_N, INTERMEDIATE, HIDDEN, TMA)
                x = tl.load(hidden_at + block * BLOCK_K, mask=real[:, None], other=0.0)
                first += scaled_product(x, w_first, row_scale * first_scale, SWAP)
                second += scaled_product(x, w_second, row_scale * second_scale, SWAP)
    if JOINED:
        if SWAP:
            both = tl.trans(both)
        # Columns BLOCK_N apart are one thread's: no value moves.
        first, second = tl.split(tl.permute(tl.reshape(both, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
    elif SWAP:
        first, second = tl.trans(first), tl.trans(second)

    value = swiglu_of(first, second) if GATE_FIRST else swiglu_of(second, first)
    row = (rows_before + slot).to(tl.int64)
    if BLOCK_N == 128:
        store_quantized(value, out_ptr, out_scale_ptr, row, real, block_n, capacity, INTERMEDIATE)
        signal(finished_ptr, at, E)
    else:
        row_at = unquantized_ptr + row[:, None] * INTERMEDIATE
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(row_at + column[None, :], value, mask=real[:, None])
        if draw_ticket(tickets_ptr + row_tile * (INTERMEDIATE // 128) + block_n) == 128 // BLOCK_N - 1:
            # Past the first-level cache, which other multiprocessors' stores don't reach.
            whole_at = row_at + (block_n * 128 + tl.arange(0, 128))[None, :]
            whole = tl.load(whole_at, mask=real[:, None], other=0.0, cache_modifier=".cg")
            store_quantized(whole, out_ptr, out_scale_ptr, row, real, block_n, capacity, INTERMEDIATE)
            signal(finished_ptr, at, E)


@triton.jit(do_not_specialize=["stride_scale_k", "stride_scale_t", "num_tokens", "capacity"])
def gemm1_swiglu_kernel(
    hidden_ptr,  # [T, HIDDEN] e4m3, rows STRIDE_HIDDEN apart
    hidden_scale_ptr,  # [HIDDEN/128, T] float32
    weight,  # [E, 2 * INTERMEDIATE, HIDDEN] e4m3: a descriptor of its rows if TMA, else a pointer
    weight_scale_ptr,  # [E, 2 * INTERMEDIATE/128, HIDDEN/128] float32
    counts_ptr,  # [E] int32
    slot_token_ptr,  # [E, T] int32
    out_ptr,  # [capacity, INTERMEDIATE] e4m3, out
    out_scale_ptr,  # [INTERMEDIATE/128, capacity] float32, out
    unquantized_ptr,  # [capacity, INTERMEDIATE] float32, scratch; not touched if BLOCK_N is 128
    tickets_ptr,  # [row tiles, INTERMEDIATE/128] int32, zeros on entry; not touched if BLOCK_N is 128
    finished_ptr,  # [E + 1] int32, zeros on entry: a signal for each row tile's 128 block of the activation
    stride_scale_k,
    stride_scale_t,
    num_tokens,
    capacity,
    STRIDE_HIDDEN: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    JOINED: tl.constexpr,
    TIERS: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: any number of programs; they share the tiles of BLOCK_M rows by BLOCK_N gate and up columns.

    JOINED computes gate and up by one product. TIERS are tuples (rows above which, rows of the tile, stages, unroll): a
    tile takes the one that what is left of its expert's rows falls into, all from BLOCK_M on the last.
    """
    tl.static_assert(128 % BLOCK_N == 0)
    TILES_N: tl.constexpr = INTERMEDIATE // BLOCK_N
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)

    expert = tl.arange(0, E_POW2)
    count = tl.load(counts_ptr + expert, mask=expert < E, other=0)
    num_tiles = tl.sum(tl.cdiv(count, BLOCK_M), axis=0) * TILES_N
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        at, rows, rows_before, tiles_before, tile_m, tile_n = locate_tile(tile, count, expert, TILES_N, BLOCK_M)
        first_slot = tile_m * BLOCK_M
        left = tl.minimum(rows - first_slot, BLOCK_M)
        for tier in tl.static_range(len(TIERS)):
            if left > TIERS[tier][0] and left <= TIERS[tier][1]:
                gemm1_tile(
                    hidden_ptr, hidden_scale_ptr, weight, weight_scale_ptr, slot_token_ptr, out_ptr, out_scale_ptr,
                    unquantized_ptr, tickets_ptr, finished_ptr, stride_scale_k, stride_scale_t, num_tokens, capacity,
                    at, rows, rows_before, tiles_before + tile_m, first_slot, tile_n,
                    STRIDE_HIDDEN, HIDDEN, INTERMEDIATE, GATE_FIRST, E, TIERS[tier][1], BLOCK_N, JOINED,
                    TIERS[tier][2], TIERS[tier][3], TMA,
                )  # fmt: skip


@triton.jit
def gemm2_tile(
    activated_ptr,
    activated_scale_ptr,
    weight,
    weight_scale_ptr,
    out_ptr,
    first_column,
    capacity,
    at,
    rows,
    rows_before,
    first_slot,
    tile_n,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    JOINED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    K_UNROLL: tl.constexpr,
    TMA: tl.constexpr,
):
    """One tile of `gemm2_kernel`, whose arguments these are; the rest says where the tile lies."""
    BLOCK_K: tl.constexpr = 128
    K_BLOCKS: tl.constexpr = INTERMEDIATE // BLOCK_K
    WIDTH: tl.constexpr = BLOCK_N if JOINED else BLOCK_N // 2
    tl.static_assert(128 % WIDTH == 0)
    tl.static_assert(K_BLOCKS % K_UNROLL == 0)
    k = tl.arange(0, BLOCK_K)
    slot = first_slot + tl.arange(0, BLOCK_M)
    real = slot < rows
    row = (rows_before + slot).to(tl.int64)
    activated_at = activated_ptr + row[:, None] * INTERMEDIATE + k[None, :]
    activated_scale_at = activated_scale_ptr + row
    weight_row = first_column + tile_n * BLOCK_N
    scale_at = weight_scale_ptr + (at * (HIDDEN // 128) + weight_row // 128) * K_BLOCKS

    SWAP: tl.constexpr = BLOCK_M < 64 and WIDTH >= 64
    total = zeros(BLOCK_M, WIDTH, SWAP)
    # Where the right half's scales are from the left's: in the same row of them unless each half has a 128 block.
    scales = 0 if WIDTH < 128 or JOINED else K_BLOCKS
    if not JOINED:
        right = zeros(BLOCK_M, WIDTH, SWAP)
    next_row, next_left, next_right = gemm2_scales(activated_scale_at, scale_at, scales, 0, capacity, real, K_BLOCKS)
    for step in tl.range(0, K_BLOCKS // K_UNROLL, num_stages=NUM_STAGES):
        for unrolled in tl.static_range(K_UNROLL):
            block = step * K_UNROLL + unrolled
            row_scale, scale, right_scale = next_row, next_left, next_right
            next_row, next_left, next_right = gemm2_scales(
                activated_scale_at, scale_at, scales, block + 1, capacity, real, K_BLOCKS
            )
            x = tl.load(activated_at + block * BLOCK_K, mask=real[:, None], other=0.0)
            w = load_weights(weight, at, weight_row, block, 1, WIDTH, HIDDEN, INTERMEDIATE, TMA)
            total += scaled_product(x, w, row_scale * scale, SWAP)
            if not JOINED:
                w_right = load_weights(weight, at, weight_row + WIDTH, block, 1, WIDTH, HIDDEN, INTERMEDIATE, TMA)
                right += scaled_product(x, w_right, row_scale * right_scale, SWAP)
    if SWAP:
        total = tl.trans(total)
        if not JOINED:
            right = tl.trans(right)

    out_at = out_ptr + row[:, None] * COLUMNS + (tile_n * BLOCK_N + tl.arange(0, WIDTH))[None, :]
    tl.store(out_at, total.to(tl.bfloat16), mask=real[:, None])
    if not JOINED:
        tl.store(out_at + WIDTH, right.to(tl.bfloat16), mask=real[:, None])


@triton.jit(do_not_specialize=["first_column", "capacity"])
def gemm2_kernel(
    activated_ptr,  # [capacity, INTERMEDIATE] e4m3
    activated_scale_ptr,  # [INTERMEDIATE/128, capacity] float32
    weight,  # [E, HIDDEN, INTERMEDIATE] e4m3: a descriptor of its rows if TMA, else a pointer
    weight_ptr,  # the same by pointer
    weight_scale_ptr,  # [E, HIDDEN/128, INTERMEDIATE/128] float32
    counts_ptr,  # [E] int32
    finished_ptr,  # [E + 1] int32: GEMM1's signals, see `finished`
    out_ptr,  # [capacity, COLUMNS] bfloat16, out: columns first_column... of the result
    first_column,
    capacity,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    COLUMNS: tl.constexpr,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    JOINED: tl.constexpr,
    TIERS: tl.constexpr,
    FIRST_M: tl.constexpr,
    SIGNALS: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: any number of programs; they share the tiles of BLOCK_M rows by BLOCK_N columns.

    JOINED computes the tile by one product, otherwise its left and right half by one each: of 256 columns each half has
    its own weight scale, and they share the rows, which saves a quarter of the traffic from L2. TIERS are as in
    `gemm1_swiglu_kernel`. GEMM1, with row tiles of FIRST_M and SIGNALS for each of them, may still run.
    """
    TILES_N: tl.constexpr = COLUMNS // BLOCK_N
    tl.static_assert(COLUMNS % BLOCK_N == 0)
    let_next_kernel_start(PDL)

    expert = tl.arange(0, E_POW2)
    # The routing is through, as GEMM1 has waited for it. Not from the first-level cache, which may hold older counts.
    count = tl.load(counts_ptr + expert, mask=expert < E, other=0, cache_modifier=".cg")
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
                # By when half of a row tile is through, GEMM1 leaves some of the memory's time to this kernel.
                await_signals(finished_ptr, at, SIGNALS // 2)
                PREFETCHED: tl.constexpr = min(TIERS[0][2] * TIERS[0][3] * 128, INTERMEDIATE)
                prefetch_rows(
                    weight_ptr, at * HIDDEN + first_column + tile_n * BLOCK_N, BLOCK_N, INTERMEDIATE, PREFETCHED
                )
            await_expert(finished_ptr, at, rows, FIRST_M, SIGNALS)
        for tier in tl.static_range(len(TIERS)):
            if left > TIERS[tier][0] and left <= TIERS[tier][1]:
                gemm2_tile(
                    activated_ptr, activated_scale_ptr, weight, weight_scale_ptr, out_ptr, first_column, capacity,
                    at, rows, rows_before, first_slot, tile_n,
                    HIDDEN, INTERMEDIATE, COLUMNS, TIERS[tier][1], BLOCK_N, JOINED, TIERS[tier][2], TIERS[tier][3], TMA,
                )  # fmt: skip
    # The end of this kernel has to mean the end of GEMM1: what comes next may clear the counters of both.
    wait_for_previous_kernel(PDL)
