"""Grouped FP8 block-scale GEMMs for many rows on Hopper: one warp group loads, two multiply (Gluon).

Where an expert has rows enough that arithmetic binds, a program that waits for each product before it promotes it
leaves the tensor cores idle half of the time. Here a producer warp group fills a ring of stages, and two consumer warp
groups take from it without ever waiting for one another: while one promotes, the other multiplies.

A tile is 128 rows by 256 columns of weights: each consumer has all its rows and half of its columns, in two chunks of
64 rows, of which the second is left out where an expert's last tile has no more than 64. GEMM1's 256 columns are 128 of
up and of gate: each consumer has 64 of both, and so SwiGLU's operands. The two exchange the largest value of each
row for the scale of its 128 columns.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ...launch import let_next_kernel_start, wait_for_previous_kernel
from ...quantize import quantize, swiglu_of
from ..completion import all_finished, await_expert, let_async_copies_see, signal

# Renamed between the Triton releases 3.6 and 3.9.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
load_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

ROWS = gl.constexpr(128)  # of a tile
CHUNK = gl.constexpr(64)  # rows of a product: what wgmma takes
COLUMNS = gl.constexpr(128)  # of weights for each consumer, and of a block of the sum
ACC = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]))
HALF = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 32]))
COPY = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread, 128 a row
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
E4M3 = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def load_counts(counts_ptr, SWIGLU: gl.constexpr, E: gl.constexpr, E_POW2: gl.constexpr):
    """The experts' numbers and the counts of their rows, int32; zeros from E on."""
    # Every warp has the whole vector, so that no sum leaves the warp.
    PER_THREAD: gl.constexpr = E_POW2 // 32 if E_POW2 > 32 else 1
    layout: gl.constexpr = gl.BlockedLayout([PER_THREAD], [32], [4], [0])
    expert = gl.arange(0, E_POW2, layout=layout)
    # GEMM2 has not waited for a kernel yet: the first-level cache may hold older counts.
    CACHE: gl.constexpr = "" if SWIGLU else ".cg"
    return expert, gl.load(counts_ptr + expert, mask=expert < E, other=0, cache_modifier=CACHE)


