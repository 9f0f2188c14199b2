"""What the warp-specialised kernels share: the tile scheduler, pipeline stages, and what they are compiled for."""

import functools
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ....problem import MoEProblem
from ...aggregate import aggregate
from ...launcher import Constants, DeviceLimits
from ...plan import LaunchKey
from ...shapes import max_local_rows, pow2
from ...steps import Operand, Tiles
from ..completion import Signals

# Renamed between the Triton releases 3.6 and 3.9.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
load_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

COPY = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread, 128 a row
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
E4M3 = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
FIELDS = gl.constexpr(7)  # of a `Tile`
# Lines of `TileScheduler.table`.
TOKENS, TOKENS_END, TILES_END, LIGHT_TILES_END = (gl.constexpr(line) for line in range(4))
# Rows of all busy experts together from which on they are worth a pair of launches of their own.
BUSY_ROWS = gl.constexpr(144)


@aggregate
class Tile:
    """Where a tile is. An expert of E or more says that there is no such tile."""

    expert: gl.tensor
    expert_rows: gl.tensor
    slot: gl.tensor  # its first row among the expert's
    rows: gl.tensor
    first_row: gl.tensor  # among those of all experts
    row_tile: gl.tensor  # number among those of all experts
    n: gl.tensor  # column tile


@aggregate
class TileScheduler:
    """A program's first tile has the program's number; the producer draws the next ones from a counter of all programs.

    It alone finds out where they are, and publishes them in shared memory. Nobody frees a slot: the pipeline holds the
    producer back before it gets around, see `channel_slots`.
    """

    tokens_per_expert_ptr: gl.tensor
    tile_counter_ptr: gl.tensor
    tiles: gl.shared_memory_descriptor  # [SLOTS * FIELDS, 1] int32: what `Tile` has
    published: gl.shared_memory_descriptor  # [SLOTS, 1] barriers, 1 arrival
    # [3, or 4 with SPREAD, E_POW2] int32, the producer's own: each expert's number of tokens; the sums of tokens and of
    # row tiles up to it, with SPREAD of experts that have several row tiles, and of those that have one. Kept in
    # registers, they would spill.
    table: gl.shared_memory_descriptor
    BLOCK_M: gl.constexpr
    bound: gl.tensor  # as `Share` has them
    busy: gl.tensor
    SHARED: gl.constexpr
    TILES_N: gl.constexpr
    HALVES: gl.constexpr
    SPREAD: gl.constexpr
    E: gl.constexpr
    E_POW2: gl.constexpr
    SLOTS: gl.constexpr

    @gluon.constexpr_function
    def layout(self):
        """Of numbers of all experts: the whole vector in every warp, so that no sum leaves the warp."""
        return gl.BlockedLayout([max(1, self.E_POW2 // 32)], [32], [4], [0])

    @gluon.jit
    def load_tokens_per_expert(self, CACHE: gl.constexpr):
        """The experts' numbers of tokens, int32; zeros from E on."""
        expert = gl.arange(0, self.E_POW2, layout=self.layout())
        at = self.tokens_per_expert_ptr + expert
        return gl.load(at, mask=expert < self.E, other=0, cache_modifier=CACHE)

    @gluon.jit
    def own(self, tokens):
        """Of these numbers those of the launch's experts, zeros for the others."""
        if self.SHARED:
            is_busy = tokens > self.bound
            enough = gl.sum(gl.where(is_busy, tokens, 0), axis=0) >= BUSY_ROWS
            return gl.where((is_busy & enough) == (self.busy != 0), tokens, 0)
        else:
            return tokens

    @gluon.jit
    def halved(self, tokens):
        """Whether a tile has half of BLOCK_M rows: with HALVES, where programs would be left over even then."""
        if self.HALVES:
            tiles = gl.sum((self.own(tokens) + (self.BLOCK_M - 1)) // self.BLOCK_M, axis=0) * self.TILES_N
            return 2 * tiles <= gl.num_programs(0)
        else:
            return False

    @gluon.jit
    def row_tiles(self, rows, halved):
        """How many tiles so many rows of an expert have."""
        tiles = (rows + (self.BLOCK_M - 1)) // self.BLOCK_M
        if self.HALVES:
            HALF: gl.constexpr = self.BLOCK_M // 2
            return gl.where(halved, (rows + (HALF - 1)) // HALF, tiles)
        else:
            return tiles

    @gluon.jit
    def fill_table(self, CACHE: gl.constexpr):
        """Write the table, for `locate`. The experts' numbers of tokens, and whether tiles are halved."""
        tokens = self.load_tokens_per_expert(CACHE)
        halved = self.halved(tokens)
        row_tiles = self.row_tiles(self.own(tokens), halved)
        if self.SPREAD:
            is_light = row_tiles == 1
            self.table.index(LIGHT_TILES_END).store(gl.associative_scan(is_light.to(gl.int32), 0, _add))
            row_tiles = gl.where(is_light, 0, row_tiles)
        self.table.index(TOKENS).store(tokens)
        self.table.index(TOKENS_END).store(gl.associative_scan(tokens, 0, _add))
        self.table.index(TILES_END).store(gl.associative_scan(row_tiles, 0, _add))
        return tokens, halved

    @gluon.jit
    def look_up(self, line, expert):
        """One number of the table."""
        numbers = reinterpret(self.table, gl.int32, [table_lines(self.SPREAD) * self.E_POW2, 1], PLAIN)
        return _number(numbers.index(line * self.E_POW2 + expert))

    @gluon.jit
    def locate(self, number, halved):
        """The tile of a number, by the table. The tiles of an expert follow one another, its row tiles fastest.

        SPREAD: those of experts with one row tile, which memory binds, and those of experts with several, which
        arithmetic binds, follow either order of their own, spread evenly among one another.
        """
        line = TILES_END
        if self.SPREAD:
            heavy = self.look_up(TILES_END, self.E_POW2 - 1)
            light = self.look_up(LIGHT_TILES_END, self.E_POW2 - 1)
            # Those of which there are fewer are at every so many-th place, as long as there are any.
            fewer = gl.minimum(light, heavy) * self.TILES_N
            every = gl.maximum((light + heavy) * self.TILES_N // gl.maximum(fewer, 1), 1)
            is_fewer = (number % every == 0) & (number // every < fewer)
            fewer_before = gl.minimum((number + every - 1) // every, fewer)
            is_light = is_fewer == (light <= heavy)
            past_all = number >= (light + heavy) * self.TILES_N
            line = gl.where(is_light, LIGHT_TILES_END, TILES_END)
            number = gl.where(past_all, number, gl.where(is_fewer, fewer_before, number - fewer_before))
        ends = self.table.index(line).load(self.layout()) * self.TILES_N
        at = gl.sum((ends <= number).to(gl.int32), axis=0)
        there = gl.minimum(at, self.E_POW2 - 1)
        expert_rows = self.look_up(TOKENS, there)
        above_another = gl.maximum(self.row_tiles(expert_rows, halved), 1)
        row_tiles_before = self.look_up(line, there) - above_another
        inside = gl.where(at < self.E, number - row_tiles_before * self.TILES_N, 0)
        m = inside % above_another
        rows = gl.where(halved, self.BLOCK_M // 2, self.BLOCK_M)
        slot = m * rows
        return Tile(
            expert=at,
            expert_rows=expert_rows,
            slot=slot,
            rows=gl.minimum(expert_rows - slot, rows),
            first_row=self.look_up(TOKENS_END, there) - expert_rows + slot,
            row_tile=row_tiles_before + m,
            n=inside // above_another,
        )

    @gluon.jit
    def draw_tile(self):
        """The number of a tile that nobody else has: tiles cost more and less, and whoever is done takes the next."""
        return gl.num_programs(0) + gl.atomic_add(self.tile_counter_ptr, 1, sem="relaxed")

    @gluon.jit
    def publish(self, turn, tile):
        """Tell the consumers this program's tile number ``turn``."""
        first = turn % self.SLOTS * FIELDS
        zero = gl.full([1], 0, gl.int32, layout=LINE)
        self.tiles.index(first).store(zero + tile.expert)
        self.tiles.index(first + 1).store(zero + tile.expert_rows)
        self.tiles.index(first + 2).store(zero + tile.slot)
        self.tiles.index(first + 3).store(zero + tile.rows)
        self.tiles.index(first + 4).store(zero + tile.first_row)
        self.tiles.index(first + 5).store(zero + tile.row_tile)
        self.tiles.index(first + 6).store(zero + tile.n)
        mbarrier.arrive(self.published.index(turn % self.SLOTS), count=1)

    @gluon.jit
    def published_tile(self, turn):
        """Tile number ``turn`` of this program, once the producer has published it."""
        mbarrier.wait(self.published.index(turn % self.SLOTS), (turn // self.SLOTS) & 1)
        first = turn % self.SLOTS * FIELDS
        return Tile(
            expert=_number(self.tiles.index(first)),
            expert_rows=_number(self.tiles.index(first + 1)),
            slot=_number(self.tiles.index(first + 2)),
            rows=_number(self.tiles.index(first + 3)),
            first_row=_number(self.tiles.index(first + 4)),
            row_tile=_number(self.tiles.index(first + 5)),
            n=_number(self.tiles.index(first + 6)),
        )


@gluon.constexpr_function
def table_lines(SPREAD):
    """Of `TileScheduler.table`."""
    return 4 if SPREAD else 3


@gluon.jit
def _number(shared):
    return gl.sum(shared.load(LINE), axis=0)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def make_scheduler(
    tokens_per_expert_ptr, tile_counter_ptr, bound, busy, BLOCK_M: gl.constexpr, TILES_N: gl.constexpr,
    E: gl.constexpr, E_POW2: gl.constexpr, SLOTS: gl.constexpr, SHARED: gl.constexpr, SPREAD: gl.constexpr = False,
    HALVES: gl.constexpr = False,
):  # fmt: skip
    """A `TileScheduler` with its shared memory."""
    tiles = gl.allocate_shared_memory(gl.int32, [SLOTS * FIELDS, 1], PLAIN)
    published = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    table = gl.allocate_shared_memory(gl.int32, [table_lines(SPREAD), E_POW2], PLAIN)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(published.index(slot), count=1)
    return TileScheduler(
        tokens_per_expert_ptr=tokens_per_expert_ptr,
        tile_counter_ptr=tile_counter_ptr,
        tiles=tiles,
        published=published,
        table=table,
        BLOCK_M=BLOCK_M,
        bound=bound,
        busy=busy,
        SHARED=SHARED,
        TILES_N=TILES_N,
        HALVES=HALVES,
        SPREAD=SPREAD,
        E=E,
        E_POW2=E_POW2,
        SLOTS=SLOTS,
    )


@gluon.constexpr_function
def channel_slots(STAGES, K_BLOCKS):
    """Slots of the tile scheduler: none is written again before both consumers have read it.

    The producer publishes tile t when it has filled block ``t * K_BLOCKS - 1`` of all, so the block STAGES before it
    was released and, by the other consumer where they take turns, the one before that. Both are past the first block of
    the slot's last tile by then, and they read where a tile is before they release its first block.
    """
    return max(4, -(-(STAGES + 2) // K_BLOCKS))


@aggregate
class Pipeline:
    """STAGES of a 128 block of the sum each. A step counts blocks over all tiles of a program."""

    x: gl.shared_memory_descriptor  # [STAGES, rows, 128] e4m3
    x_scale: gl.shared_memory_descriptor  # [STAGES, rows] float32
    weight: gl.shared_memory_descriptor  # [STAGES * parts, weight rows, 128] e4m3
    full: gl.shared_memory_descriptor  # 129 arrivals: the bytes of TMA, and 128 threads' cp.async
    empty: gl.shared_memory_descriptor  # an arrival of each consumer that reads the stage
    STAGES: gl.constexpr

    @gluon.jit
    def producer_acquire(self, step, BYTES: gl.constexpr):
        """Wait until a step's stage is empty, and say how many bytes TMA will bring."""
        stage = step % self.STAGES
        mbarrier.wait(self.empty.index(stage), ((step // self.STAGES) & 1) ^ 1)
        mbarrier.expect(self.full.index(stage), BYTES)

    @gluon.jit
    def producer_commit(self, step):
        """The stage is full when the copies that this thread has started are through (cp.async)."""
        async_copy.mbarrier_arrive(self.full.index(step % self.STAGES), increment_count=False)

    @gluon.jit
    def consumer_wait(self, step, pred=True):
        """Wait until a step's stage is full."""
        mbarrier.wait(self.full.index(step % self.STAGES), (step // self.STAGES) & 1, pred=pred)

    @gluon.jit
    def consumer_release(self, step):
        """The stage may be filled again."""
        mbarrier.arrive(self.empty.index(step % self.STAGES), count=1)


@gluon.jit
def make_pipeline(
    ROWS: gl.constexpr, WEIGHT_ROWS: gl.constexpr, PARTS: gl.constexpr, READERS: gl.constexpr, STAGES: gl.constexpr
):
    """A `Pipeline` with PARTS of WEIGHT_ROWS weight rows in a stage, which READERS consumers read."""
    x = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, ROWS, 128], E4M3)
    x_scale = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], PLAIN)
    weight = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * PARTS, WEIGHT_ROWS, 128], E4M3)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=129)
        mbarrier.init(empty.index(stage), count=READERS)
    return Pipeline(x=x, x_scale=x_scale, weight=weight, full=full, empty=empty, STAGES=STAGES)


class Share(NamedTuple):
    """The experts that a launch is for: the busy ones, with more than ``bound`` rows, or the others.

    None are busy where all of them together have fewer than BUSY_ROWS.

    Parameters
    ----------
    suffix
        Of the names of its counters: each pair of GEMMs has its own.
    """

    bound: int = 2**31 - 1
    busy: bool = False
    suffix: str = ""

    def counter(self, name: str) -> str:
        """The name of one of its counters."""
        return name + self.suffix


ALL = Share()
# Of so many experts each thread of a warp has two counts at most.
FEW_EXPERTS = 64


def is_shared(problem: MoEProblem, share: Share) -> bool:
    """Whether kernels tell the experts of a launch from others: among few that takes no time, and saves a binary."""
    return share != ALL or problem.num_local_experts <= FEW_EXPERTS


class Resources(NamedTuple):
    """Of a program: a producer and two consumers, four warps each.

    Parameters
    ----------
    stages
        128 blocks of the sum in shared memory at once.
    consumer_registers, producer_registers
        Of each thread, once the groups have shared what the program started with. The first consumer has what is left.
    registers
        Of each thread at the start; None for a program that has all 65,536 of a multiprocessor.
    """

    stages: int
    consumer_registers: int
    producer_registers: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Launch options."""
        return {"num_warps": 4} | ({} if self.registers is None else {"maxnreg": self.registers})


class SwizzledTiles(Tiles):
    """Tiles of all matrices' rows under one another, with the layout in shared memory that Gluon wants to be told."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all rows."""
        return self.matrices * self.rows, self.inner

    @property
    def strides(self) -> tuple[int, ...]:
        """Of all rows."""
        return self.inner, 1

    def descriptor(self, base: Any) -> TensorDescriptor:
        """Gluon's description of it."""
        return TensorDescriptor(base, list(self.shape), list(self.strides), [self.box_rows, 128], E4M3.value)


@functools.lru_cache(maxsize=256)
def gemm1_constants(
    problem: MoEProblem, limits: DeviceLimits, resources: Resources, stride_hidden: int, **more: int
) -> Constants:
    """What the first GEMM's kernels are compiled for; ``more`` is some kernel's own, and its last."""
    arguments = {
        "STRIDE_HIDDEN": stride_hidden,
        "HIDDEN": problem.hidden_size,
        "INTERMEDIATE": problem.intermediate_size,
        "GATE_FIRST": problem.gate_first,
        **_shared_arguments(problem, limits, resources),
        **more,
    }
    return Constants(arguments, {**limits.options, **resources.options})


@functools.lru_cache(maxsize=256)
def gemm2_constants(
    problem: MoEProblem, limits: DeviceLimits, resources: Resources, columns: int, first: Signals, **more: bool
) -> Constants:
    """The same for the second GEMM; ``first`` are the signals of the step that computed the activation."""
    arguments = {
        "HIDDEN": problem.hidden_size,
        "INTERMEDIATE": problem.intermediate_size,
        "COLUMNS": columns,
        "FIRST_M": first.block_m,
        "SIGNALS": first.per_row_tile,
        **_shared_arguments(problem, limits, resources),
        **more,
    }
    return Constants(arguments, {**limits.options, **resources.options})


def gemm2_operands(
    problem: MoEProblem, key: LaunchKey, first_column: int, share: Share, row_tile: int | None, weight_rows: int
) -> tuple[Operand, ...]:
    """Of the second GEMM's kernels, which copy ``row_tile`` rows of the activation at once, ``weight_rows`` of weights.

    ``row_tile`` of None: the activation is read by pointer.
    """
    e, inner, max_rows = problem.num_local_experts, problem.intermediate_size, max_local_rows(problem, key.num_tokens)
    return (
        "activated" if row_tile is None else SwizzledTiles("activated", 1, max_rows, inner, 1, row_tile),
        "activated_scale",
        SwizzledTiles("gemm2_weights", e, problem.hidden_size, inner, 1, weight_rows),
        "gemm2_weights_scale",
        "tokens_per_expert",
        share.counter("finished"),
        "rows",
        share.counter("gemm2_tile_counter"),
        first_column,
        max_rows,
        share.bound,
        int(share.busy),
    )


def _shared_arguments(problem: MoEProblem, limits: DeviceLimits, resources: Resources) -> dict[str, int | bool]:
    return {
        "E": problem.num_local_experts,
        # Shorter than a warp, the vectors would cost registers.
        "E_POW2": max(32, pow2(problem.num_local_experts)),
        "STAGES": resources.stages,
        "CONSUMER_REGISTERS": resources.consumer_registers,
        "PRODUCER_REGISTERS": resources.producer_registers,
        "PDL": limits.pdl,
    }
