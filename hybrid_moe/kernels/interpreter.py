"""A repair of Triton's interpreter, which runs the kernels on the CPU for tests.

Its conversion of float32 (`triton.runtime.interpreter._convert_float`, 3.6 to 3.9) rounds the mantissa to e4m3 without
carrying into the exponent, 127.8 becomes 64 instead of 128, and cuts off what bfloat16 doesn't hold: results are 0.3%
too small for each tensor that is stored. GPUs convert right.
"""

from __future__ import annotations

import functools

import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` when they were imported)."""
    return knobs.runtime.interpret


def repair() -> None:
    """Make the interpreter convert float32 as the hardware does; a second call changes nothing."""
    original = interpreter._convert_float
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def convert(input, input_dtype, output_dtype, rounding_mode):  # the argument names are Triton's
        if input_dtype == tl.float32 and output_dtype == tl.float8e4nv:
            values = torch.from_numpy(input.copy()).clamp(-448.0, 448.0)
            return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if input_dtype == tl.float32 and output_dtype == tl.bfloat16:
            return torch.from_numpy(input.copy()).bfloat16().view(torch.uint16).numpy()
        return original(input, input_dtype, output_dtype, rounding_mode)

    interpreter._convert_float = convert
