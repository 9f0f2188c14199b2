"""Grouped FP8 block-scale GEMMs for few rows on Hopper, in Gluon: one warp group loads, two share each tile's sum.

With few rows an expert's weights are all that matters, and with few experts a tile's own chain of waiting, multiplying
and promoting, one 128 block of the sum after the other, takes longer than its bytes. Here each of two consumers has
every second block, and they add up their halves at the end of the tile.

A tile is 64 weight rows, which come first in the product as wgmma takes 64 rows of its first operand, by up to 32 rows
of the activation; in GEMM1 of up to 16 tokens by 16, which leaves room for more stages. GEMM1's are 32 of up and 32 of
gate; who finishes the last of the four tiles that make a 128 block quantises it.

Roles (12 warps)
    producer (``[8:12]``)
        Draws tiles; loads weights (TMA), rows and their scales (cp.async), two blocks at a time. Loads the next tile
        while the consumers store this one, and in GEMM2 a tile's first weights before GEMM1 has finished its expert.
    consumer 0 (``[0:4]``)
        wgmma and promotion of every second block, the sum of both halves, epilogue.
    consumer 1 (``[4:8]``)
        wgmma and promotion of the other blocks.

Barriers (arrivals)
    pipeline.full (129)
        producer -> the consumer of the block: the bytes of TMA, and each of 128 threads' cp.async.
    pipeline.empty (1)
        consumer of the block -> producer.
    scheduler.published (1)
        producer -> consumers: where the next tile is.
    acc_full (1)
        consumer 1 -> consumer 0: its half of the sum is in shared memory.
    acc_empty (1)
        consumer 0 -> consumer 1: it has stored the sum.

Timeline (b: blocks of the sum)
    producer    load b0 b1 | load b2 b3 | ... | publish | load the next tile's b0 b1 | ...
    consumer 0  mma b0, promote | mma b2, promote | ... | acc_full? add, epilogue, acc_empty! | ...
    consumer 1  mma b1, promote | mma b3, promote | ... | acc_empty? store half, acc_full! | ...
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
from ...quantize import quantize_block, swiglu_of
from ...shapes import max_local_rows, max_row_tiles
from ...steps import Step
from ..completion import Signals, all_finished, await_expert, count_arrival, signal
from .common import (
    COPY,
    LINE,
    Pipeline,
    Resources,
    SwizzledTiles,
    gemm1_constants,
    gemm2_constants,
    gemm2_operands,
    load_rows,
    load_tile,
    make_pipeline,
)
from .share import ALL, Share, is_shared
from .tile_scheduler import TileScheduler, channel_slots, make_scheduler

GROUP = gl.constexpr(2)  # 128 blocks of the sum that are loaded together
BLOCK_M = gl.constexpr(32)
FEW = gl.constexpr(16)  # what is computed where an expert has no more
BLOCK_N = gl.constexpr(64)  # weight rows of a tile
# Neighbouring columns of the result are one thread's: of 32 float32, of 64 bfloat16.
HALF_COLUMNS = gl.constexpr(gl.BlockedLayout([4, 1], [8, 4], [1, 4], [0, 1]))
COLUMNS = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))
WHOLE = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0]))  # a warp has a row of 128 columns
SHARED_SUMS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@aggregate
class Accumulator:
    """The sum of both consumers' halves of a tile, in shared memory."""

    sums: gl.shared_memory_descriptor  # [BLOCK_N, rows] float32
    acc_full: gl.shared_memory_descriptor
    acc_empty: gl.shared_memory_descriptor