@gluon.jit
def locate(tile, expert, count, BLOCK_M: gl.constexpr, TILES_N: gl.constexpr, E: gl.constexpr):
    """Where the tile of a number is; expert E or more: there is no such tile.

    Returns expert, its rows, rows and row tiles of all experts before it, row tile, column tile.
    """
    row_tiles = (count + (BLOCK_M - 1)) // BLOCK_M
    ends = gl.associative_scan(row_tiles, 0, _add) * TILES_N
    at = gl.sum((ends <= tile).to(gl.int32), axis=0)
    rows = gl.sum(gl.where(expert == at, count, 0), axis=0)
    rows_before = gl.sum(gl.where(expert < at, count, 0), axis=0)
    tiles_before = gl.sum(gl.where(expert < at, row_tiles, 0), axis=0)
    inside = tile - tiles_before * TILES_N
    my_tiles = gl.maximum((rows + (BLOCK_M - 1)) // BLOCK_M, 1)
    inside = gl.where(at < E, inside, 0)
    return at, rows, rows_before, tiles_before, inside % my_tiles, inside // my_tiles


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def locate_next(
    tile,
    counts_ptr,
    expert,
    count,
    TILES_N: gl.constexpr,
    SWIGLU: gl.constexpr,
    E: gl.constexpr,
    E_POW2: gl.constexpr,
):
    """`locate` of a later tile than the first."""
    if SWIGLU:  # kept from the first on, the counts would cost GEMM1 a register more than there are
        expert, count = load_counts(counts_ptr, SWIGLU, E, E_POW2)
    return locate(tile, expert, count, ROWS, TILES_N, E)


@gluon.jit
def announce(agenda, turn, tile):
    """Tell the consumers which tile comes after their tile number ``turn``.

    Nobody has to say that it was read: the producer is no more blocks of the sum ahead than a tile has.
    """
    numbers, said = agenda
    place = turn % 4
    numbers.index(place).store(gl.full([1], 0, gl.int32, layout=LINE) + tile)
    mbarrier.arrive(said.index(place), count=1)


@gluon.jit
def announced(agenda, turn):
    """The tile after tile number ``turn``."""
    numbers, said = agenda
    place = turn % 4
    mbarrier.wait(said.index(place), (turn // 4) & 1)
    return gl.sum(numbers.index(place).load(LINE), axis=0)


@gluon.jit
def producer(
    x,
    x_scale_ptr,
    weight,
    counts_ptr,
    finished_ptr,
    slot_token_ptr,
    tickets_ptr,
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
    expert, count = load_counts(counts_ptr, SWIGLU, E, E_POW2)
    if not SWIGLU:
        through = all_finished(finished_ptr, count, FIRST_M, SIGNALS, E)
        if through:
            wait_for_previous_kernel(PDL)
    tile = gl.program_id(0)
    at, rows, rows_before, _, tile_m, tile_n = locate(tile, expert, count, ROWS, TILES_N, E)
    step = 0
    turn = 0
    while at < E:
        slot = tile_m * ROWS + gl.arange(0, ROWS, layout=LINE)
        real = slot < rows
        if SWIGLU:  # rows are gathered by their tokens
            tokens_at = slot_token_ptr + at.to(gl.int64) * num_tokens
            row = gl.load(tokens_at + slot, mask=real, other=0)
            x_slot = tile_m * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPY))
            x_real = x_slot < rows
            x_row = gl.load(tokens_at + x_slot, mask=x_real, other=0)
            column = gl.arange(0, 128, layout=gl.SliceLayout(0, COPY))
            x_at = x + (x_row.to(gl.int64) * X_STRIDE)[:, None] + column[None, :]
            x_mask = x_real[:, None] & (column[None, :] >= 0)
            weight_row = at * N + tile_n * COLUMNS
        else:
            row = rows_before + slot
            weight_row = at * N + first_column + tile_n * (2 * COLUMNS)
            if not through:
                await_expert(finished_ptr, at, rows, FIRST_M, SIGNALS)
                let_async_copies_see(PDL)
        scale_at = x_scale_ptr + row.to(gl.int64) * stride_scale_t
        for block in range(K // 128):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, 2 * 128 * 128 if SWIGLU else 3 * 128 * 128)
            for consumer in gl.static_range(2):
                w = weight_stages.index(stage * 2 + consumer)
                if SWIGLU:
                    load_tile(weight, [weight_row + UP + consumer * 64, block * 128], bar, w.slice(0, 64, dim=0))
                    load_tile(weight, [weight_row + GATE + consumer * 64, block * 128], bar, w.slice(64, 64, dim=0))
                else:
                    load_tile(weight, [weight_row + consumer * 128, block * 128], bar, w)
            if SWIGLU:
                load_rows(x_stages.index(stage), x_at + block * 128, mask=x_mask)
            else:
                load_tile(x, [rows_before + tile_m * ROWS, block * 128], bar, x_stages.index(stage))
            load_rows(scale_stages.index(stage), scale_at, mask=real)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            scale_at += stride_scale_k
            step += 1
        # Tiles cost more and less: whoever is done takes the next one.
        tile = gl.num_programs(0) + gl.atomic_add(tickets_ptr, 1, sem="relaxed")
        announce(agenda, turn, tile)
        turn += 1
        at, rows, rows_before, _, tile_m, tile_n = locate_next(
            tile, counts_ptr, expert, count, TILES_N, SWIGLU, E, E_POW2
        )  # fmt: skip


@gluon.jit
def promoted(total, product, row_scale, left, right, TWO: gl.constexpr):
    """The sum with one block's product, promoted by the scales of its rows and of its left and right 64 columns."""
    if TWO:
        column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, ACC))
        scale = gl.where(column < COLUMNS // 2, left, right)
        return total + product * (row_scale[:, None] * scale[None, :])
    else:
        return total + product * (row_scale * left)[:, None]


@gluon.jit
def await_stage(ring, step, wanted, FENCE: gl.constexpr, STAGES: gl.constexpr):
    """Wait until a stage is full, and load the scales of its rows: of the upper 64 and of the lower."""
    x_stages, scale_stages, weight_stages, full, empty = ring
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1, pred=wanted)
    if FENCE:
        fence_async_shared()  # rows that were not written by TMA
    scale = scale_stages.index(stage)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    return scale.slice(0, CHUNK).load(BY_ROW), scale.slice(CHUNK, CHUNK).load(BY_ROW)


@gluon.jit
def multiply(
    ring,
    left_at,
    right_at,
    left,
    right,
    step,
    never,
    K_BLOCKS: gl.constexpr,
    TWO: gl.constexpr,
    STAGES: gl.constexpr,
    ME: gl.constexpr,
    CHUNKS: gl.constexpr,
):
    """The sums of a consumer's columns: of a tile's upper 64 rows and, if CHUNKS is 2, of its lower ones; next step.

    What the next block needs is awaited while this block's last product runs: between two products stands nothing but
    the first one's promotion. A product gets the one before as an operand that ``never`` (false, but not known to the
    compiler) keeps out of the sum, so that its registers are taken again, and not before its promotion.
    """
    x_stages, scale_stages, weight_stages, full, empty = ring
    total = gl.zeros([CHUNK, COLUMNS], gl.float32, layout=ACC)
    below = gl.zeros([CHUNK, COLUMNS], gl.float32, layout=ACC)
    product = gl.zeros([CHUNK, COLUMNS], gl.float32, layout=ACC)
    upper_scale, lower_scale = await_stage(ring, step, True, TWO, STAGES)
    for block in range(K_BLOCKS):
        stage = step % STAGES
        x = x_stages.index(stage)
        w = weight_stages.index(stage * 2 + ME).permute((1, 0))
        ahead = gl.minimum(block + 1, K_BLOCKS - 1)
        product = warpgroup_mma(x.slice(0, CHUNK, dim=0), w, product, use_acc=never, is_async=True)
        next_left, next_right = gl.load(left_at + ahead), gl.load(right_at + ahead)
        if CHUNKS == 2:
            product = warpgroup_mma_wait(0, deps=[product])
            total = promoted(total, product, upper_scale, left, right, TWO)
            product = warpgroup_mma(x.slice(CHUNK, CHUNK, dim=0), w, product, use_acc=never, is_async=True)
        next_upper, next_lower = await_stage(ring, step + 1, block + 1 < K_BLOCKS, TWO, STAGES)
        product = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(empty.index(stage), count=1)
        if CHUNKS == 2:
            below = promoted(below, product, lower_scale, left, right, TWO)
        else:
            total = promoted(total, product, upper_scale, left, right, TWO)
        left, right, upper_scale, lower_scale = next_left, next_right, next_upper, next_lower
        step += 1
    return total, below, step


@gluon.jit
def weight_scales(
    weight_scale_ptr,
    at,
    tile_n,
    first_column,
    K_BLOCKS: gl.constexpr,
    N: gl.constexpr,
    SWIGLU: gl.constexpr,
    UP: gl.constexpr,
    GATE: gl.constexpr,
    E: gl.constexpr,
    ME: gl.constexpr,
):
    """Where the scales of a consumer's left and right 64 columns are; of the first expert's if there is no tile."""
    expert = gl.where(at < E, at, 0)
    if SWIGLU:
        first = weight_scale_ptr + (expert * (N // 128) + tile_n) * K_BLOCKS
        return first + UP // 128 * K_BLOCKS, first + GATE // 128 * K_BLOCKS
    else:
        first = weight_scale_ptr + (expert * (N // 128) + first_column // 128 + tile_n * 2 + ME) * K_BLOCKS
        return first, first


@gluon.jit
def consumer(
    weight_scale_ptr,
    counts_ptr,
    finished_ptr,
    out_ptr,
    out_scale_ptr,
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
    """Multiply, promote and store the columns of one consumer: the left half of each tile's (ME 0) or the right."""
    K_BLOCKS: gl.constexpr = K // 128
    expert, count = load_counts(counts_ptr, SWIGLU, E, E_POW2)
    at, rows, rows_before, _, tile_m, tile_n = locate(gl.program_id(0), expert, count, ROWS, TILES_N, E)
    step = 0
    turn = 0
    never = capacity < 0
    left_at, right_at = weight_scales(weight_scale_ptr, at, tile_n, first_column, K_BLOCKS, N, SWIGLU, UP, GATE, E, ME)
    left, right = gl.load(left_at), gl.load(right_at)
    while at < E:
        here = rows - tile_m * ROWS
        # Two loops: a branch inside of one would copy and spill the sums.
        if here > CHUNK:
            total, below, step = multiply(
                ring, left_at, right_at, left, right, step, never, K_BLOCKS, SWIGLU, STAGES, ME, 2
            )
        else:
            total, below, step = multiply(
                ring, left_at, right_at, left, right, step, never, K_BLOCKS, SWIGLU, STAGES, ME, 1
            )
        first_row = rows_before + tile_m * ROWS
        column_tile, stored = tile_n, at
        # The next tile's first scales are on their way while this one is stored.
        at, rows, rows_before, _, tile_m, tile_n = locate_next(
            announced(agenda, turn), counts_ptr, expert, count, TILES_N, SWIGLU, E, E_POW2
        )
        left_at, right_at = weight_scales(
            weight_scale_ptr, at, tile_n, first_column, K_BLOCKS, N, SWIGLU, UP, GATE, E, ME
        )
        left, right = gl.load(left_at), gl.load(right_at)
        if SWIGLU:
            value = swiglu(total)
            value_below = swiglu(below)
            amax = gl.max(gl.abs(value), axis=1)
            amax_below = gl.max(gl.abs(value_below), axis=1)
            # Written and read by turns: this consumer is at most one tile ahead of the other.
            parity = turn & 1
            buffers, barriers = exchange
            mine, others = parity * 4 + ME * 2, parity * 4 + (1 - ME) * 2
            buffers.index(mine).store(amax)
            buffers.index(mine + 1).store(amax_below)
            mbarrier.arrive(barriers.index(parity * 2 + ME), count=1)
            mbarrier.wait(barriers.index(parity * 2 + 1 - ME), (turn >> 1) & 1)
            amax = gl.maximum(amax, buffers.index(others).load(gl.SliceLayout(1, HALF)))
            amax_below = gl.maximum(amax_below, buffers.index(others + 1).load(gl.SliceLayout(1, HALF)))
            store_quantized(
                value, amax, out_ptr, out_scale_ptr, first_row, here, column_tile, capacity, OUT_COLUMNS, ME
            )
            if here > CHUNK:
                store_quantized(
                    value_below, amax_below, out_ptr, out_scale_ptr, first_row + CHUNK, here - CHUNK, column_tile,
                    capacity, OUT_COLUMNS, ME,
                )  # fmt: skip
            signal(finished_ptr, stored, E)
        else:
            column = column_tile * (2 * COLUMNS) + ME * COLUMNS
            store_rows(total, out_ptr, first_row, here, column, OUT_COLUMNS)
            if here > CHUNK:
                store_rows(below, out_ptr, first_row + CHUNK, here - CHUNK, column, OUT_COLUMNS)
        turn += 1


@gluon.jit
def swiglu(total):
    """``silu(gate) * up`` of a chunk whose left 64 columns are up and whose right 64 are gate."""
    up, gate = total.reshape([CHUNK, 2, COLUMNS // 2]).permute(0, 2, 1).split()
    up = gl.convert_layout(up, HALF)
    gate = gl.convert_layout(gate, HALF)
    return swiglu_of(gate, up)


@gluon.jit
def store_quantized(
    value, amax, out_ptr, out_scale_ptr, first_row, rows, block_n, capacity, OUT_COLUMNS: gl.constexpr, ME: gl.constexpr
):
    """Store 64 of a 128 block's columns in e4m3, and its scales."""
    quantized, scale = quantize(value, amax)
    wide: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    quantized = gl.convert_layout(quantized, wide)
    slot = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, wide))
    column = block_n * 128 + ME * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, wide))
    at = out_ptr + (first_row + slot).to(gl.int64)[:, None] * OUT_COLUMNS + column[None, :]
    gl.store(at, quantized, mask=(slot < rows)[:, None] & (column[None, :] >= 0))
    if ME == 0:
        slot = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, HALF))
        gl.store(out_scale_ptr + block_n.to(gl.int64) * capacity + first_row + slot, scale, mask=slot < rows)


@gluon.jit
def store_rows(total, out_ptr, first_row, rows, first_column, OUT_COLUMNS: gl.constexpr):
    """Store a chunk in bfloat16."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    value = gl.convert_layout(total.to(gl.bfloat16), wide)
    slot = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, wide))
    column = first_column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, wide))
    at = out_ptr + (first_row + slot).to(gl.int64)[:, None] * OUT_COLUMNS + column[None, :]
    gl.store(at, value, mask=(slot < rows)[:, None] & (column[None, :] >= 0))


@gluon.jit
def run_partitions(
    x, x_scale_ptr, weight, weight_scale_ptr, counts_ptr, finished_ptr, slot_token_ptr, out_ptr, out_scale_ptr,
    tickets_ptr, first_column, stride_scale_k, stride_scale_t, num_tokens, capacity,
    X_STRIDE: gl.constexpr, K: gl.constexpr, N: gl.constexpr, OUT_COLUMNS: gl.constexpr, TILES_N: gl.constexpr,
    SWIGLU: gl.constexpr, UP: gl.constexpr, GATE: gl.constexpr, E: gl.constexpr, E_POW2: gl.constexpr,
    FIRST_M: gl.constexpr, SIGNALS: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Both GEMMs: set up the ring and start the three warp groups."""
    x_stages = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, ROWS, 128], E4M3)
    scale_stages = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], PLAIN)
    weight_stages = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 2, COLUMNS, 128], E4M3)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    buffers = gl.allocate_shared_memory(gl.float32, [8, CHUNK], PLAIN)
    barriers = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=129)  # the weights' bytes, and 128 threads' copies of rows
        mbarrier.init(empty.index(stage), count=2)
    numbers = gl.allocate_shared_memory(gl.int32, [4, 1], PLAIN)
    said = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(4):
        mbarrier.init(barriers.index(number), count=1)
        mbarrier.init(said.index(number), count=1)
    if SWIGLU:
        wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    ring = (x_stages, scale_stages, weight_stages, full, empty)
    agenda = (numbers, said)
    exchange = (buffers, barriers)
    # Written out in the call: a tuple in a variable would make tensors of the compile-time arguments.
    gl.warp_specialize(
        [
            (consumer, (
                weight_scale_ptr, counts_ptr, finished_ptr, out_ptr, out_scale_ptr, first_column, capacity, ring,
                agenda, exchange, K, N, OUT_COLUMNS, TILES_N, SWIGLU, UP, GATE, E, E_POW2, STAGES, 0,
            )),
            (consumer, (
                weight_scale_ptr, counts_ptr, finished_ptr, out_ptr, out_scale_ptr, first_column, capacity, ring,
                agenda, exchange, K, N, OUT_COLUMNS, TILES_N, SWIGLU, UP, GATE, E, E_POW2, STAGES, 1,
            )),
            (producer, (
                x, x_scale_ptr, weight, counts_ptr, finished_ptr, slot_token_ptr, tickets_ptr, first_column,
                stride_scale_k, stride_scale_t, num_tokens, ring, agenda, X_STRIDE, K, N, TILES_N, SWIGLU, UP, GATE,
                E, E_POW2, FIRST_M, SIGNALS, STAGES, PDL,
            )),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
    if not SWIGLU:
        # The end of this kernel has to mean the end of GEMM1: what comes next may clear the counters of both.
        wait_for_previous_kernel(PDL)


@gluon.jit(do_not_specialize=["ticket", "stride_scale_k", "stride_scale_t", "num_tokens", "capacity"])
def hopper_gemm1_kernel(
    hidden_ptr,  # [T, HIDDEN] e4m3, rows STRIDE_HIDDEN apart
    hidden_scale_ptr,  # [HIDDEN/128, T] float32
    weight,  # descriptor of [E * 2 * INTERMEDIATE, HIDDEN] e4m3, 64 rows by 128
    weight_scale_ptr,  # [E, 2 * INTERMEDIATE/128, HIDDEN/128] float32
    counts_ptr,  # [E] int32
    slot_token_ptr,  # [E, T] int32
    out_ptr,  # [capacity, INTERMEDIATE] e4m3, out
    out_scale_ptr,  # [INTERMEDIATE/128, capacity] float32, out
    finished_ptr,  # [E + 1] int32, zeros on entry: two signals for each row tile's 128 block of the activation
    tickets_ptr,  # int32, number ``ticket`` of them zero on entry
    ticket,
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
        out_scale_ptr, tickets_ptr + ticket, 0, stride_scale_k, stride_scale_t, num_tokens, capacity,
        STRIDE_HIDDEN, HIDDEN, 2 * INTERMEDIATE, INTERMEDIATE, INTERMEDIATE // 128, True, UP, GATE, E, E_POW2,
        1, 1, STAGES, CONSUMER_REGISTERS, PRODUCER_REGISTERS, PDL,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["ticket", "first_column", "capacity"])
def hopper_gemm2_kernel(
    activated,  # descriptor of [capacity, INTERMEDIATE] e4m3, 128 rows by 128
    activated_scale_ptr,  # [INTERMEDIATE/128, capacity] float32
    weight,  # descriptor of [E * HIDDEN, INTERMEDIATE] e4m3, 128 rows by 128
    weight_scale_ptr,  # [E, HIDDEN/128, INTERMEDIATE/128] float32
    counts_ptr,  # [E] int32
    finished_ptr,  # [E + 1] int32: GEMM1's signals, see `finished`
    out_ptr,  # [capacity, COLUMNS] bfloat16, out: columns first_column... of the result
    tickets_ptr,  # int32, number ``ticket`` of them zero on entry
    ticket,
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
    gl.static_assert(COLUMNS % 256 == 0)
    run_partitions(
        activated, activated_scale_ptr, weight, weight_scale_ptr, counts_ptr, finished_ptr, counts_ptr, out_ptr,
        counts_ptr, tickets_ptr + ticket, first_column, capacity, 1, 0, capacity,
        INTERMEDIATE, INTERMEDIATE, HIDDEN, COLUMNS, COLUMNS // 256, False, 0, 0, E, E_POW2,
        FIRST_M, SIGNALS, STAGES, CONSUMER_REGISTERS, PRODUCER_REGISTERS, PDL,
    )  # fmt: skip
