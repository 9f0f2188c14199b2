"""GEMM1 in plain Triton: gathers its rows by token index, computes gate and up together, applies SwiGLU and quantises.

A row's 128 columns of the activation share one scale. Where a tile is narrower than that, which is what fills the GPU
when few experts are active, the last program to finish a 128 block quantises it.
"""

import functools

import torch
import triton
import triton.language as tl

from ....inputs import FP8
from ....problem import MoEProblem
from ...aggregate import aggregate
from ...arena import Arena
from ...launcher import Constants, DeviceLimits, Kernel
from ...pdl import let_next_kernel_start, wait_for_previous_kernel
from ...plan import LaunchKey
from ...quantize import quantize_block, swiglu_of
from ...shapes import max_local_rows, max_row_tiles, pow2
from ...steps import Step
from ..completion import Signals, count_arrival, signal
from ..tiles import Tile
from .common import bucket_constants, load_weights, locate_tile, options, scaled_product, weights_operand, zeros


@aggregate
class Gemm1:
    """Arguments of `gemm1_swiglu_kernel` that its tiles use."""

    hidden_ptr: tl.tensor
    hidden_scale_ptr: tl.tensor
    weight: tl.core.base_value  # a descriptor or a pointer
    weight_scale_ptr: tl.tensor
    slot_token_ptr: tl.tensor
    out_ptr: tl.tensor
    out_scale_ptr: tl.tensor
    unquantized_ptr: tl.tensor
    block_arrivals_ptr: tl.tensor
    finished_ptr: tl.tensor
    stride_scale_k: tl.tensor
    stride_scale_t: tl.tensor
    num_tokens: tl.tensor
    max_rows: tl.tensor
    STRIDE_HIDDEN: tl.constexpr
    HIDDEN: tl.constexpr
    INTERMEDIATE: tl.constexpr
    GATE_FIRST: tl.constexpr
    E: tl.constexpr
    BLOCK_N: tl.constexpr
    FUSE_GATE_UP: tl.constexpr
    TMA: tl.constexpr


@triton.jit
def scaled_pair_product(x, w, row_scale, first_scale, second_scale, ROWS: tl.constexpr, SWAP_AB: tl.constexpr):
    """`scaled_product` with one more factor for the first ROWS rows of ``w`` and another for the ROWS after them."""
    factor = tl.where(tl.arange(0, 2 * ROWS) < ROWS, first_scale, second_scale)
    if SWAP_AB:
        return tl.dot(w, tl.trans(x)) * (factor[:, None] * row_scale[None, :])
    else:
        return tl.dot(x, tl.trans(w)) * (row_scale[:, None] * factor[None, :])


@triton.jit
def load_scales(row_at, first_at, second_at, block, stride_scale_k, real, K_BLOCKS: tl.constexpr):
    """Scales of the rows and of both halves of the weights for a 128 block; those of the last one after it."""
    block = tl.minimum(block, K_BLOCKS - 1)
    row = tl.load(row_at + tl.cast(block, tl.int64) * stride_scale_k, mask=real, other=0.0)
    return row, tl.load(first_at + block), tl.load(second_at + block)


@triton.jit
def store_quantized(p, value, row, real, block_n):
    """Quantise one 128 block of the activation and store it with its scales."""
    quantized, scale = quantize_block(value)
    column = block_n * 128 + tl.arange(0, 128)
    tl.store(p.out_ptr + row[:, None] * p.INTERMEDIATE + column[None, :], quantized, mask=real[:, None])
    tl.store(p.out_scale_ptr + block_n.to(tl.int64) * p.max_rows + row, scale, mask=real)


