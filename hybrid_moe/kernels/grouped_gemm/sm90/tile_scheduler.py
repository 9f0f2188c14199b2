"""Which program computes which tile: drawn from a counter and found by the producer, published to the consumers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ...aggregate import aggregate
from .common import LINE, PLAIN, reinterpret
from .share import BUSY_ROWS

FIELDS = gl.constexpr(7)  # of a `Tile`
# Lines of `TileScheduler.table`.
TOKENS, TOKENS_END, TILES_END, LIGHT_TILES_END = (gl.constexpr(line) for line in range(4))


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
