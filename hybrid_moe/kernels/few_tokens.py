"""The layer for a few tokens in float32, by dot products: `hybrid_moe.reference.moe_reference` without waiting.

It shares no code with the pipeline and reads no weights but those of the chosen local experts. Which ones they are
stays on the device, so that the host waits for nothing. For checks of what others computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..inputs import Inputs
from ..problem import MoEProblem

# Weight rows of a program: few, so that even one token has programs enough to keep the memory busy.
ROWS = 8
# Columns at a time, of as many blocks.
COLUMNS = 512


@triton.jit
def _products(x, w_ptr, w_scale_ptr, first_row, column, LENGTH: tl.constexpr, ROWS: tl.constexpr):
    """``[ROWS, columns]``: weights, dequantised, times a vector; the rows lie in one block of scales."""
    exists = column < LENGTH
    row = first_row + tl.arange(0, ROWS)
    w = tl.load(w_ptr + row[:, None] * LENGTH + column[None, :], mask=exists[None, :], other=0.0).to(tl.float32)
    scale = tl.load(w_scale_ptr + first_row // 128 * (LENGTH // 128) + column // 128, mask=exists, other=0.0)
    return w * (x * scale)[None, :]


@triton.jit(do_not_specialize=["tokens", "local_expert_offset"])
def inner_kernel(
    ids_ptr,  # [T, TOP_K] int32, global
    hidden_ptr,  # [T, HIDDEN] e4m3
    scale_ptr,  # [HIDDEN / 128, T] float32
    w13_ptr,  # [E, 2 INTER, HIDDEN] e4m3
    s13_ptr,  # [E, 2 INTER / 128, HIDDEN / 128] float32
    inner_ptr,  # [T * TOP_K, INTER] float32, out; unwritten for experts that aren't local
    tokens,
    local_expert_offset,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTER: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (T * TOP_K, INTER / ROWS). silu(gate) * up of one choice of a token."""
    pair = tl.program_id(0)
    token = pair // TOP_K
    expert = tl.load(ids_ptr + pair).to(tl.int64) - local_expert_offset
    if (expert >= 0) & (expert < E):
        first_row = tl.program_id(1) * ROWS
        x_ptr = hidden_ptr + token.to(tl.int64) * HIDDEN
        first_ptr = w13_ptr + expert * 2 * INTER * HIDDEN
        first_scale_ptr = s13_ptr + expert * (2 * INTER // 128) * (HIDDEN // 128)
        second_ptr = first_ptr + INTER * HIDDEN
        second_scale_ptr = first_scale_ptr + (INTER // 128) * (HIDDEN // 128)
        first = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        second = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, HIDDEN, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            exists = column < HIDDEN
            x = tl.load(x_ptr + column, mask=exists, other=0.0).to(tl.float32)
            x *= tl.load(scale_ptr + column // 128 * tokens + token, mask=exists, other=0.0)
            first += _products(x, first_ptr, first_scale_ptr, first_row, column, HIDDEN, ROWS)
            second += _products(x, second_ptr, second_scale_ptr, first_row, column, HIDDEN, ROWS)
        if GATE_FIRST:
            up, gate = tl.sum(second, axis=1), tl.sum(first, axis=1)
        else:
            up, gate = tl.sum(first, axis=1), tl.sum(second, axis=1)
        row = first_row + tl.arange(0, ROWS)
        tl.store(inner_ptr + pair.to(tl.int64) * INTER + row, gate / (1.0 + tl.exp(-gate)) * up)


@triton.jit(do_not_specialize=["local_expert_offset"])
def output_kernel(
    ids_ptr,  # [T, TOP_K] int32, global
    weights_ptr,  # [T, TOP_K] float32
    inner_ptr,  # [T * TOP_K, INTER] float32
    w2_ptr,  # [E, HIDDEN, INTER] e4m3
    s2_ptr,  # [E, HIDDEN / 128, INTER / 128] float32
    output_ptr,  # [T, HIDDEN] float32, out
    local_expert_offset,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (T, HIDDEN / ROWS). The sum over a token's choices that are local."""
    token = tl.program_id(0)
    first_row = tl.program_id(1) * ROWS
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for choice in range(TOP_K):
        pair = token * TOP_K + choice
        expert = tl.load(ids_ptr + pair).to(tl.int64) - local_expert_offset
        if (expert >= 0) & (expert < E):
            weight = tl.load(weights_ptr + pair)
            x_ptr = inner_ptr + pair.to(tl.int64) * INTER
            w_ptr = w2_ptr + expert * HIDDEN * INTER
            w_scale_ptr = s2_ptr + expert * (HIDDEN // 128) * (INTER // 128)
            for start in range(0, INTER, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                x = tl.load(x_ptr + column, mask=column < INTER, other=0.0) * weight
                total += _products(x, w_ptr, w_scale_ptr, first_row, column, INTER, ROWS)
    row = first_row + tl.arange(0, ROWS)
    tl.store(output_ptr + token.to(tl.int64) * HIDDEN + row, tl.sum(total, axis=1))


def few_tokens(inputs: Inputs, topk_ids: torch.Tensor, topk_weights: torch.Tensor, problem: MoEProblem) -> torch.Tensor:
    """The layer's result in float32, on the current stream.

    Parameters
    ----------
    inputs
        As `moe_reference` has them, the activations contiguous.
    topk_ids, topk_weights
        ``[T, top_k + num_shared_experts]`` int32 and float32, contiguous; see `hybrid_moe.reference.chosen_experts`.
    problem
        The layer.

    Returns
    -------
    torch.Tensor
        ``[T, H]`` float32; zeros for a token without a local expert.
    """
    problem = problem.all_routed
    tokens, hidden, inter = inputs.num_tokens, problem.hidden_size, problem.intermediate_size
    device, offset = inputs.hidden_states.device, int(inputs.local_expert_offset)
    inner = torch.empty((tokens * problem.top_k, inter), dtype=torch.float32, device=device)
    output = torch.empty((tokens, hidden), dtype=torch.float32, device=device)
    sizes = {"TOP_K": problem.top_k, "E": problem.num_local_experts, "HIDDEN": hidden, "INTER": inter}
    options = {"ROWS": ROWS, "COLUMNS": COLUMNS, "enable_fp_fusion": True}
    inner_kernel[(tokens * problem.top_k, inter // ROWS)](
        topk_ids,
        inputs.hidden_states,
        inputs.hidden_states_scale,
        inputs.gemm1_weights,
        inputs.gemm1_weights_scale,
        inner,
        tokens,
        offset,
        GATE_FIRST=problem.gate_first,
        **sizes,
        **options,
    )
    output_kernel[(tokens, hidden // ROWS)](
        topk_ids,
        topk_weights,
        inner,
        inputs.gemm2_weights,
        inputs.gemm2_weights_scale,
        output,
        offset,
        **sizes,
        **options,
    )
    return output
