"""`sm90.tile_scheduler` by itself: each tile has one number, whatever the experts' rows and however many there are."""

import gluon_emulation
import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hybrid_moe.kernels.grouped_gemm.sm90.share import BUSY_ROWS
from hybrid_moe.kernels.grouped_gemm.sm90.tile_scheduler import make_scheduler
from hybrid_moe.kernels.shapes import pow2

BLOCK_M, TILES_N = 128, 2
PROGRAMS = 30


@gluon.jit
def locate_kernel(
    tokens_per_expert_ptr, counter_ptr, out_ptr, numbers, bound, busy, BLOCK_M: gl.constexpr, TILES_N: gl.constexpr,
    E: gl.constexpr, E_POW2: gl.constexpr, SHARED: gl.constexpr, SPREAD: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Write the tiles of all numbers, and of some past them."""
    scheduler = make_scheduler(
        tokens_per_expert_ptr, counter_ptr, bound, busy, BLOCK_M, TILES_N, E, E_POW2, 4, SHARED, SPREAD, HALVES
    )
    _, halved = scheduler.fill_table("")
    for number in range(numbers):
        tile = scheduler.locate(number, halved)
        gl.store(out_ptr + number * 6, tile.expert)
        gl.store(out_ptr + number * 6 + 1, tile.slot)
        gl.store(out_ptr + number * 6 + 2, tile.rows)
        gl.store(out_ptr + number * 6 + 3, tile.first_row)
        gl.store(out_ptr + number * 6 + 4, tile.n)
        gl.store(out_ptr + number * 6 + 5, tile.expert_rows)


def located(rows, *, bound=2**31 - 1, busy=0, spread=False, halves=False):
    """The tiles in their order; none of those past them is one."""
    wanted = [-(-count // (BLOCK_M // 2 if halves else BLOCK_M)) * TILES_N for count in rows]
    numbers, experts = sum(wanted) + PROGRAMS, len(rows)
    out = torch.full((numbers, 6), -1, dtype=torch.int32)
    arguments = {
        "tokens_per_expert_ptr": torch.tensor(rows, dtype=torch.int32),
        "counter_ptr": torch.zeros(1, dtype=torch.int32),
        "out_ptr": out,
        "numbers": numbers,
        "bound": bound,
        "busy": busy,
        "BLOCK_M": BLOCK_M,
        "TILES_N": TILES_N,
        "E": experts,
        "E_POW2": max(32, pow2(experts)),
        "SHARED": bound < 2**31 - 1,
        "SPREAD": spread,
        "HALVES": halves,
    }
    gluon_emulation.launch([(locate_kernel, (PROGRAMS,), arguments, 4)], only=[(0,)])
    tiles = [tuple(row) for row in out.tolist()]
    count = sum(tile[0] < experts for tile in tiles)
    assert all(tile[0] >= experts for tile in tiles[count:])
    return tiles[:count]


def expected(rows, own, height=BLOCK_M):
    """Of the experts of a launch, in the order of their numbers."""
    first, found = 0, []
    for expert, count in enumerate(rows):
        if own(count):
            for n in range(TILES_N):
                for slot in range(0, count, height):
                    found.append((expert, slot, min(height, count - slot), first + slot, n, count))
        first += count
    return found


def drawn(experts, seed=0, most=400):
    """Rows of experts: none of many, few of most, many of some."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 4, (experts,), generator=generator)
    few, many = (torch.randint(1, top, (experts,), generator=generator) for top in (BLOCK_M, most))
    return torch.where(kind == 0, 0, torch.where(kind == 3, many, few)).tolist()


ROWS = {
    "none": [0, 0, 0],
    "one row": [0, 1, 0, 0],
    "the last expert": [0, 0, 0, 129],
    "edges": [127, 128, 129, 0, 256, 257],
    **{f"{experts} experts": drawn(experts) for experts in (32, 33, 257)},
}


@pytest.mark.parametrize("name", ROWS)
def test_tiles_of_an_expert_follow_one_another(name):
    assert located(ROWS[name]) == expected(ROWS[name], bool)


@pytest.mark.parametrize("name", ROWS)
def test_light_experts_among_the_others(name):
    """Either kind in its own order, as evenly as their numbers allow."""
    rows = ROWS[name]
    tiles, wanted = located(rows, spread=True), expected(rows, bool)
    assert sorted(tiles) == sorted(wanted)
    kinds = [[tile for tile in tiles if (tile[5] <= BLOCK_M) == light] for light in (True, False)]
    assert kinds == [[tile for tile in wanted if (tile[5] <= BLOCK_M) == light] for light in (True, False)]
    fewer, more = sorted(kinds, key=len)
    places = [at for at, tile in enumerate(tiles) if tile in set(fewer)]
    every = len(tiles) // max(len(fewer), 1)
    assert len(fewer) == len(more) or places == [every * number for number in range(len(fewer))]


@pytest.mark.parametrize("rows", [[64, 0, 65], [0, 0, 300], [1, 128, 129], [900, 0, 0]], ids=str)
def test_tiles_of_half_the_rows(rows):
    """Where all tiles of as many rows as usual leave half of the programs over."""
    few = 2 * len(expected(rows, bool)) <= PROGRAMS
    assert located(rows, halves=True) == expected(rows, bool, BLOCK_M // 2 if few else BLOCK_M)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(
    "rows", [[100, 3, 0, 44], [100, 3, 0, 43], [143, 0, 10], [144, 0, 10], [5, 6, 7], drawn(257, seed=1)], ids=len
)
def test_experts_by_their_rows(rows, spread):
    """Each tile is one launch's. Few busy rows are the others'."""
    bound = 40
    enough = sum(count for count in rows if count > bound) >= BUSY_ROWS.value
    for busy in (0, 1):
        wanted = expected(rows, lambda count, busy=busy: count > 0 and (count > bound and enough) == bool(busy))
        assert sorted(located(rows, bound=bound, busy=busy, spread=spread)) == sorted(wanted)
