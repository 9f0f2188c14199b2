"""Grouped FP8 block-scale GEMMs for many rows on Hopper, in Gluon: one warp group loads, two multiply.

Where an expert has rows enough that arithmetic binds, a program that waits for each product before it promotes it
leaves the tensor cores idle half of the time. Here two consumers never wait for one another: while one promotes, the
other multiplies.

A tile is 128 rows by 256 weight rows. Each consumer has all its rows and half of its columns, in two chunks of 64 rows,
of which the second is left out where an expert's last tile has no more than 64. GEMM1's 256 columns are 128 of up and
128 of gate, of which each consumer has 64: SwiGLU's operands. A row's 128 columns share one scale, for which the two
exchange the largest value of their halves.

Roles (12 warps)
    producer (``[8:12]``)
        Draws tiles; loads rows (GEMM1: gathered by cp.async; GEMM2: TMA), their scales (cp.async) and weights (TMA).
    consumer 0, 1 (``[0:4]``, ``[4:8]``)
        wgmma, promotion by the scales, epilogue.

Barriers (arrivals)
    pipeline.full (129)
        producer -> consumers: the bytes of TMA, and each of 128 threads' cp.async.
    pipeline.empty (2)
        consumers -> producer: both have read the stage.
    scheduler.published (1)
        producer -> consumers: the number of the next tile.
    row_max.ready (1), GEMM1
        consumer -> the other one: its maxima of a tile, in one of two buffers by turns.

Timeline (b: blocks of the sum)
    producer    load b0 b1 ... | publish | load the next tile's b0 b1 ...
    consumer 0  mma b0 upper, promote, mma b0 lower, promote | ... | next tile's number and scales | epilogue | ...
    consumer 1  the same, half a block later
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ....problem import MoEProblem
from ...aggregate import aggregate
from ...launcher import DeviceLimits, Kernel
from ...pdl import let_next_kernel_start, wait_for_previous_kernel
from ...plan import LaunchKey
from ...quantize import amax_of, larger, quantize, swiglu_of
from ...shapes import max_local_rows
from ...steps import Step
from ..completion import Signals, all_finished, await_expert, let_async_copies_see, signal
from .common import (
    ALL,
    COPY,
    LINE,
    PLAIN,
    Pipeline,
    Resources,
    Share,
    SwizzledTiles,
    TileScheduler,
    channel_slots,
    gemm1_constants,
    gemm2_constants,
    gemm2_operands,
    load_rows,
    load_tile,
    make_pipeline,
    make_scheduler,
)

BLOCK_M = gl.constexpr(128)
BLOCK_N = gl.constexpr(256)
CHUNK = gl.constexpr(64)  # rows of a product: what wgmma takes
WG_N = gl.constexpr(128)  # weight rows of each consumer, and of a block of the sum
ACC = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]))
HALF = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 32]))


@aggregate
class RowMax:
    """How the consumers exchange the largest values of their halves of a tile's rows: two buffers, by turns."""

    values: gl.shared_memory_descriptor  # [turn, consumer, chunk] of [CHUNK] float32
    ready: gl.shared_memory_descriptor  # [turn, consumer] barriers

    @gluon.jit
    def exchange(self, upper, lower, turn, WG: gl.constexpr):
        """Of whole rows. A consumer is at most one tile ahead of the other."""
        parity = turn & 1
        mine, others = parity * 4 + WG * 2, parity * 4 + (1 - WG) * 2
        self.values.index(mine).store(upper)
        self.values.index(mine + 1).store(lower)
        mbarrier.arrive(self.ready.index(parity * 2 + WG), count=1)
        mbarrier.wait(self.ready.index(parity * 2 + 1 - WG), (turn >> 1) & 1)
        BY_ROW: gl.constexpr = gl.SliceLayout(1, HALF)
        upper = larger(upper, self.values.index(others).load(BY_ROW))
        lower = larger(lower, self.values.index(others + 1).load(BY_ROW))
        return upper, lower


