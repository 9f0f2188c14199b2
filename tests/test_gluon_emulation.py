"""The emulation of Gluon sees what a GPU would do wrong: small kernels, each right, and with something left out."""

import re

import pytest
import torch
import triton
import triton.language as tl
from gluon_emulation import EmulationError, Hang, Overflow, launch
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
load_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
ROWS = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
SUM = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 32]))
SEEDS = range(8)


@gluon.jit
def loader(x, w_ptr, x_stages, w_stages, full, empty, STEPS: gl.constexpr, MISTAKE: gl.constexpr):
    for step in range(STEPS):
        stage = step % 2
        if MISTAKE != "does not wait for empty":
            mbarrier.wait(empty.index(stage), ((step // 2) & 1) ^ (0 if MISTAKE == "phase" else 1))
        mbarrier.expect(full.index(stage), 64 * 128 + (1 if MISTAKE == "bytes" else 0))
        load_tile(x, [0, step * 128], full.index(stage), x_stages.index(stage))
        row = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
        column = gl.arange(0, 128, layout=gl.SliceLayout(0, ROWS))
        at = w_ptr + row[:, None] * (STEPS * 128) + (step * 128 + column)[None, :]
        load_rows(w_stages.index(stage), at, mask=(row >= 0)[:, None] & (column >= 0)[None, :])
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def multiplier(out_ptr, x_stages, w_stages, full, empty, STEPS: gl.constexpr, MISTAKE: gl.constexpr):
    total = gl.zeros([64, 64], gl.float32, layout=SUM)
    for step in range(STEPS):
        stage = step % 2
        if MISTAKE != "does not wait for full":
            mbarrier.wait(full.index(stage), (step // 2) & 1)
        if MISTAKE != "no fence":
            fence_async_shared()
        w = w_stages.index(stage).permute((1, 0))
        total = warpgroup_mma(x_stages.index(stage), w, total, is_async=True)
        if MISTAKE == "released too early":
            mbarrier.arrive(empty.index(stage), count=1)
        if MISTAKE != "product not waited for":
            total = warpgroup_mma_wait(0, deps=[total])
        if MISTAKE != "released too early" and MISTAKE != "not released":
            mbarrier.arrive(empty.index(stage), count=2 if MISTAKE == "arrives twice" else 1)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, SUM))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, SUM))
    gl.store(out_ptr + row[:, None] * 64 + column[None, :], total)


@gluon.jit
def product_kernel(x, w_ptr, out_ptr, STEPS: gl.constexpr, MISTAKE: gl.constexpr):
    x_stages = gl.allocate_shared_memory(gl.float8e4nv, [2, 64, 128], TILE)
    w_stages = gl.allocate_shared_memory(gl.float8e4nv, [2, 64, 128], TILE)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(2):
        mbarrier.init(full.index(stage), count=1 if MISTAKE == "count" else 129)
        mbarrier.init(empty.index(stage), count=1)
    gl.warp_specialize(
        [
            (multiplier, (out_ptr, x_stages, w_stages, full, empty, STEPS, MISTAKE)),
            (loader, (x, w_ptr, x_stages, w_stages, full, empty, STEPS, MISTAKE)),
        ],
        [4],
        [48],
    )


def product(mistake, seed, steps=5):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn((64, steps * 128), generator=generator).to(torch.float8_e4m3fn) for _ in range(2))
    out = torch.full((64, 64), float("nan"))
    x_tiles = TensorDescriptor(x, [64, steps * 128], [steps * 128, 1], [64, 128], TILE.value)
    arguments = dict(x=x_tiles, w_ptr=w, out_ptr=out, STEPS=steps, MISTAKE=mistake)
    launch([(product_kernel, (1,), arguments, 4)], seed)
    return torch.allclose(out, x.float() @ w.float().T, atol=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_pipeline_of_copies_and_products(seed):
    assert product("none", seed)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("does not wait for empty", r"(which a product is still reading|which an async copy is still writing)"),
        (
            "does not wait for full",
            r"(multiplies (x|w)_stages\[.\], which an async copy is still writing)",
        ),
        ("phase", r"the end of a phase of parity 0 of empty\[0\] in its phase 0: 0 of 1 arrivals"),
        ("bytes", r"the end of a phase of parity 0 of full\[0\] in its phase 0: 129 of 129 arrivals, 1 bytes to come"),
        ("no fence", r"multiplier 0 multiplies w_stages\[.\] without a fence since it was stored"),
        ("released too early", r"loader 1 writes (x|w)_stages\[.\], which a product is still reading"),
        ("product not waited for", r"(still reading|used as a value|hasn't waited for)"),
        ("not released", r"product_kernel\[0\] loader 1 waits for .* empty\[0\] in its phase 0: 0 of 1 arrivals"),
        ("arrives twice", r"empty\[0\] in its phase 0: 2 of 1 arrivals.*more than it was made for"),
        ("count", r"more than it was made for"),
    ],
)
def test_what_is_wrong_with_a_pipeline(mistake, message):
    seen = []
    for seed in SEEDS:
        try:
            product(mistake, seed)
        except EmulationError as error:
            seen.append(str(error))
    assert any(re.search(message, error) for error in seen), seen


