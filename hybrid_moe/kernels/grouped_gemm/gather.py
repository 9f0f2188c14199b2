"""Rows in expert order, for other libraries' grouped GEMMs: they want their input contiguous, ours gathers by index."""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from ...problem import MoEProblem
from ..launcher import Constants, DeviceLimits, Kernel
from ..pdl import let_next_kernel_start, wait_for_previous_kernel
from ..plan import LaunchKey
from ..shapes import pow2
from ..steps import Step
from .library_rows import Rows


# Strides depend on T: not specialised, one binary serves every T.
@triton.jit(do_not_specialize=["stride_scale_k", "stride_scale_t", "stride_rows_scale_r", "stride_rows_scale_k"])
def gather_kernel(
    hidden_ptr,  # [T, HIDDEN] e4m3, rows STRIDE_HIDDEN apart
    hidden_scale_ptr,  # [HIDDEN/128, T] float32
    tokens_per_expert_ptr,  # [E] int32
    pair_ptr,  # [T, TOP_K] int32, see `routing.route_kernel`
    rows_ptr,  # [max_rows, HIDDEN] e4m3, out; only rows that exist are written
    rows_scale_ptr,  # float32, out: of row r and block k at r * stride_rows_scale_r + k * stride_rows_scale_k
    start_ptr,  # [E + 1] int32, out: each expert's first row; after the last expert, where the next one would start
    end_ptr,  # [E] int32, out: the row after each expert's last
    problem_sizes_ptr,  # [2, E, 3] int32, out if TABLES: rows, columns and sum length of GEMM1, then of GEMM2
    strides_ptr,  # [3, E] int64, out if TABLES: HIDDEN, INTERMEDIATE, 2 * INTERMEDIATE
    stride_scale_k,
    stride_scale_t,
    stride_rows_scale_r,
    stride_rows_scale_k,
    STRIDE_HIDDEN: tl.constexpr,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_POW2: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    ALIGN: tl.constexpr,
    TABLES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (T,). Copies each token to all its local experts; an expert's rows start at a multiple of ALIGN."""
    K_BLOCKS: tl.constexpr = HIDDEN // 128
    K_BLOCKS_POW2: tl.constexpr = HIDDEN_POW2 // 128
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, E_POW2)
    count = tl.load(tokens_per_expert_ptr + expert, mask=expert < E, other=0)
    extent = tl.cdiv(count, ALIGN) * ALIGN

    choice = tl.arange(0, TOP_K_POW2)
    pair = tl.load(pair_ptr + token * TOP_K + choice, mask=choice < TOP_K, other=-1)
    before = tl.where(expert[None, :] < (pair % E)[:, None], extent[None, :], 0)
    row = tl.where(pair >= 0, tl.sum(before, axis=1) + pair // E, -1)
    # With many ranks most tokens have no local expert: don't read them.
    if tl.max(row, axis=0) >= 0:
        column = tl.arange(0, HIDDEN_POW2)
        block = tl.arange(0, K_BLOCKS_POW2)
        value = tl.load(hidden_ptr + token * STRIDE_HIDDEN + column, mask=column < HIDDEN)
        scale_at = hidden_scale_ptr + token * stride_scale_t + block.to(tl.int64) * stride_scale_k
        scale = tl.load(scale_at, mask=block < K_BLOCKS, other=0.0)
        for k in tl.static_range(TOP_K):
            to = tl.sum(tl.where(choice == k, row, 0), axis=0).to(tl.int64)
            if to >= 0:
                tl.store(rows_ptr + to * HIDDEN + column, value, mask=column < HIDDEN)
                rows_scale_at = rows_scale_ptr + to * stride_rows_scale_r + block.to(tl.int64) * stride_rows_scale_k
                tl.store(rows_scale_at, scale, mask=block < K_BLOCKS)

    if tl.program_id(0) == 0:
        real = expert < E
        start = tl.cumsum(extent, axis=0) - extent
        tl.store(start_ptr + expert, start, mask=real)
        tl.store(start_ptr + E, tl.sum(extent, axis=0))
        tl.store(end_ptr + expert, start + count, mask=real)
        if TABLES:
            one = tl.full((E_POW2,), 1, tl.int32)
            first = problem_sizes_ptr + expert * 3
            tl.store(first, count, mask=real)
            tl.store(first + 1, one * (2 * INTERMEDIATE), mask=real)
            tl.store(first + 2, one * HIDDEN, mask=real)
            second = first + E * 3
            tl.store(second, count, mask=real)
            tl.store(second + 1, one * HIDDEN, mask=real)
            tl.store(second + 2, one * INTERMEDIATE, mask=real)
            long = one.to(tl.int64)
            tl.store(strides_ptr + expert, long * HIDDEN, mask=real)
            tl.store(strides_ptr + E + expert, long * INTERMEDIATE, mask=real)
            tl.store(strides_ptr + 2 * E + expert, long * (2 * INTERMEDIATE), mask=real)


GATHER = Kernel(gather_kernel)


def gather(rows: Rows, limits: DeviceLimits, key: LaunchKey) -> Step:
    """The copy of the tokens into ``gathered``, which fills the tables as well."""
    operands = (
        "hidden_states",
        "hidden_states_scale",
        "tokens_per_expert",
        "pair",
        "gathered",
        "gathered_scale",
        "start",
        "end",
        "problem_sizes" if rows.tables else "start",
        "strides" if rows.tables else "start",
        key.stride_scale_k,
        key.stride_scale_t,
        *rows.scale_strides(rows.problem.hidden_size),
    )
    constants = _gather_constants(rows.problem, limits, rows.align, key.stride_hidden, rows.tables)
    return Step(GATHER, (key.num_tokens,), operands, constants)


@functools.lru_cache(maxsize=256)
def _gather_constants(
    problem: MoEProblem, limits: DeviceLimits, align: int, stride_hidden: int, tables: bool
) -> Constants:
    hidden_pow2 = pow2(problem.hidden_size)
    arguments = {
        "STRIDE_HIDDEN": stride_hidden,
        "E": problem.num_local_experts,
        "E_POW2": pow2(problem.num_local_experts),
        "TOP_K": problem.top_k,
        "TOP_K_POW2": pow2(problem.top_k),
        "HIDDEN": problem.hidden_size,
        "HIDDEN_POW2": hidden_pow2,
        "INTERMEDIATE": problem.intermediate_size,
        "ALIGN": align,
        "TABLES": tables,
        "PDL": limits.pdl,
    }
    return Constants(arguments, {**limits.options, "num_warps": 8 if hidden_pow2 >= 4096 else 4})