@aggregate
class Gemm1:
    """Arguments of GEMM1's partitions; the pointers are those of `hopper_gemm1_kernel`."""

    weight_scale_ptr: gl.tensor
    finished_ptr: gl.tensor
    out_ptr: gl.tensor
    out_scale_ptr: gl.tensor
    max_rows: gl.tensor
    pipeline: Pipeline
    scheduler: TileScheduler
    row_max: RowMax
    hidden_ptr: gl.tensor
    hidden_scale_ptr: gl.tensor
    weight: tma.tensor_descriptor
    slot_token_ptr: gl.tensor
    stride_scale_k: gl.tensor
    stride_scale_t: gl.tensor
    num_tokens: gl.tensor
    STRIDE_HIDDEN: gl.constexpr
    HIDDEN: gl.constexpr
    INTERMEDIATE: gl.constexpr
    UP: gl.constexpr  # first row of an expert's up weights
    GATE: gl.constexpr
    E: gl.constexpr

    @gluon.jit
    def scales_at(self, tile):
        """Where a tile's scales of up and of gate are; the first expert's if there is no tile."""
        K_BLOCKS: gl.constexpr = self.HIDDEN // 128
        expert = gl.where(tile.expert < self.E, tile.expert, 0)
        first = self.weight_scale_ptr + (expert * (2 * self.INTERMEDIATE // 128) + tile.n) * K_BLOCKS
        return first + self.UP // 128 * K_BLOCKS, first + self.GATE // 128 * K_BLOCKS


@aggregate
class Gemm2:
    """Arguments of GEMM2's partitions; the pointers are those of `hopper_gemm2_kernel`."""

    weight_scale_ptr: gl.tensor
    finished_ptr: gl.tensor
    out_ptr: gl.tensor
    first_column: gl.tensor
    max_rows: gl.tensor
    pipeline: Pipeline
    scheduler: TileScheduler
    activated: tma.tensor_descriptor
    activated_scale_ptr: gl.tensor
    weight: tma.tensor_descriptor
    HIDDEN: gl.constexpr
    INTERMEDIATE: gl.constexpr
    COLUMNS: gl.constexpr
    FIRST_M: gl.constexpr
    SIGNALS: gl.constexpr
    E: gl.constexpr
    PDL: gl.constexpr

    @gluon.jit
    def scales_at(self, tile, WG: gl.constexpr):
        """Where the scales of a consumer's columns are; the first expert's if there is no tile."""
        K_BLOCKS: gl.constexpr = self.INTERMEDIATE // 128
        expert = gl.where(tile.expert < self.E, tile.expert, 0)
        block = expert * (self.HIDDEN // 128) + self.first_column // 128 + tile.n * 2 + WG
        return self.weight_scale_ptr + block * K_BLOCKS


@gluon.jit
def gemm1_producer(p):
    """Load the blocks of all tiles of this program."""
    pipeline = p.pipeline
    expert, tokens = p.scheduler.load_tokens_per_expert("")
    tile = p.scheduler.locate(gl.program_id(0), expert, tokens)
    step = 0
    turn = 0
    while tile.expert < p.E:
        slot = tile.m * BLOCK_M + gl.arange(0, BLOCK_M, layout=LINE)
        real = slot < tile.rows
        tokens_at = p.slot_token_ptr + tile.expert.to(gl.int64) * p.num_tokens
        row = gl.load(tokens_at + slot, mask=real, other=0)
        x_slot = tile.m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, COPY))
        x_real = x_slot < tile.rows
        x_row = gl.load(tokens_at + x_slot, mask=x_real, other=0)
        column = gl.arange(0, 128, layout=gl.SliceLayout(0, COPY))
        x_at = p.hidden_ptr + (x_row.to(gl.int64) * p.STRIDE_HIDDEN)[:, None] + column[None, :]
        x_mask = x_real[:, None] & (column[None, :] >= 0)
        weight_row = tile.expert * (2 * p.INTERMEDIATE) + tile.n * WG_N
        scale_at = p.hidden_scale_ptr + row.to(gl.int64) * p.stride_scale_t
        for block in range(p.HIDDEN // 128):
            stage = step % pipeline.STAGES
            pipeline.producer_acquire(step, BLOCK_N * 128)
            bar = pipeline.full.index(stage)
            for wg in gl.static_range(2):
                w = pipeline.weight.index(stage * 2 + wg)
                load_tile(p.weight, [weight_row + p.UP + wg * 64, block * 128], bar, w.slice(0, 64, dim=0))
                load_tile(p.weight, [weight_row + p.GATE + wg * 64, block * 128], bar, w.slice(64, 64, dim=0))
            load_rows(pipeline.x.index(stage), x_at + block * 128, mask=x_mask)
            load_rows(pipeline.x_scale.index(stage), scale_at, mask=real)
            pipeline.producer_commit(step)
            scale_at += p.stride_scale_k
            step += 1
        number = p.scheduler.publish_tile(turn)
        turn += 1
        # Kept in registers, the vectors would spill.
        expert, tokens = p.scheduler.load_tokens_per_expert("")
        tile = p.scheduler.locate(number, expert, tokens)


@gluon.jit
def gemm2_producer(p):
    """Load the blocks of all tiles of this program, each expert's once GEMM1 has finished it."""
    pipeline = p.pipeline
    # Nothing was waited for: L1 may hold older counts.
    expert, tokens = p.scheduler.load_tokens_per_expert(".cg")
    through = all_finished(p.finished_ptr, p.scheduler.own(tokens), p.FIRST_M, p.SIGNALS, p.E)
    if through:
        wait_for_previous_kernel(p.PDL)
    tile = p.scheduler.locate(gl.program_id(0), expert, tokens)
    step = 0
    turn = 0
    while tile.expert < p.E:
        slot = tile.m * BLOCK_M + gl.arange(0, BLOCK_M, layout=LINE)
        real = slot < tile.rows
        row = tile.rows_before + slot
        weight_row = tile.expert * p.HIDDEN + p.first_column + tile.n * BLOCK_N
        if not through:
            await_expert(p.finished_ptr, tile.expert, tile.rows, p.FIRST_M, p.SIGNALS)
            let_async_copies_see(p.PDL)
        scale_at = p.activated_scale_ptr + row.to(gl.int64)
        for block in range(p.INTERMEDIATE // 128):
            stage = step % pipeline.STAGES
            pipeline.producer_acquire(step, (BLOCK_M + BLOCK_N) * 128)
            bar = pipeline.full.index(stage)
            for wg in gl.static_range(2):
                w = pipeline.weight.index(stage * 2 + wg)
                load_tile(p.weight, [weight_row + wg * WG_N, block * 128], bar, w)
            load_tile(p.activated, [tile.rows_before + tile.m * BLOCK_M, block * 128], bar, pipeline.x.index(stage))
            load_rows(pipeline.x_scale.index(stage), scale_at, mask=real)
            pipeline.producer_commit(step)
            scale_at += p.max_rows
            step += 1
        number = p.scheduler.publish_tile(turn)
        turn += 1
        tile = p.scheduler.locate(number, expert, tokens)


@gluon.jit
def promoted(total, product, row_scale, left, right, SPLIT_SCALES: gl.constexpr):
    """The sum with one block's product, promoted by the scales of its rows and of its left and right 64 columns."""
    if SPLIT_SCALES:
        column = gl.arange(0, WG_N, layout=gl.SliceLayout(0, ACC))
        scale = gl.where(column < WG_N // 2, left, right)
        return total + product * (row_scale[:, None] * scale[None, :])
    else:
        return total + product * (row_scale * left)[:, None]


@gluon.jit
def await_stage(pipeline, step, pred, FENCE: gl.constexpr):
    """Wait until a stage is full, and load the scales of its rows: of the upper 64 and of the lower."""
    pipeline.consumer_wait(step, pred)
    if FENCE:
        fence_async_shared()  # rows that were not written by TMA
    scale = pipeline.x_scale.index(step % pipeline.STAGES)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    return scale.slice(0, CHUNK).load(BY_ROW), scale.slice(CHUNK, CHUNK).load(BY_ROW)


@gluon.jit
def multiply(
    pipeline, left_at, right_at, left, right, step, use_acc, K_BLOCKS: gl.constexpr, SPLIT_SCALES: gl.constexpr,
    CHUNKS: gl.constexpr, WG: gl.constexpr,
):  # fmt: skip
    """The sums of a consumer's columns: of a tile's upper 64 rows and, if CHUNKS is 2, of its lower ones; next step.

    The next block is awaited while this block's last product runs, so that only a promotion separates two products. A
    product takes the previous one as its accumulator, which ``use_acc`` (false, unknown to the compiler) ignores: its
    registers are reused, and not before it has been promoted.
    """
    total = gl.zeros([CHUNK, WG_N], gl.float32, layout=ACC)
    below = gl.zeros([CHUNK, WG_N], gl.float32, layout=ACC)
    product = gl.zeros([CHUNK, WG_N], gl.float32, layout=ACC)
    upper_scale, lower_scale = await_stage(pipeline, step, True, SPLIT_SCALES)
    for block in range(K_BLOCKS):
        stage = step % pipeline.STAGES
        x = pipeline.x.index(stage)
        w = pipeline.weight.index(stage * 2 + WG).permute((1, 0))
        ahead = gl.minimum(block + 1, K_BLOCKS - 1)
        product = warpgroup_mma(x.slice(0, CHUNK, dim=0), w, product, use_acc=use_acc, is_async=True)
        next_left, next_right = gl.load(left_at + ahead), gl.load(right_at + ahead)
        if CHUNKS == 2:
            product = warpgroup_mma_wait(0, deps=[product])
            total = promoted(total, product, upper_scale, left, right, SPLIT_SCALES)
            product = warpgroup_mma(x.slice(CHUNK, CHUNK, dim=0), w, product, use_acc=use_acc, is_async=True)
        next_upper, next_lower = await_stage(pipeline, step + 1, block + 1 < K_BLOCKS, SPLIT_SCALES)
        product = warpgroup_mma_wait(0, deps=[product])
        pipeline.consumer_release(step)
        if CHUNKS == 2:
            below = promoted(below, product, lower_scale, left, right, SPLIT_SCALES)
        else:
            total = promoted(total, product, upper_scale, left, right, SPLIT_SCALES)
        left, right, upper_scale, lower_scale = next_left, next_right, next_upper, next_lower
        step += 1
    return total, below, step


@gluon.jit
def gemm1_consumer(p, WG: gl.constexpr):
    """GEMM1's left (WG 0) or right 64 columns of up and of gate, with their SwiGLU and quantisation."""
    K_BLOCKS: gl.constexpr = p.HIDDEN // 128
    expert, tokens = p.scheduler.load_tokens_per_expert("")
    tile = p.scheduler.locate(gl.program_id(0), expert, tokens)
    step = 0
    turn = 0
    use_acc = p.max_rows < 0
    up_at, gate_at = p.scales_at(tile)
    up_scale, gate_scale = gl.load(up_at), gl.load(gate_at)
    while tile.expert < p.E:
        rows = tile.rows - tile.m * BLOCK_M
        # Two loops: a branch inside one would copy and spill the accumulators.
        if rows > CHUNK:
            total, below, step = multiply(
                p.pipeline, up_at, gate_at, up_scale, gate_scale, step, use_acc, K_BLOCKS, True, 2, WG
            )
        else:
            total, below, step = multiply(
                p.pipeline, up_at, gate_at, up_scale, gate_scale, step, use_acc, K_BLOCKS, True, 1, WG
            )
        done = tile
        first_row = done.rows_before + done.m * BLOCK_M
        # Prefetch the next tile's first scales during the epilogue.
        number = p.scheduler.next_tile(turn)
        expert, tokens = p.scheduler.load_tokens_per_expert("")
        tile = p.scheduler.locate(number, expert, tokens)
        up_at, gate_at = p.scales_at(tile)
        up_scale, gate_scale = gl.load(up_at), gl.load(gate_at)
        value = swiglu(total)
        value_below = swiglu(below)
        amax = amax_of(value)
        amax_below = amax_of(value_below)
        amax, amax_below = p.row_max.exchange(amax, amax_below, turn, WG)
        store_quantized(p, value, amax, first_row, rows, done.n, WG)
        if rows > CHUNK:
            store_quantized(p, value_below, amax_below, first_row + CHUNK, rows - CHUNK, done.n, WG)
        signal(p.finished_ptr, done.expert, p.E)
        turn += 1


@gluon.jit
def gemm2_consumer(p, WG: gl.constexpr):
    """GEMM2's left (WG 0) or right 128 columns of each tile."""
    K_BLOCKS: gl.constexpr = p.INTERMEDIATE // 128
    expert, tokens = p.scheduler.load_tokens_per_expert(".cg")
    tile = p.scheduler.locate(gl.program_id(0), expert, tokens)
    step = 0
    turn = 0
    use_acc = p.max_rows < 0
    scale_at = p.scales_at(tile, WG)
    scale = gl.load(scale_at)
    while tile.expert < p.E:
        rows = tile.rows - tile.m * BLOCK_M
        if rows > CHUNK:
            total, below, step = multiply(
                p.pipeline, scale_at, scale_at, scale, scale, step, use_acc, K_BLOCKS, False, 2, WG
            )
        else:
            total, below, step = multiply(
                p.pipeline, scale_at, scale_at, scale, scale, step, use_acc, K_BLOCKS, False, 1, WG
            )
        done = tile
        first_row = done.rows_before + done.m * BLOCK_M
        tile = p.scheduler.locate(p.scheduler.next_tile(turn), expert, tokens)
        scale_at = p.scales_at(tile, WG)
        scale = gl.load(scale_at)
        column = done.n * BLOCK_N + WG * WG_N
        store_rows(p, total, first_row, rows, column)
        if rows > CHUNK:
            store_rows(p, below, first_row + CHUNK, rows - CHUNK, column)
        turn += 1


@gluon.jit
def swiglu(total):
    """``silu(gate) * up`` of a chunk whose left 64 columns are up and whose right 64 are gate."""
    up, gate = total.reshape([CHUNK, 2, WG_N // 2]).permute(0, 2, 1).split()
    up = gl.convert_layout(up, HALF)
    gate = gl.convert_layout(gate, HALF)
    return swiglu_of(gate, up)


@gluon.jit
def store_quantized(p, value, amax, first_row, rows, block_n, WG: gl.constexpr):
    """Store 64 of a 128 block's columns in e4m3, and its scales."""
    quantized, scale = quantize(value, amax)
    wide: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    quantized = gl.convert_layout(quantized, wide)
    slot = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, wide))
    column = block_n * 128 + WG * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, wide))
    at = p.out_ptr + (first_row + slot).to(gl.int64)[:, None] * p.INTERMEDIATE + column[None, :]
    gl.store(at, quantized, mask=(slot < rows)[:, None] & (column[None, :] >= 0))
    if WG == 0:
        slot = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, HALF))
        gl.store(p.out_scale_ptr + block_n.to(gl.int64) * p.max_rows + first_row + slot, scale, mask=slot < rows)


