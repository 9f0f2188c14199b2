"""The weighted sum of each token's expert rows."""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from ..problem import MoEProblem
from .launcher import Constants, DeviceLimits, Kernel
from .pdl import let_next_kernel_start, wait_for_previous_kernel
from .plan import LaunchKey
from .shapes import pow2
from .steps import Step

# Programs that a multiprocessor runs at once; more of them share a token's columns only up to this.
PROGRAMS = 16
# Column blocks that one program adds up at once: that many loads are in flight.
BLOCKS = 8
# From so many tokens on, other programs hide latency, and skipping other ranks' choices saves work.
BRANCH_TOKENS = 512


@triton.jit(do_not_specialize=["first_block"])
def combine_kernel(
    rows_ptr,  # [rows, COLUMNS] bfloat16: the second GEMM's result for each pair
    tokens_per_expert_ptr,  # [E] int32
    pair_ptr,  # [T, TOP_K] int32
    pair_weight_ptr,  # [T, TOP_K] float32
    output_ptr,  # [T, HIDDEN] bfloat16; COLUMNS columns from 128 * first_block on are written
    first_block,  # counted in 128s, so that the stores are known to be aligned
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    BRANCH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (T, programs that share the columns, BLOCKS blocks of BLOCK_N each).

    An expert's rows start at a multiple of ALIGN. Sums in float32 over the choices in their order: same input, same
    bits.
    """
    tl.static_assert(COLUMNS % BLOCK_N == 0)  # a mask inside of a block would break up the wide loads
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, E_POW2)
    count = tl.load(tokens_per_expert_ptr + expert, mask=expert < E, other=0)
    extent = tl.cdiv(count, ALIGN) * ALIGN
    if BRANCH:
        # Loaded before the first branch, so that the loads overlap.
        choice = tl.arange(0, TOP_K_POW2)
        pairs = tl.load(pair_ptr + token * TOP_K + choice, mask=choice < TOP_K, other=-1)
        weights = tl.load(pair_weight_ptr + token * TOP_K + choice, mask=choice < TOP_K, other=0.0)

    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    real = block < COLUMNS // BLOCK_N
    total = tl.zeros((BLOCKS, BLOCK_N), tl.float32)
    for k in tl.static_range(TOP_K):
        if BRANCH:
            pair = tl.sum(tl.where(choice == k, pairs, 0), axis=0)
        else:
            pair = tl.load(pair_ptr + token * TOP_K + k)
        # Without a branch the loads of all choices overlap, those of other ranks masked off.
        if not BRANCH or pair >= 0:
            if BRANCH:
                weight = tl.sum(tl.where(choice == k, weights, 0.0), axis=0)
            else:
                weight = tl.load(pair_weight_ptr + token * TOP_K + k)
            row = (tl.sum(tl.where(expert < pair % E, extent, 0), axis=0) + pair // E).to(tl.int64)
            wanted = real & (pair + tl.zeros((BLOCKS, 1), tl.int32) >= 0)
            value = tl.load(rows_ptr + row * COLUMNS + column, mask=wanted, other=0.0)
            total += value.to(tl.float32) * weight
    tl.store(output_ptr + token * HIDDEN + first_block * 128 + column, total.to(tl.bfloat16), mask=real)


COMBINE = Kernel(combine_kernel)


def combine(problem: MoEProblem, limits: DeviceLimits, key: LaunchKey, columns: int, first_column: int) -> Step:
    """The weighted sum for the columns that ``rows`` holds, ``[max_rows, columns]`` bfloat16."""
    tokens = key.num_tokens
    # The largest power of two that divides the columns, up to what spreads few tokens over the device.
    block_n = min(512 if tokens < limits.num_sms // 4 else 1024, columns & -columns)
    blocks = columns // block_n
    programs = max(1, min(blocks, limits.num_sms * PROGRAMS // tokens))
    blocks_each = min(pow2(-(-blocks // programs)), BLOCKS)
    grid = (tokens, -(-blocks // blocks_each))
    branch = tokens >= BRANCH_TOKENS
    constants = _combine_constants(problem, limits, columns, block_n, blocks_each, key.row_alignment, branch)
    operands = ("rows", "tokens_per_expert", "pair", "pair_weight", "output", first_column // problem.block)
    return Step(COMBINE, grid, operands, constants)


@functools.lru_cache(maxsize=256)
def _combine_constants(
    problem: MoEProblem, limits: DeviceLimits, columns: int, block_n: int, blocks: int, align: int, branch: bool
) -> Constants:
    arguments = {
        "E": problem.num_local_experts,
        "E_POW2": pow2(problem.num_local_experts),
        "TOP_K": problem.top_k,
        "TOP_K_POW2": pow2(problem.top_k),
        "HIDDEN": problem.hidden_size,
        "COLUMNS": columns,
        "ALIGN": align,
        "BRANCH": branch,
        "BLOCKS": blocks,
        "BLOCK_N": block_n,
        "PDL": limits.pdl,
    }
    return Constants(arguments, {**limits.options, "num_warps": 4})