@triton.jit
def gemm1_tile(
    p, expert, rows, rows_before, row_tile, first_slot, tile_n, BLOCK_M: tl.constexpr, NUM_STAGES: tl.constexpr,
    K_UNROLL: tl.constexpr,
):  # fmt: skip
    """One tile of an expert with so many ``rows``."""
    BLOCK_K: tl.constexpr = 128
    K_BLOCKS: tl.constexpr = p.HIDDEN // BLOCK_K
    BLOCK_N: tl.constexpr = p.BLOCK_N
    tl.static_assert(K_BLOCKS % K_UNROLL == 0)
    k = tl.arange(0, BLOCK_K)
    slot = first_slot + tl.arange(0, BLOCK_M)
    real = slot < rows
    # For T = 1 the token is 0: a load that is masked off takes no time.
    unknown = tl.where(p.num_tokens > 1, rows, 0)
    token = tl.load(p.slot_token_ptr + expert.to(tl.int64) * p.num_tokens + slot, mask=slot < unknown, other=0)
    hidden_at = p.hidden_ptr + token.to(tl.int64)[:, None] * p.STRIDE_HIDDEN + k[None, :]
    hidden_scale_at = p.hidden_scale_ptr + token.to(tl.int64) * p.stride_scale_t
    weight_row = tile_n * BLOCK_N
    block_n = weight_row // 128
    first_scale_at = p.weight_scale_ptr + (expert * (2 * p.INTERMEDIATE // 128) + block_n) * K_BLOCKS
    second_scale_at = first_scale_at + p.INTERMEDIATE // 128 * K_BLOCKS

    SWAP_AB: tl.constexpr = BLOCK_M < 64 and BLOCK_N * (2 if p.FUSE_GATE_UP else 1) >= 64
    if p.FUSE_GATE_UP:
        both = zeros(BLOCK_M, 2 * BLOCK_N, SWAP_AB)
    else:
        first = zeros(BLOCK_M, BLOCK_N, SWAP_AB)
        second = zeros(BLOCK_M, BLOCK_N, SWAP_AB)
    # Scales are loaded one block ahead: their latency would stall every promotion.
    next_row, next_first, next_second = load_scales(
        hidden_scale_at, first_scale_at, second_scale_at, 0, p.stride_scale_k, real, K_BLOCKS
    )
    for step in tl.range(0, K_BLOCKS // K_UNROLL, num_stages=NUM_STAGES):
        for unrolled in tl.static_range(K_UNROLL):
            block = step * K_UNROLL + unrolled
            row_scale, first_scale, second_scale = next_row, next_first, next_second
            next_row, next_first, next_second = load_scales(
                hidden_scale_at, first_scale_at, second_scale_at, block + 1, p.stride_scale_k, real, K_BLOCKS
            )
            # Weights first: the loads of rows depend on the tokens.
            if p.FUSE_GATE_UP:
                w = load_weights(p.weight, 2 * expert, weight_row, block, 2, BLOCK_N, p.INTERMEDIATE, p.HIDDEN, p.TMA)
                x = tl.load(hidden_at + block * BLOCK_K, mask=real[:, None], other=0.0)
                both += scaled_pair_product(x, w, row_scale, first_scale, second_scale, BLOCK_N, SWAP_AB)
            else:
                w_first = load_weights(
                    p.weight, 2 * expert, weight_row, block, 1, BLOCK_N, p.INTERMEDIATE, p.HIDDEN, p.TMA
                )
                w_second = load_weights(
                    p.weight, 2 * expert + 1, weight_row, block, 1, BLOCK_N, p.INTERMEDIATE, p.HIDDEN, p.TMA
                )
                x = tl.load(hidden_at + block * BLOCK_K, mask=real[:, None], other=0.0)
                first += scaled_product(x, w_first, row_scale * first_scale, SWAP_AB)
                second += scaled_product(x, w_second, row_scale * second_scale, SWAP_AB)
    if p.FUSE_GATE_UP:
        if SWAP_AB:
            both = tl.trans(both)
        # A thread has both columns already: nothing moves.
        first, second = tl.split(tl.permute(tl.reshape(both, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
    elif SWAP_AB:
        first, second = tl.trans(first), tl.trans(second)

    value = swiglu_of(first, second) if p.GATE_FIRST else swiglu_of(second, first)
    row = (rows_before + slot).to(tl.int64)
    if BLOCK_N == 128:
        store_quantized(p, value, row, real, block_n)
        signal(p.finished_ptr, expert, p.E)
    else:
        row_at = p.unquantized_ptr + row[:, None] * p.INTERMEDIATE
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(row_at + column[None, :], value, mask=real[:, None])
        if count_arrival(p.block_arrivals_ptr + row_tile * (p.INTERMEDIATE // 128) + block_n) == 128 // BLOCK_N - 1:
            # Not from L1, which doesn't see other SMs' stores.
            whole_at = row_at + (block_n * 128 + tl.arange(0, 128))[None, :]
            whole = tl.load(whole_at, mask=real[:, None], other=0.0, cache_modifier=".cg")
            store_quantized(p, whole, row, real, block_n)
            signal(p.finished_ptr, expert, p.E)


@triton.jit(do_not_specialize=["stride_scale_k", "stride_scale_t", "num_tokens", "max_rows"])
def gemm1_swiglu_kernel(
    hidden_ptr,  # [T, HIDDEN] e4m3, rows STRIDE_HIDDEN apart
    hidden_scale_ptr,  # [HIDDEN/128, T] float32
    weight,  # [E, 2 * INTERMEDIATE, HIDDEN] e4m3: a descriptor of its rows if TMA, else a pointer
    weight_scale_ptr,  # [E, 2 * INTERMEDIATE/128, HIDDEN/128] float32
    tokens_per_expert_ptr,  # [E] int32
    slot_token_ptr,  # [E, T] int32
    out_ptr,  # [max_rows, INTERMEDIATE] e4m3, out
    out_scale_ptr,  # [INTERMEDIATE/128, max_rows] float32, out
    unquantized_ptr,  # [max_rows, INTERMEDIATE] float32, scratch; not touched if BLOCK_N is 128
    block_arrivals_ptr,  # [row tiles, INTERMEDIATE/128] int32, zeros on entry; not touched if BLOCK_N is 128
    finished_ptr,  # [E + 1] int32, zeros on entry: a signal for each row tile's 128 block of the activation
    stride_scale_k,
    stride_scale_t,
    num_tokens,
    max_rows,
    STRIDE_HIDDEN: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FUSE_GATE_UP: tl.constexpr,
    M_BUCKETS: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: any number of programs; they share the tiles of BLOCK_M rows by BLOCK_N gate and up columns.

    FUSE_GATE_UP computes gate and up by one product. M_BUCKETS are tuples (rows above which, rows of the tile, stages,
    unroll): a tile takes the one that what is left of its expert's rows falls into, all from BLOCK_M on the last.
    """
    tl.static_assert(128 % BLOCK_N == 0)
    TILES_N: tl.constexpr = INTERMEDIATE // BLOCK_N
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    p = Gemm1(
        hidden_ptr=hidden_ptr, hidden_scale_ptr=hidden_scale_ptr, weight=weight,
        weight_scale_ptr=weight_scale_ptr, slot_token_ptr=slot_token_ptr, out_ptr=out_ptr,
        out_scale_ptr=out_scale_ptr, unquantized_ptr=unquantized_ptr, block_arrivals_ptr=block_arrivals_ptr,
        finished_ptr=finished_ptr, stride_scale_k=stride_scale_k, stride_scale_t=stride_scale_t,
        num_tokens=num_tokens, max_rows=max_rows, STRIDE_HIDDEN=STRIDE_HIDDEN, HIDDEN=HIDDEN,
        INTERMEDIATE=INTERMEDIATE, GATE_FIRST=GATE_FIRST, E=E, BLOCK_N=BLOCK_N, FUSE_GATE_UP=FUSE_GATE_UP,
        TMA=TMA,
    )  # fmt: skip
    expert = tl.arange(0, E_POW2)
    count = tl.load(tokens_per_expert_ptr + expert, mask=expert < E, other=0)
    num_tiles = tl.sum(tl.cdiv(count, BLOCK_M), axis=0) * TILES_N
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        at, rows, rows_before, tiles_before, tile_m, tile_n = locate_tile(tile, count, expert, TILES_N, BLOCK_M)
        first_slot = tile_m * BLOCK_M
        left = tl.minimum(rows - first_slot, BLOCK_M)
        for b in tl.static_range(len(M_BUCKETS)):
            if left > M_BUCKETS[b][0] and left <= M_BUCKETS[b][1]:
                gemm1_tile(
                    p, at, rows, rows_before, tiles_before + tile_m, first_slot, tile_n, M_BUCKETS[b][1],
                    M_BUCKETS[b][2], M_BUCKETS[b][3],
                )  # fmt: skip


GEMM1 = Kernel(gemm1_swiglu_kernel)


def block_arrivals(problem: MoEProblem, num_tokens: int, tile: Tile) -> int:
    """Counters of `gemm1`: one for each row tile and 128 block of the activation that several tiles share."""
    if tile.block_n == problem.block:
        return 0
    return max_row_tiles(problem, num_tokens, tile.block_m) * (problem.intermediate_size // problem.block)


def signals(problem: MoEProblem, tile: Tile) -> Signals:
    """Of `gemm1`: one for each row tile and 128 block of the activation."""
    return Signals(tile.block_m, problem.intermediate_size // problem.block)


def reserve_activation(arena: Arena, problem: MoEProblem, rows: int, tile: Tile) -> None:
    """Add the result of `gemm1`, and what it gathers in float32 where its tiles are narrower than a 128 block."""
    width = problem.intermediate_size
    arena.reserve("activated", (rows, width), FP8)
    arena.reserve("activated_scale", (width // problem.block, rows), torch.float32)
    arena.reserve("unquantized", (rows if tile.block_n < problem.block else 0, width), torch.float32)


def gemm1(problem: MoEProblem, limits: DeviceLimits, key: LaunchKey, tile: Tile) -> Step:
    """SwiGLU of the first GEMM: ``[max_rows, I]`` e4m3 and ``[I/128, max_rows]`` scales."""
    tokens, width = key.num_tokens, problem.intermediate_size
    operands = (
        "hidden_states",
        "hidden_states_scale",
        weights_operand("gemm1_weights", problem, key, (width, problem.hidden_size), 2, 1 + tile.fused, tile.block_n),
        "gemm1_weights_scale",
        "tokens_per_expert",
        "slot_token",
        "activated",
        "activated_scale",
        "unquantized",
        "block_arrivals",
        "finished",
        key.stride_scale_k,
        key.stride_scale_t,
        tokens,
        max_local_rows(problem, tokens),
    )
    tiles = max_row_tiles(problem, tokens, tile.block_m) * (width // tile.block_n)
    grid = (min(tiles, limits.num_sms * tile.programs_per_sm),)
    return Step(GEMM1, grid, operands, _constants(problem, limits, tile, key.stride_hidden, key.aligned))


@functools.lru_cache(maxsize=256)
def _constants(problem: MoEProblem, limits: DeviceLimits, tile: Tile, stride_hidden: int, tma: bool) -> Constants:
    arguments = {
        "STRIDE_HIDDEN": stride_hidden,
        "HIDDEN": problem.hidden_size,
        "INTERMEDIATE": problem.intermediate_size,
        "GATE_FIRST": problem.gate_first,
        "E": problem.num_local_experts,
        "E_POW2": pow2(problem.num_local_experts),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "FUSE_GATE_UP": tile.fused,
        "M_BUCKETS": bucket_constants(tile),
        "TMA": tma,
        "PDL": limits.pdl,
    }
    return Constants(arguments, options(limits, tile))
