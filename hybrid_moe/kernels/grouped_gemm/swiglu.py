"""SwiGLU and quantisation between the grouped GEMMs of other libraries; ours do it in the first GEMM's epilogue."""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from ...problem import MoEProblem
from ..launcher import Constants, DeviceLimits, Kernel
from ..pdl import let_next_kernel_start, wait_for_previous_kernel
from ..quantize import quantize_block, swiglu_of
from ..shapes import pow2
from ..steps import Step
from .library_rows import Rows

PROGRAMS = 8  # that a multiprocessor runs at once


@triton.jit(do_not_specialize=["stride_scale_r", "stride_scale_k"])
def swiglu_quantize_kernel(
    rows_ptr,  # [max_rows, 2 * INTERMEDIATE] bfloat16; up and gate halves, or the other way round if GATE_FIRST
    tokens_per_expert_ptr,  # [E] int32
    out_ptr,  # [max_rows, INTERMEDIATE] e4m3, out; only rows that exist are written
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
    count = tl.load(tokens_per_expert_ptr + expert, mask=expert < E, other=0)
    ends = tl.cumsum(count, axis=0)
    # Padding between an expert and the next.
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


SWIGLU = Kernel(swiglu_quantize_kernel)


def swiglu(rows: Rows, limits: DeviceLimits) -> Step:
    """SwiGLU and quantisation of ``gemm1`` into ``activated``."""
    blocks = rows.problem.intermediate_size // rows.problem.block
    # Few rows are cut into pieces, to occupy the GPU.
    most = 2 if rows.max_rows < 8 * limits.num_sms else 8
    piece = next(n for n in (8, 4, 2, 1) if n <= most and blocks % n == 0)
    pieces = rows.max_rows * (blocks // piece)
    strides = rows.scale_strides(rows.problem.intermediate_size)
    grid = (min(pieces, limits.num_sms * PROGRAMS),)
    constants = _swiglu_constants(rows.problem, limits, rows.align, piece)
    return Step(SWIGLU, grid, ("gemm1", "tokens_per_expert", "activated", "activated_scale", *strides), constants)


@functools.lru_cache(maxsize=256)
def _swiglu_constants(problem: MoEProblem, limits: DeviceLimits, align: int, blocks: int) -> Constants:
    arguments = {
        "INTERMEDIATE": problem.intermediate_size,
        "GATE_FIRST": problem.gate_first,
        "E": problem.num_local_experts,
        "E_POW2": pow2(problem.num_local_experts),
        "ALIGN": align,
        "BLOCKS": blocks,
        "PDL": limits.pdl,
    }
    return Constants(arguments, {**limits.options, "num_warps": 1 if blocks < 8 else 4})
