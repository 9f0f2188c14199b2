"""Grouped FP8 block-scale GEMMs for many rows on Hopper, in Gluon: one warp group loads, two multiply.

Where an expert has rows enough that arithmetic binds, a program that waits for each product before it promotes it
leaves the tensor cores idle half of the time. Here the next product is under way while one is promoted.

A tile is 128 rows by 256 weight rows. Each consumer has 64 of its rows; where an expert's last tile has no more than
64, the second consumer leaves it out. Where all tiles together leave programs over, a tile has no more. In GEMM1 a
consumer keeps its rows in registers and multiplies them by 64 weight rows at a time, so that two products and all sums
fit; its 256 columns are 128 of up and 128 of gate: SwiGLU's operands. GEMM2 multiplies by 128 weight rows at a time,
and only the other consumer's product runs while one is promoted: that is faster where sums are short.

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
        producer -> consumers: where the next tile is.

Timeline (b: blocks of the sum; 0 to 3: the groups of 64 columns)
    producer    load b0 b1 ... draw ... | find and publish | load the next tile's b0 b1 ...
    GEMM1's     rows b0 | mma 0 | mma 1, promote 0 | mma 2, promote 1 | mma 3, promote 2 | b1 full?, promote 3 | ...
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
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
from .share import ALL, FEW_EXPERTS, Share, is_shared
from .tile_scheduler import TileScheduler, channel_slots, make_scheduler

BLOCK_M = gl.constexpr(128)
BLOCK_N = gl.constexpr(256)
CHUNK = gl.constexpr(64)  # rows of a consumer, and of a product: what wgmma takes
PART_N = gl.constexpr(128)  # weight rows of a load: they share a scale
GROUP_N = gl.constexpr(64)  # weight rows of a product
ACC = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 32]))
ROWS = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=ACC.value, k_width=4))
WIDE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]))


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
    def scales_at(self, tile):
        """Where the scales of a tile's left and right 128 columns are; the first expert's if there is no tile."""
        K_BLOCKS: gl.constexpr = self.INTERMEDIATE // 128
        expert = gl.where(tile.expert < self.E, tile.expert, 0)
        block = expert * (self.HIDDEN // 128) + self.first_column // 128 + tile.n * 2
        first = self.weight_scale_ptr + block * K_BLOCKS
        return first, first + K_BLOCKS


@gluon.constexpr_function
def draw_at(K_BLOCKS):
    """The block of a tile after which its producer draws the next one: late, as whoever is done first shall have it.

    The number is there when the tile's last blocks are under way.
    """
    return max(0, K_BLOCKS - 3)


@gluon.jit
def gemm1_producer(p):
    """Load the blocks of all tiles of this program."""
    K_BLOCKS: gl.constexpr = p.HIDDEN // 128
    pipeline = p.pipeline
    _, halved = p.scheduler.fill_table("")
    number = gl.program_id(0)
    tile = p.scheduler.locate(number, halved)
    p.scheduler.publish(0, tile)
    step = 0
    turn = 0
    while tile.expert < p.E:
        slot = gl.arange(0, BLOCK_M, layout=LINE)
        real = slot < tile.rows
        tokens_at = p.slot_token_ptr + tile.expert.to(gl.int64) * p.num_tokens + tile.slot
        row = gl.load(tokens_at + slot, mask=real, other=0)
        x_slot = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, COPY))
        x_real = x_slot < tile.rows
        x_row = gl.load(tokens_at + x_slot, mask=x_real, other=0)
        column = gl.arange(0, 128, layout=gl.SliceLayout(0, COPY))
        x_at = p.hidden_ptr + (x_row.to(gl.int64) * p.STRIDE_HIDDEN)[:, None] + column[None, :]
        x_mask = x_real[:, None] & (column[None, :] >= 0)
        weight_row = tile.expert * (2 * p.INTERMEDIATE) + tile.n * PART_N
        scale_at = p.hidden_scale_ptr + row.to(gl.int64) * p.stride_scale_t
        for block in range(K_BLOCKS):
            stage = step % pipeline.STAGES
            pipeline.producer_acquire(step, BLOCK_N * 128)
            bar = pipeline.full.index(stage)
            load_tile(p.weight, [weight_row + p.UP, block * 128], bar, pipeline.weight.index(stage * 2))
            load_tile(p.weight, [weight_row + p.GATE, block * 128], bar, pipeline.weight.index(stage * 2 + 1))
            load_rows(pipeline.x.index(stage), x_at + block * 128, mask=x_mask)
            load_rows(pipeline.x_scale.index(stage), scale_at, mask=real)
            pipeline.producer_commit(step)
            scale_at += p.stride_scale_k
            step += 1
            if block == draw_at(K_BLOCKS):
                number = p.scheduler.draw_tile()
        tile = p.scheduler.locate(number, halved)
        turn += 1
        p.scheduler.publish(turn, tile)


@gluon.jit
def gemm2_producer(p):
    """Load the blocks of all tiles of this program, each expert's once GEMM1 has finished it."""
    K_BLOCKS: gl.constexpr = p.INTERMEDIATE // 128
    pipeline = p.pipeline
    # Nothing was waited for: L1 may hold older counts.
    tokens, halved = p.scheduler.fill_table(".cg")
    number = gl.program_id(0)
    tile = p.scheduler.locate(number, halved)
    p.scheduler.publish(0, tile)
    through = all_finished(p.finished_ptr, p.scheduler.own(tokens), p.FIRST_M, p.SIGNALS, p.E)
    if through:
        wait_for_previous_kernel(p.PDL)
    step = 0
    turn = 0
    while tile.expert < p.E:
        slot = gl.arange(0, BLOCK_M, layout=LINE)
        real = slot < tile.rows
        row = tile.first_row + slot
        weight_row = tile.expert * p.HIDDEN + p.first_column + tile.n * BLOCK_N
        if not through:
            await_expert(p.finished_ptr, tile.expert, tile.expert_rows, p.FIRST_M, p.SIGNALS)
            let_async_copies_see(p.PDL)
        scale_at = p.activated_scale_ptr + row.to(gl.int64)
        for block in range(K_BLOCKS):
            stage = step % pipeline.STAGES
            pipeline.producer_acquire(step, (BLOCK_M + BLOCK_N) * 128)
            bar = pipeline.full.index(stage)
            for part in gl.static_range(2):
                w = pipeline.weight.index(stage * 2 + part)
                load_tile(p.weight, [weight_row + part * PART_N, block * 128], bar, w)
            load_tile(p.activated, [tile.first_row, block * 128], bar, pipeline.x.index(stage))
            load_rows(pipeline.x_scale.index(stage), scale_at, mask=real)
            pipeline.producer_commit(step)
            scale_at += p.max_rows
            step += 1
            if block == draw_at(K_BLOCKS):
                number = p.scheduler.draw_tile()
        tile = p.scheduler.locate(number, halved)
        turn += 1
        p.scheduler.publish(turn, tile)


