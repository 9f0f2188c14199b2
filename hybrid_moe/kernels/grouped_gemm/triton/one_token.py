"""GEMM2 and the combine of one token whose experts are narrow, by dot products.

All weights that a program needs are on their way before it waits for GEMM1: a few columns of each chosen expert.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from ....problem import MoEProblem
from ...launcher import Constants, DeviceLimits, Kernel
from ...pdl import let_next_kernel_start, wait_for_previous_kernel
from ...plan import LaunchKey
from ...shapes import max_local_rows, pow2
from ...steps import Step

# Columns of the result that a program computes: a divisor of 128.
BLOCK_N = 8
# Wider experts are left to others: of 384 columns, with registers for 512, it is 4% slower than them.
MAX_INTERMEDIATE = 256


@triton.jit(do_not_specialize=["max_rows"])
def one_token_kernel(
    activated_ptr,  # [max_rows, INTERMEDIATE] e4m3
    activated_scale_ptr,  # [INTERMEDIATE/128, max_rows] float32
    weight_ptr,  # [E, HIDDEN, INTERMEDIATE] e4m3
    weight_scale_ptr,  # [E, HIDDEN/128, INTERMEDIATE/128] float32
    pair_ptr,  # [1, TOP_K] int32
    pair_weight_ptr,  # [1, TOP_K] float32
    output_ptr,  # [1, HIDDEN] bfloat16, out
    max_rows,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    E: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    INTERMEDIATE_POW2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (HIDDEN / BLOCK_N,)."""
    K_BLOCKS: tl.constexpr = INTERMEDIATE // 128
    let_next_kernel_start(PDL)
    choice = tl.arange(0, TOP_K_POW2)
    # Nothing was waited for but the routing: the first-level cache may hold older pairs.
    pair = tl.load(pair_ptr + choice, mask=choice < TOP_K, other=-1, cache_modifier=".cg")
    pair_weight = tl.load(pair_weight_ptr + choice, mask=choice < TOP_K, other=0.0, cache_modifier=".cg")
    local = pair >= 0
    expert = tl.where(local, pair % E, 0)
    first = tl.program_id(0) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, INTERMEDIATE_POW2)
    real = local[:, None] & (k < INTERMEDIATE)[None, :]
    weight_row = expert.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    weight_at = weight_ptr + weight_row[:, :, None] * INTERMEDIATE + k[None, None, :]
    weight = tl.load(weight_at, mask=real[:, None, :] & (column >= 0)[None, :, None], other=0.0)
    scale_at = weight_scale_ptr + (expert * (HIDDEN // 128) + first // 128)[:, None] * K_BLOCKS + (k // 128)[None, :]
    weight_scale = tl.load(scale_at, mask=real, other=0.0)
    # An expert has one row or none.
    row = tl.sum((local[None, :] & (expert[None, :] < expert[:, None])).to(tl.int32), axis=1)
    wait_for_previous_kernel(PDL)
    x = tl.load(activated_ptr + row[:, None] * INTERMEDIATE + k[None, :], mask=real, other=0.0)
    x_scale = tl.load(activated_scale_ptr + (k // 128)[None, :] * max_rows + row[:, None], mask=real, other=0.0)
    x = x.to(tl.float32) * (x_scale * weight_scale * pair_weight[:, None])
    total = tl.sum(tl.sum(weight.to(tl.float32) * x[:, None, :], axis=2), axis=0)
    tl.store(output_ptr + column, total.to(tl.bfloat16))


ONE_TOKEN = Kernel(one_token_kernel)


def fits(problem: MoEProblem) -> bool:
    """Whether experts are as narrow as the kernel is for."""
    return problem.intermediate_size <= MAX_INTERMEDIATE


def gemm2(problem: MoEProblem, limits: DeviceLimits, key: LaunchKey) -> Step:
    """The layer's output, of the activation of one token."""
    operands = (
        "activated",
        "activated_scale",
        "gemm2_weights",
        "gemm2_weights_scale",
        "pair",
        "pair_weight",
        "output",
        max_local_rows(problem, key.num_tokens),
    )
    return Step(ONE_TOKEN, (problem.hidden_size // BLOCK_N,), operands, _constants(problem, limits))


@functools.lru_cache(maxsize=256)
def _constants(problem: MoEProblem, limits: DeviceLimits) -> Constants:
    arguments = {
        "TOP_K": problem.top_k,
        "TOP_K_POW2": pow2(problem.top_k),
        "E": problem.num_local_experts,
        "HIDDEN": problem.hidden_size,
        "INTERMEDIATE": problem.intermediate_size,
        "INTERMEDIATE_POW2": pow2(problem.intermediate_size),
        "BLOCK_N": BLOCK_N,
        "PDL": limits.pdl,
    }
    return Constants(arguments, {**limits.options, "num_warps": 4})