@gluon.jit
def store_rows(p, total, first_row, rows, first_column):
    """Store a chunk in bfloat16."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    value = gl.convert_layout(total.to(gl.bfloat16), wide)
    slot = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, wide))
    column = first_column + gl.arange(0, WG_N, layout=gl.SliceLayout(0, wide))
    at = p.out_ptr + (first_row + slot).to(gl.int64)[:, None] * p.COLUMNS + column[None, :]
    gl.store(at, value, mask=(slot < rows)[:, None] & (column[None, :] >= 0))


@gluon.jit(do_not_specialize=["stride_scale_k", "stride_scale_t", "num_tokens", "max_rows", "above", "most"])
def hopper_gemm1_kernel(
    hidden_ptr,  # [T, HIDDEN] e4m3, rows STRIDE_HIDDEN apart
    hidden_scale_ptr,  # [HIDDEN/128, T] float32
    weight,  # descriptor of [E * 2 * INTERMEDIATE, HIDDEN] e4m3, 64 rows by 128
    weight_scale_ptr,  # [E, 2 * INTERMEDIATE/128, HIDDEN/128] float32
    tokens_per_expert_ptr,  # [E] int32
    slot_token_ptr,  # [E, T] int32
    out_ptr,  # [max_rows, INTERMEDIATE] e4m3, out
    out_scale_ptr,  # [INTERMEDIATE/128, max_rows] float32, out
    finished_ptr,  # [E + 1] int32, zeros on entry: two signals for each row tile's 128 block of the activation
    tile_counter_ptr,  # int32, zero on entry
    stride_scale_k,
    stride_scale_t,
    num_tokens,
    max_rows,
    above,  # as `Share` has them
    most,
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
    pipeline = make_pipeline(BLOCK_M, WG_N, 2, 2, STAGES)
    values = gl.allocate_shared_memory(gl.float32, [8, CHUNK], PLAIN)
    ready = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(4):
        mbarrier.init(ready.index(number), count=1)
    scheduler = make_scheduler(
        tokens_per_expert_ptr, tile_counter_ptr, above, most, BLOCK_M, INTERMEDIATE // 128,
        E, E_POW2, channel_slots(STAGES, HIDDEN // 128),
    )  # fmt: skip
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    p = Gemm1(
        weight_scale_ptr=weight_scale_ptr, finished_ptr=finished_ptr, out_ptr=out_ptr,
        out_scale_ptr=out_scale_ptr, max_rows=max_rows, pipeline=pipeline, scheduler=scheduler,
        row_max=RowMax(values=values, ready=ready), hidden_ptr=hidden_ptr, hidden_scale_ptr=hidden_scale_ptr,
        weight=weight, slot_token_ptr=slot_token_ptr, stride_scale_k=stride_scale_k,
        stride_scale_t=stride_scale_t, num_tokens=num_tokens, STRIDE_HIDDEN=STRIDE_HIDDEN, HIDDEN=HIDDEN,
        INTERMEDIATE=INTERMEDIATE, UP=INTERMEDIATE if GATE_FIRST else 0, GATE=0 if GATE_FIRST else INTERMEDIATE,
        E=E,
    )  # fmt: skip
    gl.warp_specialize(
        [(gemm1_consumer, (p, 0)), (gemm1_consumer, (p, 1)), (gemm1_producer, (p,))],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit(do_not_specialize=["first_column", "max_rows", "above", "most"])
def hopper_gemm2_kernel(
    activated,  # descriptor of [max_rows, INTERMEDIATE] e4m3, 128 rows by 128
    activated_scale_ptr,  # [INTERMEDIATE/128, max_rows] float32
    weight,  # descriptor of [E * HIDDEN, INTERMEDIATE] e4m3, 128 rows by 128
    weight_scale_ptr,  # [E, HIDDEN/128, INTERMEDIATE/128] float32
    tokens_per_expert_ptr,  # [E] int32
    finished_ptr,  # [E + 1] int32: GEMM1's signals, see `completion`
    out_ptr,  # [max_rows, COLUMNS] bfloat16, out: columns first_column... of the result
    tile_counter_ptr,  # [HIDDEN / COLUMNS] int32, zeros on entry
    first_column,
    max_rows,
    above,  # as `Share` has them
    most,
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
    gl.static_assert(COLUMNS % BLOCK_N == 0)
    pipeline = make_pipeline(BLOCK_M, WG_N, 2, 2, STAGES)
    scheduler = make_scheduler(
        tokens_per_expert_ptr, tile_counter_ptr + first_column // COLUMNS, above, most, BLOCK_M, COLUMNS // BLOCK_N,
        E, E_POW2, channel_slots(STAGES, INTERMEDIATE // 128),
    )  # fmt: skip
    let_next_kernel_start(PDL)
    p = Gemm2(
        weight_scale_ptr=weight_scale_ptr, finished_ptr=finished_ptr, out_ptr=out_ptr,
        first_column=first_column, max_rows=max_rows, pipeline=pipeline, scheduler=scheduler,
        activated=activated, activated_scale_ptr=activated_scale_ptr, weight=weight, HIDDEN=HIDDEN,
        INTERMEDIATE=INTERMEDIATE, COLUMNS=COLUMNS, FIRST_M=FIRST_M, SIGNALS=SIGNALS, E=E, PDL=PDL,
    )  # fmt: skip
    gl.warp_specialize(
        [(gemm2_consumer, (p, 0)), (gemm2_consumer, (p, 1)), (gemm2_producer, (p,))],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
    # GEMM1 has to end before this kernel does: the next one may clear the counters of both.
    wait_for_previous_kernel(PDL)


RESOURCES = Resources(stages=4, consumer_registers=232, producer_registers=40)
COLUMNS = BLOCK_N.value

GEMM1, GEMM2 = Kernel(hopper_gemm1_kernel), Kernel(hopper_gemm2_kernel)


def fits(problem: MoEProblem) -> bool:
    """Whether GEMM2 of this problem has the sizes that the kernel is for; GEMM1's may be any."""
    return problem.hidden_size % COLUMNS == 0


