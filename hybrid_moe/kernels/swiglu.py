"""SwiGLU and quantisation between the grouped GEMMs of other libraries; ours do it in the first GEMM's epilogue."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import let_next_kernel_start, wait_for_previous_kernel
from .quantize import quantize_block, swiglu_of


@triton.jit(do_not_specialize=["stride_scale_r", "stride_scale_k"])
def swiglu_quantize_kernel(
    rows_ptr,  # [capacity, 2 * INTERMEDIATE] bfloat16; up and gate halves, or the other way round if GATE_FIRST
    counts_ptr,  # [E] int32
    out_ptr,  # [capacity, INTERMEDIATE] e4m3, out; only rows that exist are written
    out_scale_ptr,  # float32, out: of row r and block k at r * stride_scale_r + k * stride_scale_k
    stride_scale_r,
    stride_scale_k,
    INTERMEDIATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: any number of programs; they share the pieces of BLOCKS 128 blocks of the rows that exist.

    An expert's rows start at a multiple of ALIGN; what lies between experts is neither read nor written.
    """
    PIECES: tl.constexpr = INTERMEDIATE // (128 * BLOCKS)
    UP: tl.constexpr = INTERMEDIATE if GATE_FIRST else 0
    GATE: tl.constexpr = 0 if GATE_FIRST else INTERMEDIATE
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    expert = tl.arange(0, E_POW2)
    count = tl.load(counts_ptr + expert, mask=expert < E, other=0)
    ends = tl.cumsum(count, axis=0)
    # Rows of no use between an expert and the next.
    gap = tl.cdiv(count, ALIGN) * ALIGN - count
    block = tl.arange(0, BLOCKS)
    inside = tl.arange(0, 128)

    for piece in range(tl.program_id(0), tl.sum(count, axis=0) * PIECES, tl.num_programs(0)):
        number = piece // PIECES
        row = (number + tl.sum(tl.where(ends <= number, gap, 0), axis=0)).to(tl.int64)
        first_block = (piece % PIECES) * BLOCKS
        column = (first_block + block)[:, None] * 128 + inside[None, :]
        at = rows_ptr + row * (2 * INTERMEDIATE) + column
        up = tl.load(at + UP).to(tl.float32)
        gate = tl.load(at + GATE).to(tl.float32)
        quantized, scale = quantize_block(swiglu_of(gate, up))
        tl.store(out_ptr + row * INTERMEDIATE + column, quantized)
        scale_column = (first_block + block).to(tl.int64)
        tl.store(out_scale_ptr + row * stride_scale_r + scale_column * stride_scale_k, scale)
