"""Grouped FP8 block-scale GEMMs for few rows on Hopper: one warp group loads, two share each tile's sum (Gluon).

With few rows an expert's weights are all that matters, and with few experts a tile's own chain of waiting, multiplying
and promoting, one 128 block of the sum after the other, takes longer than its bytes. Here each of two warp groups has
every second block, and they add up their halves at the end of the tile. The third loads the next tile meanwhile, and in
GEMM2 the first weights before GEMM1 has ended.

A tile is 64 rows of weights, which come first in the product as wgmma takes 64 rows of its first operand, by up to 32
rows of the activation. GEMM1's are 32 of up and of gate; who finishes the last of the four tiles that make a 128 block
quantises it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ...launch import let_next_kernel_start, wait_for_previous_kernel
from ...quantize import quantize_block, swiglu_of
from ..completion import all_finished, await_expert, draw_ticket, signal
from .many_rows_kernels import COPY, E4M3, LINE, PLAIN, announce, announced, load_counts, load_rows, load_tile, locate

GROUP = gl.constexpr(2)  # 128 blocks of the sum that are loaded together
MOST = gl.constexpr(32)  # rows of a tile
FEW = gl.constexpr(16)  # what is computed where an expert has no more
WIDTH = gl.constexpr(64)  # weight rows of a tile
# Neighbouring columns of the result are one thread's: of 32 float32, of 64 bfloat16.
HALF_COLUMNS = gl.constexpr(gl.BlockedLayout([4, 1], [8, 4], [1, 4], [0, 1]))
COLUMNS = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))
WHOLE = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0]))  # a warp has a row of 128 columns
SHARED_SUMS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def load_weights(
    weight, weight_row, block, step, weight_stages, full, empty, BLOCKS: gl.constexpr, SWIGLU: gl.constexpr,
    UP: gl.constexpr, GATE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start loading the weights of neighbouring 128 blocks into the stages from ``step`` on, once these are empty.

    Memory serves them better together: each adds 128 bytes to the same weight rows.
    """
    for number in gl.static_range(BLOCKS):
        stage = (step + number) % STAGES
        mbarrier.wait(empty.index(stage), (((step + number) // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), WIDTH * 128)
    for part in gl.static_range(2 if SWIGLU else 1):
        for number in gl.static_range(BLOCKS):
            stage = (step + number) % STAGES
            bar, w, column = full.index(stage), weight_stages.index(stage), (block + number) * 128
            if SWIGLU:
                row = weight_row + (GATE if part else UP)
                load_tile(weight, [row, column], bar, w.slice(part * (WIDTH // 2), WIDTH // 2, dim=0))
            else:
                load_tile(weight, [weight_row, column], bar, w)


@gluon.jit
def load_blocks(
    ring, weight, weight_row, x_at, x_mask, scale_at, real, stride_scale_k, block, step, ready,
    BLOCKS: gl.constexpr, SWIGLU: gl.constexpr, UP: gl.constexpr, GATE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start loading all of neighbouring 128 blocks, but for the weights of the first ``ready`` of the tile."""
    x_stages, scale_stages, weight_stages, full, empty = ring
    if block >= ready:
        load_weights(weight, weight_row, block, step, weight_stages, full, empty, BLOCKS, SWIGLU, UP, GATE, STAGES)
    for number in gl.static_range(BLOCKS):
        stage = (step + number) % STAGES
        load_rows(x_stages.index(stage), x_at + (block + number) * 128, mask=x_mask)
        load_rows(scale_stages.index(stage), scale_at + number * stride_scale_k, mask=real)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def producer(
    x_ptr,
    x_scale_ptr,
    weight,
    counts_ptr,
    finished_ptr,
    slot_token_ptr,
    drawn_ptr,
    first_column,
    stride_scale_k,
    stride_scale_t,
    num_tokens,
    ring,
    agenda,
    X_STRIDE: gl.constexpr,
    K: gl.constexpr,
    N: gl.constexpr,
    TILES_N: gl.constexpr,
    SWIGLU: gl.constexpr,
    UP: gl.constexpr,
    GATE: gl.constexpr,
    E: gl.constexpr,
    E_POW2: gl.constexpr,
    FIRST_M: gl.constexpr,
    SIGNALS: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """Load rows, their scales and the weights of all tiles of this program, one 128 block of the sum a stage."""
    x_stages, scale_stages, weight_stages, full, empty = ring
    K_BLOCKS: gl.constexpr = K // 128
    expert, count = load_counts(counts_ptr, SWIGLU, E, E_POW2)
    if not SWIGLU:
        through = all_finished(finished_ptr, count, FIRST_M, SIGNALS, E)
        if through:
            wait_for_previous_kernel(PDL)
    tile = gl.program_id(0)
    at, rows, rows_before, tiles_before, tile_m, tile_n = locate(tile, expert, count, MOST, TILES_N, E)
    step = 0
    turn = 0
    while at < E:
        slot = tile_m * MOST + gl.arange(0, MOST, layout=LINE)
        x_slot = tile_m * MOST + gl.arange(0, MOST, layout=gl.SliceLayout(1, COPY))
        real = slot < rows
        x_real = x_slot < rows
        if SWIGLU:
            weight_row = at * N + tile_n * (WIDTH // 2)
        else:
            weight_row = at * N + first_column + tile_n * WIDTH
        ready = 0
        if not SWIGLU:
            if not through:
                for group in range(STAGES // GROUP):
                    load_weights(
                        weight, weight_row, group * GROUP, step + group * GROUP, weight_stages, full, empty,
                        GROUP, SWIGLU, UP, GATE, STAGES,
                    )  # fmt: skip
                await_expert(finished_ptr, at, rows, FIRST_M, SIGNALS)
                ready = STAGES
        if SWIGLU:  # rows are gathered by their tokens
            tokens_at = slot_token_ptr + at.to(gl.int64) * num_tokens
            # One token's number is 0, and what is masked costs no time.
            unknown = gl.where(num_tokens > 1, rows, 0)
            row = gl.load(tokens_at + slot, mask=slot < unknown, other=0)
            x_row = gl.load(tokens_at + x_slot, mask=x_slot < unknown, other=0)
        else:
            row = rows_before + slot
            x_row = rows_before + x_slot
        column = gl.arange(0, 128, layout=gl.SliceLayout(0, COPY))
        x_at = x_ptr + (x_row.to(gl.int64) * X_STRIDE)[:, None] + column[None, :]
        x_mask = x_real[:, None] & (column[None, :] >= 0)
        scale_at = x_scale_ptr + row.to(gl.int64) * stride_scale_t
        for group in range(K_BLOCKS // GROUP):
            load_blocks(
                ring, weight, weight_row, x_at, x_mask, scale_at, real, stride_scale_k, group * GROUP,
                step + group * GROUP, ready, GROUP, SWIGLU, UP, GATE, STAGES,
            )  # fmt: skip
            scale_at += GROUP * stride_scale_k
        if K_BLOCKS % GROUP > 0:
            block = K_BLOCKS // GROUP * GROUP
            load_blocks(
                ring, weight, weight_row, x_at, x_mask, scale_at, real, stride_scale_k, block,
                step + block, ready, K_BLOCKS % GROUP, SWIGLU, UP, GATE, STAGES,
            )  # fmt: skip
        step += K_BLOCKS
        tile = gl.num_programs(0) + gl.atomic_add(drawn_ptr, 1, sem="relaxed")
        announce(agenda, turn, tile)
        turn += 1
        if not SWIGLU:
            if not through:
                through = all_finished(finished_ptr, count, FIRST_M, SIGNALS, E)
        at, rows, rows_before, tiles_before, tile_m, tile_n = locate(tile, expert, count, MOST, TILES_N, E)


@gluon.jit
def load_scales(up_at, gate_at, block, K_BLOCKS: gl.constexpr, SWIGLU: gl.constexpr):
    """Scales of the tile's first and last 32 weight rows for a block, or for the last one."""
    block = gl.minimum(block, K_BLOCKS - 1)
    first = gl.load(up_at + block)
    if SWIGLU:
        return first, gl.load(gate_at + block)
    else:
        return first, first


@gluon.jit
def half_sum(
    ring,
    up_at,
    gate_at,
    step,
    K_BLOCKS: gl.constexpr,
    ROWS: gl.constexpr,
    SUM: gl.constexpr,
    SWIGLU: gl.constexpr,
    STAGES: gl.constexpr,
    ME: gl.constexpr,
):
    """The sum over every second block, those whose step has this consumer's parity."""
    x_stages, scale_stages, weight_stages, full, empty = ring
    total = gl.zeros([WIDTH, ROWS], gl.float32, layout=SUM)
    product = gl.zeros([WIDTH, ROWS], gl.float32, layout=SUM)
    side = gl.arange(0, WIDTH, layout=gl.SliceLayout(1, SUM)) < WIDTH // 2
    first = (step + ME) & 1
    # Two of its blocks ahead, as every eighth scale comes from memory.
    up, gate = load_scales(up_at, gate_at, first, K_BLOCKS, SWIGLU)
    next_up, next_gate = load_scales(up_at, gate_at, first + 2, K_BLOCKS, SWIGLU)
    for block in range(first, K_BLOCKS, 2):
        stage = (step + block) % STAGES
        mbarrier.wait(full.index(stage), ((step + block) // STAGES) & 1)
        fence_async_shared()  # rows that were not written by TMA
        x = x_stages.index(stage).slice(0, ROWS, dim=0).permute((1, 0))
        product = warpgroup_mma(weight_stages.index(stage), x, product, use_acc=False, is_async=True)
        row_scale = scale_stages.index(stage).slice(0, ROWS).load(gl.SliceLayout(0, SUM))
        factor = gl.where(side, up, gate)
        up, gate = next_up, next_gate
        next_up, next_gate = load_scales(up_at, gate_at, block + 4, K_BLOCKS, SWIGLU)
        product = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(empty.index(stage), count=1)
        total = total + product * (factor[:, None] * row_scale[None, :])
    return total


@gluon.jit
def store_activation(
    sums, unquantized_ptr, tickets_ptr, finished_ptr, out_ptr, out_scale_ptr, expert, first_row, rows, row_tile, tile_n,
    capacity, WIDE: gl.constexpr, ROWS: gl.constexpr, E: gl.constexpr,
):  # fmt: skip
    """SwiGLU of a tile's sums; all four tiles of a 128 block being there, quantise it."""
    column = gl.arange(0, WIDTH // 2, layout=gl.SliceLayout(1, HALF_COLUMNS))
    slot = gl.arange(0, ROWS, layout=gl.SliceLayout(0, HALF_COLUMNS))
    up = sums.slice(0, WIDTH // 2, dim=0).load(HALF_COLUMNS)
    gate = sums.slice(WIDTH // 2, WIDTH // 2, dim=0).load(HALF_COLUMNS)
    value = swiglu_of(gate, up)
    row_at = unquantized_ptr + (first_row + slot).to(gl.int64) * WIDE
    at = row_at[None, :] + (tile_n * (WIDTH // 2) + column)[:, None]
    gl.store(at, value, mask=(slot < rows)[None, :] & (column >= 0)[:, None])
    block = tile_n // 4
    if draw_ticket(tickets_ptr + row_tile * (WIDE // 128) + block) == 3:
        whole_column = gl.arange(0, 128, layout=gl.SliceLayout(0, WHOLE))
        whole_slot = gl.arange(0, ROWS, layout=gl.SliceLayout(1, WHOLE))
        real = whole_slot < rows
        row = (first_row + whole_slot).to(gl.int64)
        wide_at = row[:, None] * WIDE + (block * 128 + whole_column)[None, :]
        mask = real[:, None] & (whole_column >= 0)[None, :]
        # Past the first-level cache, which other multiprocessors' stores don't reach.
        whole = gl.load(unquantized_ptr + wide_at, mask=mask, other=0.0, cache_modifier=".cg")
        quantized, scale = quantize_block(whole)
        gl.store(out_ptr + wide_at, quantized, mask=mask)
        gl.store(out_scale_ptr + block.to(gl.int64) * capacity + row, scale, mask=real)
        signal(finished_ptr, expert, E)


@gluon.jit
def consumer(
    weight_scale_ptr,
    counts_ptr,
    finished_ptr,
    out_ptr,
    out_scale_ptr,
    unquantized_ptr,
    tickets_ptr,
    first_column,
    capacity,
    ring,
    agenda,
    exchange,
    K: gl.constexpr,
    N: gl.constexpr,
    OUT_COLUMNS: gl.constexpr,
    TILES_N: gl.constexpr,
    SWIGLU: gl.constexpr,
    UP: gl.constexpr,
    GATE: gl.constexpr,
    E: gl.constexpr,
    E_POW2: gl.constexpr,
    STAGES: gl.constexpr,
    ME: gl.constexpr,
):
    """Half of the blocks of each tile's sum; consumer 0 adds the other's to its own, and stores the result."""
    expert, count = load_counts(counts_ptr, SWIGLU, E, E_POW2)
    at, rows, rows_before, tiles_before, tile_m, tile_n = locate(gl.program_id(0), expert, count, MOST, TILES_N, E)
    step = 0
    turn = 0
    while at < E:
        here = rows - tile_m * MOST
        if here > FEW:
            consume_tile(
                weight_scale_ptr, finished_ptr, out_ptr, out_scale_ptr, unquantized_ptr, tickets_ptr, first_column,
                capacity, ring, exchange, at, here, rows_before + tile_m * MOST, tiles_before + tile_m, tile_n, step,
                turn, K, N, OUT_COLUMNS, SWIGLU, UP, GATE, E, STAGES, ME, MOST,
            )  # fmt: skip
        else:
            consume_tile(
                weight_scale_ptr, finished_ptr, out_ptr, out_scale_ptr, unquantized_ptr, tickets_ptr, first_column,
                capacity, ring, exchange, at, here, rows_before + tile_m * MOST, tiles_before + tile_m, tile_n, step,
                turn, K, N, OUT_COLUMNS, SWIGLU, UP, GATE, E, STAGES, ME, FEW,
            )  # fmt: skip
        step += K // 128
        at, rows, rows_before, tiles_before, tile_m, tile_n = locate(
            announced(agenda, turn), expert, count, MOST, TILES_N, E
        )
        turn += 1


@gluon.jit
def consume_tile(
    weight_scale_ptr, finished_ptr, out_ptr, out_scale_ptr, unquantized_ptr, tickets_ptr, first_column, capacity, ring,
    exchange, at, here, first_row, row_tile, tile_n, step, turn,
    K: gl.constexpr, N: gl.constexpr, OUT_COLUMNS: gl.constexpr, SWIGLU: gl.constexpr, UP: gl.constexpr,
    GATE: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr, ME: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """One tile of `consumer`."""
    K_BLOCKS: gl.constexpr = K // 128
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 32])
    if SWIGLU:
        scales_at = weight_scale_ptr + (at * (N // 128) + tile_n // 4) * K_BLOCKS
        up_at, gate_at = scales_at + UP // 128 * K_BLOCKS, scales_at + GATE // 128 * K_BLOCKS
    else:
        up_at = weight_scale_ptr + (at * (N // 128) + first_column // 128 + tile_n // 2) * K_BLOCKS
        gate_at = up_at
    total = half_sum(ring, up_at, gate_at, step, K_BLOCKS, ROWS, SUM, SWIGLU, STAGES, ME)
    shared_sums, given, taken = exchange
    sums = shared_sums.slice(0, ROWS, dim=1)
    if ME == 1:
        mbarrier.wait(taken.index(0), (turn & 1) ^ 1)
        sums.store(total)
        mbarrier.arrive(given.index(0), count=1)
    else:
        mbarrier.wait(given.index(0), turn & 1)
        sums.store(total + sums.load(SUM))
        if SWIGLU:
            store_activation(
                sums, unquantized_ptr, tickets_ptr, finished_ptr, out_ptr, out_scale_ptr, at, first_row, here, row_tile,
                tile_n, capacity, OUT_COLUMNS, ROWS, E,
            )  # fmt: skip
        else:
            slot = gl.arange(0, ROWS, layout=gl.SliceLayout(0, COLUMNS))
            column = tile_n * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(1, COLUMNS))
            value = sums.load(COLUMNS).to(gl.bfloat16)
            row_at = out_ptr + (first_row + slot).to(gl.int64) * OUT_COLUMNS
            gl.store(row_at[None, :] + column[:, None], value, mask=(slot < here)[None, :] & (column >= 0)[:, None])
        mbarrier.arrive(taken.index(0), count=1)


@gluon.jit
def run_partitions(
    x_ptr, x_scale_ptr, weight, weight_scale_ptr, counts_ptr, finished_ptr, slot_token_ptr, out_ptr, out_scale_ptr,
    unquantized_ptr, tickets_ptr, drawn_ptr, first_column, stride_scale_k, stride_scale_t, num_tokens, capacity,
    X_STRIDE: gl.constexpr, K: gl.constexpr, N: gl.constexpr, OUT_COLUMNS: gl.constexpr, TILES_N: gl.constexpr,
    SWIGLU: gl.constexpr, UP: gl.constexpr, GATE: gl.constexpr, E: gl.constexpr, E_POW2: gl.constexpr,
    FIRST_M: gl.constexpr, SIGNALS: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Both GEMMs: set up the ring and start the three warp groups."""
    gl.static_assert(STAGES % 2 == 0)
    x_stages = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, MOST, 128], E4M3)
    scale_stages = gl.allocate_shared_memory(gl.float32, [STAGES, MOST], PLAIN)
    weight_stages = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, WIDTH, 128], E4M3)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    shared_sums = gl.allocate_shared_memory(gl.float32, [WIDTH, MOST], SHARED_SUMS)
    given = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=129)  # the weights' bytes, and 128 threads' copies of rows
        mbarrier.init(empty.index(stage), count=1)
    mbarrier.init(given.index(0), count=1)
    mbarrier.init(taken.index(0), count=1)
    numbers = gl.allocate_shared_memory(gl.int32, [4, 1], PLAIN)
    said = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(4):
        mbarrier.init(said.index(number), count=1)
    if SWIGLU:
        wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    ring = (x_stages, scale_stages, weight_stages, full, empty)
    agenda = (numbers, said)
    exchange = (shared_sums, given, taken)
    # Written out in the call: a tuple in a variable would make tensors of the compile-time arguments.
    gl.warp_specialize(
        [
            (consumer, (
                weight_scale_ptr, counts_ptr, finished_ptr, out_ptr, out_scale_ptr, unquantized_ptr, tickets_ptr,
                first_column, capacity, ring, agenda, exchange, K, N, OUT_COLUMNS, TILES_N, SWIGLU, UP, GATE, E, E_POW2,
                STAGES, 0,
            )),
            (consumer, (
                weight_scale_ptr, counts_ptr, finished_ptr, out_ptr, out_scale_ptr, unquantized_ptr, tickets_ptr,
                first_column, capacity, ring, agenda, exchange, K, N, OUT_COLUMNS, TILES_N, SWIGLU, UP, GATE, E, E_POW2,
                STAGES, 1,
            )),
            (producer, (
                x_ptr, x_scale_ptr, weight, counts_ptr, finished_ptr, slot_token_ptr, drawn_ptr, first_column,
                stride_scale_k, stride_scale_t, num_tokens, ring, agenda, X_STRIDE, K, N, TILES_N, SWIGLU, UP, GATE, E,
                E_POW2, FIRST_M, SIGNALS, STAGES, PDL,
            )),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
    if not SWIGLU:
        # The end of this kernel has to mean the end of GEMM1: what comes next may clear the counters of both.
        wait_for_previous_kernel(PDL)


@gluon.jit(do_not_specialize=["drawn", "tickets", "stride_scale_k", "stride_scale_t", "num_tokens", "capacity"])
def hopper_few_gemm1_kernel(
    hidden_ptr,  # [T, HIDDEN] e4m3, rows STRIDE_HIDDEN apart
    hidden_scale_ptr,  # [HIDDEN/128, T] float32
    weight,  # descriptor of [E * 2 * INTERMEDIATE, HIDDEN] e4m3, 32 rows by 128
    weight_scale_ptr,  # [E, 2 * INTERMEDIATE/128, HIDDEN/128] float32
    counts_ptr,  # [E] int32
    slot_token_ptr,  # [E, T] int32
    out_ptr,  # [capacity, INTERMEDIATE] e4m3, out
    out_scale_ptr,  # [INTERMEDIATE/128, capacity] float32, out
    unquantized_ptr,  # [capacity, INTERMEDIATE] float32, scratch
    finished_ptr,  # [E + 1] int32, zeros on entry: a signal for each row tile's 128 block of the activation
    tickets_ptr,  # int32, zeros on entry: number ``drawn``, and from ``tickets`` on [row tiles, INTERMEDIATE/128]
    drawn,
    tickets,
    stride_scale_k,
    stride_scale_t,
    num_tokens,
    capacity,
    STRIDE_HIDDEN: gl.constexpr,
    HIDDEN: gl.constexpr,
    INTERMEDIATE: gl.constexpr,
    GATE_FIRST: gl.constexpr,
    E: gl.constexpr,
    E_POW2: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Gather, GEMM1, SwiGLU and quantisation. Grid: any number of programs; they share the tiles."""
    UP: gl.constexpr = INTERMEDIATE if GATE_FIRST else 0
    GATE: gl.constexpr = 0 if GATE_FIRST else INTERMEDIATE
    run_partitions(
        hidden_ptr, hidden_scale_ptr, weight, weight_scale_ptr, counts_ptr, finished_ptr, slot_token_ptr, out_ptr,
        out_scale_ptr, unquantized_ptr, tickets_ptr + tickets, tickets_ptr + drawn, 0, stride_scale_k, stride_scale_t,
        num_tokens, capacity, STRIDE_HIDDEN, HIDDEN, 2 * INTERMEDIATE, INTERMEDIATE, INTERMEDIATE // 32, True, UP, GATE,
        E, E_POW2, 1, 1, STAGES, CONSUMER_REGISTERS, PRODUCER_REGISTERS, PDL,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["drawn", "first_column", "capacity"])
def hopper_few_gemm2_kernel(
    activated_ptr,  # [capacity, INTERMEDIATE] e4m3
    activated_scale_ptr,  # [INTERMEDIATE/128, capacity] float32
    weight,  # descriptor of [E * HIDDEN, INTERMEDIATE] e4m3, 64 rows by 128
    weight_scale_ptr,  # [E, HIDDEN/128, INTERMEDIATE/128] float32
    counts_ptr,  # [E] int32
    finished_ptr,  # [E + 1] int32: GEMM1's signals, see `finished`
    out_ptr,  # [capacity, COLUMNS] bfloat16, out: columns first_column... of the result
    tickets_ptr,  # int32, number ``drawn`` of them zero on entry
    drawn,
    first_column,
    capacity,
    HIDDEN: gl.constexpr,
    INTERMEDIATE: gl.constexpr,
    COLUMNS: gl.constexpr,
    FIRST_M: gl.constexpr,
    SIGNALS: gl.constexpr,
    E: gl.constexpr,
    E_POW2: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    """GEMM2. Grid: any number of programs; they share the tiles.

    GEMM1, with row tiles of FIRST_M and SIGNALS for each of them, may still run.
    """
    gl.static_assert(COLUMNS % 64 == 0)
    run_partitions(
        activated_ptr, activated_scale_ptr, weight, weight_scale_ptr, counts_ptr, finished_ptr, counts_ptr, out_ptr,
        counts_ptr, counts_ptr, counts_ptr, tickets_ptr + drawn, first_column, capacity, 1, 0, capacity,
        INTERMEDIATE, INTERMEDIATE, HIDDEN, COLUMNS, COLUMNS // 64, False, 0, 0, E, E_POW2,
        FIRST_M, SIGNALS, STAGES, CONSUMER_REGISTERS, PRODUCER_REGISTERS, PDL,
    )  # fmt: skip