def gemm1(problem: MoEProblem, limits: DeviceLimits, key: LaunchKey, share: Share = ALL) -> Step:
    """SwiGLU of the first GEMM: ``[max_rows, I]`` e4m3 and ``[I/128, max_rows]`` scales."""
    e, width, inner = problem.num_local_experts, problem.intermediate_size, problem.hidden_size
    operands = (
        "hidden_states",
        "hidden_states_scale",
        SwizzledTiles("gemm1_weights", e, 2 * width, inner, 1, 64),
        "gemm1_weights_scale",
        "tokens_per_expert",
        "slot_token",
        "activated",
        "activated_scale",
        share.counter("finished"),
        share.counter("gemm1_tile_counter"),
        key.stride_scale_k,
        key.stride_scale_t,
        key.num_tokens,
        max_local_rows(problem, key.num_tokens),
        share.above,
        share.most,
    )
    constants = gemm1_constants(problem, limits, RESOURCES, key.stride_hidden)
    return Step(GEMM1, (limits.num_sms,), operands, constants)


def signals(problem: MoEProblem) -> Signals:
    """Of `gemm1`: both consumers' for each row tile and 128 block of the activation."""
    return Signals(BLOCK_M.value, 2 * problem.intermediate_size // problem.block)


def gemm2(
    problem: MoEProblem,
    limits: DeviceLimits,
    key: LaunchKey,
    columns: int,
    first_column: int,
    first: Signals,
    share: Share = ALL,
) -> Step:
    """Columns ``[first_column, first_column + columns)`` of the second GEMM into ``rows`` bfloat16.

    ``first`` are the signals of the step that computed the activation of the same ``share``.
    """
    operands = gemm2_operands(problem, key, first_column, share, BLOCK_M.value, 128)
    constants = gemm2_constants(problem, limits, RESOURCES, columns, first)
    return Step(GEMM2, (limits.num_sms,), operands, constants)
