"""Both grouped GEMMs for one token on Hopper, in Gluon: a stream of weights, and no counters.

One token's products are matrix by vector, and all that costs is reading each weight once: from the routing to the end
memory should never idle. So GEMM2, which adds up the choices too, has its first weights on their way before it waits
for GEMM1, and nothing is counted: a program has all of its sum, and what GEMM1 stores is float32, which every program
of GEMM2 quantises for itself.

A matrix is read as rows of 128 columns, as they lie in memory: K_BLOCKS of them are a row of weights. A slot of such
rows is the first operand of wgmma, and blocks of the token are the columns of the second, so that a row's own block is
one of the products; the others are not looked at.

Roles (8 warps)
    producer (``[4:8]``)
        Loads slots (TMA), as many ahead as there are stages.
    consumer (``[0:4]``)
        wgmma; picks and adds up each row's blocks, epilogue.

Barriers (arrivals)
    ring.full (1)
        producer -> consumer: the bytes of TMA.
    ring.empty (1)
        consumer -> producer.

Timeline (s: slots)
    GEMM1   route | load s0 s1 s2 ...     mma s0, pick | mma s1, pick | ... | SwiGLU, store
    GEMM2   route | load s0 s1 ... s7     GEMM1? quantise | mma s0, pick | ... | store
"""

import functools
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ....inputs import RoutedInputs
from ....problem import MoEProblem
from ...aggregate import aggregate
from ...launcher import Constants, DeviceLimits, Kernel
from ...pdl import let_next_kernel_start, wait_for_previous_kernel
from ...plan import LaunchKey
from ...quantize import quantize_block, swiglu_of
from ...routing import given_experts, select_experts, selection_constants
from ...shapes import max_local_rows, pow2
from ...steps import Operand, Step
from .common import COPY, E4M3, LINE, PLAIN, SwizzledTiles, load_tile, reinterpret

ROWS = gl.constexpr(8)  # of up and of gate, that GEMM1 computes at once
BLOCKS = gl.constexpr(8)  # of each of them in a slot
HALF = gl.constexpr(ROWS * BLOCKS)  # a slot of GEMM1: up's rows and gate's
SUMS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 8, 32]))
WHOLE = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0]))  # a warp has a row of 128 columns


@aggregate
class Chosen:
    """The token's local experts, in the order of the choices."""

    expert: gl.tensor  # [TOP_K_POW2] int32
    weight: gl.tensor
    number: gl.tensor  # among the local ones; -1 where a choice is elsewhere
    count: gl.tensor

    @gluon.jit
    def expert_of(self, number):
        """The local expert with a number."""
        return gl.sum(gl.where(self.number == number, self.expert, 0), axis=0)