@gluon.jit
def multiply_group(pipeline, stage, x, product, use_acc, GROUP: gl.constexpr):
    """Start the product of a consumer's rows with 64 of a stage's weight rows."""
    w = pipeline.weight.index(stage * 2 + GROUP // 2).slice(GROUP % 2 * GROUP_N, GROUP_N, dim=0)
    return warpgroup_mma(x, w.permute((1, 0)), product, use_acc=use_acc, is_async=True)


@gluon.jit
def multiply_groups(pipeline, left_at, right_at, left, right, step, use_acc, K_BLOCKS: gl.constexpr, WG: gl.constexpr):
    """The sums of a consumer's rows with each group of 64 columns; next step.

    The next block is awaited while the last product runs. A product takes the one before the last as its accumulator,
    which ``use_acc`` (false, unknown to the compiler) ignores: its registers are reused, and not before it has been
    promoted.
    """
    BY_ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    sum0 = gl.zeros([CHUNK, GROUP_N], gl.float32, layout=ACC)
    sum1 = gl.zeros([CHUNK, GROUP_N], gl.float32, layout=ACC)
    sum2 = gl.zeros([CHUNK, GROUP_N], gl.float32, layout=ACC)
    sum3 = gl.zeros([CHUNK, GROUP_N], gl.float32, layout=ACC)
    even = gl.zeros([CHUNK, GROUP_N], gl.float32, layout=ACC)
    odd = gl.zeros([CHUNK, GROUP_N], gl.float32, layout=ACC)
    pipeline.consumer_wait(step)
    stage = step % pipeline.STAGES
    for block in range(K_BLOCKS):
        # Loaded in the block before, each byte would take a register.
        x = pipeline.x.index(stage).slice(WG * CHUNK, CHUNK, dim=0).load(ROWS)
        row_scale = pipeline.x_scale.index(stage).slice(WG * CHUNK, CHUNK).load(BY_ROW)
        even = multiply_group(pipeline, stage, x, even, use_acc, 0)
        ahead = gl.minimum(block + 1, K_BLOCKS - 1)
        next_left, next_right = gl.load(left_at + ahead), gl.load(right_at + ahead)
        left_scale, right_scale = (row_scale * left)[:, None], (row_scale * right)[:, None]
        odd = multiply_group(pipeline, stage, x, odd, use_acc, 1)
        even = warpgroup_mma_wait(1, deps=[even])
        sum0 = sum0 + even * left_scale
        even = multiply_group(pipeline, stage, x, even, use_acc, 2)
        odd = warpgroup_mma_wait(1, deps=[odd])
        sum1 = sum1 + odd * left_scale
        odd = multiply_group(pipeline, stage, x, odd, use_acc, 3)
        even = warpgroup_mma_wait(1, deps=[even])
        sum2 = sum2 + even * right_scale
        next_stage = (step + 1) % pipeline.STAGES
        pipeline.consumer_wait(step + 1, block + 1 < K_BLOCKS)
        odd = warpgroup_mma_wait(0, deps=[odd])
        pipeline.consumer_release(step)
        sum3 = sum3 + odd * right_scale
        left, right = next_left, next_right
        stage = next_stage
        step += 1
    return sum0, sum1, sum2, sum3, step


@gluon.jit
def multiply_halves(pipeline, left_at, right_at, left, right, step, use_acc, K_BLOCKS: gl.constexpr, WG: gl.constexpr):
    """The sums of a consumer's rows with both halves of 128 columns, each product after the other; next step."""
    sum0 = gl.zeros([CHUNK, PART_N], gl.float32, layout=WIDE)
    sum1 = gl.zeros([CHUNK, PART_N], gl.float32, layout=WIDE)
    product = gl.zeros([CHUNK, PART_N], gl.float32, layout=WIDE)
    pipeline.consumer_wait(step)
    stage = step % pipeline.STAGES
    for block in range(K_BLOCKS):
        x = pipeline.x.index(stage).slice(WG * CHUNK, CHUNK, dim=0)
        w = pipeline.weight.index(stage * 2)
        product = warpgroup_mma(x, w.permute((1, 0)), product, use_acc=use_acc, is_async=True)
        row_scale = pipeline.x_scale.index(stage).slice(WG * CHUNK, CHUNK).load(gl.SliceLayout(1, WIDE))
        ahead = gl.minimum(block + 1, K_BLOCKS - 1)
        next_left, next_right = gl.load(left_at + ahead), gl.load(right_at + ahead)
        left_scale, right_scale = (row_scale * left)[:, None], (row_scale * right)[:, None]
        product = warpgroup_mma_wait(0, deps=[product])
        sum0 = sum0 + product * left_scale
        w = pipeline.weight.index(stage * 2 + 1)
        product = warpgroup_mma(x, w.permute((1, 0)), product, use_acc=use_acc, is_async=True)
        next_stage = (step + 1) % pipeline.STAGES
        pipeline.consumer_wait(step + 1, block + 1 < K_BLOCKS)
        product = warpgroup_mma_wait(0, deps=[product])
        pipeline.consumer_release(step)
        sum1 = sum1 + product * right_scale
        left, right = next_left, next_right
        stage = next_stage
        step += 1
    return sum0, sum1, step


@gluon.jit
def leave_out(pipeline, step, K_BLOCKS: gl.constexpr):
    """Release the stages of a tile in which this consumer has no rows; next step."""
    for _ in range(K_BLOCKS):
        pipeline.consumer_wait(step)
        pipeline.consumer_release(step)
        step += 1
    return step


@gluon.jit
def await_tile(p, turn):
    """Tile number ``turn`` of this program, where its scales are, and those of its first block."""
    tile = p.scheduler.published_tile(turn)
    left_at, right_at = p.scales_at(tile)
    return tile, left_at, right_at, gl.load(left_at), gl.load(right_at)


@gluon.jit
def gemm1_consumer(p, WG: gl.constexpr):
    """GEMM1's upper (WG 0) or lower 64 rows of each tile, with their SwiGLU and quantisation."""
    K_BLOCKS: gl.constexpr = p.HIDDEN // 128
    step = 0
    turn = 0
    use_acc = p.max_rows < 0
    tile, up_at, gate_at, up_scale, gate_scale = await_tile(p, turn)
    while tile.expert < p.E:
        rows, first_row, block, expert = tile.rows - WG * CHUNK, tile.first_row + WG * CHUNK, tile.n, tile.expert
        turn += 1
        if rows > 0:
            up0, up1, gate0, gate1, step = multiply_groups(
                p.pipeline, up_at, gate_at, up_scale, gate_scale, step, use_acc, K_BLOCKS, WG
            )
            # While this tile is stored, the next one's scales are under way.
            tile, up_at, gate_at, up_scale, gate_scale = await_tile(p, turn)
            left, right = swiglu_of(gate0, up0), swiglu_of(gate1, up1)
            amax = larger(amax_of(left), amax_of(right))
            scale = store_quantized(p, left, amax, first_row, rows, block * PART_N)
            store_quantized(p, right, amax, first_row, rows, block * PART_N + GROUP_N)
            slot = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, ACC))
            gl.store(p.out_scale_ptr + block.to(gl.int64) * p.max_rows + first_row + slot, scale, mask=slot < rows)
            signal(p.finished_ptr, expert, p.E)
        else:
            step = leave_out(p.pipeline, step, K_BLOCKS)
            tile, up_at, gate_at, up_scale, gate_scale = await_tile(p, turn)


