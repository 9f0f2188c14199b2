"""The arithmetic between the two GEMMs, which every path through the pipeline shares to the bit."""

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
def quantize(value, amax):
    """e4m3 values and scales of float32 rows, whose largest absolute values are ``amax``."""
    scale = tl.maximum(amax, MIN_AMAX) / FP8_MAX
    scaled = tl.minimum(tl.maximum(value / scale[:, None], -FP8_MAX), FP8_MAX)
    return scaled.to(tl.float8e4nv), scale


@triton.jit
def quantize_block(value):
    """`quantize` of ``[rows, 128]``: one scale for each row."""
    return quantize(value, tl.max(tl.abs(value), axis=1))