@gluon.constexpr_function
def _one_warp(rows, columns):
    """A layout in which each warp has all of a matrix."""
    each = max(1, rows * columns // 32)
    across = max(1, columns // each)
    return gl.BlockedLayout([1, each], [32 // across, across], [4, 1], [1, 0])


@aggregate
class Choices:
    """The token's choices in shared memory: a local expert and its weight, or -1."""

    expert: gl.shared_memory_descriptor  # [TOP_K_POW2] int32
    weight: gl.shared_memory_descriptor  # [TOP_K_POW2] float32
    TOP_K_POW2: gl.constexpr

    @gluon.jit
    def chosen(self):
        """The local ones, in the registers of the warps that ask."""
        TABLE: gl.constexpr = gl.BlockedLayout([1, self.TOP_K_POW2], [32, 1], [4, 1], [1, 0])
        choice = gl.arange(0, self.TOP_K_POW2, layout=gl.SliceLayout(1, TABLE))
        other = gl.arange(0, self.TOP_K_POW2, layout=gl.SliceLayout(0, TABLE))
        expert = self.expert.load(gl.SliceLayout(1, TABLE))
        before = (other[None, :] < choice[:, None]) & (self.expert.load(gl.SliceLayout(0, TABLE)) >= 0)[None, :]
        number = gl.where(expert >= 0, gl.sum(before.to(gl.int32), axis=1), -1)
        weight = self.weight.load(gl.SliceLayout(1, TABLE))
        return Chosen(expert=expert, weight=weight, number=number, count=gl.sum((expert >= 0).to(gl.int32), axis=0))


@gluon.jit
def choose(
    choices, first_ptr, second_ptr, local_expert_offset, routed_scaling_factor, CHOSEN: gl.constexpr,
    NUM_EXPERTS: gl.constexpr, TOP_K: gl.constexpr, TOP_K_POW2: gl.constexpr, N_GROUP: gl.constexpr,
    N_GROUP_POW2: gl.constexpr, TOPK_GROUP: gl.constexpr, GROUP_SIZE: gl.constexpr, GROUP_SIZE_POW2: gl.constexpr,
    SOFTMAX: gl.constexpr, RENORMALIZE: gl.constexpr, NUM_SHARED: gl.constexpr, E: gl.constexpr,
):  # fmt: skip
    """Find the token's experts: every program does for itself, as a launch for it would take longer."""
    TABLE: gl.constexpr = gl.BlockedLayout([1, TOP_K_POW2], [32, 1], [4, 1], [1, 0])
    choice = gl.arange(0, TOP_K_POW2, layout=gl.SliceLayout(1, TABLE))
    if CHOSEN:
        other = gl.arange(0, TOP_K_POW2, layout=gl.SliceLayout(0, TABLE))
        expert, weight = given_experts(first_ptr, second_ptr, 0, 0, 0, choice, other, NUM_EXPERTS, TOP_K, NUM_SHARED)
    else:
        BOTH: gl.constexpr = _one_warp(N_GROUP_POW2, GROUP_SIZE_POW2)
        group = gl.arange(0, N_GROUP_POW2, layout=gl.SliceLayout(1, BOTH))[:, None]
        member = gl.arange(0, GROUP_SIZE_POW2, layout=gl.SliceLayout(0, BOTH))[None, :]
        expert, weight = select_experts(
            first_ptr, second_ptr, 0, routed_scaling_factor, group, member, choice, 0, TOP_K, TOP_K_POW2, N_GROUP,
            N_GROUP_POW2, TOPK_GROUP, GROUP_SIZE, GROUP_SIZE_POW2, SOFTMAX, RENORMALIZE, NUM_SHARED,
        )  # fmt: skip
    local = expert - local_expert_offset
    is_local = (choice < TOP_K + NUM_SHARED) & (local >= 0) & (local < E)
    choices.expert.store(gl.where(is_local, local, -1))
    choices.weight.store(gl.where(is_local, weight, 0.0))


@gluon.jit
def make_choices(TOP_K_POW2: gl.constexpr):
    """`Choices` with their shared memory."""
    expert = gl.allocate_shared_memory(gl.int32, [TOP_K_POW2], PLAIN)
    weight = gl.allocate_shared_memory(gl.float32, [TOP_K_POW2], PLAIN)
    return Choices(expert=expert, weight=weight, TOP_K_POW2=TOP_K_POW2)


@aggregate
class Ring:
    """Stages of a slot each; a step counts slots over all of a program's."""

    slots: gl.shared_memory_descriptor  # [STAGES, rows, 128] e4m3
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.jit
    def acquire(self, step, BYTES: gl.constexpr):
        """The barrier and the slot of a step, once it is empty; TMA will bring so many bytes."""
        stage = step % self.STAGES
        mbarrier.wait(self.empty.index(stage), ((step // self.STAGES) & 1) ^ 1)
        mbarrier.expect(self.full.index(stage), BYTES)
        return self.full.index(stage), self.slots.index(stage)


@gluon.jit
def make_ring(STAGES: gl.constexpr, SLOT: gl.constexpr):
    """A `Ring` with its shared memory."""
    slots = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, SLOT, 128], E4M3)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    return Ring(slots=slots, full=full, empty=empty, STAGES=STAGES)


@gluon.jit
def multiply(ring, x, product, step):
    """The products of a slot's rows with the blocks of ``x``; the last ones' registers are taken again."""
    stage = step % ring.STAGES
    mbarrier.wait(ring.full.index(stage), (step // ring.STAGES) & 1)
    product = warpgroup_mma(ring.slots.index(stage), x.permute((1, 0)), product, use_acc=False, is_async=True)
    product = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(ring.empty.index(stage), count=1)
    return product


@gluon.jit
def rows_of(sums, row, FIRST: gl.constexpr, WIDTH: gl.constexpr):
    """Sums by the row of weights that each is of, from FIRST on: ``[WIDTH]``."""
    TOTAL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 32])
    wanted = FIRST + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, TOTAL))
    its_sum = gl.convert_layout(gl.sum(sums, axis=1), gl.SliceLayout(1, TOTAL))
    its_row = gl.convert_layout(row, gl.SliceLayout(1, TOTAL))
    return gl.where(its_row[:, None] == wanted[None, :], its_sum[:, None], 0.0)


@aggregate
class Gemm1:
    """Arguments of GEMM1's partitions; the pointers are those of `hopper_one_token_gemm1_kernel`."""

    hidden_ptr: gl.tensor
    hidden_scale_ptr: gl.tensor
    weight: tma.tensor_descriptor
    weight_scale_ptr: gl.tensor
    out_ptr: gl.tensor
    stride_scale_k: gl.tensor
    choices: Choices
    ring: Ring
    x: gl.shared_memory_descriptor  # [PLACES, 128] e4m3
    factor: gl.shared_memory_descriptor  # [2, PLACES] float32: of up's blocks, and of gate's
    K_BLOCKS: gl.constexpr
    PLACES: gl.constexpr
    INTERMEDIATE: gl.constexpr
    UP: gl.constexpr  # first row of an expert's up weights
    GATE: gl.constexpr


@gluon.jit
def gemm1_producer(p):
    """Load all tiles of this program: BLOCKS blocks of ROWS up and ROWS gate rows in a slot."""
    TILES: gl.constexpr = p.INTERMEDIATE // ROWS
    chosen = p.choices.chosen()
    step = 0
    for tile in range(gl.program_id(0), chosen.count * TILES, gl.num_programs(0)):
        first = chosen.expert_of(tile // TILES) * (2 * p.INTERMEDIATE) + tile % TILES * ROWS
        for group in range(p.K_BLOCKS // BLOCKS):
            ring = p.ring
            bar, slot = ring.acquire(step, 2 * HALF * 128)
            for half in gl.static_range(2):
                row = (first + (p.GATE if half else p.UP)) * p.K_BLOCKS + group * BLOCKS
                for number in gl.static_range(ROWS):
                    to = slot.slice(half * HALF + number * BLOCKS, BLOCKS, dim=0)
                    load_tile(p.weight, [row + number * p.K_BLOCKS, 0], bar, to)
            step += 1


@gluon.jit
def gemm1_consumer(p):
    """SwiGLU of all tiles of this program."""
    TILES: gl.constexpr = p.INTERMEDIATE // ROWS
    place = gl.arange(0, 2 * HALF, layout=gl.SliceLayout(1, SUMS))
    own = gl.arange(0, BLOCKS, layout=gl.SliceLayout(0, SUMS))[None, :] == (place % BLOCKS)[:, None]
    row = gl.arange(0, p.PLACES, layout=gl.SliceLayout(1, COPY))
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, COPY))
    mask = (row < p.K_BLOCKS)[:, None] & (column >= 0)[None, :]
    p.x.store(gl.load(p.hidden_ptr + row[:, None] * 128 + column[None, :], mask=mask, other=0.0))
    fence_async_shared()
    x = reinterpret(p.x, gl.float8e4nv, [p.PLACES // BLOCKS, BLOCKS, 128], E4M3)
    factors = reinterpret(p.factor, gl.float32, [2 * p.PLACES // BLOCKS, BLOCKS], PLAIN)
    block = gl.arange(0, p.PLACES, layout=LINE)
    real = block < p.K_BLOCKS
    row_scale = gl.load(p.hidden_scale_ptr + block * p.stride_scale_k, mask=real, other=0.0)
    chosen = p.choices.chosen()
    step = 0
    for tile in range(gl.program_id(0), chosen.count * TILES, gl.num_programs(0)):
        first = tile % TILES * ROWS
        scale_row = chosen.expert_of(tile // TILES) * (2 * p.INTERMEDIATE // 128) + first // 128
        scale_at = p.weight_scale_ptr + scale_row * p.K_BLOCKS + block
        up_scale = gl.load(scale_at + p.UP // 128 * p.K_BLOCKS, mask=real, other=0.0)
        gate_scale = gl.load(scale_at + p.GATE // 128 * p.K_BLOCKS, mask=real, other=0.0)
        p.factor.index(0).store(row_scale * up_scale)
        p.factor.index(1).store(row_scale * gate_scale)
        sums = gl.zeros([2 * HALF, BLOCKS], gl.float32, layout=SUMS)
        product = gl.zeros([2 * HALF, BLOCKS], gl.float32, layout=SUMS)
        for group in range(p.K_BLOCKS // BLOCKS):
            product = multiply(p.ring, x.index(group), product, step + group)
            up_factor = factors.index(group).load(gl.SliceLayout(0, SUMS))
            gate_factor = factors.index(p.PLACES // BLOCKS + group).load(gl.SliceLayout(0, SUMS))
            factor = gl.where((place < HALF)[:, None], up_factor[None, :], gate_factor[None, :])
            sums += gl.where(own, product * factor, 0.0)
        up = gl.sum(rows_of(sums, place // BLOCKS, 0, ROWS), axis=0)
        gate = gl.sum(rows_of(sums, place // BLOCKS, ROWS, ROWS), axis=0)
        value = swiglu_of(gate, up)
        # The tiles of an expert follow one another, as do the rows of the result.
        gl.store(p.out_ptr + tile * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(0, SUMS)), value)
        step += p.K_BLOCKS // BLOCKS


@gluon.jit(do_not_specialize=["local_expert_offset", "stride_scale_k"])
def hopper_one_token_gemm1_kernel(
    hidden_ptr,  # [1, HIDDEN] e4m3
    hidden_scale_ptr,  # [HIDDEN/128, 1] float32
    weight,  # descriptor of [E * 2 * INTERMEDIATE * HIDDEN/128, 128] e4m3, BLOCKS rows
    weight_scale_ptr,  # [E, 2 * INTERMEDIATE/128, HIDDEN/128] float32
    first_ptr,  # [1, NUM_EXPERTS] float32 logits; if CHOSEN, [1, TOP_K] int32 global experts
    second_ptr,  # [NUM_EXPERTS] bfloat16 or float32, the bias; if CHOSEN, [1, TOP_K] float32 weights
    local_expert_offset,
    routed_scaling_factor,
    out_ptr,  # [choices, INTERMEDIATE] float32, out: of the local experts in the order of the choices
    stride_scale_k,
    HIDDEN: gl.constexpr,
    INTERMEDIATE: gl.constexpr,
    GATE_FIRST: gl.constexpr,
    PLACES: gl.constexpr,
    CHOSEN: gl.constexpr,
    NUM_EXPERTS: gl.constexpr,
    TOP_K: gl.constexpr,
    TOP_K_POW2: gl.constexpr,
    N_GROUP: gl.constexpr,
    N_GROUP_POW2: gl.constexpr,
    TOPK_GROUP: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    GROUP_SIZE_POW2: gl.constexpr,
    SOFTMAX: gl.constexpr,
    RENORMALIZE: gl.constexpr,
    NUM_SHARED: gl.constexpr,
    E: gl.constexpr,
    STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    """GEMM1 and SwiGLU. Grid: any number of programs; they share the tiles."""
    gl.static_assert(HIDDEN // 128 % BLOCKS == 0)
    ring = make_ring(STAGES, 2 * HALF)
    x = gl.allocate_shared_memory(gl.float8e4nv, [PLACES, 128], E4M3)
    factor = gl.allocate_shared_memory(gl.float32, [2, PLACES], PLAIN)
    choices = make_choices(TOP_K_POW2)
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    choose(
        choices, first_ptr, second_ptr, local_expert_offset, routed_scaling_factor, CHOSEN, NUM_EXPERTS, TOP_K,
        TOP_K_POW2, N_GROUP, N_GROUP_POW2, TOPK_GROUP, GROUP_SIZE, GROUP_SIZE_POW2, SOFTMAX, RENORMALIZE, NUM_SHARED, E,
    )  # fmt: skip
    p = Gemm1(
        hidden_ptr=hidden_ptr, hidden_scale_ptr=hidden_scale_ptr, weight=weight, weight_scale_ptr=weight_scale_ptr,
        out_ptr=out_ptr, stride_scale_k=stride_scale_k, choices=choices, ring=ring, x=x, factor=factor,
        K_BLOCKS=HIDDEN // 128, PLACES=PLACES, INTERMEDIATE=INTERMEDIATE, UP=INTERMEDIATE if GATE_FIRST else 0,
        GATE=0 if GATE_FIRST else INTERMEDIATE,
    )  # fmt: skip
    gl.warp_specialize([(gemm1_consumer, (p,)), (gemm1_producer, (p,))], [4], [PRODUCER_REGISTERS])


@aggregate
class Gemm2:
    """Arguments of GEMM2's partitions; the pointers are those of `hopper_one_token_gemm2_kernel`."""

    activated_ptr: gl.tensor
    weight: tma.tensor_descriptor
    weight_scale_ptr: gl.tensor
    output_ptr: gl.tensor
    choices: Choices
    ring: Ring
    x: gl.shared_memory_descriptor  # [PLACES, 128] e4m3: BLOCKS for each local expert
    factor: gl.shared_memory_descriptor  # [PLACES] float32
    HIDDEN: gl.constexpr
    K_BLOCKS: gl.constexpr
    EACH: gl.constexpr
    BLOCKS: gl.constexpr
    PLACES: gl.constexpr
    WIDTH: gl.constexpr
    SLOT: gl.constexpr
    BOX: gl.constexpr
    TOP_K_POW2: gl.constexpr
    PDL: gl.constexpr


@gluon.jit
def load_slots(p, chosen, slot, step, COUNT: gl.constexpr):
    """Load COUNT rows of this program's columns of each expert, from the start of a slot on."""
    for number in range(chosen.count):
        row = (chosen.expert_of(number) * p.HIDDEN + gl.program_id(0) * p.WIDTH) * p.K_BLOCKS + slot * p.SLOT
        bar, to = p.ring.acquire(step + number, COUNT * 128)
        for box in gl.static_range(COUNT // p.BOX):
            load_tile(p.weight, [row + box * p.BOX, 0], bar, to.slice(box * p.BOX, p.BOX, dim=0))


@gluon.jit
def gemm2_producer(p):
    """Load this program's columns, each slot of all experts."""
    FULL: gl.constexpr = p.WIDTH * p.K_BLOCKS // p.SLOT
    REST: gl.constexpr = p.WIDTH * p.K_BLOCKS % p.SLOT
    chosen = p.choices.chosen()
    for slot in range(FULL):
        load_slots(p, chosen, slot, slot * chosen.count, p.SLOT)
    if REST > 0:
        load_slots(p, chosen, FULL, FULL * chosen.count, REST)


@gluon.jit
def store_factors(p, chosen):
    """What the blocks' products count, but for the activation's scales: these alone have to be waited for."""
    TABLE: gl.constexpr = gl.BlockedLayout([1, p.TOP_K_POW2], [32, 1], [4, 1], [1, 0])
    place = gl.arange(0, p.PLACES, layout=gl.SliceLayout(1, TABLE))
    number, block = place // p.EACH, place % p.EACH
    chosen_number = gl.convert_layout(chosen.number, gl.SliceLayout(0, TABLE))
    here = chosen_number[None, :] == number[:, None]
    expert = gl.sum(gl.where(here, gl.convert_layout(chosen.expert, gl.SliceLayout(0, TABLE))[None, :], 0), axis=1)
    weight = gl.sum(gl.where(here, gl.convert_layout(chosen.weight, gl.SliceLayout(0, TABLE))[None, :], 0.0), axis=1)
    scale_row = expert * (p.HIDDEN // 128) + gl.program_id(0) * p.WIDTH // 128
    real = (number < chosen.count) & (block < p.K_BLOCKS)
    scale = gl.load(p.weight_scale_ptr + scale_row * p.K_BLOCKS + block, mask=real, other=0.0)
    p.factor.store(scale * weight)


@gluon.jit
def quantize_batch(p, chosen, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """Quantise so many of the places' blocks."""
    place = FIRST + gl.arange(0, COUNT, layout=gl.SliceLayout(1, WHOLE))
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, WHOLE))
    number, block = place // p.EACH, place % p.EACH
    real = (number < chosen.count) & (block < p.K_BLOCKS)
    at = p.activated_ptr + ((number * p.K_BLOCKS + block) * 128)[:, None] + column[None, :]
    mask = real[:, None] & (column >= 0)[None, :]
    quantized, scale = quantize_block(gl.load(at, mask=mask, other=0.0, cache_modifier=".cg"))
    p.x.slice(FIRST, COUNT, dim=0).store(quantized)
    factor = p.factor.slice(FIRST, COUNT)
    factor.store(factor.load(gl.SliceLayout(1, WHOLE)) * scale)


@gluon.jit
def gemm2_consumer(p):
    """The columns of this program of the layer's output."""
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, p.BLOCKS, 32])
    TOTAL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, p.WIDTH, 32])
    BATCH: gl.constexpr = min(64, p.PLACES)
    chosen = p.choices.chosen()
    store_factors(p, chosen)
    wait_for_previous_kernel(p.PDL)
    for batch in gl.static_range(p.PLACES // BATCH):
        if batch * (BATCH // p.EACH) < chosen.count:
            quantize_batch(p, chosen, batch * BATCH, BATCH)
    fence_async_shared()
    x = reinterpret(p.x, gl.float8e4nv, [p.PLACES // p.BLOCKS, p.BLOCKS, 128], E4M3)
    factor = reinterpret(p.factor, gl.float32, [p.PLACES // p.BLOCKS, p.BLOCKS], PLAIN)
    place = gl.arange(0, p.SLOT, layout=gl.SliceLayout(1, SUM))
    block = gl.arange(0, p.BLOCKS, layout=gl.SliceLayout(0, SUM))
    total = gl.zeros([p.SLOT, p.WIDTH], gl.float32, layout=TOTAL)
    product = gl.zeros([p.SLOT, p.BLOCKS], gl.float32, layout=SUM)
    step = 0
    for slot in range((p.WIDTH * p.K_BLOCKS + p.SLOT - 1) // p.SLOT):
        flat = slot * p.SLOT + place
        sums = gl.zeros([p.SLOT, p.BLOCKS], gl.float32, layout=SUM)
        for number in range(chosen.count):
            window = number * p.EACH // p.BLOCKS
            product = multiply(p.ring, x.index(window), product, step)
            own = block[None, :] == (number * p.EACH % p.BLOCKS + flat % p.K_BLOCKS)[:, None]
            sums += gl.where(own, product * factor.index(window).load(gl.SliceLayout(0, SUM))[None, :], 0.0)
            step += 1
        # Past the last row, where a slot isn't full, there is no column.
        total += rows_of(sums, flat // p.K_BLOCKS, 0, p.WIDTH)
    column = gl.program_id(0) * p.WIDTH + gl.arange(0, p.WIDTH, layout=gl.SliceLayout(0, TOTAL))
    gl.store(p.output_ptr + column, gl.sum(total, axis=0).to(gl.bfloat16))


@gluon.jit(do_not_specialize=["local_expert_offset"])
def hopper_one_token_gemm2_kernel(
    activated_ptr,  # [choices, INTERMEDIATE] float32: of the local experts in their order
    weight,  # descriptor of [E * HIDDEN * INTERMEDIATE/128, 128] e4m3, BOX rows
    weight_scale_ptr,  # [E, HIDDEN/128, INTERMEDIATE/128] float32
    first_ptr,  # [1, NUM_EXPERTS] float32 logits; if CHOSEN, [1, TOP_K] int32 global experts
    second_ptr,  # [NUM_EXPERTS] bfloat16 or float32, the bias; if CHOSEN, [1, TOP_K] float32 weights
    local_expert_offset,
    routed_scaling_factor,
    output_ptr,  # [1, HIDDEN] bfloat16, out
    HIDDEN: gl.constexpr,
    INTERMEDIATE: gl.constexpr,
    EACH: gl.constexpr,
    BLOCKS: gl.constexpr,
    PLACES: gl.constexpr,
    WIDTH: gl.constexpr,
    SLOT: gl.constexpr,
    BOX: gl.constexpr,
    CHOSEN: gl.constexpr,
    NUM_EXPERTS: gl.constexpr,
    TOP_K: gl.constexpr,
    TOP_K_POW2: gl.constexpr,
    N_GROUP: gl.constexpr,
    N_GROUP_POW2: gl.constexpr,
    TOPK_GROUP: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    GROUP_SIZE_POW2: gl.constexpr,
    SOFTMAX: gl.constexpr,
    RENORMALIZE: gl.constexpr,
    NUM_SHARED: gl.constexpr,
    E: gl.constexpr,
    STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Quantisation, GEMM2 and the weighted sum. Grid: (HIDDEN / WIDTH,). GEMM1 may still run."""
    ring = make_ring(STAGES, SLOT)
    x = gl.allocate_shared_memory(gl.float8e4nv, [PLACES, 128], E4M3)
    factor = gl.allocate_shared_memory(gl.float32, [PLACES], PLAIN)
    choices = make_choices(TOP_K_POW2)
    let_next_kernel_start(PDL)
    choose(
        choices, first_ptr, second_ptr, local_expert_offset, routed_scaling_factor, CHOSEN, NUM_EXPERTS, TOP_K,
        TOP_K_POW2, N_GROUP, N_GROUP_POW2, TOPK_GROUP, GROUP_SIZE, GROUP_SIZE_POW2, SOFTMAX, RENORMALIZE, NUM_SHARED, E,
    )  # fmt: skip
    p = Gemm2(
        activated_ptr=activated_ptr, weight=weight, weight_scale_ptr=weight_scale_ptr, output_ptr=output_ptr,
        choices=choices, ring=ring, x=x, factor=factor, HIDDEN=HIDDEN, K_BLOCKS=INTERMEDIATE // 128, EACH=EACH,
        BLOCKS=BLOCKS, PLACES=PLACES, WIDTH=WIDTH, SLOT=SLOT, BOX=BOX, TOP_K_POW2=TOP_K_POW2, PDL=PDL,
    )  # fmt: skip
    gl.warp_specialize([(gemm2_consumer, (p,)), (gemm2_producer, (p,))], [4], [PRODUCER_REGISTERS])


PROGRAMS = 2  # of GEMM1 that fit on a multiprocessor at once, beside one of GEMM2
SLOT = 128  # rows in a stage of GEMM2, of which a program has no part
GEMM1_STAGES, GEMM2_BYTES = 4, 2**16
REGISTERS, PRODUCER_REGISTERS = 80, 40

GEMM1, GEMM2 = Kernel(hopper_one_token_gemm1_kernel), Kernel(hopper_one_token_gemm2_kernel)


def fits(problem: MoEProblem, num_tokens: int, capability: tuple[int, int] | None) -> bool:
    """Whether it is one token, on Hopper, GEMM1's slots are full, and weights are on the output."""
    full = problem.hidden_size // problem.block % BLOCKS.value == 0
    return num_tokens == 1 and capability == (9, 0) and full and not problem.weight_on_input


def gemm1(problem: MoEProblem, limits: DeviceLimits, key: LaunchKey) -> Step:
    """SwiGLU of the first GEMM, float32."""
    layer, width, hidden = problem.all_routed, problem.intermediate_size, problem.hidden_size
    matrices = layer.num_local_experts
    operands: tuple[Operand, ...] = (
        "hidden_states",
        "hidden_states_scale",
        SwizzledTiles("gemm1_weights", matrices, 2 * width * (hidden // 128), 128, 1, BLOCKS.value),
        "gemm1_weights_scale",
        *_routing_operands(key),
        "unquantized",
        key.stride_scale_k,
    )
    grid = (min(max_local_rows(layer, 1) * width // ROWS.value, PROGRAMS * limits.num_sms),)
    return Step(GEMM1, grid, operands, _gemm1_constants(problem, limits, key.kind is RoutedInputs, key.dtype_routing))


def gemm2(problem: MoEProblem, limits: DeviceLimits, key: LaunchKey) -> Step:
    """The layer's output."""
    matrices, inner, hidden = problem.all_routed.num_local_experts, problem.intermediate_size, problem.hidden_size
    constants = _gemm2_constants(problem, limits, key.kind is RoutedInputs, key.dtype_routing)
    box = constants.arguments["BOX"]
    operands: tuple[Operand, ...] = (
        "unquantized",
        SwizzledTiles("gemm2_weights", matrices, hidden * (inner // 128), 128, 1, box),
        "gemm2_weights_scale",
        *_routing_operands(key),
        "output",
    )
    return Step(GEMM2, (hidden // constants.arguments["WIDTH"],), operands, constants)


def _routing_operands(key: LaunchKey) -> tuple[str, ...]:
    return (*key.kind._fields[:2], "local_expert_offset", "routed_scaling_factor")


def _shared(problem: MoEProblem, limits: DeviceLimits, chosen: bool, stages: int) -> dict[str, Any]:
    return {
        "CHOSEN": chosen,
        "NUM_EXPERTS": problem.num_experts,
        **selection_constants(problem),
        "E": problem.all_routed.num_local_experts,
        "STAGES": stages,
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
        "PDL": limits.pdl,
    }


@functools.lru_cache(maxsize=256)
def _gemm1_constants(problem: MoEProblem, limits: DeviceLimits, chosen: bool, dtype: torch.dtype) -> Constants:
    # One for each dtype of the bias, as each has its own binary.
    arguments = {
        "HIDDEN": problem.hidden_size,
        "INTERMEDIATE": problem.intermediate_size,
        "GATE_FIRST": problem.gate_first,
        "PLACES": pow2(problem.hidden_size // 128),
        **_shared(problem, limits, chosen, GEMM1_STAGES),
    }
    return Constants(arguments, {**limits.options, "num_warps": 4, "maxnreg": REGISTERS})


@functools.lru_cache(maxsize=256)
def _gemm2_constants(problem: MoEProblem, limits: DeviceLimits, chosen: bool, dtype: torch.dtype) -> Constants:
    blocks = problem.intermediate_size // 128
    # As many programs as multiprocessors at least.
    width = 32 if problem.hidden_size // 32 >= limits.num_sms else 16
    slot = SLOT if width * blocks % SLOT == 0 else 64
    arguments = {
        "HIDDEN": problem.hidden_size,
        "INTERMEDIATE": problem.intermediate_size,
        "EACH": pow2(blocks),
        "BLOCKS": max(BLOCKS.value, pow2(blocks)),
        "PLACES": max(16, pow2(problem.all_routed.top_k * pow2(blocks))),
        "WIDTH": width,
        "SLOT": slot,
        "BOX": next(box for box in (slot, 32, 16) if width * blocks % box == 0),
        **_shared(problem, limits, chosen, GEMM2_BYTES // (slot * 128)),
    }
    return Constants(arguments, {**limits.options, "num_warps": 4, "maxnreg": REGISTERS})