@aggregate
class Gemm1:
    """Arguments of GEMM1's partitions; the pointers are those of `hopper_few_gemm1_kernel`."""

    weight_scale_ptr: gl.tensor
    finished_ptr: gl.tensor
    out_ptr: gl.tensor
    out_scale_ptr: gl.tensor
    unquantized_ptr: gl.tensor
    block_arrivals_ptr: gl.tensor
    max_rows: gl.tensor
    pipeline: Pipeline
    scheduler: TileScheduler
    accumulator: Accumulator
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
    def load_weights(self, weight_row, block, step, BLOCKS: gl.constexpr):
        """Start loading the weights of neighbouring blocks into the stages from ``step`` on, once these are empty.

        Memory serves them better together: each adds 128 bytes to the same weight rows.
        """
        pipeline = self.pipeline
        for number in gl.static_range(BLOCKS):
            pipeline.producer_acquire(step + number, BLOCK_N * 128)
        for part in gl.static_range(2):
            for number in gl.static_range(BLOCKS):
                stage = (step + number) % pipeline.STAGES
                bar, w, column = pipeline.full.index(stage), pipeline.weight.index(stage), (block + number) * 128
                row = weight_row + (self.GATE if part else self.UP)
                load_tile(self.weight, [row, column], bar, w.slice(part * (BLOCK_N // 2), BLOCK_N // 2, dim=0))

    @gluon.jit
    def scales_at(self, tile):
        """Where a tile's scales of up and of gate are."""
        K_BLOCKS: gl.constexpr = self.HIDDEN // 128
        first = self.weight_scale_ptr + (tile.expert * (2 * self.INTERMEDIATE // 128) + tile.n // 4) * K_BLOCKS
        return first + self.UP // 128 * K_BLOCKS, first + self.GATE // 128 * K_BLOCKS


@aggregate
class Gemm2:
    """Arguments of GEMM2's partitions; the pointers are those of `hopper_few_gemm2_kernel`."""

    weight_scale_ptr: gl.tensor
    finished_ptr: gl.tensor
    out_ptr: gl.tensor
    first_column: gl.tensor
    max_rows: gl.tensor
    pipeline: Pipeline
    scheduler: TileScheduler
    accumulator: Accumulator
    activated_ptr: gl.tensor
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
    def load_weights(self, weight_row, block, step, BLOCKS: gl.constexpr):
        """As `Gemm1.load_weights`."""
        pipeline = self.pipeline
        for number in gl.static_range(BLOCKS):
            pipeline.producer_acquire(step + number, BLOCK_N * 128)
        for number in gl.static_range(BLOCKS):
            stage = (step + number) % pipeline.STAGES
            bar, w, column = pipeline.full.index(stage), pipeline.weight.index(stage), (block + number) * 128
            load_tile(self.weight, [weight_row, column], bar, w)

    @gluon.jit
    def scales_at(self, tile):
        """Where a tile's scales are."""
        block = tile.expert * (self.HIDDEN // 128) + self.first_column // 128 + tile.n // 2
        return self.weight_scale_ptr + block * (self.INTERMEDIATE // 128)


@gluon.jit
def load_blocks(
    p, weight_row, x_at, x_mask, scale_at, scale_mask, stride_scale_k, block, step, ready, BLOCKS: gl.constexpr
):
    """Start loading all of neighbouring blocks, but for the weights of the tile's first ``ready``."""
    pipeline = p.pipeline
    if block >= ready:
        p.load_weights(weight_row, block, step, BLOCKS)
    for number in gl.static_range(BLOCKS):
        stage = (step + number) % pipeline.STAGES
        load_rows(pipeline.x.index(stage), x_at + (block + number) * 128, mask=x_mask)
        load_rows(pipeline.x_scale.index(stage), scale_at + number * stride_scale_k, mask=scale_mask)
        pipeline.producer_commit(step + number)


@gluon.jit
def load_tile_blocks(
    p, weight_row, x_at, x_mask, scale_at, scale_mask, stride_scale_k, step, ready, K_BLOCKS: gl.constexpr
):
    """`load_blocks` of a tile."""
    for group in range(K_BLOCKS // GROUP):
        load_blocks(
            p, weight_row, x_at, x_mask, scale_at, scale_mask, stride_scale_k, group * GROUP, step + group * GROUP,
            ready, GROUP,
        )  # fmt: skip
        scale_at += GROUP * stride_scale_k
    if K_BLOCKS % GROUP > 0:
        block = K_BLOCKS // GROUP * GROUP
        load_blocks(
            p, weight_row, x_at, x_mask, scale_at, scale_mask, stride_scale_k, block, step + block, ready,
            K_BLOCKS % GROUP,
        )  # fmt: skip


@gluon.jit
def gemm1_producer(p):
    """Load the blocks of all tiles of this program."""
    K_BLOCKS: gl.constexpr = p.HIDDEN // 128
    p.scheduler.fill_table("")
    tile = p.scheduler.locate(gl.program_id(0), False)
    p.scheduler.publish(0, tile)
    step = 0
    turn = 0
    while tile.expert < p.E:
        slot = gl.arange(0, p.scheduler.BLOCK_M, layout=LINE)
        x_slot = gl.arange(0, p.scheduler.BLOCK_M, layout=gl.SliceLayout(1, COPY))
        real = slot < tile.rows
        x_real = x_slot < tile.rows
        weight_row = tile.expert * (2 * p.INTERMEDIATE) + tile.n * (BLOCK_N // 2)
        tokens_at = p.slot_token_ptr + tile.expert.to(gl.int64) * p.num_tokens + tile.slot
        # For T = 1 the token is 0: a load that is masked off takes no time.
        unknown = gl.where(p.num_tokens > 1, tile.rows, 0)
        row = gl.load(tokens_at + slot, mask=slot < unknown, other=0)
        x_row = gl.load(tokens_at + x_slot, mask=x_slot < unknown, other=0)
        column = gl.arange(0, 128, layout=gl.SliceLayout(0, COPY))
        x_at = p.hidden_ptr + (x_row.to(gl.int64) * p.STRIDE_HIDDEN)[:, None] + column[None, :]
        x_mask = x_real[:, None] & (column[None, :] >= 0)
        scale_at = p.hidden_scale_ptr + row.to(gl.int64) * p.stride_scale_t
        load_tile_blocks(p, weight_row, x_at, x_mask, scale_at, real, p.stride_scale_k, step, 0, K_BLOCKS)
        step += K_BLOCKS
        tile = p.scheduler.locate(p.scheduler.draw_tile(), False)
        turn += 1
        p.scheduler.publish(turn, tile)


@gluon.jit
def gemm2_producer(p):
    """Load the blocks of all tiles of this program, the activation once GEMM1 has finished the tile's expert."""
    K_BLOCKS: gl.constexpr = p.INTERMEDIATE // 128
    # Blocks whose weights are loaded before the expert is finished.
    AHEAD: gl.constexpr = min(p.pipeline.STAGES, K_BLOCKS) // GROUP * GROUP
    # Nothing was waited for: L1 may hold older counts.
    tokens, _ = p.scheduler.fill_table(".cg")
    tile = p.scheduler.locate(gl.program_id(0), False)
    p.scheduler.publish(0, tile)
    through = all_finished(p.finished_ptr, p.scheduler.own(tokens), p.FIRST_M, p.SIGNALS, p.E)
    if through:
        wait_for_previous_kernel(p.PDL)
    step = 0
    turn = 0
    while tile.expert < p.E:
        slot = gl.arange(0, BLOCK_M, layout=LINE)
        x_slot = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, COPY))
        real = slot < tile.rows
        x_real = x_slot < tile.rows
        weight_row = tile.expert * p.HIDDEN + p.first_column + tile.n * BLOCK_N
        ready = 0
        if not through:
            for group in range(AHEAD // GROUP):
                p.load_weights(weight_row, group * GROUP, step + group * GROUP, GROUP)
            await_expert(p.finished_ptr, tile.expert, tile.expert_rows, p.FIRST_M, p.SIGNALS)
            ready = AHEAD
        row = tile.first_row + slot
        x_row = tile.first_row + x_slot
        column = gl.arange(0, 128, layout=gl.SliceLayout(0, COPY))
        x_at = p.activated_ptr + (x_row.to(gl.int64) * p.INTERMEDIATE)[:, None] + column[None, :]
        x_mask = x_real[:, None] & (column[None, :] >= 0)
        scale_at = p.activated_scale_ptr + row.to(gl.int64)
        load_tile_blocks(p, weight_row, x_at, x_mask, scale_at, real, p.max_rows, step, ready, K_BLOCKS)
        step += K_BLOCKS
        tile = p.scheduler.locate(p.scheduler.draw_tile(), False)
        turn += 1
        p.scheduler.publish(turn, tile)
        if not through:
            through = all_finished(p.finished_ptr, p.scheduler.own(tokens), p.FIRST_M, p.SIGNALS, p.E)


@gluon.jit
def load_scales(left_at, right_at, block, K_BLOCKS: gl.constexpr, SPLIT_SCALES: gl.constexpr):
    """Scales of the tile's first and last 32 weight rows for a block, or for the last one."""
    block = gl.minimum(block, K_BLOCKS - 1)
    left = gl.load(left_at + block)
    if SPLIT_SCALES:
        return left, gl.load(right_at + block)
    else:
        return left, left


@gluon.jit
def half_sum(
    pipeline, left_at, right_at, step, K_BLOCKS: gl.constexpr, ROWS: gl.constexpr, SUM: gl.constexpr,
    SPLIT_SCALES: gl.constexpr, WG: gl.constexpr,
):  # fmt: skip
    """The sum over every second block, those whose step has this consumer's parity."""
    total = gl.zeros([BLOCK_N, ROWS], gl.float32, layout=SUM)
    product = gl.zeros([BLOCK_N, ROWS], gl.float32, layout=SUM)
    is_left = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, SUM)) < BLOCK_N // 2
    first = (step + WG) & 1
    # Two blocks ahead: every eighth scale is a miss.
    left, right = load_scales(left_at, right_at, first, K_BLOCKS, SPLIT_SCALES)
    next_left, next_right = load_scales(left_at, right_at, first + 2, K_BLOCKS, SPLIT_SCALES)
    for block in range(first, K_BLOCKS, 2):
        stage = (step + block) % pipeline.STAGES
        pipeline.consumer_wait(step + block)
        fence_async_shared()  # rows that were not written by TMA
        x = pipeline.x.index(stage).slice(0, ROWS, dim=0).permute((1, 0))
        product = warpgroup_mma(pipeline.weight.index(stage), x, product, use_acc=False, is_async=True)
        row_scale = pipeline.x_scale.index(stage).slice(0, ROWS).load(gl.SliceLayout(0, SUM))
        factor = gl.where(is_left, left, right)
        left, right = next_left, next_right
        next_left, next_right = load_scales(left_at, right_at, block + 4, K_BLOCKS, SPLIT_SCALES)
        product = warpgroup_mma_wait(0, deps=[product])
        pipeline.consumer_release(step + block)
        total = total + product * (factor[:, None] * row_scale[None, :])
    return total


@gluon.jit
def store_activation(p, sums, tile, ROWS: gl.constexpr):
    """SwiGLU of a tile's sums; all four tiles of a 128 block being there, quantise it."""
    column = gl.arange(0, BLOCK_N // 2, layout=gl.SliceLayout(1, HALF_COLUMNS))
    slot = gl.arange(0, ROWS, layout=gl.SliceLayout(0, HALF_COLUMNS))
    up = sums.slice(0, BLOCK_N // 2, dim=0).load(HALF_COLUMNS)
    gate = sums.slice(BLOCK_N // 2, BLOCK_N // 2, dim=0).load(HALF_COLUMNS)
    value = swiglu_of(gate, up)
    row_at = p.unquantized_ptr + (tile.first_row + slot).to(gl.int64) * p.INTERMEDIATE
    at = row_at[None, :] + (tile.n * (BLOCK_N // 2) + column)[:, None]
    gl.store(at, value, mask=(slot < tile.rows)[None, :] & (column >= 0)[:, None])
    block = tile.n // 4
    if count_arrival(p.block_arrivals_ptr + tile.row_tile * (p.INTERMEDIATE // 128) + block) == 3:
        whole_column = gl.arange(0, 128, layout=gl.SliceLayout(0, WHOLE))
        whole_slot = gl.arange(0, ROWS, layout=gl.SliceLayout(1, WHOLE))
        real = whole_slot < tile.rows
        row = (tile.first_row + whole_slot).to(gl.int64)
        wide_at = row[:, None] * p.INTERMEDIATE + (block * 128 + whole_column)[None, :]
        mask = real[:, None] & (whole_column >= 0)[None, :]
        # Not from L1, which doesn't see other SMs' stores.
        whole = gl.load(p.unquantized_ptr + wide_at, mask=mask, other=0.0, cache_modifier=".cg")
        quantized, scale = quantize_block(whole)
        gl.store(p.out_ptr + wide_at, quantized, mask=mask)
        gl.store(p.out_scale_ptr + block.to(gl.int64) * p.max_rows + row, scale, mask=real)
        signal(p.finished_ptr, tile.expert, p.E)


@gluon.jit
def gemm1_tile(p, tile, step, turn, ROWS: gl.constexpr, WG: gl.constexpr):
    """One tile of `gemm1_consumer`."""
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 32])
    up_at, gate_at = p.scales_at(tile)
    total = half_sum(p.pipeline, up_at, gate_at, step, p.HIDDEN // 128, ROWS, SUM, True, WG)
    accumulator = p.accumulator
    sums = accumulator.sums.slice(0, ROWS, dim=1)
    if WG == 1:
        mbarrier.wait(accumulator.acc_empty.index(0), (turn & 1) ^ 1)
        sums.store(total)
        mbarrier.arrive(accumulator.acc_full.index(0), count=1)
    else:
        mbarrier.wait(accumulator.acc_full.index(0), turn & 1)
        sums.store(total + sums.load(SUM))
        store_activation(p, sums, tile, ROWS)
        mbarrier.arrive(accumulator.acc_empty.index(0), count=1)


@gluon.jit
def gemm1_consumer(p, WG: gl.constexpr):
    """Half of the blocks of each tile's sum; consumer 0 adds the other's to its own, and stores the activation."""
    tile = p.scheduler.published_tile(0)
    step = 0
    turn = 0
    while tile.expert < p.E:
        if p.scheduler.BLOCK_M == FEW:
            gemm1_tile(p, tile, step, turn, FEW, WG)
        elif tile.rows > FEW:
            gemm1_tile(p, tile, step, turn, BLOCK_M, WG)
        else:
            gemm1_tile(p, tile, step, turn, FEW, WG)
        step += p.HIDDEN // 128
        turn += 1
        tile = p.scheduler.published_tile(turn)


@gluon.jit
def gemm2_tile(p, tile, step, turn, ROWS: gl.constexpr, WG: gl.constexpr):
    """One tile of `gemm2_consumer`."""
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 32])
    scales_at = p.scales_at(tile)
    total = half_sum(p.pipeline, scales_at, scales_at, step, p.INTERMEDIATE // 128, ROWS, SUM, False, WG)
    accumulator = p.accumulator
    sums = accumulator.sums.slice(0, ROWS, dim=1)
    if WG == 1:
        mbarrier.wait(accumulator.acc_empty.index(0), (turn & 1) ^ 1)
        sums.store(total)
        mbarrier.arrive(accumulator.acc_full.index(0), count=1)
    else:
        mbarrier.wait(accumulator.acc_full.index(0), turn & 1)
        sums.store(total + sums.load(SUM))
        slot = gl.arange(0, ROWS, layout=gl.SliceLayout(0, COLUMNS))
        column = tile.n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, COLUMNS))
        value = sums.load(COLUMNS).to(gl.bfloat16)
        row_at = p.out_ptr + (tile.first_row + slot).to(gl.int64) * p.COLUMNS
        mask = (slot < tile.rows)[None, :] & (column >= 0)[:, None]
        # The combine reads them next.
        gl.store(row_at[None, :] + column[:, None], value, mask=mask, eviction_policy="evict_last")
        mbarrier.arrive(accumulator.acc_empty.index(0), count=1)


@gluon.jit
def gemm2_consumer(p, WG: gl.constexpr):
    """Half of the blocks of each tile's sum; consumer 0 adds the other's to its own, and stores the result."""
    tile = p.scheduler.published_tile(0)
    step = 0
    turn = 0
    while tile.expert < p.E:
        if tile.rows > FEW:
            gemm2_tile(p, tile, step, turn, BLOCK_M, WG)
        else:
            gemm2_tile(p, tile, step, turn, FEW, WG)
        step += p.INTERMEDIATE // 128
        turn += 1
        tile = p.scheduler.published_tile(turn)


@gluon.jit
def make_accumulator(ROWS: gl.constexpr):
    """An `Accumulator` with its shared memory."""
    sums = gl.allocate_shared_memory(gl.float32, [BLOCK_N, ROWS], SHARED_SUMS)
    acc_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    acc_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(acc_full.index(0), count=1)
    mbarrier.init(acc_empty.index(0), count=1)
    return Accumulator(sums=sums, acc_full=acc_full, acc_empty=acc_empty)


@gluon.jit(do_not_specialize=["stride_scale_k", "stride_scale_t", "num_tokens", "max_rows", "bound", "busy"])
def hopper_few_gemm1_kernel(
    hidden_ptr,  # [T, HIDDEN] e4m3, rows STRIDE_HIDDEN apart
    hidden_scale_ptr,  # [HIDDEN/128, T] float32
    weight,  # descriptor of [E * 2 * INTERMEDIATE, HIDDEN] e4m3, 32 rows by 128
    weight_scale_ptr,  # [E, 2 * INTERMEDIATE/128, HIDDEN/128] float32
    tokens_per_expert_ptr,  # [E] int32
    slot_token_ptr,  # [E, T] int32
    out_ptr,  # [max_rows, INTERMEDIATE] e4m3, out
    out_scale_ptr,  # [INTERMEDIATE/128, max_rows] float32, out
    unquantized_ptr,  # [max_rows, INTERMEDIATE] float32, scratch
    finished_ptr,  # [E + 1] int32, zeros on entry: a signal for each row tile's 128 block of the activation
    block_arrivals_ptr,  # [row tiles, INTERMEDIATE/128] int32, zeros on entry
    tile_counter_ptr,  # int32, zero on entry
    stride_scale_k,
    stride_scale_t,
    num_tokens,
    max_rows,
    bound,  # as `Share` has them
    busy,
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
    SHARED: gl.constexpr,
    ROWS: gl.constexpr,  # of a tile
):
    """Gather, GEMM1, SwiGLU and quantisation. Grid: any number of programs; they share the tiles."""
    gl.static_assert(STAGES % 2 == 0)
    pipeline = make_pipeline(ROWS, BLOCK_N, 1, 1, STAGES)
    accumulator = make_accumulator(ROWS)
    scheduler = make_scheduler(
        tokens_per_expert_ptr, tile_counter_ptr, bound, busy, ROWS, INTERMEDIATE // (BLOCK_N // 2),
        E, E_POW2, channel_slots(STAGES, HIDDEN // 128), SHARED,
    )  # fmt: skip
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    p = Gemm1(
        weight_scale_ptr=weight_scale_ptr, finished_ptr=finished_ptr, out_ptr=out_ptr,
        out_scale_ptr=out_scale_ptr, unquantized_ptr=unquantized_ptr, block_arrivals_ptr=block_arrivals_ptr,
        max_rows=max_rows, pipeline=pipeline, scheduler=scheduler, accumulator=accumulator,
        hidden_ptr=hidden_ptr, hidden_scale_ptr=hidden_scale_ptr, weight=weight, slot_token_ptr=slot_token_ptr,
        stride_scale_k=stride_scale_k, stride_scale_t=stride_scale_t, num_tokens=num_tokens,
        STRIDE_HIDDEN=STRIDE_HIDDEN, HIDDEN=HIDDEN, INTERMEDIATE=INTERMEDIATE,
        UP=INTERMEDIATE if GATE_FIRST else 0, GATE=0 if GATE_FIRST else INTERMEDIATE, E=E,
    )  # fmt: skip
    gl.warp_specialize(
        [(gemm1_consumer, (p, 0)), (gemm1_consumer, (p, 1)), (gemm1_producer, (p,))],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit(do_not_specialize=["first_column", "max_rows", "bound", "busy"])
def hopper_few_gemm2_kernel(
    activated_ptr,  # [max_rows, INTERMEDIATE] e4m3
    activated_scale_ptr,  # [INTERMEDIATE/128, max_rows] float32
    weight,  # descriptor of [E * HIDDEN, INTERMEDIATE] e4m3, 64 rows by 128
    weight_scale_ptr,  # [E, HIDDEN/128, INTERMEDIATE/128] float32
    tokens_per_expert_ptr,  # [E] int32
    finished_ptr,  # [E + 1] int32: GEMM1's signals, see `completion`
    out_ptr,  # [max_rows, COLUMNS] bfloat16, out: columns first_column... of the result
    tile_counter_ptr,  # [HIDDEN / COLUMNS] int32, zeros on entry
    first_column,
    max_rows,
    bound,  # as `Share` has them
    busy,
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
    SHARED: gl.constexpr,
):
    """GEMM2. Grid: any number of programs; they share the tiles.

    GEMM1, with row tiles of FIRST_M and SIGNALS for each of them, may still run.
    """
    gl.static_assert(STAGES % 2 == 0)
    gl.static_assert(COLUMNS % BLOCK_N == 0)
    pipeline = make_pipeline(BLOCK_M, BLOCK_N, 1, 1, STAGES)
    accumulator = make_accumulator(BLOCK_M)
    scheduler = make_scheduler(
        tokens_per_expert_ptr, tile_counter_ptr + first_column // COLUMNS, bound, busy, BLOCK_M, COLUMNS // BLOCK_N,
        E, E_POW2, channel_slots(STAGES, INTERMEDIATE // 128), SHARED,
    )  # fmt: skip
    let_next_kernel_start(PDL)
    p = Gemm2(
        weight_scale_ptr=weight_scale_ptr, finished_ptr=finished_ptr, out_ptr=out_ptr,
        first_column=first_column, max_rows=max_rows, pipeline=pipeline, scheduler=scheduler,
        accumulator=accumulator, activated_ptr=activated_ptr, activated_scale_ptr=activated_scale_ptr,
        weight=weight, HIDDEN=HIDDEN, INTERMEDIATE=INTERMEDIATE, COLUMNS=COLUMNS, FIRST_M=FIRST_M,
        SIGNALS=SIGNALS, E=E, PDL=PDL,
    )  # fmt: skip
    gl.warp_specialize(
        [(gemm2_consumer, (p, 0)), (gemm2_consumer, (p, 1)), (gemm2_producer, (p,))],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
    # GEMM1 has to end before this kernel does: the next one may clear the counters of both.
    wait_for_previous_kernel(PDL)


PROGRAMS = 2  # that fit on a multiprocessor at once
RESOURCES = Resources(stages=8, consumer_registers=80, producer_registers=48, registers=72)
FEW_RESOURCES = RESOURCES._replace(stages=10)  # of tiles of FEW rows

GEMM1, GEMM2 = Kernel(hopper_few_gemm1_kernel), Kernel(hopper_few_gemm2_kernel)


def gemm1_rows(num_tokens: int) -> int:
    """Of a tile of `gemm1`: where no expert can have more than FEW, the memory of more holds further stages."""
    return FEW.value if num_tokens <= FEW.value else BLOCK_M.value


def signals(problem: MoEProblem, num_tokens: int) -> Signals:
    """Of `gemm1`: one for each row tile and 128 block of the activation."""
    return Signals(gemm1_rows(num_tokens), problem.intermediate_size // problem.block)


def block_arrivals(problem: MoEProblem, num_tokens: int) -> int:
    """Counters of `gemm1`: one for each row tile and 128 block of the activation, which its tiles share."""
    blocks = problem.intermediate_size // problem.block
    return max_row_tiles(problem, num_tokens, gemm1_rows(num_tokens)) * blocks


def gemm1(problem: MoEProblem, limits: DeviceLimits, key: LaunchKey, share: Share = ALL) -> Step:
    """SwiGLU of the first GEMM: ``[max_rows, I]`` e4m3 and ``[I/128, max_rows]`` scales."""
    e, width, inner = problem.num_local_experts, problem.intermediate_size, problem.hidden_size
    operands = (
        "hidden_states",
        "hidden_states_scale",
        SwizzledTiles("gemm1_weights", e, 2 * width, inner, 1, 32),
        "gemm1_weights_scale",
        "tokens_per_expert",
        "slot_token",
        "activated",
        "activated_scale",
        "unquantized",
        share.counter("finished"),
        "block_arrivals",
        share.counter("gemm1_tile_counter"),
        key.stride_scale_k,
        key.stride_scale_t,
        key.num_tokens,
        max_local_rows(problem, key.num_tokens),
        share.bound,
        int(share.busy),
    )
    rows = gemm1_rows(key.num_tokens)
    resources = FEW_RESOURCES if rows == FEW.value else RESOURCES
    tiles = max_row_tiles(problem, key.num_tokens, rows) * (width // (BLOCK_N.value // 2))
    grid = (min(tiles, PROGRAMS * limits.num_sms),)
    more = {"SHARED": is_shared(problem, share), "ROWS": rows}
    return Step(GEMM1, grid, operands, gemm1_constants(problem, limits, resources, key.stride_hidden, **more))


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
    operands = gemm2_operands(problem, key, first_column, share, None, BLOCK_N.value)
    tiles = max_row_tiles(problem, key.num_tokens, BLOCK_M.value) * (columns // BLOCK_N.value)
    grid = (min(tiles, PROGRAMS * limits.num_sms),)
    constants = gemm2_constants(problem, limits, RESOURCES, columns, first, SHARED=is_shared(problem, share))
    return Step(GEMM2, grid, operands, constants)
