"""The weighted sum of each token's expert rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import let_next_kernel_start, wait_for_previous_kernel


@triton.jit
def combine_kernel(
    rows_ptr,  # [rows, COLUMNS] bfloat16: the second GEMM's result for each pair
    counts_ptr,  # [E] int32
    pair_ptr,  # [T, TOP_K] int32
    pair_weight_ptr,  # [T, TOP_K] float32
    output_ptr,  # [T, HIDDEN] bfloat16; columns [first_column, first_column + COLUMNS) are written
    first_column,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (T, cdiv(COLUMNS, BLOCK_N)). Sums in float32 over the choices in their order: same input, same bits."""
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    choice = tl.arange(0, TOP_K_POW2)
    expert = tl.arange(0, E_POW2)

    pair = tl.load(pair_ptr + token * TOP_K + choice, mask=choice < TOP_K, other=-1)
    weight = tl.load(pair_weight_ptr + token * TOP_K + choice, mask=choice < TOP_K, other=0.0)
    count = tl.load(counts_ptr + expert, mask=expert < E, other=0)
    is_local = pair >= 0
    rows_before = tl.sum(tl.where(expert[None, :] < (pair % E)[:, None], count[None, :], 0), axis=1)
    row = (rows_before + pair // E).to(tl.int64)
    value = tl.load(
        rows_ptr + row[:, None] * COLUMNS + column[None, :],
        mask=is_local[:, None] & (column < COLUMNS)[None, :],
        other=0.0,
    )
    total = tl.sum(value.to(tl.float32) * weight[:, None], axis=0)
    tl.store(output_ptr + token * HIDDEN + first_column + column, total.to(tl.bfloat16), mask=column < COLUMNS)