@triton.jit
def first_kernel(x_ptr, count_ptr, MISTAKE: tl.constexpr):
    if MISTAKE != "starts the next before it may":
        gdc_wait()
    gdc_launch_dependents()
    place = tl.arange(0, 8)
    tl.store(x_ptr + tl.program_id(0) * 8 + place, tl.full((8,), 7, tl.int32))
    if MISTAKE != "no barrier":
        tl.debug_barrier()
    tl.atomic_add(count_ptr, 1, sem="relaxed" if MISTAKE == "relaxed signal" else "release")


@triton.jit
def second_kernel(x_ptr, count_ptr, out_ptr, MISTAKE: tl.constexpr):
    """Waits for signals, not for the end of the first kernel, but at its own end."""
    gdc_launch_dependents()
    wanted = 3 if MISTAKE == "one signal too few" else 4
    while tl.atomic_add(count_ptr, 0, sem="relaxed" if MISTAKE == "relaxed look" else "acquire") < wanted:
        pass
    place = tl.arange(0, 32)
    tl.store(out_ptr + place, tl.load(x_ptr + place))
    if MISTAKE != "does not wait at its end":
        gdc_wait()


@triton.jit
def third_kernel(x_ptr, out_ptr, MISTAKE: tl.constexpr):
    """Reads what both have stored."""
    if MISTAKE != "does not wait":
        gdc_wait()
    place = tl.arange(0, 32)
    tl.store(out_ptr + 32 + place, tl.load(out_ptr + place) + tl.load(x_ptr + place))


def chain(mistake, seed, delay=None):
    x, count, out = torch.zeros(32, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.zeros(64).int()
    launch(
        [
            (first_kernel, (4,), dict(x_ptr=x, count_ptr=count, MISTAKE=mistake), 1),
            (second_kernel, (1,), dict(x_ptr=x, count_ptr=count, out_ptr=out, MISTAKE=mistake), 1),
            (third_kernel, (1,), dict(x_ptr=x, out_ptr=out, MISTAKE=mistake), 1),
        ],
        seed,
        delay,
    )
    return bool((out[:32] == 7).all() and (out[32:] == 14).all())


@pytest.mark.parametrize("seed", SEEDS)
def test_kernels_that_overlap(seed):
    assert chain("none", seed)


@pytest.mark.parametrize(
    "mistake", ["no barrier", "relaxed signal", "one signal too few", "relaxed look", "does not wait"]
)
def test_what_is_wrong_between_kernels(mistake):
    """A store that isn't published is held back, and what isn't acquired comes from an old cache."""
    assert not all(chain(mistake, seed) for seed in SEEDS)


def test_what_one_program_signals_late_is_waited_for():
    assert chain("none", 0, lambda what, task: what.startswith("atomic") and str(task) == "first_kernel[3]")


@triton.jit
def add_one_kernel(count_ptr):
    tl.atomic_add(count_ptr, 1)


@triton.jit
def wait_for_five_kernel(count_ptr):
    while tl.atomic_add(count_ptr, 0, sem="acquire") < 5:
        pass


def test_a_hang_says_what_is_waited_for():
    arguments = dict(count_ptr=torch.zeros(1, dtype=torch.int32))
    with pytest.raises(Hang, match=r"wait_for_five_kernel\[0\] waits for count_ptr\[0\], which stays 4"):
        launch([(add_one_kernel, (4,), arguments, 1), (wait_for_five_kernel, (1,), arguments, 1)])


@triton.jit
def address_kernel(x_ptr, out_ptr, row, STRIDE: tl.constexpr, WIDE: tl.constexpr):
    at = row.to(tl.int64) * STRIDE if WIDE else row * STRIDE
    tl.store(out_ptr + tl.arange(0, 4), tl.load(x_ptr + at + tl.arange(0, 4), mask=tl.arange(0, 4) < 3, other=5))


def test_addresses_of_32_bits_do_not_wrap_unseen():
    x, out = torch.zeros(64, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with pytest.raises(Overflow, match="2147483648 doesn't fit into int32"):
        arguments = dict(x_ptr=x, out_ptr=out, row=2**15, STRIDE=2**16, WIDE=False)
        launch([(address_kernel, (1,), arguments, 1)])
    with pytest.raises(EmulationError, match=r"x_ptr\[2147483650\] is outside of its 64 elements"):
        launch([(address_kernel, (1,), arguments | dict(WIDE=True), 1)])
    launch([(address_kernel, (1,), arguments | dict(row=1, STRIDE=61), 1)])
    assert out.tolist() == [0, 0, 0, 5]


@triton.jit
def twice_kernel(out_ptr):
    tl.store(out_ptr + tl.program_id(0) // 2 + tl.arange(0, 1), tl.full((1,), 1, tl.int32))


def test_an_element_is_stored_once():
    with pytest.raises(EmulationError, match=r"stores out_ptr\[0\], which this kernel has stored already"):
        launch([(twice_kernel, (2,), dict(out_ptr=torch.zeros(1, dtype=torch.int32)), 1)])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_is_one_interleaving(seed):
    """The same events in the same order."""

    def events(seed):
        seen = []
        chain("none", seed, lambda what, task: bool(seen.append((what, str(task)))))
        return seen

    assert events(seed) == events(seed)
    assert events(seed) != events(seed + 2)
