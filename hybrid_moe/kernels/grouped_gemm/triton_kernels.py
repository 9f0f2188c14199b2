"""Grouped FP8 block-scale GEMMs in Triton, on the definition's own weight layout.

GEMM1 gathers its rows by token index, computes the gate and the up tile together, applies SwiGLU and quantises the
result to e4m3 with one scale for each row's 128 columns. Where a tile is narrower than that, which is what fills the
GPU when few experts are active, the last program to finish a 128 block quantises it.

Each 128 block of the sum is multiplied in FP8 and promoted to float32 with its two scales.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import let_next_kernel_start, wait_for_previous_kernel
from ..quantize import quantize_block, swiglu_of


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
def load_weights(weight, row, block, ROWS: tl.constexpr, INNER: tl.constexpr, TMA: tl.constexpr):
    """ROWS rows of one 128 block of a weight matrix ``[all experts' rows, INNER]``.

    By its descriptor (TMA) no thread computes addresses: a quarter of the registers, and 4.19 instead of 3.9 TB/s on an
    H200. By pointer where the weights don't start at a multiple of 16 bytes.
    """
    if TMA:
        return weight.load([row, block * 128])
    else:
        at = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None] * INNER + block * 128 + tl.arange(0, 128)[None, :]
        return tl.load(weight + at)


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
    stride_scale_k,
    stride_scale_t,
    num_tokens,
    capacity,
    at,
    rows,
    rows_before,
    tiles_before,
    tile_m,
    tile_n,
    STRIDE_HIDDEN: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    K_UNROLL: tl.constexpr,
    TMA: tl.constexpr,
):
    """One tile of `gemm1_swiglu_kernel`, whose arguments these are; the rest says where the tile lies."""
    BLOCK_K: tl.constexpr = 128
    K_BLOCKS: tl.constexpr = HIDDEN // BLOCK_K
    UP: tl.constexpr = INTERMEDIATE if GATE_FIRST else 0
    GATE: tl.constexpr = 0 if GATE_FIRST else INTERMEDIATE
    tl.static_assert(K_BLOCKS % K_UNROLL == 0)
    k = tl.arange(0, BLOCK_K)
    slot = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    real = slot < rows
    token = tl.load(slot_token_ptr + at.to(tl.int64) * num_tokens + slot, mask=real, other=0)
    hidden_at = hidden_ptr + token.to(tl.int64)[:, None] * STRIDE_HIDDEN + k[None, :]
    hidden_scale_at = hidden_scale_ptr + token.to(tl.int64) * stride_scale_t
    weight_row = at * (2 * INTERMEDIATE) + tile_n * BLOCK_N
    block_n = tile_n * BLOCK_N // 128
    scale_at = weight_scale_ptr + (at * (2 * INTERMEDIATE // 128) + block_n) * K_BLOCKS
    up_scale_at = scale_at + UP // 128 * K_BLOCKS
    gate_scale_at = scale_at + GATE // 128 * K_BLOCKS

    SWAP: tl.constexpr = BLOCK_M < 64 and BLOCK_N >= 64
    up = zeros(BLOCK_M, BLOCK_N, SWAP)
    gate = zeros(BLOCK_M, BLOCK_N, SWAP)
    # Scales are loaded one block ahead: their latency would stall every promotion.
    next_row, next_up, next_gate = gemm1_scales(
        hidden_scale_at, up_scale_at, gate_scale_at, 0, stride_scale_k, real, K_BLOCKS
    )
    for step in tl.range(0, K_BLOCKS // K_UNROLL, num_stages=NUM_STAGES):
        for unrolled in tl.static_range(K_UNROLL):
            block = step * K_UNROLL + unrolled
            row_scale, up_scale, gate_scale = next_row, next_up, next_gate
            next_row, next_up, next_gate = gemm1_scales(
                hidden_scale_at, up_scale_at, gate_scale_at, block + 1, stride_scale_k, real, K_BLOCKS
            )
            # Weights first: their loads wait for nothing, those of the rows for the tokens' numbers.
            w_up = load_weights(weight, weight_row + UP, block, BLOCK_N, HIDDEN, TMA)
            w_gate = load_weights(weight, weight_row + GATE, block, BLOCK_N, HIDDEN, TMA)
            x = tl.load(hidden_at + block * BLOCK_K, mask=real[:, None], other=0.0)
            up += scaled_product(x, w_up, row_scale * up_scale, SWAP)
            gate += scaled_product(x, w_gate, row_scale * gate_scale, SWAP)
    if SWAP:
        up, gate = tl.trans(up), tl.trans(gate)

    value = swiglu_of(gate, up)
    row = (rows_before + slot).to(tl.int64)
    if BLOCK_N == 128:
        store_quantized(value, out_ptr, out_scale_ptr, row, real, block_n, capacity, INTERMEDIATE)
    else:
        row_at = unquantized_ptr + row[:, None] * INTERMEDIATE
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(row_at + column[None, :], value, mask=real[:, None])
        # Every thread's stores come before the ticket, and the last ticket's loads after all the others' stores.
        tl.debug_barrier()
        ticket_at = tickets_ptr + (tiles_before + tile_m) * (INTERMEDIATE // 128) + block_n
        ticket = tl.atomic_add(ticket_at, 1, sem="acq_rel", scope="gpu")
        if ticket == 128 // BLOCK_N - 1:
            # Past the first-level cache, which other multiprocessors' stores don't reach.
            whole_at = row_at + (block_n * 128 + tl.arange(0, 128))[None, :]
            whole = tl.load(whole_at, mask=real[:, None], other=0.0, cache_modifier=".cg")
            store_quantized(whole, out_ptr, out_scale_ptr, row, real, block_n, capacity, INTERMEDIATE)


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
    NUM_STAGES: tl.constexpr,
    K_UNROLL: tl.constexpr,
    FEW_M: tl.constexpr,
    FEW_STAGES: tl.constexpr,
    FEW_UNROLL: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: any number of programs; they share the tiles of BLOCK_M rows by BLOCK_N gate and up columns.

    An expert with at most FEW_M rows (0: none) takes a tile of FEW_M rows instead, with a pipeline of its own.
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
        if FEW_M > 0 and rows <= FEW_M:
            gemm1_tile(
                hidden_ptr, hidden_scale_ptr, weight, weight_scale_ptr, slot_token_ptr, out_ptr, out_scale_ptr,
                unquantized_ptr, tickets_ptr, stride_scale_k, stride_scale_t, num_tokens, capacity,
                at, rows, rows_before, tiles_before, tile_m, tile_n,
                STRIDE_HIDDEN, HIDDEN, INTERMEDIATE, GATE_FIRST, FEW_M, BLOCK_N,
                FEW_STAGES, FEW_UNROLL, TMA,
            )  # fmt: skip
        else:
            gemm1_tile(
                hidden_ptr, hidden_scale_ptr, weight, weight_scale_ptr, slot_token_ptr, out_ptr, out_scale_ptr,
                unquantized_ptr, tickets_ptr, stride_scale_k, stride_scale_t, num_tokens, capacity,
                at, rows, rows_before, tiles_before, tile_m, tile_n,
                STRIDE_HIDDEN, HIDDEN, INTERMEDIATE, GATE_FIRST, BLOCK_M, BLOCK_N, NUM_STAGES, K_UNROLL, TMA,
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
    tile_m,
    tile_n,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    K_UNROLL: tl.constexpr,
    TMA: tl.constexpr,
):
    """One tile of `gemm2_kernel`, whose arguments these are; the rest says where the tile lies."""
    BLOCK_K: tl.constexpr = 128
    K_BLOCKS: tl.constexpr = INTERMEDIATE // BLOCK_K
    TWO: tl.constexpr = BLOCK_N == 256
    WIDTH: tl.constexpr = 128 if TWO else BLOCK_N
    tl.static_assert(128 % WIDTH == 0)
    tl.static_assert(K_BLOCKS % K_UNROLL == 0)
    k = tl.arange(0, BLOCK_K)
    slot = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    real = slot < rows
    row = (rows_before + slot).to(tl.int64)
    activated_at = activated_ptr + row[:, None] * INTERMEDIATE + k[None, :]
    activated_scale_at = activated_scale_ptr + row
    weight_row = at * HIDDEN + first_column + tile_n * BLOCK_N
    scale_at = weight_scale_ptr + (at * (HIDDEN // 128) + (first_column + tile_n * BLOCK_N) // 128) * K_BLOCKS

    SWAP: tl.constexpr = BLOCK_M < 64 and WIDTH >= 64
    total = zeros(BLOCK_M, WIDTH, SWAP)
    scales = K_BLOCKS if TWO else 0  # the right half's row of scales, or the same once more
    if TWO:
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
            w = load_weights(weight, weight_row, block, WIDTH, INTERMEDIATE, TMA)
            total += scaled_product(x, w, row_scale * scale, SWAP)
            if TWO:
                w_right = load_weights(weight, weight_row + 128, block, WIDTH, INTERMEDIATE, TMA)
                right += scaled_product(x, w_right, row_scale * right_scale, SWAP)
    if SWAP:
        total = tl.trans(total)
        if TWO:
            right = tl.trans(right)

    out_at = out_ptr + row[:, None] * COLUMNS + (tile_n * BLOCK_N + tl.arange(0, WIDTH))[None, :]
    tl.store(out_at, total.to(tl.bfloat16), mask=real[:, None])
    if TWO:
        tl.store(out_at + 128, right.to(tl.bfloat16), mask=real[:, None])


@triton.jit(do_not_specialize=["first_column", "capacity"])
def gemm2_kernel(
    activated_ptr,  # [capacity, INTERMEDIATE] e4m3
    activated_scale_ptr,  # [INTERMEDIATE/128, capacity] float32
    weight,  # [E, HIDDEN, INTERMEDIATE] e4m3: a descriptor of its rows if TMA, else a pointer
    weight_scale_ptr,  # [E, HIDDEN/128, INTERMEDIATE/128] float32
    counts_ptr,  # [E] int32
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
    NUM_STAGES: tl.constexpr,
    K_UNROLL: tl.constexpr,
    FEW_M: tl.constexpr,
    FEW_STAGES: tl.constexpr,
    FEW_UNROLL: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: any number of programs; they share the tiles of BLOCK_M rows by BLOCK_N columns.

    A tile of 256 columns is two of 128 side by side: each has its own weight scale, and they share the rows, which
    saves a quarter of the traffic from L2. FEW_M is as in `gemm1_swiglu_kernel`.
    """
    TILES_N: tl.constexpr = COLUMNS // BLOCK_N
    tl.static_assert(COLUMNS % BLOCK_N == 0)
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)

    expert = tl.arange(0, E_POW2)
    count = tl.load(counts_ptr + expert, mask=expert < E, other=0)
    num_tiles = tl.sum(tl.cdiv(count, BLOCK_M), axis=0) * TILES_N
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        at, rows, rows_before, tiles_before, tile_m, tile_n = locate_tile(tile, count, expert, TILES_N, BLOCK_M)
        if FEW_M > 0 and rows <= FEW_M:
            gemm2_tile(
                activated_ptr, activated_scale_ptr, weight, weight_scale_ptr, out_ptr, first_column, capacity,
                at, rows, rows_before, tile_m, tile_n,
                HIDDEN, INTERMEDIATE, COLUMNS, FEW_M, BLOCK_N, FEW_STAGES, FEW_UNROLL, TMA,
            )  # fmt: skip
        else:
            gemm2_tile(
                activated_ptr, activated_scale_ptr, weight, weight_scale_ptr, out_ptr, first_column, capacity,
                at, rows, rows_before, tile_m, tile_n,
                HIDDEN, INTERMEDIATE, COLUMNS, BLOCK_M, BLOCK_N, NUM_STAGES, K_UNROLL, TMA,
            )  # fmt: skip
