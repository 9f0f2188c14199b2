"""Quantisation of the layer's input, where it comes in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from ..inputs import FP8
from .quantize import quantize_block

# Tokens of a program: their scales are contiguous.
ROWS = 16


@triton.jit(do_not_specialize=["tokens"])
def quantize_rows_kernel(
    hidden_ptr,  # [T, HIDDEN] bfloat16, rows STRIDE_HIDDEN apart
    out_ptr,  # [T, HIDDEN] e4m3, out
    scale_ptr,  # [HIDDEN / 128, T] float32, out
    tokens,
    STRIDE_HIDDEN: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: (ceil(T / ROWS), HIDDEN / 128). One 128 block of ROWS tokens."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    block = tl.program_id(1)
    column = block * 128 + tl.arange(0, 128)
    exists = row < tokens
    at = hidden_ptr + row[:, None] * STRIDE_HIDDEN + column[None, :]
    value = tl.load(at, mask=exists[:, None], other=0.0).to(tl.float32)
    quantized, scale = quantize_block(value)
    tl.store(out_ptr + row[:, None] * HIDDEN + column[None, :], quantized, mask=exists[:, None])
    tl.store(scale_ptr + block.to(tl.int64) * tokens + row, scale, mask=exists)


def quantize_rows(
    hidden_states: torch.Tensor, result: Mapping[str, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`hybrid_moe.reference.quantize_rows` in one kernel.

    Parameters
    ----------
    hidden_states
        ``[T, H]`` bfloat16, contiguous along H, a multiple of 128.
    result
        ``values`` and ``scale`` to write into; new tensors if not given.

    Returns
    -------
    values : torch.Tensor
        ``[T, H]`` float8_e4m3fn. The GPU's division may round the other way: one step of e4m3 from the reference.
    scale : torch.Tensor
        ``[H/128, T]`` float32; NaN where the block holds NaN or infinity.
    """
    tokens, width = hidden_states.shape
    if result is None:
        values = torch.empty((tokens, width), dtype=FP8, device=hidden_states.device)
        scale = torch.empty((width // 128, tokens), dtype=torch.float32, device=hidden_states.device)
    else:
        values, scale = result["values"], result["scale"]
    if tokens:
        with torch.cuda.device_of(hidden_states):  # Triton launches on the current device
            grid = (triton.cdiv(tokens, ROWS), width // 128)
            arguments = (hidden_states, values, scale, tokens, hidden_states.stride(0), width, ROWS)
            quantize_rows_kernel[grid](*arguments, num_warps=4, enable_fp_fusion=True)
    return values, scale