@gluon.jit
def gemm2_consumer(p, WG: gl.constexpr):
    """GEMM2's upper (WG 0) or lower 64 rows of each tile."""
    K_BLOCKS: gl.constexpr = p.INTERMEDIATE // 128
    step = 0
    turn = 0
    use_acc = p.max_rows < 0
    tile, left_at, right_at, left, right = await_tile(p, turn)
    while tile.expert < p.E:
        rows, first_row, column = tile.rows - WG * CHUNK, tile.first_row + WG * CHUNK, tile.n * BLOCK_N
        turn += 1
        if rows > 0:
            sum0, sum1, step = multiply_halves(p.pipeline, left_at, right_at, left, right, step, use_acc, K_BLOCKS, WG)
            # While this tile is stored, the next one's scales are under way.
            tile, left_at, right_at, left, right = await_tile(p, turn)
            store_rows(p, sum0, first_row, rows, column)
            store_rows(p, sum1, first_row, rows, column + PART_N)
        else:
            step = leave_out(p.pipeline, step, K_BLOCKS)
            tile, left_at, right_at, left, right = await_tile(p, turn)


@gluon.jit
def store_quantized(p, value, amax, first_row, rows, first_column):
    """Store 64 of a 128 block's columns in e4m3; the scales of the rows."""
    quantized, scale = quantize(value, amax)
    wide: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    quantized = gl.convert_layout(quantized, wide)
    slot = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, wide))
    column = first_column + gl.arange(0, GROUP_N, layout=gl.SliceLayout(0, wide))
    at = p.out_ptr + (first_row + slot).to(gl.int64)[:, None] * p.INTERMEDIATE + column[None, :]
    gl.store(at, quantized, mask=(slot < rows)[:, None] & (column[None, :] >= 0))
    return scale


