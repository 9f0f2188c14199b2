"""GEMM2 for few rows of narrow experts on Hopper, in Gluon: a unit's rows stay, its weights pass by.

Where the intermediate size is a few 128 blocks, a tile of `few_rows` is over before its stages are full, and finding
the next one takes as long as loading it. A unit of work here is up to 32 rows by some hundred columns: its rows are
loaded once, and its weights pass by in tiles of 64 columns. Each of two consumers has every second tile, with all of
its sum.

Weights come first in the product, as in `few_rows`.

Roles (12 warps)
    producer (``[8:12]``)
        Draws units and tells the consumers where they are; loads rows and weights (TMA) and their scales (cp.async).
        Loads a unit's first weights before GEMM1 has finished its expert.
    consumer 0, 1 (``[0:4]``, ``[4:8]``)
        wgmma, promotion, and the bfloat16 rows of every second tile.

Barriers (arrivals)
    weights.full, weights.empty (1)
        producer -> the consumer whose stage it is -> producer. Each consumer has its own stages: ahead of the other one
        in common ones, it would take the phase before for the one that it waits for.
    rows.full (129)
        producer -> consumers: the bytes of TMA, and each of 128 threads' cp.async.
    rows.empty (2)
        consumers -> producer.
    channel.told (1)
        producer -> consumers: where the next unit is.

Timeline (u: units, t: tiles)
    producer    u0? | u0's rows, weights t0 t1 t2 t3 | u1? | u1's rows, weights t0 ...
    consumer 0  u0: mma t0, promote, store | mma t2, promote, store | u1: ...
    consumer 1  u0: mma t1, promote, store | mma t3, promote, store | u1: ...
"""

import functools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ....problem import MoEProblem
from ...aggregate import aggregate
from ...launcher import Constants, DeviceLimits, Kernel
from ...pdl import let_next_kernel_start, wait_for_previous_kernel
from ...plan import LaunchKey
from ...shapes import max_local_rows, max_row_tiles
from ...steps import Step
from ..completion import Signals, all_finished, await_expert, let_async_copies_see
from .common import E4M3, LINE, PLAIN, Resources, gemm2_constants, gemm2_operands, load_rows, load_tile
from .share import ALL, Share, is_shared
from .tile_scheduler import TileScheduler, table_lines

BLOCK_M = gl.constexpr(32)
FEW = gl.constexpr(16)  # what is computed where a unit has no more
BLOCK_N = gl.constexpr(64)  # weight rows of a tile
SLOTS = gl.constexpr(4)  # of the channel: a consumer is no more than three units behind
# Neighbouring columns of the result are one thread's.
COLUMNS = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))


@aggregate
class Unit:
    """Where a unit is. One of no rows says that there are no more."""

    rows: gl.tensor  # of the expert, from the unit's first on
    first_row: gl.tensor
    n: gl.tensor  # the unit's place among those of the same rows


