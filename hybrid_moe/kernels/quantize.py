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
def quantize_block(value):
    """e4m3 values and scales of ``[rows, 128]`` float32, one scale for each row."""
    scale = tl.maximum(tl.max(tl.abs(value), axis=1), MIN_AMAX) / FP8_MAX
    scaled = tl.minimum(tl.maximum(value / scale[:, None], -FP8_MAX), FP8_MAX)
    return scaled.to(tl.float8e4nv), scale