@gluon.jit
def store_rows(p, total, first_row, rows, first_column):
    """Store 128 columns in bfloat16."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    value = gl.convert_layout(total.to(gl.bfloat16), wide)
    slot = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, wide))
    column = first_column + gl.arange(0, PART_N, layout=gl.SliceLayout(0, wide))
    at = p.out_ptr + (first_row + slot).to(gl.int64)[:, None] * p.COLUMNS + column[None, :]
    gl.store(at, value, mask=(slot < rows)[:, None] & (column[None, :] >= 0))


@gluon.jit(do_not_specialize=["stride_scale_k", "stride_scale_t", "num_tokens", "max_rows", "bound", "busy"])
def hopper_gemm1_kernel(
    hidden_ptr,  # [T, HIDDEN] e4m3, rows STRIDE_HIDDEN apart
    hidden_scale_ptr,  # [HIDDEN/128, T] float32
    weight,  # descriptor of [E * 2 * INTERMEDIATE, HIDDEN] e4m3, 128 rows by 128
    weight_scale_ptr,  # [E, 2 * INTERMEDIATE/128, HIDDEN/128] float32
    tokens_per_expert_ptr,  # [E] int32
    slot_token_ptr,  # [E, T] int32
    out_ptr,  # [max_rows, INTERMEDIATE] e4m3, out
    out_scale_ptr,  # [INTERMEDIATE/128, max_rows] float32, out
    finished_ptr,  # [E + 1] int32, zeros on entry: a signal for each 64 rows' 128 block of the activation
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
    SPREAD: gl.constexpr,
    HALVES: gl.constexpr,
):
    """Gather, GEMM1, SwiGLU and quantisation. Grid: any number of programs; they share the tiles."""
    pipeline = make_pipeline(BLOCK_M, PART_N, 2, 2, STAGES)
    scheduler = make_scheduler(
        tokens_per_expert_ptr, tile_counter_ptr, bound, busy, BLOCK_M, INTERMEDIATE // 128,
        E, E_POW2, channel_slots(STAGES, HIDDEN // 128), SHARED, SPREAD, HALVES,
    )  # fmt: skip
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    p = Gemm1(
        weight_scale_ptr=weight_scale_ptr, finished_ptr=finished_ptr, out_ptr=out_ptr,
        out_scale_ptr=out_scale_ptr, max_rows=max_rows, pipeline=pipeline, scheduler=scheduler,
        hidden_ptr=hidden_ptr, hidden_scale_ptr=hidden_scale_ptr,
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


@gluon.jit(do_not_specialize=["first_column", "max_rows", "bound", "busy"])
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
    SPREAD: gl.constexpr,
    HALVES: gl.constexpr,
):
    """GEMM2. Grid: any number of programs; they share the tiles.

    GEMM1, with row tiles of FIRST_M and SIGNALS for each of them, may still run.
    """
    gl.static_assert(COLUMNS % BLOCK_N == 0)
    pipeline = make_pipeline(BLOCK_M, PART_N, 2, 2, STAGES)
    scheduler = make_scheduler(
        tokens_per_expert_ptr, tile_counter_ptr + first_column // COLUMNS, bound, busy, BLOCK_M, COLUMNS // BLOCK_N,
        E, E_POW2, channel_slots(STAGES, INTERMEDIATE // 128), SHARED, SPREAD, HALVES,
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
# Rows of an expert, if routing is even, with which light experts' tiles are spread among the others'. With fewer rows
# memory binds everywhere, and finding a tile so costs 1%; with more there are few of them. See benchmarks/NOTES.md.
SPREAD_ROWS = (45, 128)
# Up to so many experts they are, and all tiles may be halved up to FEW_EXPERTS: with more, finding one takes longer
# than that gives back.
SPREAD_EXPERTS = 128

GEMM1, GEMM2 = Kernel(hopper_gemm1_kernel), Kernel(hopper_gemm2_kernel)


def fits(problem: MoEProblem) -> bool:
    """Whether GEMM2 of this problem has the sizes that the kernel is for; GEMM1's may be any."""
    return problem.hidden_size % COLUMNS == 0


