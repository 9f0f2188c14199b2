"""The arithmetic between the two GEMMs, which every path through the pipeline shares to the bit.

What is no number stays none. Clamping to the range of e4m3 makes numbers of NaN, so the scale tells: it is NaN where a
value of its block is NaN or infinite (the other values would be 0 times infinity), and with it every column of the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)
MIN_AMAX = tl.constexpr(1e-10)


@triton.jit
def swiglu_of(gate, up):
    """``silu(gate) * up`` in float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def larger(a, b):
    """The larger of two values; NaN if one of them is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def amax_of(value):
    """The largest absolute value of each row; NaN if one is."""
    return tl.reduce(tl.abs(value), 1, larger)


@triton.jit
def quantize(value, amax):
    """e4m3 values and scales of float32 rows, whose largest absolute values are ``amax``."""
    scale = tl.maximum(amax, MIN_AMAX) / FP8_MAX
    scale = tl.where(amax < float("inf"), scale, float("nan"))
    scaled = tl.minimum(tl.maximum(value / scale[:, None], -FP8_MAX), FP8_MAX)
    return scaled.to(tl.float8e4nv), scale


@triton.jit
def quantize_block(value):
    """`quantize` of ``[rows, 128]``: one scale for each row."""
    return quantize(value, amax_of(value))
