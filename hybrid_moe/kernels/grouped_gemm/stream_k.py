"""The two GEMMs for few rows, shared out evenly: every program reads the same number of bytes of the weights.

Where an expert has few rows, a GEMM takes as long as it takes to read its weights. Whole tiles can't be shared out
evenly: with 18 experts, 1152 tiles of 32 columns on 528 places take as long as 1584 would. So the tiles, cut into
steps along the sum, are laid end to end, and each program takes an equal piece of that line ("stream-K", Osama et al.
2023, arXiv 2301.03598). A program leaves the part of a tile that it doesn't finish in ``partial``; the last one to
come, known by a ticket, adds up the parts in the order of the sum, so that the result doesn't depend on who was last.

All row tiles of an expert's columns are cut at the same steps, by which a row's sum doesn't depend on its slot, and
follow one another inside a piece, by which all but the first find the weights in L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import let_next_kernel_start, wait_for_previous_kernel
from ..quantize import swiglu_of
from .triton_kernels import gemm1_sum, gemm2_sum, store_activation, store_quantized_block


@triton.jit
def piece_start(program, total, programs):
    """Where a program's piece of ``total`` steps begins; pieces differ by one step at most."""
    return program * (total // programs) + tl.minimum(program, total % programs)


@triton.jit
def program_of(step, total, programs):
    """Whose piece a step is in: the inverse of `piece_start`."""
    each = total // programs
    in_longer = (total % programs) * (each + 1)
    return tl.where(step < in_longer, step // (each + 1), total % programs + (step - in_longer) // each)


@triton.jit
def expert_at(position, count, expert, BLOCK_M: tl.constexpr, STEPS: tl.constexpr):
    """The expert whose steps hold a position: its number, rows, rows of all before it, and its first position."""
    extent = tl.cdiv(count, BLOCK_M) * STEPS
    at = tl.sum((tl.cumsum(extent, axis=0) <= position).to(tl.int32), axis=0)
    rows = tl.sum(tl.where(expert == at, count, 0), axis=0)
    before = expert < at
    return at, rows, tl.sum(tl.where(before, count, 0), axis=0), tl.sum(tl.where(before, extent, 0), axis=0)


@triton.jit
def share(count, BLOCK_M: tl.constexpr, STEPS: tl.constexpr):
    """All steps, and among how many programs to share them: so few that each piece has a step of every row tile."""
    tiles = tl.cdiv(count, BLOCK_M)
    total = tl.sum(tiles, axis=0) * STEPS
    return total, tl.minimum(tl.num_programs(0), tl.maximum(total // tl.maximum(tl.max(tiles, axis=0), 1), 1))


@triton.jit
def take_ticket(ticket_at, holders):
    """Whether all others that share a tile have left their parts; the last to come sets the ticket back to zero."""
    # Every thread's stores come before the ticket, and the last ticket's loads after all the others' stores.
    tl.debug_barrier()
    last = tl.atomic_add(ticket_at, 1, sem="acq_rel", scope="gpu") == holders - 1
    if last:
        tl.store(ticket_at, 0)
    return last


@triton.jit
def part_at(partial_ptr, program, first, row, num_tokens, WIDTH: tl.constexpr):
    """Where a program keeps rows of a tile that it doesn't finish: of the one it begins with, or ends with."""
    slot = program * 2 + tl.where(program == first, 1, 0)
    return partial_ptr + (slot.to(tl.int64) * num_tokens + row)[:, None] * WIDTH


@triton.jit
def gemm1_finish(
    up,
    gate,
    out_ptr,
    out_scale_ptr,
    unquantized_ptr,
    row,
    real,
    tile_n,
    capacity,
    INTERMEDIATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store a finished tile: quantised if it is 128 columns wide, else its SwiGLU for `quantize_together`."""
    if BLOCK_N == 128:
        store_activation(up, gate, out_ptr, out_scale_ptr, row, real, tile_n, capacity, INTERMEDIATE)
    else:
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(unquantized_ptr + row[:, None] * INTERMEDIATE + column, swiglu_of(gate, up), mask=real[:, None])


@triton.jit
def quantize_together(
    unquantized_ptr,
    out_ptr,
    out_scale_ptr,
    ticket_at,
    rows,
    rows_before,
    row_tiles,
    block_n,
    capacity,
    INTERMEDIATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """After the tiles of a 128 block: the last of them quantises the block for all rows of the expert."""
    if take_ticket(ticket_at, 128 // BLOCK_N):
        for tile_m in range(row_tiles):
            slot = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
            real = slot < rows
            row = (rows_before + slot).to(tl.int64)
            store_quantized_block(
                unquantized_ptr, out_ptr, out_scale_ptr, row, real, block_n, capacity, INTERMEDIATE
            )  # fmt: skip


@triton.jit
def gemm1_piece(
    hidden_ptr,
    hidden_scale_ptr,
    weight,
    weight_scale_ptr,
    slot_token_ptr,
    out_ptr,
    out_scale_ptr,
    unquantized_ptr,
    partial_ptr,
    tickets_ptr,
    stride_scale_k,
    stride_scale_t,
    num_tokens,
    capacity,
    at,
    rows,
    rows_before,
    row_tiles,
    tile_n,
    first_block,
    last_block,
    first_program,
    holders,
    STRIDE_HIDDEN: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    K_UNROLL: tl.constexpr,
    TMA: tl.constexpr,
):
    """Blocks first_block... before last_block of the sum of one expert's BLOCK_N columns, for all its row tiles."""
    TILES_N: tl.constexpr = INTERMEDIATE // BLOCK_N
    inside = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)[None, :]
    for tile_m in range(row_tiles):
        up, gate = gemm1_sum(
            hidden_ptr, hidden_scale_ptr, weight, weight_scale_ptr, slot_token_ptr, stride_scale_k, stride_scale_t,
            num_tokens, at, rows, tile_m, tile_n, first_block // K_UNROLL, last_block // K_UNROLL,
            STRIDE_HIDDEN, HIDDEN, INTERMEDIATE, GATE_FIRST, BLOCK_M, BLOCK_N, NUM_STAGES, K_UNROLL, TMA,
        )  # fmt: skip
        slot = tile_m * BLOCK_M + inside
        real = slot < rows
        if holders == 1:
            row = (rows_before + slot).to(tl.int64)
            gemm1_finish(
                up, gate, out_ptr, out_scale_ptr, unquantized_ptr, row, real, tile_n, capacity, INTERMEDIATE, BLOCK_N
            )
        else:
            mine = part_at(partial_ptr, tl.program_id(0), first_program, slot, num_tokens, 2 * BLOCK_N) + column
            tl.store(mine, up, mask=real[:, None])
            tl.store(mine + BLOCK_N, gate, mask=real[:, None])
    finished = holders == 1
    if holders > 1:
        finished = take_ticket(tickets_ptr + at * TILES_N + tile_n, holders)
        if finished:
            for tile_m in range(row_tiles):
                slot = tile_m * BLOCK_M + inside
                real = slot < rows
                up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for program in range(first_program, first_program + holders):
                    part = part_at(partial_ptr, program, first_program, slot, num_tokens, 2 * BLOCK_N) + column
                    # Past the first-level cache, which other multiprocessors' stores don't reach.
                    up += tl.load(part, mask=real[:, None], other=0.0, cache_modifier=".cg")
                    gate += tl.load(part + BLOCK_N, mask=real[:, None], other=0.0, cache_modifier=".cg")
                row = (rows_before + slot).to(tl.int64)
                gemm1_finish(
                    up, gate, out_ptr, out_scale_ptr, unquantized_ptr, row, real, tile_n, capacity,
                    INTERMEDIATE, BLOCK_N,
                )  # fmt: skip
    if BLOCK_N < 128:
        if finished:
            block_n = tile_n * BLOCK_N // 128
            ticket_at = tickets_ptr + E * TILES_N + at * (INTERMEDIATE // 128) + block_n
            quantize_together(
                unquantized_ptr, out_ptr, out_scale_ptr, ticket_at,
                rows, rows_before, row_tiles, block_n, capacity, INTERMEDIATE, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit(do_not_specialize=["stride_scale_k", "stride_scale_t", "num_tokens", "capacity"])
def gemm1_stream_k_kernel(
    hidden_ptr,  # [T, HIDDEN] e4m3, rows STRIDE_HIDDEN apart
    hidden_scale_ptr,  # [HIDDEN/128, T] float32
    weight,  # [E, 2 * INTERMEDIATE, HIDDEN] e4m3: a descriptor of its rows if TMA, else a pointer
    weight_scale_ptr,  # [E, 2 * INTERMEDIATE/128, HIDDEN/128] float32
    counts_ptr,  # [E] int32
    slot_token_ptr,  # [E, T] int32
    out_ptr,  # [capacity, INTERMEDIATE] e4m3, out
    out_scale_ptr,  # [INTERMEDIATE/128, capacity] float32, out
    unquantized_ptr,  # [capacity, INTERMEDIATE] float32, scratch; not touched if BLOCK_N is 128
    partial_ptr,  # [programs, 2, T, up or gate, BLOCK_N] float32, scratch
    tickets_ptr,  # [E, INTERMEDIATE/BLOCK_N], then [E, INTERMEDIATE/128] int32, zeros on entry and at the end
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
    """GEMM1 with SwiGLU and quantisation, as `gemm1_swiglu_kernel`. Grid: as many programs as run at once.

    An expert with at most FEW_M rows (0: none) takes a tile of FEW_M rows.
    """
    STEP: tl.constexpr = K_UNROLL if K_UNROLL > FEW_UNROLL else FEW_UNROLL
    tl.static_assert(STEP % K_UNROLL == 0 and STEP % FEW_UNROLL == 0 and HIDDEN // 128 % STEP == 0)
    K_STEPS: tl.constexpr = HIDDEN // 128 // STEP
    STEPS: tl.constexpr = INTERMEDIATE // BLOCK_N * K_STEPS
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)

    expert = tl.arange(0, E_POW2)
    count = tl.load(counts_ptr + expert, mask=expert < E, other=0)
    total, programs = share(count, BLOCK_M, STEPS)
    position = piece_start(tl.program_id(0), total, programs)
    end = piece_start(tl.program_id(0) + 1, total, programs)
    if tl.program_id(0) >= programs:
        end = position
    while position < end:
        at, rows, rows_before, base = expert_at(position, count, expert, BLOCK_M, STEPS)
        row_tiles = tl.cdiv(rows, BLOCK_M)
        step = tl.cdiv(position - base, row_tiles)
        steps = tl.minimum(tl.cdiv(end - base, row_tiles), STEPS) - step
        tile_n, first_step = step // K_STEPS, step % K_STEPS
        last_step = tl.minimum(K_STEPS, first_step + steps)
        if last_step > first_step:
            first_program = program_of(base + tile_n * K_STEPS * row_tiles, total, programs)
            last_program = program_of(base + (tile_n * K_STEPS + K_STEPS - 1) * row_tiles, total, programs)
            holders = last_program - first_program + 1
            if FEW_M > 0 and rows <= FEW_M:
                gemm1_piece(
                    hidden_ptr, hidden_scale_ptr, weight, weight_scale_ptr, slot_token_ptr, out_ptr, out_scale_ptr,
                    unquantized_ptr, partial_ptr, tickets_ptr, stride_scale_k, stride_scale_t, num_tokens, capacity,
                    at, rows, rows_before, 1, tile_n, first_step * STEP, last_step * STEP, first_program, holders,
                    STRIDE_HIDDEN, HIDDEN, INTERMEDIATE, GATE_FIRST, E, FEW_M, BLOCK_N, FEW_STAGES, FEW_UNROLL, TMA,
                )  # fmt: skip
            else:
                gemm1_piece(
                    hidden_ptr, hidden_scale_ptr, weight, weight_scale_ptr, slot_token_ptr, out_ptr, out_scale_ptr,
                    unquantized_ptr, partial_ptr, tickets_ptr, stride_scale_k, stride_scale_t, num_tokens, capacity,
                    at, rows, rows_before, row_tiles, tile_n, first_step * STEP, last_step * STEP,
                    first_program, holders,
                    STRIDE_HIDDEN, HIDDEN, INTERMEDIATE, GATE_FIRST, E, BLOCK_M, BLOCK_N, NUM_STAGES, K_UNROLL, TMA,
                )  # fmt: skip
        position = base + (tile_n * K_STEPS + last_step) * row_tiles


@triton.jit
def gemm2_piece(
    activated_ptr,
    activated_scale_ptr,
    weight,
    weight_scale_ptr,
    out_ptr,
    partial_ptr,
    tickets_ptr,
    first_column,
    num_tokens,
    capacity,
    at,
    rows,
    rows_before,
    row_tiles,
    tile_n,
    first_block,
    last_block,
    first_program,
    holders,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    K_UNROLL: tl.constexpr,
    TMA: tl.constexpr,
):
    """Blocks first_block... before last_block of the sum of one expert's BLOCK_N columns, for all its row tiles."""
    inside = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)[None, :]
    for tile_m in range(row_tiles):
        total, _ = gemm2_sum(
            activated_ptr, activated_scale_ptr, weight, weight_scale_ptr, first_column, capacity,
            at, rows, rows_before, tile_m, tile_n, first_block // K_UNROLL, last_block // K_UNROLL,
            HIDDEN, INTERMEDIATE, BLOCK_M, BLOCK_N, NUM_STAGES, K_UNROLL, TMA,
        )  # fmt: skip
        slot = tile_m * BLOCK_M + inside
        real = slot < rows
        if holders == 1:
            out_at = out_ptr + (rows_before + slot).to(tl.int64)[:, None] * COLUMNS + tile_n * BLOCK_N + column
            tl.store(out_at, total.to(tl.bfloat16), mask=real[:, None])
        else:
            mine = part_at(partial_ptr, tl.program_id(0), first_program, slot, num_tokens, BLOCK_N) + column
            tl.store(mine, total, mask=real[:, None])
    if holders > 1:
        if take_ticket(tickets_ptr + at * (COLUMNS // BLOCK_N) + tile_n, holders):
            for tile_m in range(row_tiles):
                slot = tile_m * BLOCK_M + inside
                real = slot < rows
                total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for program in range(first_program, first_program + holders):
                    part = part_at(partial_ptr, program, first_program, slot, num_tokens, BLOCK_N) + column
                    total += tl.load(part, mask=real[:, None], other=0.0, cache_modifier=".cg")
                out_at = out_ptr + (rows_before + slot).to(tl.int64)[:, None] * COLUMNS + tile_n * BLOCK_N + column
                tl.store(out_at, total.to(tl.bfloat16), mask=real[:, None])


@triton.jit(do_not_specialize=["first_column", "num_tokens", "capacity"])
def gemm2_stream_k_kernel(
    activated_ptr,  # [capacity, INTERMEDIATE] e4m3
    activated_scale_ptr,  # [INTERMEDIATE/128, capacity] float32
    weight,  # [E, HIDDEN, INTERMEDIATE] e4m3: a descriptor of its rows if TMA, else a pointer
    weight_scale_ptr,  # [E, HIDDEN/128, INTERMEDIATE/128] float32
    counts_ptr,  # [E] int32
    out_ptr,  # [capacity, COLUMNS] bfloat16, out: columns first_column... of the result
    partial_ptr,  # [programs, 2, T, BLOCK_N] float32, scratch
    tickets_ptr,  # [E, COLUMNS/BLOCK_N] int32, zeros on entry and at the end
    first_column,
    num_tokens,
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
    """GEMM2, as `gemm2_kernel`. Grid and FEW_M as in `gemm1_stream_k_kernel`."""
    STEP: tl.constexpr = K_UNROLL if K_UNROLL > FEW_UNROLL else FEW_UNROLL
    tl.static_assert(STEP % K_UNROLL == 0 and STEP % FEW_UNROLL == 0 and INTERMEDIATE // 128 % STEP == 0)
    K_STEPS: tl.constexpr = INTERMEDIATE // 128 // STEP
    STEPS: tl.constexpr = COLUMNS // BLOCK_N * K_STEPS
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)

    expert = tl.arange(0, E_POW2)
    count = tl.load(counts_ptr + expert, mask=expert < E, other=0)
    total, programs = share(count, BLOCK_M, STEPS)
    position = piece_start(tl.program_id(0), total, programs)
    end = piece_start(tl.program_id(0) + 1, total, programs)
    if tl.program_id(0) >= programs:
        end = position
    while position < end:
        at, rows, rows_before, base = expert_at(position, count, expert, BLOCK_M, STEPS)
        row_tiles = tl.cdiv(rows, BLOCK_M)
        step = tl.cdiv(position - base, row_tiles)
        steps = tl.minimum(tl.cdiv(end - base, row_tiles), STEPS) - step
        tile_n, first_step = step // K_STEPS, step % K_STEPS
        last_step = tl.minimum(K_STEPS, first_step + steps)
        if last_step > first_step:
            first_program = program_of(base + tile_n * K_STEPS * row_tiles, total, programs)
            last_program = program_of(base + (tile_n * K_STEPS + K_STEPS - 1) * row_tiles, total, programs)
            holders = last_program - first_program + 1
            if FEW_M > 0 and rows <= FEW_M:
                gemm2_piece(
                    activated_ptr, activated_scale_ptr, weight, weight_scale_ptr, out_ptr, partial_ptr, tickets_ptr,
                    first_column, num_tokens, capacity,
                    at, rows, rows_before, 1, tile_n, first_step * STEP, last_step * STEP, first_program, holders,
                    HIDDEN, INTERMEDIATE, COLUMNS, FEW_M, BLOCK_N, FEW_STAGES, FEW_UNROLL, TMA,
                )  # fmt: skip
            else:
                gemm2_piece(
                    activated_ptr, activated_scale_ptr, weight, weight_scale_ptr, out_ptr, partial_ptr, tickets_ptr,
                    first_column, num_tokens, capacity,
                    at, rows, rows_before, row_tiles, tile_n, first_step * STEP, last_step * STEP,
                    first_program, holders,
                    HIDDEN, INTERMEDIATE, COLUMNS, BLOCK_M, BLOCK_N, NUM_STAGES, K_UNROLL, TMA,
                )  # fmt: skip
        position = base + (tile_n * K_STEPS + last_step) * row_tiles