def _scheduling(problem: MoEProblem, key: LaunchKey, share: Share) -> dict[str, bool]:
    """The tile scheduler's variants."""
    least, most = SPREAD_ROWS
    return {
        "SHARED": is_shared(problem, share),
        "SPREAD": problem.num_local_experts <= SPREAD_EXPERTS
        and least <= key.num_tokens * problem.top_k / problem.num_experts <= most,
        "HALVES": problem.num_local_experts <= FEW_EXPERTS,
    }


def gemm1(problem: MoEProblem, limits: DeviceLimits, key: LaunchKey, share: Share = ALL) -> Step:
    """SwiGLU of the first GEMM: ``[max_rows, I]`` e4m3 and ``[I/128, max_rows]`` scales."""
    e, width, inner = problem.num_local_experts, problem.intermediate_size, problem.hidden_size
    operands = (
        "hidden_states",
        "hidden_states_scale",
        SwizzledTiles("gemm1_weights", e, 2 * width, inner, 1, PART_N.value),
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
        share.bound,
        int(share.busy),
    )
    constants = gemm1_constants(problem, limits, RESOURCES, key.stride_hidden, **_scheduling(problem, key, share))
    return Step(GEMM1, (limits.num_sms,), operands, constants)


def signals(problem: MoEProblem) -> Signals:
    """Of `gemm1`: a consumer's, for its rows and a 128 block of the activation."""
    return Signals(CHUNK.value, problem.intermediate_size // problem.block)


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
    constants = gemm2_constants(problem, limits, RESOURCES, columns, first, **_scheduling(problem, key, share))
    return Step(GEMM2, (limits.num_sms,), operands, constants)