@aggregate
class Channel:
    """How the producer tells the consumers its units. Nobody frees a slot: `Rows` holds the producer back before."""

    numbers: gl.shared_memory_descriptor  # [SLOTS * 3, 1] int32
    told: gl.shared_memory_descriptor

    @gluon.jit
    def tell(self, turn, rows, first_row, n):
        """Where unit number ``turn`` is."""
        slot = turn % SLOTS
        zero = gl.full([1], 0, gl.int32, layout=LINE)
        self.numbers.index(slot * 3).store(zero + rows)
        self.numbers.index(slot * 3 + 1).store(zero + first_row)
        self.numbers.index(slot * 3 + 2).store(zero + n)
        mbarrier.arrive(self.told.index(slot), count=1)

    @gluon.jit
    def hear(self, turn):
        """Where unit number ``turn`` is."""
        slot = turn % SLOTS
        mbarrier.wait(self.told.index(slot), (turn // SLOTS) & 1)
        return Unit(
            rows=gl.sum(self.numbers.index(slot * 3).load(LINE), axis=0),
            first_row=gl.sum(self.numbers.index(slot * 3 + 1).load(LINE), axis=0),
            n=gl.sum(self.numbers.index(slot * 3 + 2).load(LINE), axis=0),
        )


@aggregate
class Weights:
    """Stages of one 128 block of a tile, STAGES for each consumer. A step counts the blocks of a consumer."""

    tiles: gl.shared_memory_descriptor  # [2 * STAGES, BLOCK_N, 128] e4m3
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.jit
    def stage_of(self, step, WG: gl.constexpr):
        """The stage of a consumer's step."""
        return WG * self.STAGES + step % self.STAGES


@aggregate
class Rows:
    """The rows and scales of two units, by turns."""

    x: gl.shared_memory_descriptor  # [2 * K_BLOCKS, BLOCK_M, 128] e4m3
    x_scale: gl.shared_memory_descriptor  # [2 * K_BLOCKS, BLOCK_M] float32
    weight_scale: gl.shared_memory_descriptor  # [2 * UNIT_N / 128 * K_BLOCKS, 1] float32
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@aggregate
class Gemm2:
    """Arguments of the partitions; the pointers are those of `hopper_narrow_gemm2_kernel`."""

    activated: tma.tensor_descriptor
    activated_scale_ptr: gl.tensor
    weight: tma.tensor_descriptor
    weight_scale_ptr: gl.tensor
    finished_ptr: gl.tensor
    out_ptr: gl.tensor
    first_column: gl.tensor
    max_rows: gl.tensor
    scheduler: TileScheduler
    channel: Channel
    weights: Weights
    rows: Rows
    HIDDEN: gl.constexpr
    K_BLOCKS: gl.constexpr
    COLUMNS: gl.constexpr
    UNIT_N: gl.constexpr
    FIRST_M: gl.constexpr
    SIGNALS: gl.constexpr
    UNROLL: gl.constexpr  # the consumers' loops over tiles and blocks: of more blocks, they spill
    E: gl.constexpr
    PDL: gl.constexpr
    KEEP: gl.constexpr  # the result in L2, where the combine reads it next

    @gluon.jit
    def load_tile_pair(self, weight_row, step):
        """Start loading both consumers' next tiles, all blocks of one together: each adds 128 bytes to its rows."""
        weights = self.weights
        for wg in gl.static_range(2):
            for block in gl.static_range(self.K_BLOCKS):
                stage = weights.stage_of(step + block, wg)
                mbarrier.wait(weights.empty.index(stage), (((step + block) // weights.STAGES) & 1) ^ 1)
                mbarrier.expect(weights.full.index(stage), BLOCK_N * 128)
            for block in gl.static_range(self.K_BLOCKS):
                stage = weights.stage_of(step + block, wg)
                at = [weight_row + wg * BLOCK_N, block * 128]
                load_tile(self.weight, at, weights.full.index(stage), weights.tiles.index(stage))

    @gluon.jit
    def load_unit(self, turn, rows, first_row, weight_row):
        """Start loading a unit's rows and all its scales."""
        SCALES: gl.constexpr = self.UNIT_N // 128 * self.K_BLOCKS
        buffer = turn % 2
        mbarrier.wait(self.rows.empty.index(buffer), ((turn // 2) & 1) ^ 1)
        bar = self.rows.full.index(buffer)
        mbarrier.expect(bar, self.K_BLOCKS * BLOCK_M * 128)
        slot = gl.arange(0, BLOCK_M, layout=LINE)
        for block in gl.static_range(self.K_BLOCKS):
            place = buffer * self.K_BLOCKS + block
            load_tile(self.activated, [first_row, block * 128], bar, self.rows.x.index(place))
            scale_at = self.activated_scale_ptr + block * self.max_rows.to(gl.int64) + first_row + slot
            load_rows(self.rows.x_scale.index(place), scale_at, mask=slot < rows)
        scale_at = self.weight_scale_ptr + weight_row // 128 * self.K_BLOCKS + gl.arange(0, 1, layout=LINE)
        for number in gl.static_range(SCALES):
            load_rows(self.rows.weight_scale.index(buffer * SCALES + number), scale_at + number)
        async_copy.mbarrier_arrive(bar, increment_count=False)


@gluon.jit
def producer(p):
    """Load the rows, weights and scales of all units of this program."""
    PAIRS: gl.constexpr = p.UNIT_N // (2 * BLOCK_N)  # of tiles
    AHEAD: gl.constexpr = min(p.weights.STAGES // p.K_BLOCKS, PAIRS)  # whose weights wait for nothing
    # Nothing was waited for: the first-level cache may hold older numbers.
    tokens, _ = p.scheduler.fill_table(".cg")
    through = all_finished(p.finished_ptr, p.scheduler.own(tokens), p.FIRST_M, p.SIGNALS, p.E)
    if through:
        wait_for_previous_kernel(p.PDL)
    tile = p.scheduler.locate(gl.program_id(0), False)
    step = 0
    turn = 0
    while tile.expert < p.E:
        weight_row = tile.expert * p.HIDDEN + p.first_column + tile.n * p.UNIT_N
        p.channel.tell(turn, tile.rows, tile.first_row, tile.n)
        ready = 0
        if not through:
            for pair in range(AHEAD):
                p.load_tile_pair(weight_row + pair * (2 * BLOCK_N), step + pair * p.K_BLOCKS)
            await_expert(p.finished_ptr, tile.expert, tile.expert_rows, p.FIRST_M, p.SIGNALS)
            let_async_copies_see(p.PDL)
            ready = AHEAD
        p.load_unit(turn, tile.rows, tile.first_row, weight_row)
        for pair in range(ready, PAIRS):
            p.load_tile_pair(weight_row + pair * (2 * BLOCK_N), step + pair * p.K_BLOCKS)
        step += PAIRS * p.K_BLOCKS
        turn += 1
        number = p.scheduler.draw_tile()
        if not through:
            through = all_finished(p.finished_ptr, p.scheduler.own(tokens), p.FIRST_M, p.SIGNALS, p.E)
            let_async_copies_see(p.PDL)
        tile = p.scheduler.locate(number, False)
    p.channel.tell(turn, 0, 0, 0)


@gluon.jit
def add_block(p, total, product, pair, block, step, buffer, ROWS: gl.constexpr, SUM: gl.constexpr, WG: gl.constexpr):
    """The sum with one block of a tile; and its product, whose registers the next one takes."""
    SCALES: gl.constexpr = p.UNIT_N // 128 * p.K_BLOCKS
    weights = p.weights
    at = step + pair * p.K_BLOCKS + block
    stage = weights.stage_of(at, WG)
    place = buffer * p.K_BLOCKS + block
    x = p.rows.x.index(place).slice(0, ROWS, dim=0).permute((1, 0))
    mbarrier.wait(weights.full.index(stage), (at // weights.STAGES) & 1)
    # False, but unknown to the compiler: it can't take other registers while these are promoted.
    use_acc = p.max_rows < 0
    product = warpgroup_mma(weights.tiles.index(stage), x, product, use_acc=use_acc, is_async=True)
    row_scale = p.rows.x_scale.index(place).slice(0, ROWS).load(gl.SliceLayout(0, SUM))
    # Both consumers' tiles are of the same 128 columns.
    scale = gl.sum(p.rows.weight_scale.index(buffer * SCALES + pair * p.K_BLOCKS + block).load(LINE), axis=0)
    product = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(weights.empty.index(stage), count=1)
    return total + product * (row_scale * scale)[None, :], product


@gluon.jit
def compute_tile(p, unit, pair, step, buffer, ROWS: gl.constexpr, WG: gl.constexpr):
    """A consumer's tile of a pair, of a unit that has up to ROWS rows."""
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 32])
    total = gl.zeros([BLOCK_N, ROWS], gl.float32, layout=SUM)
    product = gl.zeros([BLOCK_N, ROWS], gl.float32, layout=SUM)
    if p.UNROLL:
        for block in gl.static_range(p.K_BLOCKS):
            total, product = add_block(p, total, product, pair, block, step, buffer, ROWS, SUM, WG)
    else:
        for block in range(p.K_BLOCKS):
            total, product = add_block(p, total, product, pair, block, step, buffer, ROWS, SUM, WG)
    value = gl.convert_layout(total.to(gl.bfloat16), COLUMNS)
    slot = gl.arange(0, ROWS, layout=gl.SliceLayout(0, COLUMNS))
    column = unit.n * p.UNIT_N + (pair * 2 + WG) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, COLUMNS))
    row_at = p.out_ptr + (unit.first_row + slot).to(gl.int64) * p.COLUMNS
    mask = (slot < unit.rows)[None, :] & (column >= 0)[:, None]
    POLICY: gl.constexpr = "evict_last" if p.KEEP else ""
    gl.store(row_at[None, :] + column[:, None], value, mask=mask, eviction_policy=POLICY)


@gluon.jit
def compute_unit(p, unit, step, buffer, ROWS: gl.constexpr, WG: gl.constexpr):
    """Every second tile of a unit that has up to ROWS rows."""
    PAIRS: gl.constexpr = p.UNIT_N // (2 * BLOCK_N)
    if p.UNROLL:
        for pair in gl.static_range(PAIRS):
            compute_tile(p, unit, pair, step, buffer, ROWS, WG)
    else:
        for pair in range(PAIRS):
            compute_tile(p, unit, pair, step, buffer, ROWS, WG)


@gluon.jit
def consumer(p, WG: gl.constexpr):
    """Every second tile of each unit."""
    step = 0
    turn = 0
    unit = p.channel.hear(turn)
    while unit.rows > 0:
        mbarrier.wait(p.rows.full.index(turn % 2), (turn // 2) & 1)
        if unit.rows > FEW:
            compute_unit(p, unit, step, turn % 2, BLOCK_M, WG)
        else:
            compute_unit(p, unit, step, turn % 2, FEW, WG)
        mbarrier.arrive(p.rows.empty.index(turn % 2), count=1)
        step += p.UNIT_N // (2 * BLOCK_N) * p.K_BLOCKS
        turn += 1
        unit = p.channel.hear(turn)


@gluon.jit(do_not_specialize=["first_column", "max_rows", "bound", "busy"])
def hopper_narrow_gemm2_kernel(
    activated,  # descriptor of [max_rows, INTERMEDIATE] e4m3, 32 rows by 128
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
    UNIT_N: gl.constexpr,
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
    KEEP: gl.constexpr,
):
    """GEMM2. Grid: any number of programs; they share the units, UNIT_N columns wide.

    GEMM1, with row tiles of FIRST_M and SIGNALS for each of them, may still run.
    """
    K_BLOCKS: gl.constexpr = INTERMEDIATE // 128
    gl.static_assert(COLUMNS % UNIT_N == 0)
    gl.static_assert(UNIT_N % (2 * BLOCK_N) == 0)
    gl.static_assert(STAGES >= K_BLOCKS)
    tiles = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, BLOCK_N, 128], E4M3)
    tile_full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    tile_empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    x = gl.allocate_shared_memory(gl.float8e4nv, [2 * K_BLOCKS, BLOCK_M, 128], E4M3)
    x_scale = gl.allocate_shared_memory(gl.float32, [2 * K_BLOCKS, BLOCK_M], PLAIN)
    weight_scale = gl.allocate_shared_memory(gl.float32, [2 * (UNIT_N // 128) * K_BLOCKS, 1], PLAIN)
    unit_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    unit_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    numbers = gl.allocate_shared_memory(gl.int32, [SLOTS * 3, 1], PLAIN)
    told = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    table = gl.allocate_shared_memory(gl.int32, [table_lines(False), E_POW2], PLAIN)
    for stage in gl.static_range(2 * STAGES):
        mbarrier.init(tile_full.index(stage), count=1)
        mbarrier.init(tile_empty.index(stage), count=1)
    for buffer in gl.static_range(2):
        mbarrier.init(unit_full.index(buffer), count=129)
        mbarrier.init(unit_empty.index(buffer), count=2)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(told.index(slot), count=1)
    # It draws alone: its own channel would be unused, and what is unused shares its memory with what comes later, an
    # initialised barrier with a converted layout.
    scheduler = TileScheduler(
        tokens_per_expert_ptr=tokens_per_expert_ptr,
        tile_counter_ptr=tile_counter_ptr + first_column // COLUMNS,
        tiles=numbers,
        published=told,
        table=table,
        BLOCK_M=BLOCK_M,
        TILES_N=COLUMNS // UNIT_N,
        SPREAD=False,
        bound=bound,
        busy=busy,
        SHARED=SHARED,
        HALVES=False,
        E=E,
        E_POW2=E_POW2,
        SLOTS=SLOTS,
    )
    let_next_kernel_start(PDL)
    p = Gemm2(
        activated=activated,
        activated_scale_ptr=activated_scale_ptr,
        weight=weight,
        weight_scale_ptr=weight_scale_ptr,
        finished_ptr=finished_ptr,
        out_ptr=out_ptr,
        first_column=first_column,
        max_rows=max_rows,
        scheduler=scheduler,
        channel=Channel(numbers=numbers, told=told),
        weights=Weights(tiles=tiles, full=tile_full, empty=tile_empty, STAGES=STAGES),
        rows=Rows(x=x, x_scale=x_scale, weight_scale=weight_scale, full=unit_full, empty=unit_empty),
        HIDDEN=HIDDEN,
        K_BLOCKS=K_BLOCKS,
        COLUMNS=COLUMNS,
        UNIT_N=UNIT_N,
        FIRST_M=FIRST_M,
        SIGNALS=SIGNALS,
        UNROLL=K_BLOCKS <= 2,
        E=E,
        PDL=PDL,
        KEEP=KEEP,
    )
    gl.warp_specialize(
        [(consumer, (p, 0)), (consumer, (p, 1)), (producer, (p,))],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
    # The end of this kernel has to mean the end of GEMM1: what comes next may clear the counters of both.
    wait_for_previous_kernel(PDL)


PROGRAMS = 2  # that fit on a multiprocessor at once
RESOURCES = Resources(stages=4, consumer_registers=80, producer_registers=72, registers=80)
MAX_INTERMEDIATE = RESOURCES.stages * 128
# Columns of a unit. With so few rows that there are hardly more wide units than programs, narrow ones.
UNIT_N, NARROW_UNIT_N, NARROW_UNIT_ROWS = 256, 128, 128
# Of the result, up to which L2 is asked to keep it for the combine: it has 50 MB. See benchmarks/NOTES.md.
KEPT_BYTES = 32 * 2**20

GEMM2 = Kernel(hopper_narrow_gemm2_kernel)


def fits(problem: MoEProblem) -> bool:
    """Whether GEMM2 of this problem has the sizes that the kernel is for."""
    return problem.intermediate_size <= MAX_INTERMEDIATE


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
    operands = gemm2_operands(problem, key, first_column, share, BLOCK_M.value, BLOCK_N.value)
    wide = columns % UNIT_N == 0 and max_local_rows(problem, key.num_tokens) > NARROW_UNIT_ROWS
    unit_n = UNIT_N if wide else NARROW_UNIT_N
    units = max_row_tiles(problem, key.num_tokens, BLOCK_M.value) * (columns // unit_n)
    grid = (min(units, PROGRAMS * limits.num_sms),)
    shared, keep = is_shared(problem, share), max_local_rows(problem, key.num_tokens) * columns * 2 <= KEPT_BYTES
    return Step(GEMM2, grid, operands, _constants(problem, limits, columns, first, unit_n, shared, keep))


@functools.lru_cache(maxsize=256)
def _constants(
    problem: MoEProblem, limits: DeviceLimits, columns: int, first: Signals, unit_n: int, shared: bool, keep: bool
) -> Constants:
    constants = gemm2_constants(problem, limits, RESOURCES, columns, first, SHARED=shared, KEEP=keep)
    return Constants({"UNIT_N": unit_n, **constants.arguments}, constants.options)
