"""Activations in bfloat16, for libraries that quantise them by themselves."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import wait_for_previous_kernel


# Strides that follow T: one binary serves every T, so that none is compiled while serving.
@triton.jit(do_not_specialize=["stride_scale_k", "stride_scale_t"])
def dequantize_kernel(
    hidden_ptr,  # [T, HIDDEN] e4m3, rows STRIDE_HIDDEN apart
    scale_ptr,  # [HIDDEN/128, T] float32
    x_ptr,  # [T, HIDDEN] bfloat16, out
    stride_scale_k,
    stride_scale_t,
    STRIDE_HIDDEN: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (T, HIDDEN / BLOCK_N).

    Must follow a kernel that lets it start when all before that has finished and whose results it doesn't need. It
    waits for that one at its own end, and lets nothing start before: what comes next finds the results of both.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * (BLOCK_N // 128) + tl.arange(0, BLOCK_N // 128)
    column = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    value = tl.load(hidden_ptr + token * STRIDE_HIDDEN + column).to(tl.float32)
    scale = tl.load(scale_ptr + token * stride_scale_t + block.to(tl.int64) * stride_scale_k)
    tl.store(x_ptr + token * HIDDEN + column, (value * scale[:, None]).to(tl.bfloat16))
    wait_for_previous_kernel(PDL)
